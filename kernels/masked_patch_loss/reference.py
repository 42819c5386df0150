"""masked_patch_loss in plain PyTorch: its definition, on any device, in any floating dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidl.kernels.patches import constants, gather


def masked_patch_loss(
    prediction: Tensor,  # [B, masked, t * h * w * C] or [total, t * h * w * C]
    video: Tensor,  # [B, C, T, H, W]
    ids_masked: Tensor,  # [B, masked] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    patch: Sequence[int],  # t, h, w
    statistics: str,  # "patch" or "channel" of a patch has a mean and a variance; or "none"
    scale: Sequence[float],  # a pixel of channel c becomes pixel * scale[c] + shift[c]
    shift: Sequence[float],
    eps: float,
) -> Tensor:
    """Gather the masked patches, normalise them, and return the mean squared error of each."""
    high = torch.float64 if torch.float64 in (prediction.dtype, video.dtype) else torch.float32
    pixels, _ = gather("masked_patch_loss: ids_masked", video, patch, ids_masked, cu_seqlens)
    pixels = pixels.to(high).permute(0, 2, 3, 4, 1).flatten(1, 3)  # [rows, t * h * w, C]
    a, b = (constants(x, video.device, high) for x in (scale, shift))
    target = pixels * a + b
    if statistics == "patch":
        var, mean = torch.var_mean(target, (1, 2), keepdim=True)
        target = (target - mean) / (var + eps).sqrt()
    elif statistics == "channel":
        var, mean = torch.var_mean(target, 1, keepdim=True)
        target = (target - mean) / (var.sqrt() + eps)
    target = target.reshape(prediction.shape)
    return (prediction.to(high) - target).square().mean(-1)
