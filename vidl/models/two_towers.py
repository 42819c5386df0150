"""The base of all models: a clip encoder and a text encoder with a shared embedding space."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vidl.masking import VisualMask
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
        return self.contrast.similarity(clips, text)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens and all frames are kept."""
        yield
