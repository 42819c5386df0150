"""timm's `PatchEmbed` without its convolution."""

from typing import Any

import timm.layers.patch_embed as timm_patch_embed
import torch.nn.functional as F
from timm.layers.format import Format
from torch import Tensor

from vidl.nn.patch_embed import is_convolution
from vidl.swapping.patches import embed_images, speed, stays
from vidl.swapping.patches import why_not as why_not_convolution
from vidl.swapping.registry import Family, Rule, state_of


class PatchEmbed(timm_patch_embed.PatchEmbed):
    """timm's embedding by `masked_patch_embed`, if a vidl kernel runs it.

    timm calls a projection that is not a plain convolution, such as an adapter of peft.
    """

    def forward(self, x: Tensor) -> Tensor:
        state = state_of(self)
        assert state is not None
        if not is_convolution(self.proj) or stays(self.proj, x, state.backend):
            return super().forward(x)
        x = self._checked(x)
        h, w = (n // p for n, p in zip(x.shape[-2:], self.patch_size, strict=True))
        x = x[..., : h * self.patch_size[0], : w * self.patch_size[1]]  # as a convolution does
        tokens = embed_images(self.proj, x, state.backend)
        return self.norm(tokens if self.flatten else tokens.unflatten(1, (h, w)))

    def _checked(self, x: Tensor) -> Tensor:
        """The images, padded to whole patches if the model pads."""
        size = tuple(x.shape[-2:])
        if self.img_size is not None and self.strict_img_size and size != tuple(self.img_size):
            raise ValueError(f"need images of {self.img_size}, got {size}")
        rest = [-n % p for n, p in zip(size, self.patch_size, strict=True)]
        if any(rest) and self.dynamic_img_pad:
            return F.pad(x, (0, rest[1], 0, rest[0]))
        if any(rest) and self.img_size is not None and not self.strict_img_size:
            raise ValueError(f"need images of whole patches of {self.patch_size}, got {size}")
        return x


def why_not(embed: Any) -> str | None:
    """The reason why this embedding is left, or None."""
    if not embed.flatten and embed.output_fmt != Format.NHWC:
        return f"its output format is {embed.output_fmt.value}, which is that of a convolution"
    return why_not_convolution(embed.proj)


def note(embed: Any, backend: str) -> str:
    """The report's note on this embedding."""
    return speed(embed.proj, backend)


FAMILY = Family(rules=[Rule(timm_patch_embed.PatchEmbed, PatchEmbed, why_not, note)])
