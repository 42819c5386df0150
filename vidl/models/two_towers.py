"""What all models can do after training: bring clips and captions into one space."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vidl.masking import VisualMask
from vidl.nn import Bert, Projection
from vidl.objectives import ContrastiveLoss


class TwoTowers(nn.Module, ABC):
    """An encoder of clips, one of captions, and a projection of each: what retrieval needs.

    A subclass makes these parts, and says how a clip is encoded.
    """

    recipe: Any
    vision: Any
    text: Bert
    project_clip: Projection
    project_text: Projection
    contrast: ContrastiveLoss

    @abstractmethod
    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of clips, [B, ..., n, C], of which the first is CLS; None: nothing is masked.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            mask: of the recipe's `visual_mask`.
        """

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The tokens of captions, [B, L, C], of which the first is CLS; see `vidl.nn.Bert`."""
        return self.text.encode(ids, attention_mask, words=words)

    def clip_features(self, clips: Tensor) -> Tensor:
        """What is compared, of the tokens of clips: [B, E], or [B, T, E] of each frame."""
        return self.project_clip(clips[..., 0, :])

    def text_features(self, text: Tensor) -> Tensor:
        """What is compared, of the tokens of captions: [B, E]."""
        return self.project_text(text[:, 0])

    def embed_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The features of clips, [B, E] or [B, T, E]; for retrieval without a mask."""
        return self.clip_features(self.encode_clips(video, mask))

    def embed_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The features of captions, [B, E]."""
        return self.text_features(self.encode_text(ids, attention_mask, words=words))

    def similarity(self, clips: Tensor, text: Tensor) -> Tensor:
        """Of features, [V, B]: the cosine, over the temperature; of several frames their mean.

        Args:
            clips: [V, E] or [V, T, E], of `embed_clips`.
            text: [B, E], of `embed_text`.
        """
        return self.contrast.similarity(clips, text)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Within this all visible tokens and all frames stay, whatever the recipe says."""
        yield
