"""Clips and captions as one sequence for each sample, without padding."""

import torch
from torch import Tensor

from vidl.kernels.arguments import check_floating, check_shape, check_tensors
from vidl.kernels.groups import Groups, group_of
from vidl.nn.captions import Captions


class Merged:
    """Rows of clips and of words, in which the clip and the words of a sample attend to each other.

    The rows are [the patches of all clips; the packed words of all captions]. Nothing is
    concatenated for each sample, and captions need no padding.

    Args:
        clips: tokens of the clips, [S, N, C]; only the shape is used.
        captions: the S captions.

    Raises:
        ValueError: the numbers of clips and captions differ.
    """

    def __init__(self, clips: Tensor, captions: Captions) -> None:
        if not isinstance(captions, Captions):
            raise TypeError(f"need captions as Captions, got {type(captions).__name__}")
        check_tensors(clips=clips)
        check_floating(clips=clips)
        check_shape("clips", clips, captions.batch, "N", "C")
        if clips.device != captions.device:
            raise ValueError(f"need clips on {captions.device}, got {clips.device}")
        self.samples, self.tokens = clips.shape[:2]
        self.captions = captions

    def rows(self, clips: Tensor, text: Tensor) -> Tensor:
        """Clips [S, N, C] and captions [S, L, C] to rows [S N + words, C]."""
        check_tensors(clips=clips, text=text)
        check_floating(clips=clips, text=text)
        check_shape("clips", clips, self.samples, self.tokens, "C")
        check_shape("text", text, self.samples, self.captions.length, clips.shape[2])
        return torch.cat([clips.flatten(0, 1), self.captions.pack(text)])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to clips [S, N, C] and captions [S, L, C], zero at padding."""
        count = self.samples * self.tokens
        check_tensors(x=x)
        check_floating(x=x)
        check_shape("x", x, count + self.captions.rows, "C")
        clips = x[:count].unflatten(0, (self.samples, self.tokens))
        return clips, self.captions.unpack(x[count:])

    def joint(self) -> Groups:
        """Groups of one sample each; rows of padding are in groups of their own."""
        captions, device = self.captions, self.captions.device
        own = torch.arange(self.samples, device=device)
        if captions.order is None:
            words, tails = own.repeat_interleave(captions.length), 0
        else:
            words, tails = group_of(captions.offsets, captions.rows), captions.tails
        labels = torch.cat([own.repeat_interleave(self.tokens), words.long()])
        longest = max(self.tokens + captions.length, captions.length)
        return Groups.labelled(labels, self.samples + tails, longest)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the rows of each sample, [S, C]."""
        clips, text = self.split(x)
        return (clips.sum(1) + text.sum(1)) / (self.tokens + self.captions.lengths()[:, None])
