"""TimeSformer of transformers, which does not use transformers' attention interface.

Source: TimeSformer, arXiv 2102.05095, 3.
"""

from typing import Any

import torch
import transformers.models.timesformer.modeling_timesformer as timesformer
from torch import Tensor

from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention import space_time_attention
from vidl.swapping.attention import cached, equal_groups, speed
from vidl.swapping.registry import Family, Rule, state_of


class TimesformerSelfAttention(timesformer.TimesformerSelfAttention):
    """Attention within groups, on slices of the fused QKV buffer, without a weight matrix."""

    def forward(
        self, hidden_states: Tensor, output_attentions: bool = False, groups: Groups | None = None
    ) -> tuple[Tensor, ...]:
        if output_attentions or drops_out(self):
            assert groups is None
            return super().forward(hidden_states, output_attentions)
        state = state_of(self)
        assert state is not None
        B, N, C = hidden_states.shape
        if groups is None:
            groups = equal_groups(B, N, N, hidden_states.device)
        q, k, v = self.qkv(hidden_states).view(B * N, 3, self.num_heads, -1).unbind(1)
        out = space_time_attention(q, k, v, groups, scale=self.scale, backend=state.backend)
        return (out.view(B, N, C),)


class TimesformerLayer(timesformer.TimesformerLayer):
    """Divided attention without reordering: patches stay in the order (position, frame).

    The original copies them to the order (frame, position) for spatial attention, and back. In
    spatial attention CLS has one query for each frame, whose outputs are averaged: these T rows
    precede the patches.
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        space: Any = self.attention
        if output_attentions or drops_out(space.attention):
            return super().forward(hidden_states, output_attentions)
        time: Any = self.temporal_attention
        cls, patches = hidden_states[:, :1], hidden_states[:, 1:]
        B, T, C = hidden_states.shape[0], self.config.num_frames, hidden_states.shape[2]
        P = patches.shape[1] // T
        positions = self.temporal_layernorm(patches.reshape(B * P, T, C))
        through_time = self.drop_path(time(positions)[0]).view(B, P * T, C)
        patches = patches + self.temporal_dense(through_time)

        rows = self.layernorm_before(torch.cat([cls.expand(-1, T, -1), patches], 1))
        groups = _frames(B, T, P, rows.device)
        rows = space.output(space.attention(rows, groups=groups)[0])
        if isinstance(self.drop_path, timesformer.TimesformerDropPath):
            rows = self._drop_frames(rows, B, T)
        in_space = torch.cat([rows[:, :T].mean(1, True), rows[:, T:]], 1)
        x = torch.cat([cls, patches], 1) + in_space
        mlp = self.output(self.intermediate(self.layernorm_after(x)))
        return (x + self.drop_path(mlp),)

    def _drop_frames(self, rows: Tensor, B: int, T: int) -> Tensor:
        """Stochastic depth of whole frames, CLS and patches, as in the original."""
        scale = self.drop_path(rows.new_ones(B * T, 1)).view(B, T)
        factor = torch.cat([scale, scale.repeat(1, (rows.shape[1] - T) // T)], 1)
        return rows * factor[..., None]


@cached
def _frames(B: int, T: int, P: int, device: torch.device) -> Groups:
    """The frames of B clips of T CLS rows and P x T patches, in the order (position, frame)."""
    rows = torch.arange(B * (1 + P) * T, dtype=torch.int32, device=device)
    rows = rows.view(B, 1 + P, T).transpose(1, 2).flatten()
    steps = torch.arange(B * T + 1, dtype=torch.int32, device=device) * (1 + P)
    total = B * T * (1 + P)
    return Groups(steps, steps, rows, rows, 1 + P, 1 + P, total, total, uniform=True, checked=True)


def drops_out(attention: Any) -> bool:
    """Whether attention weights are dropped out, which vidl does not support."""
    return attention.training and attention.attn_drop.p > 0


def _note(attention: Any, backend: str) -> str:
    weight = attention.qkv.weight
    head_size = weight.shape[1] // attention.num_heads
    drop = attention.attn_drop.p
    if drop:
        return f"unchanged in training, because it drops out attention weights ({drop})"
    return speed(weight.device, weight.dtype, head_size, backend)


def _why_not(layer: Any) -> str | None:
    if layer.attention_type == "divided_space_time":
        return None
    return f"attention_type={layer.attention_type!r}: vidl only replaces its attention"


FAMILY = Family(
    rules=[
        Rule(timesformer.TimesformerSelfAttention, TimesformerSelfAttention, note=_note),
        Rule(timesformer.TimesformerLayer, TimesformerLayer, _why_not),
    ],
)
