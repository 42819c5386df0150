"""Which tokens of a clip a caption keeps: those that its first word attends to most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_floating,
    check_shape,
    check_tensors,
    finite,
)
from vidl.kernels.select_tokens import kept_count, select_tokens


@dataclass(frozen=True)
class KeysOfText:
    """How cross-attention prunes its keys: each caption keeps its own tokens of the clip.

    The tokens with the highest attention from the caption's first word (CLS), averaged over heads,
    stay, in their order. `Bert.fuse` prunes after the cross-attention of one layer: later layers
    see only these tokens. The scores only rank the tokens, so no gradient flows through them.

    Attributes:
        keep_rate: share of the tokens of a clip that stay, without the prefix, in (0, 1]; rounded
            up.
        layer: the fusion layer that prunes, counted from 0.
        prefix: tokens at the front of each clip that always stay, such as its CLS.

    Raises:
        TypeError, ValueError: a number is out of range.

    Source: SViTT, arXiv 2304.08809, 3.3.
    """

    keep_rate: float
    layer: int = 0
    prefix: int = 1

    def __post_init__(self) -> None:
        if not 0 < finite("keep_rate", self.keep_rate) <= 1:
            raise ValueError(f"need keep_rate in (0, 1], got {self.keep_rate}")
        check_count("layer", self.layer)
        check_count("prefix", self.prefix)

    def drops(self, n: int) -> bool:
        """Whether any of the n tokens of a clip is dropped."""
        return kept_count(max(n - self.prefix, 0), self.keep_rate) < n - self.prefix

    def select(
        self,
        clips: Tensor,
        scores: Tensor,
        partner: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """The tokens that each caption keeps of its clip.

        Args:
            clips: [S, N, C].
            scores: attention of each caption's first word to its clip, [B, N].
            partner: the clip of each caption, [B] int64 in [0, S); None: S = B, clip b.
            backend: of the selection.

        Returns:
            [B, prefix + K, C], K = ceil(keep_rate (N - prefix)).

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit.
        """
        check_tensors(("partner",), clips=clips, scores=scores, partner=partner)
        check_floating(clips=clips, scores=scores)
        check_shape("clips", clips, "S", "N", "C")
        S, N, _ = clips.shape
        check_shape("scores", scores, "B" if partner is not None else S, N)
        if self.prefix > N:
            raise ValueError(f"need clips with the prefix of {self.prefix}, got {N} tokens")
        if partner is None:
            partner = torch.arange(S, device=clips.device)
        check_dtype("partner", partner, torch.int64)
        check_shape("partner", partner, scores.shape[0])
        # Which tokens stay is found without a copy of the clip for each caption.
        kept = select_tokens(
            scores.detach()[..., None],
            scores.detach()[:, self.prefix :],
            float(self.keep_rate),
            order="index",
            prefix=self.prefix,
            backend=backend,
        ).ids_keep
        first = torch.arange(self.prefix, device=clips.device).expand(kept.shape[0], -1)
        rows = partner[:, None] * N + torch.cat([first, kept + self.prefix], 1)
        # The gradient of an index is deterministic on CUDA where captions share a clip; that of
        # index_select is not.
        return clips.flatten(0, 1)[rows]
