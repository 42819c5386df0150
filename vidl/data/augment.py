"""Augmentations of torchvision (`transforms.v2`): the same transform for all frames of a clip."""

import random
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Augment = Literal["none", "randaugment", "trivialaugment", "jitter"]


def augmentation(name: str) -> Callable[[Tensor], Tensor] | None:
    """A transform of frames, uint8 [T, 3, H, W]; None for "none".

    Args:
        name: "randaugment" and "trivialaugment" with the defaults of torchvision, or "jitter":
            brightness, contrast and saturation from 60 to 140 %. None of them mirrors a clip;
            "jitter" keeps the hue, which captions name.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: torchvision is not installed.

    Source: RandAugment, arXiv 1909.13719; TrivialAugment, arXiv 2103.10158.
    """
    if name not in get_args(Augment):
        raise ValueError(f"need augment among {', '.join(get_args(Augment))}, got {name!r}")
    if name == "none":
        return None
    from torchvision.transforms import v2

    transforms: dict[str, Any] = {
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "jitter": lambda: v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
    }
    return transforms[name]()


def augmented(
    pictures: Tensor, transform: Callable[[Tensor], Tensor], rng: random.Random
) -> Tensor:
    """Apply a transform to all frames of a clip; it depends on `rng` only.

    Args:
        pictures: frames, uint8 [T, H, W, 3].
        transform: from `augmentation`.
        rng: random number generator.

    Returns:
        uint8 [T, H, W, 3].
    """
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(rng.getrandbits(63))
        return transform(pictures.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
