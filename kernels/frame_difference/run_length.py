"""Run-length tokens: which tubelets are new, and for how long each of them stands."""

from typing import NamedTuple

import torch
from torch import Tensor


class RunLengths(NamedTuple):
    """Visible patches for `masked_patch_embed`, and how many slices each of them stands for."""

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
    """Keep the tubelets that differ from those before them.

    A tubelet is kept if its difference is greater than `threshold`; the first slice, whose
    difference is +inf, always is. A kept tubelet stands for its run: itself and the slices up to
    the next one that is kept at its place.

    Args:
        differences: of `frame_difference`, [B, N].
        slices: T / t, which divides N.
        threshold: the paper's 0.1, in units of the normalised clip.
        keep: keep this many of each clip instead, those that differ most (ties: the earlier ones;
            NaN last).
        total: how many are kept in all, if that is known: on CUDA the host otherwise waits for
            the number, once.

    Returns:
        ids, ascending within a clip: [total] with cu_seqlens, or [B, keep] without; and lengths.

    Raises:
        ValueError: shapes or options do not fit together.

    Source: Run-Length Tokenization, arXiv 2411.05222, 3.
    """
    if differences.ndim != 2 or slices < 1 or differences.shape[1] % slices:
        raise ValueError(
            f"need differences [B, N] with N a multiple of the slices, "
            f"got {tuple(differences.shape)} and {slices}"
        )
    N = differences.shape[1]
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
        torch._assert_async(kept.sum() == total, "run_length_ids: `total` is not what is kept")
        places = torch.nonzero_static(kept.flatten(), size=total)[:, 0]
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return RunLengths(places % N, cu_seqlens, _run_lengths(kept, slices).flatten()[places])


def _run_lengths(kept: Tensor, slices: int) -> Tensor:
    """Slices from each one to the next that is kept at its place, or to the end: [B, N]."""
    kept = kept.unflatten(1, (slices, -1))  # [B, slices, S]
    here = torch.arange(slices, device=kept.device)[:, None].expand(kept.shape)
    starts = torch.where(kept, here, slices)
    after = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], slices)], 1)
    return (after.flip(1).cummin(1).values.flip(1) - here).flatten(1)
