"""frame_difference in plain PyTorch: its definition, on any device, in any dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidl.kernels.patches import constants


def frame_difference(video: Tensor, patch: Sequence[int], std: Sequence[float]) -> Tensor:
    """Compare last frames with first frames, and take the mean over every patch: [B, N]."""
    (B, C, T, H, W), (t, h, w) = video.shape, patch
    high = torch.promote_types(video.dtype, torch.float32)
    # Bytes exactly: differences fit into int16, and sum() adds them in int64.
    exact = torch.int16 if video.dtype == torch.uint8 else high
    last, first = video[:, :, t - 1 :: t].to(exact), video[:, :, ::t].to(exact)
    pixels = (last[:, :, 1:] - first[:, :, :-1]).abs()
    # [B, C, T' - 1, H', h, W', w] to sums of patches [B, C, T' - 1, H', W']
    sums = pixels.view(*pixels.shape[:3], H // h, h, W // w, w).sum((4, 6))
    if len(std):
        scale = constants(std, video.device, high).view(-1, 1, 1, 1)
        sums = sums.to(high) / scale
    count = C * h * w * (255 if video.dtype == torch.uint8 else 1)
    differences = sums.sum(1).to(high) / count
    new = differences.new_full((B, 1, H // h, W // w), float("inf"))
    return torch.cat([new, differences], 1)[:, : T // t].flatten(1)
