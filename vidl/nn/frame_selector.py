"""Selection of the frames of a clip that match a text best."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_floating, check_shape, check_tensors
from vidl.kernels.library import check_backend
from vidl.kernels.select_tokens import select_tokens


@dataclass(frozen=True, eq=False)
class SelectedFrames:
    """What `FrameSelector` returns.

    Attributes:
        tokens: of the kept frames, in temporal order, [B, keep, N, C].
        ids: indices of the kept frames, [B, keep] int64, ascending.
        probabilities: of all frames, [B, T] float32, with sum 1.
    """

    tokens: Tensor
    ids: Tensor
    probabilities: Tensor


class FrameSelector(nn.Module):
    """Keep the frames that match a text best, with a straight-through gradient for the scores.

        p = softmax over frames of fc2(gelu(fc1([frame, text])))
        out = tokens of the best frames, times 1 + p - stop_gradient(p)

    The factor equals 1 and has the gradient of p, so frames that reduce the loss become more
    probable. SMAUG (arXiv 2211.11446, figure 2c) scores frames from visual and textual features.
    The paper does not report the network, the number of kept frames or the gradient: these are our
    choice.

    Args:
        visual_dim, text_dim: channels of the frames' and of the text's features.
        keep: number of frames that stay.
        num_frames: number of frames of a clip.
        hidden_dim: width of the hidden layer; default `visual_dim`.
        backend: of `vidl.ops.select_tokens`.

    Raises:
        ValueError: `keep` is not in [1, num_frames].
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
        for name, count in (
            ("visual_dim", visual_dim), ("text_dim", text_dim), ("keep", keep),
            ("num_frames", num_frames),
        ):  # fmt: skip
            check_count(name, count, 1)
        if hidden_dim is not None:
            check_count("hidden_dim", hidden_dim, 1)
        check_backend(backend)
        if keep > num_frames:
            raise ValueError(
                f"need keep in [1, {num_frames}], the number of frames, got {keep}: sample more "
                "frames or keep fewer"
            )
        hidden = hidden_dim or visual_dim
        self.visual_dim, self.text_dim = visual_dim, text_dim
        self.keep, self.backend = keep, backend
        self.fc1 = nn.Linear(visual_dim + text_dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, frames: Tensor, text: Tensor, tokens: Tensor) -> SelectedFrames:
        """Select frames.

        Args:
            frames: a feature of each frame, such as its CLS token, [B, T, visual_dim].
            text: a feature of the text, such as its CLS token, [B, text_dim].
            tokens: of all frames, [B, T, N, C].

        Returns:
            `SelectedFrames`; of frames with equal scores the earlier ones are kept.

        Raises:
            ValueError: the shapes do not fit, or a clip has fewer than `keep` frames.
        """
        check_tensors(frames=frames, text=text, tokens=tokens, model=self.fc2.weight)
        check_floating(frames=frames, text=text, tokens=tokens)
        check_shape("frames", frames, "B", "T", self.visual_dim)
        B, T = frames.shape[:2]
        check_shape("text", text, B, self.text_dim)
        check_shape("tokens", tokens, B, T, "N", "C")
        if self.keep > T:
            raise ValueError(f"need frames [B, T, C] with T >= keep={self.keep}, got T = {T}")
        both = torch.cat([frames, text[:, None].expand(-1, T, -1)], -1)
        scores = self.fc2(self.act(self.fc1(both))).squeeze(-1)
        high = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.to(high).softmax(-1)
        selected = select_tokens(tokens, probabilities, self.keep, backend=self.backend)
        chosen = probabilities.gather(1, selected.ids_keep)
        factor = 1 + (chosen - chosen.detach())  # in this order it is exactly 1
        kept = selected.tokens * factor[..., None, None].to(tokens.dtype)
        return SelectedFrames(kept, selected.ids_keep, probabilities)

    def extra_repr(self) -> str:
        return f"keep={self.keep}, backend={self.backend!r}"
