"""timm's attentions: of ViT, DeiT, DINOv2, CLIP, SigLIP, EVA and DINOv3."""

from typing import Any

import timm.layers.attention as timm_attention
import timm.models.eva as timm_eva
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vidl.kernels.groups import Groups
from vidl.nn.patch_embed import has_hooks
from vidl.nn.pruning import Scores
from vidl.swapping.attention import attend, speed
from vidl.swapping.registry import Family, Rule, state_of

# A swapped NaFlexVit passes groups to its blocks in place of timm's mask.
Mask = Tensor | Groups | None


class Attention(timm_attention.Attention):
    """timm's attention by `space_time_attention`; with a mask or dropout, timm's own."""

    def forward(self, x: Tensor, attn_mask: Mask = None, is_causal: bool = False) -> Tensor:
        if needs_timm(self, attn_mask, is_causal):
            return super().forward(x, attn_mask, is_causal)
        return self.scored(x, groups_of(attn_mask))[0]

    def scored(
        self, x: Tensor, groups: Groups | None = None, scores: Scores | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the importance of each token, [B, N], or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return finish(self, x, self.q_norm(q), self.k_norm(k), v, groups, scores)


class Rotary:
    """What the attentions with rotary embeddings share; a subclass has `project`."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Mask = None,
        is_causal: bool = False,
    ) -> Tensor:
        if needs_timm(self, attn_mask, is_causal):
            return super().forward(x, rope, attn_mask, is_causal)  # type: ignore[misc]
        return self.scored(x, rope, groups_of(attn_mask))[0]

    def scored(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        groups: Groups | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the importance of each token, [B, N], or None."""
        attention: Any = self
        q, k, v = attention.project(x)
        q, k = rotate(self, attention.q_norm(q), attention.k_norm(k), v, rope)
        if k.shape[2] < q.shape[2]:  # several heads of queries share a head of keys
            k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
        return finish(self, x, q, k, v, groups, scores)


class EvaAttention(Rotary, timm_eva.EvaAttention):
    """timm's attention by `space_time_attention`; with a mask or dropout, timm's own."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [B, N, H, D]."""
        heads = (self.num_heads, self.head_dim)
        if self.qkv is not None:
            return biased_qkv(self, x).unflatten(-1, (3, *heads)).unbind(2)
        return tuple(p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))


class AttentionRope(Rotary, timm_attention.AttentionRope):
    """timm's attention by `space_time_attention`; with a mask or dropout, timm's own."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [B, N, H, D]; keys and values may have fewer heads."""
        if self.qkv is not None:
            return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(p(x).unflatten(-1, (-1, self.head_dim)) for p in projections)


def needs_timm(attention: Any, mask: Mask, is_causal: bool) -> bool:
    """Whether the call must fall back to timm's own attention."""
    drops = attention.training and attention.attn_drop.p > 0
    if isinstance(mask, Groups):
        if drops:
            raise ValueError("attn_drop was set after vidl.swap, which does not support it")
        return False
    return mask is not None or is_causal or drops


def groups_of(mask: Mask) -> Groups | None:
    """The groups that a swapped NaFlexVit passes in place of a mask; None without any."""
    return mask if isinstance(mask, Groups) else None


def rotate(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply rotary embeddings to queries and keys, [B, N, H, D], except to prefix tokens."""
    if rope is None:
        return q, k
    # [N, D], [H, N, D], [B, 1, N, D] or [B, H, N, D], for timm's order of tokens and heads.
    rope = rope.unsqueeze(-2) if rope.ndim == 2 else rope.transpose(-3, -2)
    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)

    def apply(x: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(x[:, prefix:], rope, half=half)
        return torch.cat([x[:, :prefix], patches], 1).type_as(v)

    return apply(q), apply(k)


def biased_qkv(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of EVA and BEiT, whose keys have no learned bias."""
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if type(attention.qkv) is not nn.Linear or has_hooks(attention.qkv):
        return attention.qkv(x) + bias  # an adapter of peft: timm reads the weight it wraps
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
        return f"attn_drop={attention.attn_drop.p}: vidl does not drop out attention weights"
    return None


def attention_speed(attention: Any, backend: str) -> str:
    """`note` of attentions."""
    weight, heads = attention.proj.weight, attention.num_heads
    return speed(weight.device, weight.dtype, attention.proj.in_features // heads, backend)


FAMILY = Family(
    rules=[
        Rule(timm_attention.Attention, Attention, no_dropout, attention_speed),
        Rule(timm_eva.EvaAttention, EvaAttention, no_dropout, attention_speed),
        Rule(timm_attention.AttentionRope, AttentionRope, no_dropout, attention_speed),
    ],
)
