"""masked_patch_embed in plain PyTorch: its definition, on any device, in any floating dtype."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vidl.kernels.patches import constants, gather


def masked_patch_embed(
    video: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C, C_in, t, h, w]
    bias: Tensor | None,  # [C]
    time: Tensor | None,  # [N / P, C]
    space: Tensor | None,  # [P, C], or [N, C] without time
    ids_keep: Tensor | None,  # [B, K] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Gather the visible patches, normalise and project them, and add their positions."""
    # [rows, C_in, t, h, w] and [rows]
    visible, ids = gather(
        "masked_patch_embed: ids_keep", video, weight.shape[2:], ids_keep, cu_seqlens
    )
    if len(mean):
        per_channel = (-1, 1, 1, 1)
        high = weight.dtype if weight.dtype == torch.float64 else torch.float32
        shift = constants(mean, video.device, high).view(per_channel)
        scale = constants(std, video.device, high).view(per_channel)
        visible = (visible.to(high) / 255 - shift) / scale

    out = torch.nn.functional.linear(
        visible.to(weight.dtype).flatten(1),
        weight.flatten(1),
        bias if bias is None else bias.to(weight.dtype),
    )
    if space is not None:
        out = out + space[ids % space.shape[0]].to(out.dtype)
        if time is not None:
            out = out + time[ids // space.shape[0]].to(out.dtype)
    N = prod(video.shape[2:]) // prod(weight.shape[2:])
    rows = (video.shape[0], N) if ids_keep is None else ids_keep.shape
    return out.view(*rows, weight.shape[0])
