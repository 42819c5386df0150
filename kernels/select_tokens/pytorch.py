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
    ids = best[:, :keep]
    if order == "index":
        ids = ids.sort(1).values
    step = torch.arange(max(B + 1, prefix, keep), device=x.device)
    inverse = torch.full_like(best, -1).scatter(1, ids, step[:keep].expand(B, -1))
    rows = torch.cat([step[:prefix].expand(B, -1), ids + prefix], 1) if prefix else ids
    tokens = _rows(x, rows)
    if weights is not None:
        fused = _fuse(x, weights, best[:, keep:], prefix, fuse).to(x.dtype)
        tokens = torch.cat([tokens, fused], 1)
    offsets = (step[: B + 1] * tokens.shape[1]).int()
    return tokens, ids, inverse, offsets


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """x[b, ids[b, k]]: [B, K, C]."""
    B, N, C = x.shape
    start = torch.arange(0, B * N, N, device=x.device) if N else ids.new_zeros(B)
    rows = (ids + start[:, None]).flatten()
    return x.reshape(B * N, C).index_select(0, rows).view(*ids.shape, C)


def _fuse(x: Tensor, weights: Tensor, dropped: Tensor, prefix: int, fuse: str) -> Tensor:
    """The weighted sum or mean of the dropped rows of each sample, [B, 1, C]."""
    weights = weights.gather(1, dropped)
    use = weights.isfinite()
    weights = torch.where(use, weights, 0)
    # Rows that do not count become zeros, since 0 x NaN is NaN.
    rows = torch.where(use[..., None], _rows(x, dropped + prefix).to(weights.dtype), 0)
    fused = weights[:, None] @ rows
    if fuse == "sum":
        return fused
    mass = weights.sum(1)[:, None, None]
    return torch.where(mass != 0, fused / torch.where(mass != 0, mass, 1), 0)
