"""token_scores as products of PyTorch, without padding where groups are equal."""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.groups import (
    Arguments,
    batched,
    cls_attention,
    logits_of,
    mask_of,
    mean_attention,
)

from . import reference


def token_scores(
    q: Tensor | None,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor | None,  # [num_keys, H, D]
    lse: Tensor | None,  # [H, num_queries]
    *rest: Any,  # the arguments of the groups, scale, kind
) -> Tensor:
    """One row of attention weights for each group, or for "mean" all of them: [E]."""
    *arguments, scale, kind = rest
    groups = Arguments(*arguments)
    if kind == "similarity":
        return reference.token_scores(q, k, v, lse, *rest)
    assert q is not None
    queries, keys = batched(groups, q.shape[0], k.shape[0])
    batch = keys.batch(k)
    mask, _ = mask_of(queries, keys)
    if kind == "mean":
        logits = logits_of(queries.batch(q), batch, mask, scale)
        weights = logits.softmax(-1)
        if lse is not None:
            given = queries.batch(lse.T).transpose(1, 2)[..., None]  # [G, H, longest, 1]
            # The value comes from the given log-sum-exp, the gradient from the softmax.
            weights = weights + (torch.exp(logits - given) - weights).detach()
        return keys.members(mean_attention(weights, queries))
    importance = cls_attention(q, batch, queries, mask, scale)
    if kind == "value":
        assert v is not None
        norms = torch.linalg.vector_norm(v, dim=(1, 2), dtype=importance.dtype)
        importance = importance * keys.batch(norms)
        total = importance.sum(1, keepdim=True)
        importance = importance / torch.where(total == 0, 1, total)
    return keys.members(importance)
