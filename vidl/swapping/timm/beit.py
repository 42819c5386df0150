"""timm's BEiT with layers that prune; relative position biases follow the tokens that stay."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.models.beit as timm_beit
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.nn.pruning import Pruning, Scores
from vidl.swapping.prune import plan_of
from vidl.swapping.registry import Family, Tower, original, remember
from vidl.swapping.timm.attention import biased_qkv
from vidl.swapping.timm.tokens import KeptTokens, refuse_grids


class Block(timm_beit.Block):
    """timm's layer with pruning, by PyTorch's attention, which takes a bias."""

    def forward(self, x: Tensor, shared_rel_pos_bias: KeptTokens | None = None) -> Tensor:
        kept, plan = shared_rel_pos_bias, plan_of(self)
        assert kept is not None
        ids = kept.before(plan.layer)
        if ids is None and not plan.drops(x.shape[1]):
            return super().forward(x, kept.embedding)
        attended = partial(self.attended, bias=bias_of(self.attn, kept, ids))
        x, selected = plan.run(x, attended, self.transformed)
        kept.hand_on(plan.layer, None if selected is None else selected.ids_keep)
        return x

    def attended(
        self, x: Tensor, scores: Scores | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after attention, and their scores."""
        out, importance = attend_biased(self.attn, self.norm1(x), bias)
        out = out if self.gamma_1 is None else self.gamma_1 * out
        return x + self.drop_path1(out), importance

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


def attend_biased(attention: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [B, N, C], and the attention from the first token, [B, N] float32."""
    qkv = biased_qkv(attention, x).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    products = attention.scale * q[:, :, :1] @ k.mT
    if bias is not None:
        products = products + bias[:, :, :1]
    importance = products.float().softmax(-1).mean(1)[:, 0]
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2))), importance


def bias_of(attention: Any, kept: KeptTokens, ids: Tensor | None) -> Tensor | None:
    """The bias among a layer's tokens, [1 or B, H, N, N]; None if there is none."""
    bias = None if kept.embedding is None else kept.embedding[None]
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    if bias is None or ids is None:
        return bias
    rows = F.pad(ids + 1, (1, 0))  # CLS comes first
    return bias[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)


class Positions(nn.Module):
    """Takes the place of a missing shared bias, and gives the layers a new `KeptTokens`."""

    def forward(self) -> KeptTokens:
        return KeptTokens(None)

    def set_window_size(self, window_size: Any) -> None:
        """There is no table to resize."""


class RelativePositionBias(timm_beit.RelativePositionBias):
    """The bias that layers share, in a new `KeptTokens`."""

    def forward(self) -> KeptTokens:
        return KeptTokens(super().forward())


class Beit(timm_beit.Beit):
    """timm's model with layers that prune."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


def set_up(model: Any) -> None:
    """Let layers pass on which tokens they kept."""
    if model.rel_pos_bias is None:
        model.rel_pos_bias = Positions()
    else:
        remember(model.rel_pos_bias, swapped=RelativePositionBias)


def undo(model: Any) -> None:
    """Remove `Positions` from a model without a shared bias."""
    if isinstance(model.rel_pos_bias, Positions):
        del model.rel_pos_bias
        model.rel_pos_bias = None


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why these layers cannot be pruned, or None."""
    if pruning.scores != "cls":
        return (
            "its attention has a relative position bias, with which vidl computes only "
            f"scores='cls', got {pruning.scores!r}"
        )
    if pruning.fuse is not None:
        return "a fused token has no position for the relative position bias; need fuse=None"
    for layer, block in enumerate(model.blocks):
        kind = original(block)
        if kind is not timm_beit.Block:
            return f"layer {layer} is a {kind.__name__}, need {timm_beit.Block.__name__}"
    return None


FAMILY = Family(
    towers=[
        Tower(
            timm_beit.Beit,
            Beit,
            {timm_beit.Block: Block},
            layers=lambda model: model.blocks,
            prefix=lambda model: model.num_prefix_tokens,
            why_not=why_not,
            every=True,
            setup=set_up,
            undo=undo,
        )
    ]
)
