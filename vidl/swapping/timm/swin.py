"""timm's Swin: attention in windows of a map, with a table of relative positions."""

from collections.abc import Sequence
from typing import Any

import timm.models.swin_transformer as timm_swin
import torch
from torch import Tensor, nn

from vidl.nn.patch_embed import has_hooks
from vidl.swapping.registry import Family, full_name, own_forward, remember, state_of
from vidl.swapping.report import Change
from vidl.swapping.timm.attention import attention_speed, no_dropout
from vidl.swapping.windows import Size, attend_in_windows, pad_to_windows


class SwinTransformerBlock(timm_swin.SwinTransformerBlock):
    """timm's block, whose attention neither rolls nor partitions the map."""

    def _attn(self, x: Tensor) -> Tensor:
        state, attn = state_of(self), self.attn
        assert state is not None
        drops = attn.training and attn.attn_drop.p > 0
        if drops or has_hooks(attn):  # hooks of the attention need its windows
            return super()._attn(x)
        size, shift = (1, *self.window_size), (0, *self.shift_size)
        H, W = x.shape[1:3]
        # timm rolls the map before it pads it: padding lies between the last rows and the first.
        pads = bool(H % size[1] or W % size[2])
        x = rolled(x, shift, -1) if pads else x
        x = pad_to_windows(x[:, None], size)
        x = rolled(x, shift, 1) if pads else x
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
        table, options = attn.relative_position_bias_table, {"scale": attn.scale}
        out = attend_in_windows(qkv, table, size, shift, size, backend=state.backend, **options)
        if pads:
            out = rolled(rolled(out, shift, -1)[:, :, :H, :W], shift, 1)
        return attn.proj_drop(attn.proj(out[:, 0]))


def rolled(x: Tensor, shift: Size, sign: int) -> Tensor:
    """The map [B, ..., H, W, C] rolled by the shift of its windows."""
    return torch.roll(x, (sign * shift[1], sign * shift[2]), (-3, -2))


def _swap(model: nn.Module, backend: str) -> Sequence[Change]:
    changes = []
    for name, block in model.named_modules():
        if type(block) is not timm_swin.SwinTransformerBlock:
            continue
        attn: Any = block.attn
        reason = _why_not(block)
        became, note = None, reason or attention_speed(attn, backend)
        if reason is None:
            remember(block, backend, swapped=SwinTransformerBlock)
            became = full_name(SwinTransformerBlock)
        inner = f"{name}.attn" if name else "attn"
        changes.append(Change(inner, full_name(type(attn)), became, note))
    return changes


def _why_not(block: Any) -> str | None:
    attn = block.attn
    if type(attn) is not timm_swin.WindowAttention:
        return f"its attention is a {type(attn).__name__}, need WindowAttention"
    return no_dropout(attn) or own_forward(attn) or own_forward(block)


FAMILY = Family(whole=_swap)
