"""select_tokens by one sort for each sample, a gather and a product."""

import torch
from torch import Tensor

from . import reference


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
    """Sort each sample by itself; packed samples differ in length, and use the reference.

    Returns:
        The tokens, ids_keep, inverse, and the offsets of the samples among the tokens.
    """
    if cu_seqlens is not None:
        return reference.select_tokens(
            x, ranks, weights, cu_seqlens, cu_kept, keep, prefix, order, fuse
        )
    B, N = ranks.shape
    # Of negative scores, since an ascending sort has NaN at its end. topk does not order ties.
    best = (-ranks).argsort(dim=1, stable=True)
    ids, dropped = best[:, :keep], best[:, keep:]
    if order == "index":
        ids = ids.sort(1).values
    step = torch.arange(max(B + 1, keep), device=x.device)
    inverse = torch.full_like(best, -1).scatter_(1, ids, step[:keep].expand(B, -1))
    # Positions count from the end of the prefix.
    front = torch.arange(-prefix, 0, device=x.device).expand(B, -1)
    if weights is None:
        tokens = _rows(x, torch.cat([front, ids], 1), prefix)
    else:
        rows = _rows(x, torch.cat([front, ids, dropped], 1), prefix)
        tokens, others = rows.split([prefix + keep, N - keep], 1)
        fused = _fuse(others, weights.gather(1, dropped), fuse)
        tokens = torch.cat([tokens, fused.to(x.dtype)], 1)
    offsets = (step[: B + 1] * tokens.shape[1]).int()
    return tokens, ids, inverse, offsets


def _rows(x: Tensor, positions: Tensor, prefix: int) -> Tensor:
    """x[b, prefix + positions[b, k]]: [B, K, C]."""
    B, N, C = x.shape
    end = prefix + B * N
    start = torch.arange(prefix, end, N, device=x.device) if N else positions.new_zeros(B)
    rows = (positions + start[:, None]).flatten()
    return x.reshape(B * N, C).index_select(0, rows).view(*positions.shape, C)


def _fuse(rows: Tensor, weights: Tensor, fuse: str) -> Tensor:
    """The weighted sum or mean of the rows [B, K, C] of each sample, [B, 1, C]."""
    use = weights.detach().abs() < float("inf")  # isfinite, in half as many operations
    weights = torch.where(use, weights, 0)
    # Rows that do not count become zeros, since 0 x NaN is NaN.
    fused = weights[:, None] @ torch.where(use[..., None], rows.to(weights.dtype), 0)
    if fuse == "sum":
        return fused
    mass = weights.sum(1)[:, None, None]
    return torch.where(mass != 0, fused / torch.where(mass != 0, mass, 1), 0)
