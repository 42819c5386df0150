"""select_tokens in plain PyTorch: its definition, on any device, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def select_tokens(
    x: Tensor,  # [B, prefix + N, C], or [total, C] with offsets
    ranks: Tensor,  # [B, N] or [total]
    weights: Tensor | None,  # as ranks
    cu_seqlens: Tensor | None,  # [B + 1]
    cu_kept: Tensor | None,  # [B + 1]
    keep: int,
    prefix: int,
    order: str,
    fuse: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the rows of each sample, number the kept rows, and gather them in that order.

    Returns:
        The tokens, ids_keep, inverse, and the offsets of the samples among the tokens.
    """
    if cu_seqlens is not None and cu_kept is not None:
        return _packed(x, ranks, weights, cu_seqlens, cu_kept, keep, prefix, order, fuse)
    (B, N), C = ranks.shape, x.shape[-1]
    step = torch.arange(B + 1, device=x.device)
    ranks = F.pad(ranks, (prefix, 0))
    weights = weights if weights is None else F.pad(weights, (prefix, 0)).reshape(-1)
    tokens, ids, inverse, offsets = _packed(
        x.reshape(B * (prefix + N), C), ranks.reshape(-1), weights,
        step * (prefix + N), step * keep, B * keep, prefix, order, fuse,
    )  # fmt: skip
    tokens = tokens.view(B, prefix + keep + (1 if fuse else 0), C)
    return tokens, ids.view(B, keep), inverse.view(B, prefix + N)[:, prefix:].contiguous(), offsets


def _packed(
    x: Tensor,  # [total, C]
    ranks: Tensor,  # [total]
    weights: Tensor | None,  # [total]
    cu_seqlens: Tensor,
    cu_kept: Tensor,
    num_kept: int,
    prefix: int,
    order: str,
    fuse: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, total = cu_seqlens.shape[0] - 1, x.shape[0]
    _check(cu_seqlens, cu_kept, total, num_kept, prefix)
    row = torch.arange(total, device=x.device)
    sample = torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)
    inside = row - cu_seqlens[sample]

    # Best first: the prefix, then numbers, then NaN, which an ascending sort has at its end. Stable
    # sorts leave ties in their order.
    best = torch.argsort(torch.where(inside < prefix, float("-inf"), -ranks), stable=True)
    best = best[torch.argsort(sample[best], stable=True)]
    rank = torch.empty_like(row).scatter(0, best, row) - cu_seqlens[sample]
    # The prefix keeps its order: its scores do not count.
    rank = torch.where(inside < prefix, inside, rank)
    kept = rank < prefix + cu_kept.diff()[sample]

    place = rank
    if order == "index":
        before = cu_kept[sample] + prefix * sample
        place = kept.cumsum(0) - 1 - before
    step = torch.arange(B + 1, device=x.device)
    offsets = cu_kept + step * (prefix + (1 if fuse else 0))
    # One element more than there are rows: all dropped rows are written to it.
    rows = num_kept + B * (prefix + (1 if fuse else 0))
    end = torch.where(kept, offsets[sample] + place, rows)
    source = row.new_zeros(rows + 1).scatter(0, end, row)[:rows]
    end = torch.where(kept & (inside >= prefix), cu_kept[sample] + place - prefix, num_kept)
    ids = row.new_zeros(num_kept + 1).scatter(0, end, inside - prefix)[:num_kept]
    inverse = torch.where(kept & (inside >= prefix), place - prefix, -1)

    if weights is not None:
        fused = _fuse(x, weights, ~kept, sample, B, fuse)
        source = source.scatter(0, offsets[1:].long() - 1, total + step[:B])
        x = torch.cat([x, fused.to(x.dtype)])
    return x[source], ids, inverse, offsets.int()


def _fuse(x: Tensor, weights: Tensor, dropped: Tensor, sample: Tensor, B: int, fuse: str) -> Tensor:
    """The weighted sum or mean of the dropped rows of each sample, [B, C]."""
    use = dropped & weights.isfinite()
    weights = torch.where(use, weights, 0)
    # Rows that do not count become zeros, since 0 x NaN is NaN.
    rows = weights[:, None] * torch.where(use[:, None], x.to(weights.dtype), 0)
    fused = weights.new_zeros(B, x.shape[1]).index_add(0, sample, rows)
    if fuse == "sum":
        return fused
    mass = weights.new_zeros(B).index_add(0, sample, weights)[:, None]
    return torch.where(mass != 0, fused / torch.where(mass != 0, mass, 1), 0)


def _check(cu_seqlens: Tensor, cu_kept: Tensor, total: int, num_kept: int, prefix: int) -> None:
    lengths, kept = cu_seqlens.diff(), cu_kept.diff()
    # No numbers in the texts: torch.compile would compile again for every number.
    torch._assert_async(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (lengths >= prefix).all(),
        "select_tokens: cu_seqlens must ascend from 0 to the rows of x in steps of prefix or more",
    )
    torch._assert_async(
        (cu_kept[-1] == num_kept) & (kept >= 0).all() & (kept <= lengths - prefix).all(),
        "select_tokens: the samples must keep num_kept tokens in all, and each at most its own",
    )
