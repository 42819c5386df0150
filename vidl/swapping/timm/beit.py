"""timm's BEiT with layers that drop tokens; the relative position bias follows those that stay."""

from collections.abc import Sequence
from typing import Any

import timm.models.beit as timm_beit
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.swapping.grids import refuse_grids
from vidl.swapping.prune import Kept, Pruning, plan_of
from vidl.swapping.registry import Family, Tower, original, remember
from vidl.swapping.timm.attention import biased_qkv


class Block(timm_beit.Block):
    """The same layer, dropping tokens, by PyTorch's attention: ours takes no bias."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Kept | None = None) -> Tensor:
        kept = shared_rel_pos_bias
        assert kept is not None
        pruning, layer, prefix = plan_of(self, x.shape[1])
        ids = kept.before(layer)
        if pruning is None and ids is None:
            return super().forward(x, kept.positions)
        out, scores = attend_biased(self.attn, self.norm1(x), bias_of(self.attn, kept, ids))
        x = x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)
        chosen = None
        if pruning is not None and pruning.when == "before_mlp":
            x, chosen = pruning.select(x, scores, prefix)
        out = self.mlp(self.norm2(x))
        x = x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
        if pruning is not None and pruning.when == "after_mlp":
            x, chosen = pruning.select(x, scores, prefix)
        kept.hand_on(layer, chosen)
        return x


def attend_biased(attention: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [B, N, C], and the attention that the first token pays, [B, N] float32."""
    qkv = biased_qkv(attention, x).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    products = attention.scale * q[:, :, :1] @ k.mT
    if bias is not None:
        products = products + bias[:, :, :1]
    scores = products.float().softmax(-1).mean(1)[:, 0]
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2))), scores


def bias_of(attention: Any, kept: Kept, ids: Tensor | None) -> Tensor | None:
    """The bias of a layer's tokens, [1 or B, H, N, N]; None if there is none."""
    bias = None if kept.positions is None else kept.positions[None]
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    if bias is None or ids is None:
        return bias
    rows = F.pad(ids + 1, (1, 0))  # CLS comes first
    return bias[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)


class Positions(nn.Module):
    """Stands where a bias that layers share would be, and hands them a new `Kept`."""

    def forward(self) -> Kept:
        return Kept(None)

    def set_window_size(self, window_size: Any) -> None:
        """There is no table to resize."""


class RelativePositionBias(timm_beit.RelativePositionBias):
    """The bias that layers share, in a new `Kept`."""

    def forward(self) -> Kept:
        return Kept(super().forward())


class Beit(timm_beit.Beit):
    """The same model, whose tokens become fewer."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


def set_up(model: Any) -> None:
    """Let layers hand on which tokens they kept."""
    if model.rel_pos_bias is None:
        model.rel_pos_bias = Positions()
    else:
        remember(model.rel_pos_bias, swapped=RelativePositionBias)


def undo(model: Any) -> None:
    """A model without a shared bias has none again."""
    if isinstance(model.rel_pos_bias, Positions):
        del model.rel_pos_bias
        model.rel_pos_bias = None


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why these layers cannot drop tokens so."""
    if pruning.score == "mean":
        return "with a relative position bias only score='cls' comes without an N x N tensor"
    if pruning.fuse is not None:
        return "a fused token has no place in the relative position bias; need fuse=None"
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
