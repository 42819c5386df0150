"""vidl.prune: layers of an existing transformer drop the tokens that matter least."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vidl.kernels.select_tokens import kept_count, select_tokens
from vidl.kernels.select_tokens.op import Fuse, Rounding
from vidl.kernels.space_time_attention.op import Scores
from vidl.swapping import families
from vidl.swapping.registry import Tower, full_name, original, remember, state_of
from vidl.swapping.report import Change, Report
from vidl.swapping.swap import swap, swapped_modules, unswap_whatever

When = Literal["before_mlp", "after_mlp"]


@dataclass(frozen=True)
class Pruning:
    """What a layer does with its tokens; `vidl.prune` describes the options."""

    keep_rate: float
    score: Scores
    fuse: Fuse | None
    when: When
    rounding: Rounding
    backend: str

    def drops(self, n: int) -> bool:
        """Whether any of n tokens is dropped."""
        return kept_count(n, self.keep_rate, self.rounding) < n

    def select(self, x: Tensor, scores: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """The tokens that stay, [B, M, C], and which they were, [B, K].

        Args:
            x: [B, prefix + n, C].
            scores: [B, prefix + n]; those of the prefix are not looked at.
        """
        found = select_tokens(
            x,
            scores[:, prefix:],
            self.keep_rate,
            rounding=self.rounding,
            fuse=self.fuse,
            prefix=prefix,
            backend=self.backend,
        )
        return found.tokens, found.ids_keep


class Kept:
    """Where the tokens of each layer came from: one object for each forward of a model.

    Layers hand it on where timm hands on rotary embeddings or relative biases. What a layer found
    is kept under the number of the next, so that a layer that is computed again, under gradient
    checkpointing, sees what it saw.

    Args:
        positions: what belongs to the positions of all tokens; None if it comes from elsewhere.
    """

    def __init__(self, positions: Tensor | None) -> None:
        self.positions = positions
        self.ids: dict[int, Tensor] = {}

    def __getitem__(self, layer: int) -> "Kept":
        """The same where each layer has positions of its own."""
        assert self.positions is not None
        found = Kept(self.positions[layer])
        found.ids = self.ids
        return found

    def before(self, layer: int) -> Tensor | None:
        """The positions of this layer's tokens, [B, K]; None: all of them, in their order.

        A fused token has the position after the last.
        """
        return self.ids.get(layer)

    def hand_on(self, layer: int, chosen: Tensor | None, fused: int | None = None) -> None:
        """Note what became of the tokens of a layer.

        Args:
            chosen: those that stay, [B, K]; None: all.
            fused: the position of a fused token, if there is one: the number of all others.
        """
        ids = self.ids.get(layer)
        if chosen is not None:
            ids = chosen if ids is None else ids.gather(1, chosen)
            if fused is not None:
                ids = torch.nn.functional.pad(ids, (0, 1), value=fused)
        if ids is not None:
            self.ids[layer + 1] = ids


def plan_of(block: nn.Module, tokens: int) -> tuple[Pruning | None, int, int]:
    """What a layer drops of so many tokens, if any; its number; and how many always stay."""
    state = state_of(block)
    assert state is not None
    layer, prefix = state.memory["layer"], state.memory["prefix"]
    pruning: Pruning | None = state.memory["pruning"]
    return pruning if pruning and pruning.drops(tokens - prefix) else None, layer, prefix


def prune(
    model: nn.Module,
    keep_rate: float,
    layers: Iterable[int],
    *,
    score: Scores = "cls",
    fuse: Fuse | None = None,
    when: When = "before_mlp",
    rounding: Rounding = "ceil",
    backend: str = "auto",
) -> Report:
    """Let layers of a vision transformer drop the tokens that matter least, in place.

    A token's score is the attention that it gets, averaged over heads. Where a kernel of ours
    computes the attention, it comes from the same launch, and no N x N tensor is made. The model is
    swapped as `vidl.swap` does, unless it is already; `vidl.unswap` undoes all of it. Weights and
    their names stay. Call it again to choose other rates or layers, as EViT's schedule does.

    Args:
        model: with a vision transformer of timm in it: ViT, DeiT, DINOv2, CLIP, SigLIP, EVA, BEiT;
            or of transformers: ViT, ViViT, or VideoMAE with its classifier.
        keep_rate: of the tokens that are there, in (0, 1]; class and register tokens always stay.
        layers: which layers drop tokens, counted from 0.
        score: "cls", the attention that the class token pays; "mean", that all tokens pay.
        fuse: adds what was dropped as one token: "sum", weighted by the scores (EViT); "mean".
        when: tokens are dropped between attention and MLP (EViT), or after the MLP (SViTT).
        rounding: of a rate, as in `vidl.ops.kept_count`.
        backend: of the selection; and of `vidl.swap`, if that was not called before.

    Returns:
        What became of each module.

    Raises:
        ValueError: there is no transformer that can be pruned, or a layer or option is not
            possible for it; the model is as it was.

    Sources: EViT, arXiv 2202.07800, 3.2; SViTT, arXiv 2304.08809, 3.3.
    """
    pruning = Pruning(keep_rate, score, fuse, when, rounding, backend)
    layers = sorted(set(layers))
    _check(pruning)
    fresh = next(swapped_modules(model), None) is None
    changes = swap(model, backend=backend).changes if fresh else ()
    try:
        towers = _towers(model)
        for name, module, tower in towers:
            _check_layers(name, module, tower, layers)
            if reason := tower.why_not(module, pruning, layers):
                raise ValueError(f"cannot prune {_called(name, module)}: {reason}")
        for name, module, tower in towers:
            changes += tuple(_install(name, module, tower, pruning, layers))
    except ValueError:
        if fresh:
            unswap_whatever(model)
        raise
    return Report(changes)


def _check(pruning: Pruning) -> None:
    for what, given, known in (
        ("score", pruning.score, ("cls", "mean")),
        ("fuse", pruning.fuse, (None, "sum", "mean")),
        ("when", pruning.when, ("before_mlp", "after_mlp")),
    ):
        if given not in known:
            raise ValueError(f"need {what} among {', '.join(map(repr, known))}, got {given!r}")
    pruning.drops(0)  # checks keep_rate and rounding


def _towers(model: nn.Module) -> list[tuple[str, nn.Module, Tower]]:
    known = {tower.original: tower for family in families.of(model) for tower in family.towers}
    found = []
    for name, module in model.named_modules():
        tower = known.get(original(module))
        if tower is not None:
            found.append((name, module, tower))
    if not found:
        names = ", ".join(sorted({kind.__name__ for kind in known})) or "of timm or transformers"
        raise ValueError(
            f"need a vision transformer that vidl can prune ({names}), found none in "
            f"{full_name(type(model))}; vidl.nn.Block prunes in models of your own"
        )
    return found


def _check_layers(name: str, module: nn.Module, tower: Tower, layers: Sequence[int]) -> None:
    depth = len(tower.layers(module))
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(
            f"need layers in [0, {depth}), those of {_called(name, module)}, got {layers}"
        )


def _install(
    name: str, module: nn.Module, tower: Tower, pruning: Pruning, layers: Sequence[int]
) -> Iterable[Change]:
    prefix = tower.prefix(module)
    path = {id(part): place for place, part in module.named_modules(prefix=name)}
    state = state_of(module)
    if state is None or "pruned" not in state.memory:
        state = remember(module, pruning.backend, swapped=tower.swapped, undo=tower.undo)
        state.memory["pruned"] = True
        if tower.setup is not None:
            tower.setup(module)
        yield Change(name, full_name(tower.original), full_name(tower.swapped))
    for layer, block in enumerate(tower.layers(module)):
        own = pruning if layer in layers else None
        if own is None and not tower.every and state_of(block) is None:
            continue
        was = type(block)
        swapped = tower.blocks.get(was, was)  # already swapped if it is called again
        state = remember(block, pruning.backend, swapped=swapped)
        state.memory |= {"pruning": own, "layer": layer, "prefix": prefix}
        if own is not None:
            fused = f", the others fused ({own.fuse})" if own.fuse else ""
            note = f"keeps {own.keep_rate:g} of its tokens by {own.score} attention{fused}"
            yield Change(path[id(block)], full_name(was), full_name(swapped), note)


def _called(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__
