"""space_time_attention in plain PyTorch: its definition, on any device, in any floating dtype."""

import torch
from torch import Tensor

from vidl.kernels.groups import group_of


def space_time_attention(
    q: Tensor,  # [queries, H, D]
    k: Tensor,  # [keys, H, D]
    v: Tensor,  # [keys, H, D]
    query_offsets: Tensor,  # [G + 1]
    key_offsets: Tensor,  # [G + 1]
    query_rows: Tensor | None,  # [queries]
    key_rows: Tensor | None,  # [E]
    max_queries: int,
    max_keys: int,
    scale: float,
    scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad every group to the longest, mask, softmax; put the results back in their rows.

    Returns:
        The output [queries, H, D], the log-sum-exp [H, queries], and the scores [E] (or [0]).
    """
    G, (queries, H, D) = query_offsets.shape[0] - 1, q.shape
    entries = k.shape[0] if key_rows is None else key_rows.shape[0]
    query_place, query_real = _padded(query_offsets, max_queries)
    key_place, key_real = _padded(key_offsets, max_keys)

    def gather(x: Tensor, place: Tensor, real: Tensor, rows: Tensor | None) -> Tensor:
        """[G, longest, H, D]; beyond a group's end a row of zeros, since 0 x NaN is NaN."""
        end = x.shape[0]
        if rows is None:
            place = torch.where(real, place, end)
        else:
            place = torch.where(real, place, rows.shape[0])
            place = torch.cat([rows, rows.new_full((1,), end)])[place]
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[place]

    groups_q = gather(q, query_place, query_real, query_rows)
    groups_k = gather(k, key_place, key_real, key_rows)
    groups_v = gather(v, key_place, key_real, key_rows)

    high = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("gqhd,gkhd->ghqk", groups_q, groups_k).to(high) * scale
    logits = logits.masked_fill(~key_real[:, None, None, :], float("-inf"))
    # A group without keys gives zeros: its rows of -inf must not become NaN.
    empty = (key_offsets.diff() == 0)[:, None, None, None]
    weights = torch.where(empty, 0, logits.masked_fill(empty, 0.0).softmax(-1))
    lse = logits.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    out = torch.einsum("ghqk,gkhd->gqhd", weights.to(v.dtype), groups_v)

    # From [G, max_queries] to rows: position of a row among the queries, then in its group.
    group = group_of(query_offsets, queries)
    inside = torch.arange(queries, device=q.device) - query_offsets[group]
    place = group * max_queries + inside
    if query_rows is not None:
        place = place[torch.argsort(query_rows, stable=True)]
    out = out.reshape(G * max_queries, H, D)[place]
    lse = lse.transpose(0, 1).reshape(H, G * max_queries)[:, place]
    if not scores:
        return out, lse, lse.new_empty(0)

    if scores == "cls":
        importance = weights[:, :, :1].sum(2).mean(1)  # [G, max_keys]; no query, no importance
        importance = torch.where((query_offsets.diff() > 0)[:, None], importance, 0)
    else:
        sizes = query_offsets.diff().clamp(min=1)[:, None]
        real = torch.where(query_real[:, None, :, None], weights, 0)
        importance = real.sum(2).mean(1) / sizes
    group = group_of(key_offsets, entries)
    inside = torch.arange(entries, device=q.device) - key_offsets[group]
    return out, lse, importance.reshape(-1)[group * max_keys + inside]


def _padded(offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where the members of each group are, [G, longest], and which of those are real."""
    inside = torch.arange(longest, device=offsets.device)
    real = inside < offsets.diff()[:, None]
    return offsets[:-1, None] + inside, real
