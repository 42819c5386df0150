"""The base of all models: a clip encoder and a text encoder with a shared embedding space."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_dtype, check_floating, check_shape, check_tensors
from vidl.kernels.patches import check_video
from vidl.masking import VisualMask
from vidl.masking.visual import check_mask
from vidl.nn import Bert, Projection
from vidl.objectives import ContrastiveLoss


class TwoTowers(nn.Module, ABC):
    """A clip encoder, a text encoder and a projection of each, as retrieval needs them.

    A subclass creates these modules and implements `encode_clips` and `forward`. Arguments and
    result of `forward` are:

    Args:
        video: [B, 3, T, H, W], uint8 or normalised; any strides.
        ids: captions, [B, L] int64.
        attention_mask: [B, L], nonzero where there is a word.
        samples: index of each sample in the data set, [B] int64.
        step: training step; masks and negatives depend on `step` and `samples`.
        clip_ids: [B] int64, the clip of each sample; None: all differ.
        words: an upper bound of the words in `ids`; see `vidl.nn.Bert`.

    Returns:
        "loss", the weighted sum, and each loss by its name: float32 scalars.

    Raises:
        TypeError, ValueError, RuntimeError: from the ops and modules that the model calls.
    """

    recipe: Any
    vision: Any
    text: Bert
    project_clip: Projection
    project_text: Projection
    contrast: ContrastiveLoss

    @abstractmethod
    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of clips, [B, ..., N, C]; the first is CLS.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            mask: from the recipe's `visual_mask`; None: all patches are visible.
        """

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The tokens of captions, [B, L, C]; the first is CLS. See `vidl.nn.Bert`."""
        return self.text.encode(ids, attention_mask, words=words)

    def check_batch(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        clip_ids: Tensor | None = None,
    ) -> None:
        """Check the arguments of `forward`; it computes masks for all frames of the recipe."""
        tensors = dict(video=video, ids=ids, attention_mask=attention_mask, samples=samples)
        check_tensors(optional=("clip_ids",), **tensors, clip_ids=clip_ids)
        self.check_clips(video)
        check_shape("video", video, "B", 3, self.recipe.frames, "H", "W")
        check_dtype("ids", ids, torch.int64)
        check_shape("ids", ids, video.shape[0], "L")
        check_shape("attention_mask", attention_mask, *ids.shape)
        check_dtype("samples", samples, torch.int64)
        check_shape("samples", samples, video.shape[0])
        if clip_ids is not None:
            check_dtype("clip_ids", clip_ids, torch.int64)
            check_shape("clip_ids", clip_ids, video.shape[0])

    def check_clips(self, video: Tensor, mask: VisualMask | None = None) -> None:
        """Check the arguments of `encode_clips`."""
        check_video(video)
        frames, size = self.recipe.frames, self.recipe.image_size
        check_shape("video", video, "B", 3, "T", size, size)
        if video.shape[2] > frames or video.shape[2] % self.recipe.tubelet_size:
            raise ValueError(
                f"need video of at most {frames} frames, in whole tubelets of "
                f"{self.recipe.tubelet_size}, got {video.shape[2]}"
            )
        if mask is not None:
            check_mask(mask)
            check_tensors(video=video, mask=mask.ids_keep)
            grid = (video.shape[2] // self.recipe.tubelet_size, *self.recipe.grid[1:])
            if tuple(mask.grid) != grid:
                raise ValueError(f"need mask of {grid} patches as video has, got {mask.grid}")

    def clip_features(self, clips: Tensor) -> Tensor:
        """The projected CLS of the clips' tokens: [B, embed_dim], or [B, T, embed_dim] by frame."""
        return self.project_clip(clips[..., 0, :])

    def text_features(self, text: Tensor) -> Tensor:
        """The projected CLS of the captions' tokens: [B, embed_dim]."""
        return self.project_text(text[:, 0])

    def embed_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The features of clips, [B, embed_dim] or [B, T, embed_dim]."""
        return self.clip_features(self.encode_clips(video, mask))

    def embed_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The features of captions, [B, embed_dim]."""
        return self.text_features(self.encode_text(ids, attention_mask, words=words))

    def similarity(self, clips: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity over the temperature, averaged over frames: [S, B].

        Args:
            clips: S clips, [S, embed_dim] or [S, T, embed_dim], from `embed_clips`.
            text: [B, embed_dim], from `embed_text`.
        """
        check_tensors(clips=clips, text=text)
        check_floating(clips=clips, text=text)
        if clips.ndim not in (2, 3) or text.ndim != 2 or clips.shape[-1] != text.shape[1]:
            raise ValueError(
                "need clips [S, C] or [S, T, C] and text [B, C], got "
                f"{tuple(clips.shape)} and {tuple(text.shape)}"
            )
        return self.contrast.similarity(clips, text)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens and all frames are kept."""
        yield


def check_model(model: TwoTowers) -> None:
    """Raise unless `model` has both encoders."""
    if not isinstance(model, TwoTowers):
        raise TypeError(f"need model as a Smaug or a Mac, got {type(model).__name__}")
