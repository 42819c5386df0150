"""token_scores in plain PyTorch: its definition, on any device, in any floating dtype."""

import torch
from torch import Tensor

from vidl.kernels.groups import group_of


def token_scores(
    q: Tensor | None,  # [queries, H, D]
    k: Tensor,  # [keys, H, D]
    v: Tensor | None,  # [keys, H, D]
    lse: Tensor | None,  # [H, queries]
    query_offsets: Tensor,  # [G + 1]
    key_offsets: Tensor,  # [G + 1]
    query_rows: Tensor | None,  # [queries]
    key_rows: Tensor | None,  # [E]
    max_queries: int,
    max_keys: int,
    scale: float,
    kind: str,
) -> Tensor:
    """Pad every group to the longest, score its keys, and put the scores back: [E]."""
    high = torch.promote_types(k.dtype, torch.float32)
    keys = _Members(key_offsets, key_rows, max_keys)
    if kind == "similarity":
        importance = _unlike(keys.of(k.to(high).mean(1)), keys.real)
    else:
        assert q is not None
        queries = _Members(query_offsets, query_rows, max_queries if kind == "mean" else 1)
        importance = _attention(q, k, lse, queries, keys, scale)
    if kind == "value":
        assert v is not None
        lengths = torch.linalg.vector_norm(v, dim=(1, 2), dtype=high)
        importance = importance * keys.of(lengths)
        total = importance.sum(1, keepdim=True)
        importance = importance / torch.where(total == 0, 1, total)

    entries = k.shape[0] if key_rows is None else key_rows.shape[0]
    group = group_of(key_offsets, entries)
    inside = torch.arange(entries, device=k.device) - key_offsets[group]
    return importance.reshape(-1)[group * max_keys + inside]


class _Members:
    """The first `longest` members of every group, padded."""

    def __init__(self, offsets: Tensor, rows: Tensor | None, longest: int) -> None:
        inside = torch.arange(longest, device=offsets.device)
        self.sizes = offsets.diff()
        self.real = inside < self.sizes[:, None]  # [G, longest]
        self.place = offsets[:-1, None] + inside
        self.rows = rows

    def of(self, x: Tensor) -> Tensor:
        """[G, longest, ...]; beyond a group's end a row of zeros, since 0 x NaN is NaN."""
        end = x.shape[0]
        if self.rows is None:
            place = torch.where(self.real, self.place, end)
        else:
            place = torch.where(self.real, self.place, self.rows.shape[0])
            place = torch.cat([self.rows, self.rows.new_full((1,), end)])[place]
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[place]


def _attention(
    q: Tensor, k: Tensor, lse: Tensor | None, queries: _Members, keys: _Members, scale: float
) -> Tensor:
    """The mean attention of these queries, over heads too: [G, max_keys]."""
    high = torch.promote_types(k.dtype, torch.float32)
    logits = torch.einsum("gqhd,gkhd->ghqk", queries.of(q), keys.of(k)).to(high) * scale
    logits = logits.masked_fill(~keys.real[:, None, None, :], float("-inf"))
    # A group without keys gives zeros: its rows of -inf must not become NaN.
    empty = (keys.sizes == 0)[:, None, None, None]
    weights = torch.where(empty, 0, logits.masked_fill(empty, 0.0).softmax(-1))
    if lse is not None:
        given = queries.of(lse.T).transpose(1, 2)[..., None]  # [G, H, max_queries, 1]
        exact = torch.where(empty, 0, torch.exp(logits - given))
        # The value by the log-sum-exp that was given; the gradient of the softmax it is part of.
        weights = weights + (exact - weights).detach()
    weights = torch.where(queries.real[:, None, :, None], weights, 0)
    count = queries.real.sum(1).clamp(min=1)
    return weights.sum(2).mean(1) / count[:, None]


def _unlike(metric: Tensor, real: Tensor) -> Tensor:
    """Minus the greatest cosine of members at even places to one at an odd place: [G, max_keys]."""
    metric = torch.nn.functional.normalize(metric, dim=-1)
    cosines = metric[:, ::2] @ metric[:, 1::2].mT
    cosines = cosines.masked_fill(~real[:, None, 1::2], float("-inf"))
    none = cosines.new_full((*cosines.shape[:2], 1), float("-inf"))
    scores = torch.full_like(metric[..., 0], float("inf"))
    scores[:, ::2] = -torch.cat([cosines, none], -1).amax(-1)
    return scores
