"""Which tokens the layers of a pruned timm model still have."""

import inspect
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vidl.swapping.registry import state_of


class KeptTokens:
    """The original positions of each layer's tokens: one object for each forward of a model.

    Layers pass it on in place of timm's rotary embeddings or relative biases. The positions after a
    layer are stored under the index of the next layer, so that gradient checkpointing recomputes a
    layer with the same positions.

    Args:
        embedding: the rotary embedding of all tokens, or the table of relative positions; None if
            layers have their own.
        window: height and width of the grid that the table is for.
    """

    def __init__(self, embedding: Tensor | None, window: tuple[int, int] = (0, 0)) -> None:
        self.embedding, self.window = embedding, window
        self.ids: dict[int, Tensor] = {}

    def __getitem__(self, layer: int) -> "KeptTokens":
        """The same tokens with the embedding of one layer, for models with one for each layer."""
        assert self.embedding is not None
        own = KeptTokens(self.embedding[layer])
        own.ids = self.ids
        return own

    def before(self, layer: int) -> Tensor | None:
        """The positions of a layer's input tokens, [B, K]; None: all tokens, in order.

        A fused token has the position after the last one.
        """
        return self.ids.get(layer)

    def hand_on(self, layer: int, kept: Tensor | None, fused: int | None = None) -> None:
        """Store the positions after a layer.

        Args:
            layer: its index.
            kept: its input tokens that stay, [B, K]; None: all.
            fused: the position of the fused token, if any: the number of all other positions.
        """
        ids = self.ids.get(layer)
        if kept is not None:
            ids = kept if ids is None else ids.gather(1, kept)
            if fused is not None:
                ids = torch.nn.functional.pad(ids, (0, 1), value=fused)
        if ids is not None:
            self.ids[layer + 1] = ids


def needs_grid(module: nn.Module) -> str | None:
    """The reason why a module around a model, as `features_only=True` makes it, needs a grid."""
    if isinstance(module, FeatureGetterNet) and module.output_fmt == "NCHW":
        return "features_only=True returns grids of tokens; need output_fmt='NLC'"
    return None


def refuse_grids(model: Any, forward: Any, *args: Any, **options: Any) -> Any:
    """Run timm's `forward_intermediates`, which would reshape a pruned model's tokens to a grid.

    Raises:
        ValueError: the model is pruned and a grid is requested.
    """
    call = inspect.signature(forward).bind(*args, **options)
    call.apply_defaults()
    state = state_of(model)
    if state and state.memory.get("pruned") and call.arguments["output_fmt"] == "NCHW":
        raise ValueError(
            "a pruned model has no grid of tokens: need output_fmt='NLC' (or reshape=False), got "
            "'NCHW'; vidl.unswap(model) restores the grid"
        )
    return forward(*args, **options)
