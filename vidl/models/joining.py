"""What models share that fuse captions with clips and tell whether they match."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_dtype, check_floating, check_shape, check_tensors
from vidl.models.abilities import Joint
from vidl.models.system import System


class Joining(System):
    """A model with one vector for each pair of a caption and a clip, and a classifier of pairs.

    A subclass creates `matches`, and implements `join`.

    Attributes:
        axes: of the tokens of clips, before their channels.
    """

    axes: ClassVar[tuple[str, ...]] = ("B", "N")
    matches: nn.Linear

    @property
    def joined_width(self) -> int:
        """Channels of `Joint.pooled`."""
        return self.recipe.text_width

    @property
    def described_width(self) -> int:
        """Channels of `described`."""
        return self.recipe.width

    def described(self, clips: Tensor) -> Tensor:
        """The tokens of clips, [B, N, C]: the rows that a decoder of words attends to."""
        check_tensors(clips=clips, model=self.matches.weight)
        check_floating(clips=clips)
        check_shape("clips", clips, *self.axes, self.recipe.width)
        return clips.flatten(1, -2)

    @abstractmethod
    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Fuse S captions with the clip of each; see `vidl.models.Joins`."""

    def match(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not match" and "matches" for each caption and its clip, [S, 2].

        Arguments are those of `join`.
        """
        return self.matches(self.join(clips, text, attention_mask, partner, words).pooled)

    def check_pairs(
        self, clips: Tensor, text: Tensor, attention_mask: Tensor, partner: Tensor | None
    ) -> None:
        """Check the arguments of `join`."""
        tensors = dict(clips=clips, text=text, attention_mask=attention_mask, partner=partner)
        check_tensors(("attention_mask", "partner"), **tensors)
        check_floating(clips=clips, text=text)
        check_shape("clips", clips, *self.axes, self.recipe.width)
        check_shape("text", text, "S", "L", self.recipe.text_width)
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, text.shape[0])
        elif clips.shape[0] != text.shape[0]:
            raise ValueError(
                f"need partner for {text.shape[0]} captions in text and {clips.shape[0]} clips"
            )
