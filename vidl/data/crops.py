"""Crops and flips, equal for all frames of a clip; uint8 in, uint8 out."""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(
    pictures: Tensor,
    size: int,
    rng: random.Random,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Tensor:
    """Crop the same random window from every frame, resize it, and flip half of the clips.

    Args:
        pictures: frames of a clip, uint8 [T, H, W, 3].
        size: height and width of the result.
        rng: random number generator.
        scale: smallest and largest area of the window, relative to the frame.
        ratio: smallest and largest aspect ratio (width / height) of the window.
        flip: whether to flip half of the clips horizontally.

    Returns:
        uint8 [T, size, size, 3].

    Raises:
        ValueError: pictures are not uint8 [T, H, W, 3].

    Source: torchvision's RandomResizedCrop; scale 0.5-1 as in Singularity and VindLU.
    """
    top, left, height, width = _window(*_size(pictures), rng, scale, ratio)
    cut = pictures[:, top : top + height, left : left + width]
    out = resize(cut, size, size)
    return out.flip(2) if flip and rng.random() < 0.5 else out


def centre_crop(pictures: Tensor, size: int) -> Tensor:
    """Resize the short side and crop the centre, for evaluation.

    Args:
        pictures: frames of a clip, uint8 [T, H, W, 3].
        size: height and width of the result.

    Returns:
        uint8 [T, size, size, 3].

    Raises:
        ValueError: pictures are not uint8 [T, H, W, 3].
    """
    height, width = _size(pictures)
    short = min(height, width)
    height, width = (max(size, round(n * size / short)) for n in (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return resize(pictures, height, width)[:, top : top + size, left : left + size]


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize frames, bilinear with antialiasing: uint8 [T, H, W, 3] to [T, height, width, 3]."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    channels_first = pictures.permute(0, 3, 1, 2)
    out = F.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return out.permute(0, 2, 3, 1)


def _size(pictures: Tensor) -> tuple[int, int]:
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != torch.uint8:
        given = f"{pictures.dtype} {list(pictures.shape)}"
        raise ValueError(f"need pictures as uint8 [T, H, W, 3], got {given}")
    return pictures.shape[1], pictures.shape[2]


def _window(
    height: int,
    width: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random window; the largest if ten draws do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w
