"""token_scores as products of PyTorch, without padding where groups are equal."""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.groups import (
    batched,
    cls_attention,
    logits_of,
    mask_of,
    mean_attention,
    split,
)

from . import reference


def token_scores(
    q: Tensor | None,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor | None,  # [num_keys, H, D]
    lse: Tensor | None,  # [H, num_queries]
    *rest: Any,  # the arguments of the groups, those of the bias, scale, kind
) -> Tensor:
    """One row of attention weights for each group, or for "mean" all of them: [E]."""
    groups, bias, (scale, kind) = split(rest)
    if kind == "similarity":
        return reference.token_scores(q, k, v, lse, *rest)
    assert q is not None
    queries, keys = batched(groups, q.shape[0], k.shape[0])
    batch = keys.batch(k)
    if bias.table is not None:  # NaN in keys without queries would reach the table's gradient
        batch = queries.cleared(batch)
    mask, unseen = mask_of(queries, keys, groups.query_limits, bias)
    if kind == "mean":
        logits = logits_of(queries.batch(q), batch, mask, scale)
        weights = logits.softmax(-1)
        if lse is not None:
            given = queries.batch(lse.T).transpose(1, 2)[..., None]  # [G, H, longest, 1]
            # The value comes from the given log-sum-exp, the gradient from the softmax.
            weights = weights + (torch.exp(logits - given) - weights).detach()
        if unseen is not None:
            weights = weights.masked_fill(unseen[:, None, :, None], 0)
        return keys.members(mean_attention(weights, queries))
    importance = cls_attention(q, batch, queries, mask, unseen, scale)
    if kind == "value":
        assert v is not None
        norms = torch.linalg.vector_norm(v, dim=(1, 2), dtype=importance.dtype)
        importance = importance * keys.batch(norms)
        total = importance.sum(1, keepdim=True)
        importance = importance / torch.where(total == 0, 1, total)
    return keys.members(importance)
