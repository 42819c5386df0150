"""The fields that the recipes of all models share: clip, two encoders and masks."""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor

from vidl.kernels.groups import Grid
from vidl.kernels.library import check_backend
from vidl.kernels.patches import per_channel
from vidl.kernels.select_tokens import kept_count
from vidl.kernels.select_tokens.op import Rounding
from vidl.masking import VisualKind, VisualMask, Vocabulary, visual_mask
from vidl.overrides import convert


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Sizes and masks that a run, its data and its reports need, whatever the encoders are.

    Values are converted to the types of their fields as on the command line: a list becomes a
    tuple, 3.0 the integer 3.

    Attributes:
        frames: number of frames of a clip.
        image_size: height and width of a frame, in pixels.
        tubelet_size: frames in a patch. 1 (the papers' choice): a patch is part of one frame; above
            1 the model sees motion within a patch and treats the tubelet as one frame.
        mask: kind of the visual mask; see `vidl.masking.visual_mask`.
        mask_ratio: share of masked patches, in [0, 1); 0: no mask.
        text_width: width of the text encoder.
        text_layers: number of layers of the text encoder.
        text_heads: number of attention heads of the text encoder.
        dropout: dropout of the text encoder.
        vocabulary: vocabulary of the captions' tokenizer.
        word_ratio: share of masked words, in [0, 1].
        embed_dim: width of the features that compare clips and captions.
        temperature: temperature of the contrastive loss.
        mean: mean that is subtracted from the pixels, in 0 to 1.
        std: standard deviation by which the pixels are divided.
        seed: seed of masks and negatives.
        gather: whether samples are contrasted with those of all ranks.
        backend: backend of all ops; see `vidl info`.

    Raises:
        TypeError, ValueError: values are of other types, out of range or inconsistent.
    """

    # How a model sees an image: repeated to a whole clip ("repeat"), or as one frame ("one").
    stills: ClassVar[Literal["repeat", "one"]] = "repeat"
    # How the number of visible patches is rounded; see `vidl.ops.kept_count`.
    rounding: ClassVar[Rounding] = "floor"

    frames: int = 4
    image_size: int = 224
    tubelet_size: int = 1
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
        for name, value in convert(vars(self), types_of(self), of=type(self).__name__).items():
            object.__setattr__(self, name, value)
        sizes = ("frames", "image_size", "tubelet_size")
        self._at_least(1, *sizes, "text_width", "text_heads", "embed_dim")
        self._at_least(0, "text_layers", "seed")
        check_backend(self.backend)
        per_channel(3, self.mean, self.std)  # checks them
        self._multiple("frames", "tubelet_size")
        self._multiple("text_width", "text_heads")
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

    def _multiple(self, whole: str, part: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise ValueError(
                f"need {whole} as a multiple of {part}={getattr(self, part)}, got "
                f"{getattr(self, whole)}"
            )

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """Frames (or tubelets), rows and columns of patches."""

    @abstractmethod
    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""

    @abstractmethod
    def variants(self) -> dict[str, Any]:
        """The recipe "dense" (no mask, no pruning) first, and as it is last."""

    @property
    def training_frames(self) -> int:
        """Frames of a sample in training; more than `frames` if it is several clips."""
        return self.frames

    def views_of(self, frames: int) -> int:
        """The clips of a sample with so many frames."""
        return 1

    @property
    def evaluation_frames(self) -> int:
        """Frames of a clip in evaluation."""
        return self.frames

    def tubelets(self, frames: int) -> int:
        """The tubelets of a clip of so many frames; an image that is seen as one frame has one."""
        return 1 if self.stills == "one" and frames == 1 else frames // self.tubelet_size

    @property
    def visible(self) -> int:
        """Number of visible patches of a clip, as `visual_mask` draws them."""
        T, H, W = self.grid
        whole = T if self.mask in ("frame", "tube") else 1
        return whole * kept_count(math.prod(self.grid) // whole, 1 - self.mask_ratio, self.rounding)

    def visual_mask(
        self, samples: Tensor, step: int | Tensor, frames: int | None = None
    ) -> VisualMask | None:
        """The visible patches of each sample at a step; None: all are visible.

        Args:
            samples, step: as in `vidl.masking.visual_mask`.
            frames: frames of the clips; default: those of the recipe.
        """
        if self.mask_ratio == 0:
            return None
        T = self.grid[0] if frames is None else self.tubelets(frames)
        grid = (T, *self.grid[1:])
        return visual_mask(
            self.seed, step, samples, grid, self.mask_ratio,
            kind=self.mask, rounding=self.rounding,
        )  # fmt: skip

    def example(self, batch: int, words: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """A random batch as the arguments of a model: uint8 clips, captions of `words` tokens."""
        size = (batch, 3, self.training_frames, self.image_size, self.image_size)
        ids = torch.randint(self.vocabulary.size, (batch, words), device=device)
        return {
            "video": torch.randint(256, size, dtype=torch.uint8, device=device),
            "ids": ids,
            "attention_mask": torch.ones_like(ids),
            "samples": torch.arange(batch, device=device),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitRecipe(Recipe):
    """Sizes of a clip encoder that is a vision transformer on patches.

    Attributes:
        patch_size: size of the patches of a frame.
        width: width of the vision encoder.
        depth: number of layers of the vision encoder.
        heads: number of attention heads of the vision encoder.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "patch_size", "width", "heads")
        self._at_least(0, "depth")
        self._multiple("image_size", "patch_size")
        self._multiple("width", "heads")

    @property
    def grid(self) -> Grid:
        """Frames (or tubelets), rows and columns of patches."""
        side = self.image_size // self.patch_size
        return self.frames // self.tubelet_size, side, side

    @property
    def embedding(self) -> dict[str, Any]:
        """The options of the patch embedding of clip encoders."""
        tubelet = None if self.tubelet_size == 1 else self.tubelet_size
        return {"tubelet_size": tubelet, "mean": self.mean, "std": self.std}


def types_of(recipe: Recipe) -> dict[str, Any]:
    """The type of each field of a recipe."""
    hints = get_type_hints(type(recipe))
    return {field.name: hints[field.name] for field in dataclasses.fields(recipe)}
