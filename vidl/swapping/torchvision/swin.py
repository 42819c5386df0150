"""torchvision's Swin and Video Swin: attention in windows, with a table of relative positions."""

from typing import Any

import torch.nn.functional as F
import torchvision.models.swin_transformer as swin
import torchvision.models.video.swin_transformer as swin3d
from torch import Tensor

from vidl.swapping.attention import speed
from vidl.swapping.registry import Family, Rule, state_of
from vidl.swapping.windows import Size, attend_in_windows, pad_to_windows


class ShiftedWindowAttention(swin.ShiftedWindowAttention):
    """torchvision's attention by `space_time_attention`; with dropout of weights, its own."""

    def forward(self, x: Tensor) -> Tensor:
        if drops(self):
            return super().forward(x)
        H, W = self.window_size
        row, column = self.shift_size
        return attended(self, x[:, None], (1, H, W), (0, row, column), (1, H, W))[:, 0]


class ShiftedWindowAttention3d(swin3d.ShiftedWindowAttention3d):
    """torchvision's attention by `space_time_attention`; with dropout of weights, its own."""

    def forward(self, x: Tensor) -> Tensor:
        if drops(self):
            return super().forward(x)
        T, H, W = self.window_size
        t, h, w = x.shape[1:4]
        size = min(T, t), min(H, h), min(W, w)
        time, row, column = self.shift_size
        return attended(self, x, size, (time, row, column), (T, H, W))


def attended(attention: Any, x: Tensor, size: Size, shift: Size, reach: Size) -> Tensor:
    """Attention and projection of a map [B, T, H, W, C], see `attend_in_windows`."""
    state = state_of(attention)
    assert state is not None
    T, H, W = x.shape[1:4]
    # torchvision lets tokens see the padding, whose keys are the bias.
    x = pad_to_windows(x, size)
    # A dimension of one window is not shifted.
    time, row, column = (
        s if m < n else 0 for s, m, n in zip(shift, size, x.shape[1:4], strict=True)
    )
    # torchvision reads the weights, too, and does not call the layers.
    qkv = F.linear(x, attention.qkv.weight, attention.qkv.bias)
    qkv = qkv.unflatten(-1, (3, attention.num_heads, -1))
    table = attention.relative_position_bias_table
    out = attend_in_windows(qkv, table, size, (time, row, column), reach, backend=state.backend)
    out = F.linear(out[:, :T, :H, :W], attention.proj.weight, attention.proj.bias)
    return F.dropout(out, attention.dropout, attention.training)


def drops(attention: Any) -> bool:
    """Whether attention weights are dropped out now."""
    return attention.training and attention.attention_dropout > 0


def _note(attention: Any, backend: str) -> str:
    weight, heads = attention.proj.weight, attention.num_heads
    note = speed(weight.device, weight.dtype, weight.shape[0] // heads, backend)
    if not note and (drop := attention.attention_dropout):
        return f"torchvision's attention in training, because it drops out weights ({drop})"
    return note


FAMILY = Family(
    rules=[
        Rule(swin.ShiftedWindowAttention, ShiftedWindowAttention, note=_note),
        Rule(swin3d.ShiftedWindowAttention3d, ShiftedWindowAttention3d, note=_note),
    ],
)
