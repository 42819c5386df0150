"""vidl.swap and vidl.unswap."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from vidl.kernels.library import check_backend
from vidl.swapping import registry
from vidl.swapping.arguments import check_model
from vidl.swapping.registry import REMEMBERED, Rule, full_name, own_forward, remember, state_of
from vidl.swapping.report import Change, Report, summary

# Classes that the report lists although no rule matches them.
WORTH_A_LINE = re.compile(r"Attention|Attn|PatchEmbed|Embeddings")


def swap(model: nn.Module, *, backend: str = "auto") -> Report:
    """Replace the modules of a model that vidl can compute, in place.

    Only their classes change: parameters, their names, hooks and modes stay, so optimizers, saved
    weights and `state_dict` still fit. Outputs and gradients are the same up to rounding. Call it
    before `torch.compile`, DDP and `fully_shard`.

    Args:
        model: contains modules of timm, torchvision or transformers.
        backend: of the ops, as in `vidl.ops`.

    Returns:
        What changed in each module; print it. A module with an unsupported option is left, and the
        report gives the reason.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no module can be swapped, for the reasons given; or the model is already
            swapped; or the backend is unknown.
    """
    check_model(model)
    check_backend(backend)
    if changed := [name for name, _ in swapped_modules(model)]:
        raise ValueError(
            f"this model is already swapped ({len(changed)} modules, the first is {changed[0]!r}): "
            "call vidl.unswap(model) first"
        )
    families = registry.families_of(model)
    rules = {rule.original: rule for family in families for rule in family.rules}
    try:
        changes = [_apply(n, m, rules[type(m)], backend) for n, m in _matched(model, rules)]
        for family in families:
            changes += family.whole(model, backend) if family.whole else ()
    except BaseException:
        restore(model)
        raise
    changes += _unmatched(model, changes, rules)
    report = Report(tuple(changes))
    if not report.swapped:
        restore(model)
        raise ValueError(_nothing(model, report.left))
    return report


def unswap(model: nn.Module) -> None:
    """Undo `vidl.swap`, `vidl.prune` and `vidl.mask`: restore the class and options of all modules.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no module is swapped; or something else has changed a module's class since, such
            as `fully_shard`.
    """
    check_model(model)
    swapped = list(swapped_modules(model))
    if not swapped:
        raise ValueError("no module of this model is swapped")
    for name, module in swapped:
        state = state_of(module)
        assert state is not None
        if type(module) is not state.swapped:
            raise ValueError(
                f"vidl swapped {name!r} to {full_name(state.swapped)}, but it is now "
                f"{full_name(type(module))}: undo that first"
            )
    restore(model)


def swapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The swapped modules, with their names."""
    return ((name, m) for name, m in model.named_modules() if state_of(m) is not None)


def restore(model: nn.Module) -> None:
    """Restore every swapped module, if there are any."""
    for _, module in list(swapped_modules(model)):
        state = state_of(module)
        assert state is not None
        for undo in reversed(state.undo):
            undo(module)
        module.__class__ = state.original
        del module.__dict__[REMEMBERED]


def _matched(model: nn.Module, rules: dict[type[nn.Module], Rule]) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if type(m) in rules]


def _apply(name: str, module: nn.Module, rule: Rule, backend: str) -> Change:
    was = full_name(rule.original)
    reason = rule.why_not(module) or own_forward(module)
    if reason is not None:
        return Change(name, was, None, reason)
    note = rule.note(module, backend)
    remember(module, backend, swapped=rule.swapped, undo=rule.undo)
    if rule.setup is not None:
        rule.setup(module)
    return Change(name, was, full_name(rule.swapped), note)


def _unmatched(
    model: nn.Module, changes: Sequence[Change], rules: dict[type[nn.Module], Rule]
) -> list[Change]:
    """Attentions and embeddings that no family knows, and that no known one contains or is in."""
    known = {change.name for change in changes}
    whole = {change.name for change in changes if WORTH_A_LINE.search(_last(change.was))}
    unmatched = []
    for name, module in model.named_modules():
        kind = type(module)
        owner = any(_inside(other, name) for other in known)
        if owner or any(_inside(name, other) for other in whole):
            continue
        if WORTH_A_LINE.search(kind.__name__):
            base = next((full_name(k) for k in kind.__mro__[1:] if k in rules), None)
            reason = "vidl does not support it"
            if base:
                reason = f"a subclass of {base}, which may compute something else"
            unmatched.append(Change(name, full_name(kind), None, reason))
            whole.add(name)
    return unmatched


def _last(full: str) -> str:
    return full.rpartition(".")[2]


def _inside(name: str, other: str) -> bool:
    return name == other or other == "" or name.startswith(f"{other}.")


def _nothing(model: nn.Module, left: Sequence[Change]) -> str:
    lines = [f"no module of {full_name(type(model))} can be swapped"]
    if left:
        lines += ["; its attentions and embeddings:", *summary(tuple(left))]
    else:
        lines.append(": vidl recognises no attention and no patch embedding in it")
    remedy = "\ndocs/guide/swapping.md lists supported models; vidl.ops has the ops themselves"
    return lines[0] + lines[1] + "".join("\n" + line for line in lines[2:]) + remedy
