"""The fields that the recipes of all models share: clip, two encoders and masks."""

import dataclasses
import math
from typing import Any, get_type_hints

from torch import Tensor

from vidl.kernels.groups import Grid
from vidl.kernels.library import check_backend
from vidl.kernels.patches import per_channel
from vidl.kernels.select_tokens import kept_count
from vidl.masking import VisualKind, VisualMask, Vocabulary, visual_mask
from vidl.overrides import convert


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and masks.

    Values are converted to the types of their fields as on the command line: a list becomes a
    tuple, 3.0 the integer 3.

    Attributes:
        frames, image_size, patch_size: number and size of the frames, and of their patches.
        tubelet_size: frames in a patch. 1 (the papers' choice): a patch is part of one frame; above
            1 the model sees motion within a patch and treats the tubelet as one frame.
        width, depth, heads: of the vision encoder.
        mask: kind of the visual mask; see `vidl.masking.visual_mask`.
        mask_ratio: share of masked patches, in [0, 1); 0: no mask.
        text_width, text_layers, text_heads, dropout: of the text encoder.
        vocabulary: vocabulary of the captions' tokenizer.
        word_ratio: share of masked words, in [0, 1].
        embed_dim: width of the features that compare clips and captions.
        temperature: temperature of the contrastive loss.
        mean, std: normalisation of pixels in 0 to 1.
        seed: seed of masks and negatives.
        gather: contrast with the features of all ranks.
        backend: backend of all ops; see `vidl info`.

    Raises:
        TypeError, ValueError: values are of other types, out of range or inconsistent.
    """

    frames: int = 4
    image_size: int = 224
    patch_size: int = 16
    tubelet_size: int = 1
    width: int = 768
    depth: int = 12
    heads: int = 12
    mask: VisualKind = "frame"
    mask_ratio: float = 0.0
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    dropout: float = 0.1
    vocabulary: Vocabulary = Vocabulary()
    word_ratio: float = 0.15
    embed_dim: int = 256
    temperature: float = 0.07
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    seed: int = 0
    gather: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name, value in convert(vars(self), kinds, of=type(self).__name__).items():
            object.__setattr__(self, name, value)
        sizes = ("frames", "image_size", "patch_size", "tubelet_size")
        positive = (*sizes, "width", "heads", "text_width", "text_heads", "embed_dim")
        self._at_least(1, *positive)
        self._at_least(0, "depth", "text_layers", "seed")
        check_backend(self.backend)
        per_channel(3, self.mean, self.std)  # checks them
        for whole, part in (
            ("image_size", "patch_size"), ("frames", "tubelet_size"), ("width", "heads"),
            ("text_width", "text_heads"),
        ):  # fmt: skip
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"need {whole} as a multiple of {part}={getattr(self, part)}, got "
                    f"{getattr(self, whole)}"
                )
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"need mask_ratio in [0, 1), got {self.mask_ratio}")
        if not 0 <= self.word_ratio <= 1:
            raise ValueError(f"need word_ratio in [0, 1], got {self.word_ratio}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"need dropout in [0, 1], got {self.dropout}")
        if self.temperature <= 0:
            raise ValueError(f"need temperature > 0, got {self.temperature}")

    def _at_least(self, least: int, *fields: str) -> None:
        for name in fields:
            if getattr(self, name) < least:
                raise ValueError(f"need {name} >= {least}, got {getattr(self, name)}")

    @property
    def grid(self) -> Grid:
        """Frames (or tubelets), rows and columns of patches."""
        side = self.image_size // self.patch_size
        return self.frames // self.tubelet_size, side, side

    @property
    def embedding(self) -> dict[str, Any]:
        """The options of the patch embedding of both clip encoders."""
        tubelet = None if self.tubelet_size == 1 else self.tubelet_size
        return {"tubelet_size": tubelet, "mean": self.mean, "std": self.std}

    @property
    def visible(self) -> int:
        """Number of visible patches of a clip, as `visual_mask` draws them."""
        T, H, W = self.grid
        whole = T if self.mask in ("frame", "tube") else 1
        return whole * kept_count(math.prod(self.grid) // whole, 1 - self.mask_ratio, "floor")

    def visual_mask(self, samples: Tensor, step: int | Tensor) -> VisualMask | None:
        """The visible patches of each sample at a step; None: all are visible."""
        if self.mask_ratio == 0:
            return None
        return visual_mask(self.seed, step, samples, self.grid, self.mask_ratio, kind=self.mask)
