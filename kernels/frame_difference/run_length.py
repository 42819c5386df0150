"""Run-length tokens: which tubelets to keep, and the length of the run that each stands for."""

from typing import NamedTuple

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, check_floating, check_tensors, finite


class RunLengths(NamedTuple):
    """Visible patches for `masked_patch_embed`, and the number of slices each stands for."""

    ids: Tensor  # int64, [total], or [B, K]
    cu_seqlens: Tensor | None  # [B + 1] int32; None where ids are [B, K]
    lengths: Tensor  # int64, of the shape of ids


def run_length_ids(
    differences: Tensor,
    slices: int,
    threshold: float = 0.1,
    *,
    keep: int | None = None,
    total: int | None = None,
) -> RunLengths:
    """Keep the tubelets that differ from the tubelet before them.

    A tubelet is kept if its difference is greater than `threshold`. The first slice, whose
    difference is +inf, is always kept. A kept tubelet stands for its run: itself and the following
    slices, up to the next kept tubelet at the same position.

    Args:
        differences: of `frame_difference`, [B, N].
        slices: T / t, which divides N.
        threshold: in units of the normalised clip; the paper has 0.1.
        keep: keep this number of tubelets of each clip instead, those that differ most (of equal
            ones the earlier; NaN last).
        total: the number of kept tubelets in the batch, if known; otherwise the host waits once
            for CUDA.

    Returns:
        ids, ascending within a clip: [total] with cu_seqlens, or [B, keep] without; and lengths.

    Raises:
        ValueError: shapes or options do not fit together.

    Source: Run-Length Tokenization, arXiv 2411.05222, 3.
    """
    check_tensors(differences=differences)
    check_floating(differences=differences)
    check_count("slices", slices, 1)
    if differences.ndim != 2 or differences.shape[1] % slices:
        raise ValueError(
            f"need differences [B, N] with N a multiple of the slices, "
            f"got {tuple(differences.shape)} and {slices}"
        )
    threshold = finite("threshold", threshold)
    N = differences.shape[1]
    for name, count in (("keep", keep), ("total", total)):
        if count is not None:
            check_count(name, count)
    if keep is not None:
        if not 0 <= keep <= N or total is not None:
            raise ValueError(f"need keep in 0 to {N}, and no total, got {keep} and {total}")
        ranked = torch.where(differences.isnan(), float("-inf"), differences)
        ids = ranked.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(-1).values
        kept = torch.zeros_like(differences, dtype=torch.bool).scatter_(1, ids, True)
        return RunLengths(ids, None, _run_lengths(kept, slices).gather(1, ids))
    kept = differences > threshold
    ends = kept.sum(1).cumsum(0)
    if total is None:
        places = kept.flatten().nonzero()[:, 0]
    else:
        torch._assert_async(kept.sum() == total, "run_length_ids: need total kept tubelets")
        places = torch.nonzero_static(kept.flatten(), size=total)[:, 0]
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return RunLengths(places % N, cu_seqlens, _run_lengths(kept, slices).flatten()[places])


def _run_lengths(kept: Tensor, slices: int) -> Tensor:
    """Slices from each tubelet to the next kept one at its position, or to the end: [B, N]."""
    kept = kept.unflatten(1, (slices, -1))  # [B, slices, P]
    here = torch.arange(slices, device=kept.device)[:, None].expand(kept.shape)
    starts = torch.where(kept, here, slices)
    after = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], slices)], 1)
    return (after.flip(1).cummin(1).values.flip(1) - here).flatten(1)
