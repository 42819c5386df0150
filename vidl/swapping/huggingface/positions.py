"""Tables of relative positions of BEiT and data2vec-vision, without an N x N bias."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vidl.nn.pruning import Pruning
from vidl.swapping.attention import Window, all_positions, attend, positions_of
from vidl.swapping.prune import Plan
from vidl.swapping.registry import state_of


class Table:
    """A table of relative positions, which layers pass to their attention.

    Args:
        table: [rows, H]; None without relative positions.
        window: height and width of the grid of patches that it is for.
        ids: of a pruned model: the patches that each layer still has, [B, K], by its index; one
            dictionary for each forward.
    """

    def __init__(
        self,
        table: Tensor | None,
        window: Window = (0, 0),
        ids: dict[int, Tensor] | None = None,
    ) -> None:
        self.table, self.window, self.ids = table, window, ids

    def __add__(self, other: Any) -> Any:
        """The sum with another table of the same grid; with a mask, the sum of two matrices."""
        if not isinstance(other, Table):
            return other if self.table is None else self.dense() + other
        ids = other.ids if self.ids is None else self.ids
        if self.table is None:
            return Table(other.table, other.window, ids)
        table = self.table if other.table is None else self.table + other.table
        return Table(table, self.window, ids)

    def dense(self) -> Tensor | None:
        """The bias of all pairs of tokens, [1, H, N, N], or None."""
        if self.table is None:
            return None
        places = all_positions(*self.window, 1, self.table.device)
        index = places.index(places.query_codes[:, None], places.key_codes)
        return self.table[index].permute(2, 0, 1)[None]

    def before(self, layer: int) -> Tensor | None:
        """The patches that a layer has, [B, K]; None: all, in order."""
        return None if self.ids is None else self.ids.get(layer)

    def hand_on(self, layer: int, kept: Tensor | None) -> None:
        """Store which of its patches a layer kept, [B, K]; None: all.

        They are stored by the layer, so that gradient checkpointing recomputes a layer with the
        same patches.
        """
        assert self.ids is not None
        ids = self.ids.get(layer)
        if kept is not None:
            ids = kept if ids is None else ids.gather(1, kept)
        if ids is not None:
            self.ids[layer + 1] = ids


def fits(bias: Any, window: Window, interpolates: bool) -> bool:
    """Whether transformers reads a table as it is for this grid of patches.

    It resizes the table for another grid, transposes that of a grid that is not square, and resizes
    the N x N bias to interpolate positions.
    """
    return not interpolates and tuple(window) == tuple(bias.window_size) and window[0] == window[1]


def attention(
    module: Any, x: Tensor, projections: Sequence[Any], table: Table, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention before its output projection, and the importance of each token, [B, N], or None.

    Args:
        module: the swapped attention.
        x: tokens, CLS first, [B, N, C].
        projections: of queries, keys and values.
        table: of relative positions.
        options: `heads`; the patches `ids` that the tokens behind CLS are, [B, N - 1], None: all,
            in order; `scores` as in `vidl.nn.Pruning`; and `scale`.
    """
    state = state_of(module)
    assert state is not None
    heads, ids = options.pop("heads"), options.pop("ids", None)
    positions = None if table.table is None else positions_of(table.window, x, ids)
    q, k, v = (p(x).unflatten(-1, (heads, -1)) for p in projections)
    more: Any = {"bias": table.table, "positions": positions, "backend": state.backend}
    return attend(q, k, v, **options, **more)


def require_pruning(plan: Plan, tables: Sequence[Any], drops: bool, weights: bool) -> None:
    """Raise if a layer of a pruned model is called with what pruning does not support."""
    if not all(isinstance(table, Table) for table in tables):
        raise ValueError(
            f"layer {plan.layer} of a pruned model needs square images of the size in its "
            "configuration, without attention_mask and interpolate_pos_encoding; "
            "vidl.unswap(model) restores layers that take others"
        )
    if drops or weights:
        what = "output_attentions=True" if weights else "attention_probs_dropout_prob above 0"
        raise ValueError(f"layer {plan.layer} of a pruned model does not support {what}")


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why layers cannot be pruned, or None."""
    if getattr(model.embeddings, "mask_token", None) is not None:
        return "it predicts masked patches, so it needs all of them"
    if pruning.fuse is not None:
        return "a fused token has no position for the relative position bias; need fuse=None"
    if drop := model.config.attention_probs_dropout_prob:
        return f"attention_probs_dropout_prob={drop}: vidl does not drop out attention weights"
    return None
