"""Clips that several descriptions share: their sizes, and random videos."""

from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clips(cuda: int, cpu: int, *, T: int, tubelet_size: int = 1, patch_size: int = 16) -> Any:
    """Sizes of B clips of T frames, 224 x 224 pixels and 3 channels."""
    sizes = dict(T=T, image_size=224, tubelet_size=tubelet_size, patch_size=patch_size)
    return dict(B=dict(cuda=cuda, cpu=cpu)) | sizes


def draw_video(
    B: int, T: int, image_size: int, frames_first: bool, generator: torch.Generator
) -> Tensor:
    """A random uint8 video [B, 3, T, H, W], in memory [B, T, 3, H, W] if `frames_first`."""
    sizes = (B, T, 3) if frames_first else (B, 3, T)
    video = torch.randint(
        0, 256, (*sizes, image_size, image_size), dtype=torch.uint8, generator=generator
    )
    return video.transpose(1, 2) if frames_first else video
