"""BridgeTower's vision tower of transformers, which uses nn.MultiheadAttention.

For the model's other attentions see huggingface/attention.py. Source: BridgeTower, arXiv
2206.08657.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers.models.bridgetower.modeling_bridgetower as bridgetower
from torch import Tensor, nn

from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention import space_time_attention
from vidl.nn.patch_embed import has_hooks
from vidl.swapping.attention import cached, speed
from vidl.swapping.registry import Family, Rule, state_of


class BridgeTowerResidualAttention(bridgetower.BridgeTowerResidualAttention):
    """Attention on rows in the order (token, sample), without a copy to (sample, token)."""

    def attention(self, hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        state, attn = state_of(self), self.attn
        assert state is not None
        plain = type(attn) is nn.MultiheadAttention and not has_hooks(attn)
        masked = attention_mask is not None or self.attn_mask is not None
        if not plain or masked or drops_out(attn):
            return super().attention(hidden_state, attention_mask)
        N, B, C = hidden_state.shape
        qkv = F.linear(hidden_state, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.reshape(N * B, 3, attn.num_heads, -1).unbind(1)
        groups = _samples(B, N, hidden_state.device)
        out = space_time_attention(q, k, v, groups, backend=state.backend)
        return attn.out_proj(out.view(N, B, C))


@cached
def _samples(B: int, N: int, device: torch.device) -> Groups:
    """The groups of B samples in N x B rows, in the order (token, sample)."""
    rows = torch.arange(N * B, dtype=torch.int32, device=device).view(N, B).T.flatten()
    steps = torch.arange(B + 1, dtype=torch.int32, device=device) * N
    return Groups(steps, steps, rows, rows, N, N, N * B, N * B, uniform=True, checked=True)


def drops_out(attention: Any) -> bool:
    """Whether attention weights are dropped out, which vidl does not support."""
    return attention.training and attention.dropout > 0


def _why_not(block: Any) -> str | None:
    attn = block.attn
    if type(attn) is not nn.MultiheadAttention or attn.in_proj_weight is None or attn.batch_first:
        return f"its attention is {attn}"
    if attn.bias_k is not None or attn.add_zero_attn:
        return "its attention has extra keys (bias_k or add_zero_attn)"
    return None


def _note(block: Any, backend: str) -> str:
    attn = block.attn
    return speed(attn.in_proj_weight.device, attn.in_proj_weight.dtype, attn.head_dim, backend)


FAMILY = Family(
    rules=[
        Rule(
            bridgetower.BridgeTowerResidualAttention,
            BridgeTowerResidualAttention,
            _why_not,
            _note,
        )
    ],
)
