"""timm's BEiT: attention with a table of relative positions, which follow the tokens that stay."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.models.beit as timm_beit
from torch import Tensor, nn

from vidl.nn.pruning import Pruning, Scores
from vidl.swapping.attention import attend, positions_of
from vidl.swapping.prune import plan_of
from vidl.swapping.registry import Family, Rule, Tower, original, remember, state_of
from vidl.swapping.timm.attention import attention_speed, biased_qkv, no_dropout
from vidl.swapping.timm.tokens import KeptTokens, needs_grid, refuse_grids


class Attention(timm_beit.Attention):
    """timm's attention by `space_time_attention`; with a shared bias or dropout, timm's own."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if shared_rel_pos_bias is not None or drops(self):
            return super().forward(x, shared_rel_pos_bias)
        return self.scored(x)[0]

    def scored(
        self,
        x: Tensor,
        kept: KeptTokens | None = None,
        ids: Tensor | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the importance of each token, [B, N], or None.

        Args:
            x: tokens, [B, N, C].
            kept: with the table that layers share, if there is one.
            ids: which patches the tokens behind CLS are, [B, N - 1]; None: all, in order.
            scores: see `vidl.nn.Pruning`.
        """
        state = state_of(self)
        assert state is not None
        table, window = self.relative_position_bias_table, self.window_size
        if kept is not None and kept.embedding is not None:
            table = kept.embedding if table is None else table + kept.embedding
            window = kept.window
        positions = None if table is None else positions_of(window, x, ids)
        q, k, v = biased_qkv(self, x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        options: Any = {"bias": table, "positions": positions, "scale": self.scale}
        out, importance = attend(q, k, v, scores=scores, backend=state.backend, **options)
        return self.proj_drop(self.proj(out)), importance


def drops(attention: timm_beit.Attention) -> bool:
    """Whether attention weights are dropped out now."""
    return attention.training and attention.attn_drop.p > 0


class Block(timm_beit.Block):
    """timm's layer with pruning."""

    def forward(self, x: Tensor, shared_rel_pos_bias: KeptTokens | None = None) -> Tensor:
        kept, plan = shared_rel_pos_bias, plan_of(self)
        assert kept is not None
        if drops(self.attn):
            raise ValueError("attn_drop was set after vidl.prune, which does not support it")
        attended = partial(self.attended, kept=kept, ids=kept.before(plan.layer))
        x, selected = plan.run(x, attended, self.transformed)
        kept.hand_on(plan.layer, None if selected is None else selected.ids_keep)
        return x

    def attended(
        self, x: Tensor, scores: Scores | None, kept: KeptTokens, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after attention, and their scores."""
        out, importance = self.attn.scored(self.norm1(x), kept, ids, scores)
        out = out if self.gamma_1 is None else self.gamma_1 * out
        return x + self.drop_path1(out), importance

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class Unshared(nn.Module):
    """Takes the place of a missing shared bias, and gives the layers a new `KeptTokens`."""

    def forward(self) -> KeptTokens:
        return KeptTokens(None)

    def set_window_size(self, window_size: Any) -> None:
        """There is no table to resize."""


class RelativePositionBias(timm_beit.RelativePositionBias):
    """The table that layers share, in a new `KeptTokens`."""

    def forward(self) -> KeptTokens:
        return KeptTokens(self.relative_position_bias_table, self.window_size)


class Beit(timm_beit.Beit):
    """timm's model with layers that prune."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


def set_up(model: Any) -> None:
    """Let layers pass on which tokens they kept."""
    if model.rel_pos_bias is None:
        model.rel_pos_bias = Unshared()
    else:
        remember(model.rel_pos_bias, swapped=RelativePositionBias)


def undo(model: Any) -> None:
    """Remove `Unshared` from a model without a shared bias."""
    if isinstance(model.rel_pos_bias, Unshared):
        del model.rel_pos_bias
        model.rel_pos_bias = None


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why these layers cannot be pruned, or None."""
    if pruning.fuse is not None:
        return "a fused token has no position for the relative position bias; need fuse=None"
    for layer, block in enumerate(model.blocks):
        kind = original(block)
        if kind is not timm_beit.Block:
            return f"layer {layer} is a {kind.__name__}, need {timm_beit.Block.__name__}"
        if state_of(block.attn) is None:
            return f"the attention of layer {layer} was left: {no_dropout(block.attn)}"
    return None


FAMILY = Family(
    rules=[Rule(timm_beit.Attention, Attention, no_dropout, attention_speed)],
    towers=[
        Tower(
            timm_beit.Beit,
            Beit,
            {timm_beit.Block: Block},
            layers=lambda model: model.blocks,
            prefix=lambda model: model.num_prefix_tokens,
            why_not=why_not,
            around=needs_grid,
            every=True,
            setup=set_up,
            undo=undo,
        )
    ],
)
