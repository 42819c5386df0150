"""timm's `Attention`: of ViT, DeiT, DINOv2, CLIP and SigLIP towers."""

from typing import Any

import timm.layers.attention as timm_attention
from torch import Tensor

from vidl.swapping.attention import attend, speed
from vidl.swapping.rules import Family, Rule, state_of


class Attention(timm_attention.Attention):
    """The same attention by `space_time_attention`; timm's own where there is a mask or dropout."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal or drops_out(self):
            return super().forward(x, attn_mask, is_causal)
        state = state_of(self)
        assert state is not None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        out, _ = attend(self.q_norm(q), self.k_norm(k), v, backend=state.backend)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def drops_out(attention: Any) -> bool:
    """Whether weights of attention are dropped at random, which our kernels do not do."""
    return attention.training and attention.attn_drop.p > 0


def no_dropout(attention: Any) -> str | None:
    """`why_not` of attentions."""
    if attention.attn_drop.p > 0:
        return f"attn_drop={attention.attn_drop.p}: weights of attention cannot be dropped out"
    return None


def attention_speed(attention: Any, backend: str) -> str:
    """`note` of attentions."""
    weight = attention.proj.weight
    return speed(weight.device, weight.dtype, attention.head_dim, backend)


FAMILY = Family(
    rules=[Rule(timm_attention.Attention, Attention, no_dropout, attention_speed)],
)
