"""vidl.swap and vidl.unswap."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from vidl.kernels import library
from vidl.swapping import families
from vidl.swapping.registry import REMEMBERED, Rule, full_name, own_forward, remember, state_of
from vidl.swapping.report import Change, Report, summary

# What the report mentions though no rule matched it.
WORTH_A_LINE = re.compile(r"Attention|Attn|PatchEmbed|Embeddings")


def swap(model: nn.Module, *, backend: str = "auto") -> Report:
    """Let the modules of a model that our operations can replace call those, in place.

    Only their classes change: parameters, their names, hooks and modes stay, so optimizers, saved
    weights and `state_dict` fit as before. Outputs and gradients are the same up to rounding.
    Call it before `torch.compile`, DDP and `fully_shard`.

    Args:
        model: with modules of timm or transformers, anywhere in it.
        backend: of the operations, as in `vidl.ops`.

    Returns:
        What became of each module; print it. A module is left, with the reason, where one of its
        options is not supported.

    Raises:
        TypeError: it is no module.
        ValueError: there is nothing to swap, for the reasons given; or the model is swapped
            already; or there is no such backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"need a torch.nn.Module, got {type(model).__name__}")
    if backend not in ("auto", *library.BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {library.BACKENDS}, got {backend!r}")
    if changed := [name for name, _ in swapped_modules(model)]:
        raise ValueError(
            f"this model is swapped already ({len(changed)} modules, {changed[0]!r} the first); "
            "call vidl.unswap(model) before"
        )
    found = families.of(model)
    rules = {rule.original: rule for family in found for rule in family.rules}
    try:
        changes = [_apply(n, m, rules[type(m)], backend) for n, m in _matched(model, rules)]
        for family in found:
            changes += family.whole(model, backend) if family.whole else ()
    except BaseException:
        unswap_whatever(model)
        raise
    changes += _unmatched(model, changes, rules)
    report = Report(tuple(changes))
    if not report.swapped:
        unswap_whatever(model)
        raise ValueError(_nothing(model, report.left))
    return report


def unswap(model: nn.Module) -> None:
    """Undo `vidl.swap`, `vidl.prune` and `vidl.mask`: every module has its class and options back.

    Raises:
        ValueError: nothing of it was swapped; or a module has got yet another class meanwhile, as
            `fully_shard` gives it.
    """
    found = list(swapped_modules(model))
    if not found:
        raise ValueError("nothing of this model is swapped")
    for name, module in found:
        state = state_of(module)
        assert state is not None
        if type(module) is not state.swapped:
            raise ValueError(
                f"{name!r} became {full_name(state.swapped)} when it was swapped and is now "
                f"{full_name(type(module))}: undo that first"
            )
    unswap_whatever(model)


def swapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that remember what they were, with their names."""
    return ((name, m) for name, m in model.named_modules() if state_of(m) is not None)


def unswap_whatever(model: nn.Module) -> None:
    """Undo what was done, be it nothing."""
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
    """Attentions and embeddings that no family knows, but no part and no owner of a known one."""
    known = {change.name for change in changes}
    whole = {change.name for change in changes if WORTH_A_LINE.search(_last(change.was))}
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        owner = any(_inside(other, name) for other in known)
        if owner or any(_inside(name, other) for other in whole):
            continue
        if WORTH_A_LINE.search(kind.__name__):
            base = next((full_name(k) for k in kind.__mro__[1:] if k in rules), None)
            reason = "vidl has nothing that computes it"
            if base:
                reason = f"a subclass of {base}, which may compute something else"
            found.append(Change(name, full_name(kind), None, reason))
            whole.add(name)
    return found


def _last(full: str) -> str:
    return full.rpartition(".")[2]


def _inside(name: str, other: str) -> bool:
    return name == other or other == "" or name.startswith(f"{other}.")


def _nothing(model: nn.Module, left: Sequence[Change]) -> str:
    lines = [f"nothing of {full_name(type(model))} can be swapped"]
    if left:
        lines += ["; what it has of attention and embeddings:", *summary(tuple(left))]
    else:
        lines.append(": it has no attention and no patch embedding that vidl could tell")
    remedy = "\ndocs/swapping.md lists what can, and vidl.ops has the operations themselves"
    return lines[0] + lines[1] + "".join("\n" + line for line in lines[2:]) + remedy
