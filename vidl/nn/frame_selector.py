"""Which frames of a clip a text is about: the others are dropped."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidl.kernels.select_tokens import select_tokens


@dataclass(frozen=True, eq=False)
class SelectedFrames:
    """What `FrameSelector` returns.

    Attributes:
        tokens: of the kept frames, in their order in time, [B, keep, N, C].
        ids: which frames these are, [B, keep] int64, ascending.
        probabilities: of all frames, [B, T] float32; they sum to 1.
    """

    tokens: Tensor
    ids: Tensor
    probabilities: Tensor


class FrameSelector(nn.Module):
    """Keep the frames that fit a text best; the scores learn by a straight-through gradient.

        p = softmax over frames of fc2(gelu(fc1([frame, text])))
        out = tokens of the best frames, times 1 + p - stop_gradient(p)

    The factor is 1, and its gradient that of p: a frame that helped more becomes more probable.
    SMAUG (arXiv 2211.11446, figure 2c) scores frames from visual and textual features; what network
    it takes, how many frames it keeps and its gradient were not found: these are our choice.

    Args:
        visual_dim, text_dim: width of the frames' and of the text's features.
        keep: how many frames stay.
        num_frames: how many there are.
        hidden_dim: width of the hidden layer; default `visual_dim`.
        backend: of `vidl.ops.select_tokens`.

    Raises:
        ValueError: more frames are to be kept than there are, or none.
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        keep: int,
        num_frames: int,
        hidden_dim: int | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 1 <= keep <= num_frames:
            raise ValueError(
                f"need keep in [1, {num_frames}], the frames that it gets, got {keep}: sample more "
                "frames or keep fewer"
            )
        hidden = hidden_dim or visual_dim
        self.keep, self.backend = keep, backend
        self.fc1 = nn.Linear(visual_dim + text_dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, 1, bias=False)  # the softmax would not see it

    def forward(self, frames: Tensor, text: Tensor, tokens: Tensor) -> SelectedFrames:
        """Select.

        Args:
            frames: a feature of each frame, such as its CLS, [B, T, visual_dim].
            text: a feature of the text, such as its CLS, [B, text_dim].
            tokens: of all frames, [B, T, N, C].

        Returns:
            `SelectedFrames`. Of equal frames the earlier ones are kept.

        Raises:
            ValueError: the shapes do not fit, or there are fewer than `keep` frames.
        """
        B, T = frames.shape[:2]
        if frames.ndim != 3 or text.ndim != 2 or tokens.ndim != 4 or len(text) != B:
            raise ValueError(
                "need frames [B, T, C], text [B, C] and tokens [B, T, N, C], got "
                f"{tuple(frames.shape)}, {tuple(text.shape)} and {tuple(tokens.shape)}"
            )
        both = torch.cat([frames, text[:, None].expand(-1, T, -1)], -1)
        scores = self.fc2(self.act(self.fc1(both))).squeeze(-1)
        high = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.to(high).softmax(-1)
        found = select_tokens(tokens, probabilities, self.keep, backend=self.backend)
        chosen = probabilities.gather(1, found.ids_keep)
        factor = 1 + (chosen - chosen.detach())  # in this order it is exactly 1
        kept = found.tokens * factor[..., None, None].to(tokens.dtype)
        return SelectedFrames(kept, found.ids_keep, probabilities)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, backend={self.backend!r}"
