"""Clips that several descriptions share: their sizes, and random videos."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Clips:
    """B clips of T square frames with 3 channels, and the size of their patches."""

    B: int
    T: int
    image_size: int
    tubelet_size: int
    patch_size: int

    @property
    def slices(self) -> int:
        return self.T // self.tubelet_size

    @property
    def P(self) -> int:
        """Patches of a slice."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.tubelet_size, self.patch_size, self.patch_size

    @property
    def pixels(self) -> int:
        """Values of a patch, in all channels."""
        return 3 * math.prod(self.patch)

    def draw(self, generator: torch.Generator, order: str) -> Tensor:
        """A random uint8 video [B, C, T, H, W], with its dimensions in memory as `order` says."""
        size = dict(B=self.B, C=3, T=self.T, H=self.image_size, W=self.image_size)
        stored = torch.randint(
            0, 256, [size[name] for name in order], dtype=torch.uint8, generator=generator
        )
        return stored.permute(*(order.index(name) for name in "BCTHW"))

    def draw_ids(self, generator: torch.Generator, count: int) -> Tensor:
        """`count` random patches of every slice, [B, slices, count]; positions in the slice."""
        return torch.rand(self.B, self.slices, self.P, generator=generator).argsort(-1)[..., :count]

    def flat(self, ids: Tensor) -> Tensor:
        """From positions in each slice, [B, slices, count], to positions in the clip, [B, K]."""
        return (ids + self.P * torch.arange(self.slices)[:, None]).flatten(1)


def sizes(cuda: int, cpu: int, *, T: int, tubelet_size: int = 1, patch_size: int = 16) -> Any:
    """The fields of `Clips` of 224 x 224 pixels, with B by type of device."""
    other = dict(T=T, image_size=224, tubelet_size=tubelet_size, patch_size=patch_size)
    return dict(B=dict(cuda=cuda, cpu=cpu)) | other
