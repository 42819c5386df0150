"""masked_patch_embed by a gather of bytes and one linear layer."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.patches import constants, cut, gather


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
    convolution: bool = False,
) -> Tensor:
    """Copy the visible patches as they are stored, normalise and project them, add positions.

    Args:
        convolution: of all patches of a floating-point clip: run the convolution of the caller's
            model instead.
    """
    if convolution:
        return _convolution(video.to(weight.dtype), weight, bias)
    patches = cut(video, weight.shape[2:])
    B, *grid = patches.shape[:4]
    if ids_keep is None:
        ids, rows = None, patches.contiguous().flatten(0, 3)
    else:
        name = "masked_patch_embed: ids_keep"
        rows, ids = gather(name, video, weight.shape[2:], ids_keep, cu_seqlens)
    if len(mean):
        high = torch.promote_types(weight.dtype, torch.float32)
        factor = constants([1 / (255 * s) for s in std], video.device, high)
        shift = constants([-m / s for m, s in zip(mean, std, strict=True)], video.device, high)
        rows = (rows * factor.view(-1, 1, 1, 1)).add_(shift.view(-1, 1, 1, 1))
    bias = bias if bias is None else bias.to(weight.dtype)
    out = F.linear(rows.to(weight.dtype).flatten(1), weight.flatten(1), bias)
    if ids is None or ids_keep is None:
        return _add_all(out.view(B, prod(grid), weight.shape[0]), time, space)
    if space is not None:
        table = space if time is None else (time[:, None] + space).flatten(0, 1)
        out = out + F.embedding(ids, table).to(out.dtype)
    return out.view(*ids_keep.shape, weight.shape[0])


def _convolution(video: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of a clip, or of its frames: [B, N, C]."""
    bias = bias if bias is None else bias.to(weight.dtype)
    if weight.shape[2] > 1:
        return F.conv3d(video, weight, bias, weight.shape[2:]).flatten(2).mT
    frames = video.transpose(1, 2)
    out = F.conv2d(frames.flatten(0, 1), weight.squeeze(2), bias, weight.shape[3:])
    return out.flatten(2).mT.unflatten(0, frames.shape[:2]).flatten(1, 2)


def _add_all(out: Tensor, time: Tensor | None, space: Tensor | None) -> Tensor:
    """Add the positions of all patches to [B, N, C]."""
    if space is None:
        return out
    if time is None:
        return out + space.to(out.dtype)
    frames = out.unflatten(1, (time.shape[0], space.shape[0]))
    return (frames + space.to(out.dtype) + time[:, None].to(out.dtype)).flatten(1, 2)
