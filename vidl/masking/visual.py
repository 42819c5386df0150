"""Masks of clips: which patches the encoder sees, and which the decoder predicts."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vidl.kernels.arguments import (
    check_counts,
    check_floating,
    check_shape,
    check_tensors,
    finite,
)
from vidl.kernels.groups import Grid
from vidl.kernels.select_tokens import kept_count
from vidl.kernels.select_tokens.op import Rounding
from vidl.masking.draws import uniform

VisualKind = Literal["frame", "tube", "clip", "block"]


@dataclass(frozen=True, eq=False)
class VisualMask:
    """The visible and the masked patches of each clip.

    Patches are numbered in (time, row, column) order. Both lists ascend, and each patch is in one
    of them.

    Attributes:
        ids_keep: the visible patches, [B, K] int64. If every frame has k visible patches, those of
            frame t are the columns t k to (t + 1) k - 1.
        ids_mask: the masked patches, [B, M] int64.
        grid: frames, rows and columns of patches.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    grid: Grid

    def masked(self) -> Tensor:
        """True at masked patches, [B, N] bool."""
        shape = self.ids_mask.shape[0], math.prod(self.grid)
        zeros = torch.zeros(shape, dtype=torch.bool, device=self.ids_mask.device)
        return zeros.scatter(1, self.ids_mask, True)

    def per_frame(self) -> "VisualMask":
        """The masks of B * T single frames; frame t of clip b is row b T + t.

        Raises:
            ValueError: the number of visible patches is not a multiple of T.
            RuntimeError: frames differ in their number of visible patches (kinds other than "frame"
                and "tube"); on CUDA a device-side assertion.
        """
        T, H, W = self.grid
        if self.ids_keep.shape[1] % T:
            raise ValueError(
                f"need the same number of visible patches in each of {T} frames, got "
                f"{self.ids_keep.shape[1]} in total: use kind 'frame' or 'tube'"
            )
        first = torch.arange(T, device=self.ids_keep.device)[:, None] * H * W
        keep, mask = (
            ids.unflatten(1, (T, ids.shape[1] // T)) - first
            for ids in (self.ids_keep, self.ids_mask)
        )
        inside = ((keep >= 0) & (keep < H * W)).all() & ((mask >= 0) & (mask < H * W)).all()
        torch._assert_async(inside, "need the same number of visible patches in each frame")
        return VisualMask(keep.flatten(0, 1), mask.flatten(0, 1), (1, H, W))


def visual_mask(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    grid: Grid,
    mask_ratio: float,
    *,
    kind: VisualKind = "frame",
    rounding: Rounding = "floor",
    stream: int = 0,
) -> VisualMask:
    """Draw a random mask for each clip; all clips have the same number of visible patches.

    ======= =================================================== =============================
    kind    masked patches                                      source
    ======= =================================================== =============================
    "frame" equally many in every frame, drawn per frame        MAC, SMAUG (figures)
    "tube"  the same patches in every frame                     VideoMAE, arXiv 2203.12602
    "clip"  anywhere in the clip                                MAE-ST, arXiv 2205.09113
    "block" random cuboids                                      VIOLET, arXiv 2111.12681; BEiT
    ======= =================================================== =============================

    A cuboid has 1 to T - 1 frames, and 1 to 2/3 of the rows and columns minus one, all uniform, as
    in VIOLET. VIOLET draws a fixed number of cuboids. Here the last cuboid is cut at random so that
    the number of masked patches is exact; if the cuboids do not suffice, the rest is random.

    Args:
        seed, step, samples, stream: as in `vidl.masking.uniform`; samples [B] int64.
        grid: frames, rows and columns of patches.
        mask_ratio: the share of masked patches, in [0, 1).
        kind: see the table.
        rounding: how the number of visible patches of a frame ("frame", "tube") or of the clip
            ("clip", "block") is rounded, see `vidl.ops.kept_count`; MAE uses "floor".
        stream: different streams give independent masks of the same samples.

    Returns:
        `VisualMask` on the device of `samples`; its shapes do not depend on the draw.

    Raises:
        TypeError, ValueError: see `vidl.masking.uniform`; unknown kind or rounding; a number is out
            of range.
    """
    if kind not in get_args(VisualKind):
        raise ValueError(f"need kind among {', '.join(get_args(VisualKind))}, got {kind!r}")
    check_counts("grid", grid, 3)
    if not 0 <= finite("mask_ratio", mask_ratio) < 1:
        raise ValueError(f"need mask_ratio in [0, 1), got {mask_ratio}")
    (T, H, W), N = grid, math.prod(grid)
    # Patches among which one share is masked: those of a frame or of the whole clip.
    patches = H * W if kind in ("frame", "tube") else N
    numbers = patches if kind == "tube" else N
    masked = patches - kept_count(patches, 1 - mask_ratio, rounding)
    ranks = uniform(seed, step, samples, numbers, stream=stream)
    if kind == "block":
        ranks = ranks + _first_cuboid(seed, step, samples, grid, mask_ratio, stream)
    keep, mask = _split(ranks.view(samples.shape[0], numbers // patches, patches), masked)
    if patches < N:
        first = torch.arange(T, device=samples.device)[:, None] * patches
        keep, mask = keep + first, mask + first
    return VisualMask(keep.flatten(1), mask.flatten(1), grid)


def replace_masked(tokens: Tensor, mask: VisualMask, mask_token: Tensor) -> Tensor:
    """Replace masked tokens by `mask_token`, [C]: [B, N, C] -> [B, N, C].

    Call it before the position embedding is added. Source: BEiT, arXiv 2106.08254, 2.3.
    """
    check_mask(mask)
    check_tensors(tokens=tokens, mask_token=mask_token, mask=mask.ids_mask)
    check_floating(tokens=tokens, mask_token=mask_token)
    check_shape("tokens", tokens, mask.ids_mask.shape[0], math.prod(mask.grid), "C")
    check_shape("mask_token", mask_token, tokens.shape[2])
    return torch.where(mask.masked()[..., None], mask_token.to(tokens.dtype), tokens)


def zero_masked(video: Tensor, mask: VisualMask) -> Tensor:
    """Set the pixels of masked patches to zero: [B, C, T, H, W] -> [B, C, T, H, W].

    Zero is the mean pixel of a normalised clip, and black in a uint8 clip. Source: VIOLET, arXiv
    2111.12681.

    Raises:
        ValueError: the clip does not divide into the mask's grid.
    """
    check_mask(mask)
    check_tensors(video=video, mask=mask.ids_mask)
    T, H, W = mask.grid
    check_shape("video", video, mask.ids_mask.shape[0], "C", "T", "H", "W")
    if any(n % m for n, m in zip(video.shape[2:], mask.grid, strict=True)):
        raise ValueError(
            f"need video [B, C, T, H, W] that divides into {mask.grid} patches, got "
            f"{tuple(video.shape)}"
        )
    masked = mask.masked().view(-1, 1, T, H, W)
    for dim in (2, 3, 4):
        times = video.shape[dim] // mask.grid[dim - 2]
        masked = masked.repeat_interleave(times, dim, output_size=video.shape[dim])
    return video.masked_fill(masked, 0)


def _split(ranks: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """The kept and the masked indices, ascending; the lowest ranks are masked."""
    order = ranks.argsort(dim=-1, stable=True)
    return order[..., masked:].sort(-1).values, order[..., :masked].sort(-1).values


def _first_cuboid(
    seed: int, step: int | Tensor, samples: Tensor, grid: Grid, mask_ratio: float, stream: int
) -> Tensor:
    """The index of the first cuboid that covers each patch, [B, N]; `count` if none does."""
    longest = (max(1, grid[0] - 1), *(max(1, 2 * n // 3 - 1) for n in grid[1:]))
    # Cuboids of mean size v leave a share (1 - v / N)^count; twice as many as mask_ratio needs.
    share = math.prod([(n + 1) / 2 for n in longest]) / math.prod(grid)
    count = max(1, math.ceil(2 * math.log(1 - mask_ratio) / math.log1p(-min(share, 0.999))))
    B = samples.shape[0]
    # a stream that callers do not use
    drawn = uniform(seed, step, samples, 6 * count, stream=stream | 1 << 62).view(B, count, 6)
    covered = torch.ones(B, count, 1, dtype=torch.bool, device=samples.device)
    for axis, (n, most) in enumerate(zip(grid, longest, strict=True)):
        size = (drawn[..., 2 * axis] * most).long() + 1
        start = (drawn[..., 2 * axis + 1] * (n - size + 1)).long()
        place = torch.arange(n, device=samples.device)
        inside = (place >= start[..., None]) & (place < (start + size)[..., None])
        covered = (covered[..., None] & inside[:, :, None]).flatten(2)
    index = torch.arange(count, device=samples.device)[:, None]
    return torch.where(covered, index, count).amin(1)


def check_mask(mask: VisualMask) -> None:
    """Raise unless `mask` is a `VisualMask`."""
    if not isinstance(mask, VisualMask):
        raise TypeError(f"need mask as a VisualMask, got {type(mask).__name__}")
