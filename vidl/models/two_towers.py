"""A clip encoder and a text encoder with a shared embedding space."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from vidl.kernels.arguments import check_floating, check_tensors
from vidl.masking import VisualMask
from vidl.models.system import System
from vidl.nn import Bert, Projection
from vidl.objectives import ContrastiveLoss


class TwoTowers(System):
    """A clip encoder, a text encoder and a projection of each, as retrieval needs them.

    A subclass creates these modules and implements `encode_clips` and `see`.
    """

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

    def text_features(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The projected CLS of the captions' tokens: [B, embed_dim]."""
        return self.project_text(text[:, 0])

    def embed_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The features of clips, [B, embed_dim] or [B, T, embed_dim]."""
        return self.clip_features(self.encode_clips(video, mask))

    def embed_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The features of captions, [B, embed_dim]."""
        text = self.encode_text(ids, attention_mask, words=words)
        return self.text_features(text, attention_mask)

    def similarity(self, clips: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity over the temperature, averaged over frames: [S, B].

        Args:
            clips: S clips, [S, embed_dim] or [S, T, embed_dim], from `embed_clips`.
            text: [B, embed_dim], from `embed_text`.
        """
        check_features(clips, text)
        return self.contrast.similarity(clips, text)


def check_features(clips: Tensor, text: Tensor) -> None:
    """Raise unless these are features of clips, [S, C] or [S, T, C], and of captions, [B, C]."""
    check_tensors(clips=clips, text=text)
    check_floating(clips=clips, text=text)
    if clips.ndim not in (2, 3) or text.ndim != 2 or clips.shape[-1] != text.shape[1]:
        raise ValueError(
            "need clips [S, C] or [S, T, C] and text [B, C], got "
            f"{tuple(clips.shape)} and {tuple(text.shape)}"
        )
