"""space_time_attention in plain PyTorch: its definition, on any device, in any floating dtype."""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.groups import Padded, attention_weights, split


def space_time_attention(
    q: Tensor,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor,  # [num_keys, H, Dv]
    *rest: Any,  # the arguments of the groups, those of the bias, scale, scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad every group to the longest, mask, softmax; put the results back in their rows.

    Returns:
        The output [num_queries, H, Dv], the log-sum-exp [H, num_queries], the scores [E] or [0].
    """
    groups, bias, (scale, scores) = split(rest)
    queries = Padded(groups.query_offsets, groups.query_rows, groups.max_queries)
    keys = Padded(groups.key_offsets, groups.key_rows, groups.max_keys)
    logits, weights = attention_weights(q, k, queries, keys, scale, groups.query_limits, bias)
    out = torch.einsum("ghqk,gkhd->gqhd", weights.to(v.dtype), keys.pad(v))
    # A query that sees no key gives zeros, even if others of its group see infinity.
    unseen = (logits == float("-inf")).all(-1).transpose(1, 2)[..., None]
    out = queries.unpad(torch.where(unseen, 0, out), q.shape[0])
    lse = queries.unpad(logits.logsumexp(-1).transpose(1, 2), q.shape[0]).T.contiguous()
    if groups.query_rows is not None:
        member = torch.argsort(groups.query_rows, stable=True)  # of every row
        out, lse = out[member], lse[:, member]
    if not scores:
        return out, lse, lse.new_empty(0)

    if scores == "cls":  # the first query; without queries zero
        importance = torch.where(queries.sizes[:, None] > 0, weights[:, :, :1].sum(2).mean(1), 0)
    else:
        weights = torch.where(queries.real[:, None, :, None], weights, 0)
        importance = weights.sum(2).mean(1) / queries.sizes.clamp(min=1)[:, None]
    return out, lse, keys.unpad(importance, groups.num_entries(k.shape[0]))
