"""timm's attentions: of ViT, DeiT, DINOv2, CLIP, SigLIP, EVA and DINOv3."""

from typing import Any

import timm.layers.attention as timm_attention
import timm.models.beit as timm_beit
import timm.models.eva as timm_eva
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention.op import Scores
from vidl.swapping.attention import attend, speed
from vidl.swapping.registry import Family, Rule, state_of

Mask = (
    Tensor | Groups | None
)  # a swapped NaFlexVit hands groups to its blocks where timm has a mask


class Attention(timm_attention.Attention):
    """The same attention by `space_time_attention`; timm's own where there is a mask or dropout."""

    def forward(self, x: Tensor, attn_mask: Mask = None, is_causal: bool = False) -> Tensor:
        if timm_does(self, attn_mask, is_causal):
            return super().forward(x, attn_mask, is_causal)
        return self.scored(x, groups_of(attn_mask))[0]

    def scored(
        self, x: Tensor, groups: Groups | None = None, scores: Scores | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and how important each token is, [B, N] or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return finish(self, x, self.q_norm(q), self.k_norm(k), v, groups, scores)


class EvaAttention(timm_eva.EvaAttention):
    """The same attention by `space_time_attention`; timm's own where there is a mask or dropout."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
    ) -> Tensor:
        if timm_does(self, attn_mask, is_causal):
            return super().forward(x, rope, attn_mask, is_causal)
        return self.scored(x, rope, groups_of(attn_mask))[0]

    def scored(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        groups: Groups | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and how important each token is, [B, N] or None."""
        heads = (self.num_heads, self.head_dim)
        if self.qkv is None:
            q, k, v = (p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = biased_qkv(self, x).unflatten(-1, (3, *heads)).unbind(2)
        q, k = turned(self, self.q_norm(q), self.k_norm(k), v, rope)
        return finish(self, x, q, k, v, groups, scores)


class AttentionRope(timm_attention.AttentionRope):
    """The same attention by `space_time_attention`; timm's own where there is a mask or dropout."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
    ) -> Tensor:
        if timm_does(self, attn_mask, is_causal):
            return super().forward(x, rope, attn_mask, is_causal)
        return self.scored(x, rope, groups_of(attn_mask))[0]

    def scored(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        groups: Groups | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and how important each token is, [B, N] or None."""
        if self.qkv is None:
            q, k, v = (
                p(x).unflatten(-1, (heads, self.head_dim))
                for p, heads in (
                    (self.q_proj, self.num_heads),
                    (self.k_proj, self.num_kv_heads),
                    (self.v_proj, self.num_kv_heads),
                )
            )
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = turned(self, self.q_norm(q), self.k_norm(k), v, rope)
        if self.num_kv_groups > 1:
            k, v = (y.repeat_interleave(self.num_kv_groups, dim=2) for y in (k, v))
        return finish(self, x, q, k, v, groups, scores)


def timm_does(attention: Any, mask: Mask, is_causal: bool) -> bool:
    """Whether this call is none for our operation."""
    drops = attention.training and attention.attn_drop.p > 0
    if isinstance(mask, Groups):
        if drops:
            raise ValueError("attn_drop was set after vidl.swap, which cannot drop out attention")
        return False
    return mask is not None or is_causal or drops


def groups_of(mask: Mask) -> Groups | None:
    """What is left of masks after `timm_does`."""
    return mask if isinstance(mask, Groups) else None


def turned(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, N, H, D] after the rotary embedding, which has no prefix tokens."""
    if rope is None:
        return q, k
    # [N, D], [H, N, D], [B, 1, N, D] or [B, H, N, D], for timm's order of tokens and heads.
    rope = rope.unsqueeze(-2) if rope.ndim == 2 else rope.transpose(-3, -2)
    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)

    def turn(x: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(x[:, prefix:], rope, half=half)
        return torch.cat([x[:, :prefix], patches], 1).type_as(v)

    return turn(q), turn(k)


def biased_qkv(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of EVA and BEiT, whose keys have no bias that learns."""
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:  # rounds twice in low precision, as the weights were trained
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)


def finish(
    attention: Any,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups | None,
    scores: Scores | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend; then norm, gate and projection."""
    state = state_of(attention)
    assert state is not None
    out, importance = attend(q, k, v, groups=groups, scores=scores, backend=state.backend)
    out = attention.norm(out)
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out)), importance


def no_dropout(attention: Any) -> str | None:
    """`why_not` of attentions."""
    if attention.attn_drop.p > 0:
        return f"attn_drop={attention.attn_drop.p}: weights of attention cannot be dropped out"
    return None


def relative_bias(attention: nn.Module) -> str | None:
    """`why_not` of BEiT's attention."""
    return "it adds a relative position bias, which PyTorch's attention takes and ours does not"


def attention_speed(attention: Any, backend: str) -> str:
    """`note` of attentions."""
    weight = attention.proj.weight
    return speed(weight.device, weight.dtype, attention.head_dim, backend)


FAMILY = Family(
    rules=[
        Rule(timm_attention.Attention, Attention, no_dropout, attention_speed),
        Rule(timm_eva.EvaAttention, EvaAttention, no_dropout, attention_speed),
        Rule(timm_attention.AttentionRope, AttentionRope, no_dropout, attention_speed),
        Rule(timm_beit.Attention, timm_beit.Attention, relative_bias),
    ],
)
