"""vidl.prune: layers of an existing transformer prune their tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vidl.kernels.library import check_backend
from vidl.kernels.select_tokens.op import Fuse, Rounding, Selected
from vidl.nn.pruning import Pruning, Scores, When, run_layer
from vidl.swapping import registry
from vidl.swapping.arguments import check_model, check_number, layer_indices
from vidl.swapping.registry import Tower, full_name, original, remember, state_of
from vidl.swapping.report import Change, Report
from vidl.swapping.swap import restore, swap, swapped_modules


@dataclass(frozen=True)
class Plan:
    """What one layer of a pruned model does.

    Attributes:
        pruning: how it prunes; None: all of its tokens stay.
        layer: its index.
        prefix: tokens in front that always stay.
        backend: of the selection.
    """

    pruning: Pruning | None
    layer: int
    prefix: int
    backend: str

    def drops(self, tokens: int) -> bool:
        """Whether the layer drops any of so many tokens, prefix included."""
        return self.pruning is not None and self.pruning.drops(tokens - self.prefix)

    def run(
        self,
        x: Tensor,
        attention: Callable[[Tensor, Scores | None], tuple[Tensor, Tensor | None]],
        mlp: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Selected | None]:
        """Run the layer on x, [B, N, C], with these parts, as `vidl.nn.pruning.run_layer` does."""
        pruning = self.pruning if self.drops(x.shape[1]) else None
        return run_layer(x, attention, mlp, pruning, prefix=self.prefix, backend=self.backend)


def plan_of(block: nn.Module) -> Plan:
    """The plan of a layer that `vidl.prune` has changed."""
    state = state_of(block)
    assert state is not None
    return state.memory["plan"]


def prune(
    model: nn.Module,
    keep_rate: float,
    layers: Iterable[int],
    *,
    scores: Scores = "cls",
    fuse: Fuse | None = None,
    when: When = "before_mlp",
    rounding: Rounding = "ceil",
    backend: str = "auto",
) -> Report:
    """Let layers of a vision transformer drop their least important tokens, in place.

    If a vidl kernel computes the attention, it also returns the scores "cls" and "mean", and no
    N x N tensor is made. The model is swapped as by `vidl.swap`, unless it already is;
    `vidl.unswap` undoes both. Weights and their names stay the same. Call it again to change rates
    or layers, as EViT's schedule does.

    Args:
        model: contains a vision transformer of timm (ViT, DeiT, DINOv2, CLIP, SigLIP, EVA, BEiT) or
            of transformers (ViT, ViViT, BEiT, data2vec-vision, or VideoMAE with its classifier).
        keep_rate: share of a layer's tokens that stay, in (0, 1]; class and register tokens always
            stay.
        layers: the layers that prune, counted from 0.
        scores: importance of a token, as in `vidl.nn.Pruning`: "cls", attention from the class
            token; "mean", attention from all tokens; "value" (ATS); "similarity" (ToMe).
        fuse: append the dropped tokens as one token: "sum", weighted by their scores (EViT), or
            "mean", the weighted mean.
        when: prune between attention and MLP (EViT), or after the MLP (SViTT).
        rounding: as in `vidl.ops.kept_count`.
        backend: of the selection, and of `vidl.swap` if the model is not swapped yet.

    Returns:
        What changed in each module.

    Raises:
        TypeError: an argument has another type than it is annotated with.
        ValueError: the model contains no transformer that vidl can prune, or one that does not
            support a layer or an option; the model is unchanged.

    Sources: EViT, arXiv 2202.07800, 3.2; SViTT, arXiv 2304.08809, 3.3; ATS, arXiv 2111.15667, 3.1;
    ToMe, arXiv 2210.09461, 3.
    """
    check_model(model)
    check_backend(backend)
    check_number("keep_rate", keep_rate)
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate: need a rate in (0, 1], got {keep_rate}")
    layers = layer_indices(layers)
    pruning = Pruning(keep_rate, scores, when, "index", fuse, rounding)
    fresh = next(swapped_modules(model), None) is None
    changes = swap(model, backend=backend).changes if fresh else ()
    try:
        towers = _towers(model)
        for name, module, tower in towers:
            _check_layers(name, module, tower, layers)
            reason = _why_not_around(model, name, tower) or _why_not(module, tower, pruning, layers)
            if reason:
                raise ValueError(f"cannot prune {_called(name, module)}: {reason}")
        for name, module, tower in towers:
            changes += tuple(_install(name, module, tower, pruning, layers, backend))
    except ValueError:
        if fresh:
            restore(model)
        raise
    return Report(changes)


def without_class_token(pruning: Pruning) -> str | None:
    """The reason why a model without a class token cannot be pruned so, or None."""
    if pruning.scores in ("cls", "value"):
        return "it has no class token; need scores='mean' or scores='similarity'"
    return None


def _towers(model: nn.Module) -> list[tuple[str, nn.Module, Tower]]:
    families = registry.families_of(model)
    known = {tower.original: tower for family in families for tower in family.towers}
    towers = [
        (name, module, known[original(module)])
        for name, module in model.named_modules()
        if original(module) in known
    ]
    if not towers:
        names = ", ".join(sorted({kind.__name__ for kind in known})) or "of timm or transformers"
        raise ValueError(
            f"need a vision transformer that vidl can prune ({names}), found none in "
            f"{full_name(type(model))}; vidl.nn.Block prunes in models of your own"
        )
    return towers


def _check_layers(name: str, module: nn.Module, tower: Tower, layers: Sequence[int]) -> None:
    depth = len(tower.layers(module))
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(
            f"need layers in [0, {depth}), those of {_called(name, module)}, got {layers}"
        )


def _why_not_around(model: nn.Module, name: str, tower: Tower) -> str | None:
    """The reason of a module that contains the tower of this name, or None."""
    path = name.split(".") if name else []
    for end in range(len(path)):
        if reason := tower.around(model.get_submodule(".".join(path[:end]))):
            return reason
    return None


def _why_not(
    module: nn.Module, tower: Tower, pruning: Pruning, layers: Sequence[int]
) -> str | None:
    prefix = tower.prefix(module)
    if pruning.scores == "similarity" and prefix > 1:
        return (
            f"it has {prefix} prefix tokens, and scores='similarity' is defined for one class "
            "token at most; need scores='cls', 'mean' or 'value'"
        )
    return tower.why_not(module, pruning, layers)


def _install(
    name: str,
    module: nn.Module,
    tower: Tower,
    pruning: Pruning,
    layers: Sequence[int],
    backend: str,
) -> Iterable[Change]:
    prefix = tower.prefix(module)
    paths = {id(part): path for path, part in module.named_modules(prefix=name)}
    state = state_of(module)
    if state is None or "pruned" not in state.memory:
        state = remember(module, backend, swapped=tower.swapped, undo=tower.undo)
        state.memory["pruned"] = True
        if tower.setup is not None:
            tower.setup(module)
        yield Change(name, full_name(tower.original), full_name(tower.swapped))
    for layer, block in enumerate(tower.layers(module)):
        own = pruning if layer in layers else None
        if own is None and not tower.every and state_of(block) is None:
            continue
        before = type(block)
        swapped = tower.blocks.get(before, before)  # itself, if it is already swapped
        state = remember(block, backend, swapped=swapped)
        state.memory["plan"] = Plan(own, layer, prefix, backend)
        if own is not None:
            fused = f" and fuses the others ({own.fuse})" if own.fuse else ""
            note = f"keeps {own.keep_rate:g} of its tokens by scores={own.scores!r}{fused}"
            yield Change(paths[id(block)], full_name(before), full_name(swapped), note)


def _called(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__
