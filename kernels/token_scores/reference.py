"""token_scores in plain PyTorch: its definition, on any device, in any floating dtype."""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.groups import Bias, Padded, attention_weights, split


def token_scores(
    q: Tensor | None,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor | None,  # [num_keys, H, D]
    lse: Tensor | None,  # [H, num_queries]
    *rest: Any,  # the arguments of the groups, those of the bias, scale, kind
) -> Tensor:
    """Pad every group to the longest, score its keys, and put the scores back: [E]."""
    groups, bias, (scale, kind) = split(rest)
    high = torch.promote_types(k.dtype, torch.float32)
    keys = Padded(groups.key_offsets, groups.key_rows, groups.max_keys)
    if kind == "similarity":
        importance = _unlike(keys.pad(k.to(high).mean(1)), keys.real)
    else:
        assert q is not None
        longest = groups.max_queries if kind == "mean" else 1
        queries = Padded(groups.query_offsets, groups.query_rows, longest)
        importance = _attention(q, k, lse, queries, keys, groups.query_limits, bias, scale)
    if kind == "value":
        assert v is not None
        # Padded first: the gradient of the norm of a row of no group, which may be NaN, is zero.
        norms = torch.linalg.vector_norm(keys.pad(v), dim=(2, 3), dtype=high)
        importance = importance * norms
        total = importance.sum(1, keepdim=True)
        importance = importance / torch.where(total == 0, 1, total)
    return keys.unpad(importance, groups.num_entries(k.shape[0]))


def _attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    queries: Padded,
    keys: Padded,
    limits: Tensor | None,
    bias: Bias,
    scale: float,
) -> Tensor:
    """The attention that each key receives, averaged over heads and queries: [G, max_keys]."""
    logits, weights = attention_weights(q, k, queries, keys, scale, limits, bias)
    if lse is not None:
        given = queries.pad(lse.T).transpose(1, 2)[..., None]  # [G, H, max_queries, 1]
        # The log-sum-exp of a query that sees no key is -inf.
        exact = torch.where(logits == float("-inf"), 0, torch.exp(logits - given))
        # The value comes from the given log-sum-exp, the gradient from the softmax.
        weights = weights + (exact - weights).detach()
    weights = torch.where(queries.real[:, None, :, None], weights, 0)
    count = queries.real.sum(1).clamp(min=1)
    return weights.sum(2).mean(1) / count[:, None]


def _unlike(metric: Tensor, real: Tensor) -> Tensor:
    """Minus the greatest cosine of each even key to an odd key of its group: [G, max_keys]."""
    metric = torch.nn.functional.normalize(metric, dim=-1)
    cosines = metric[:, ::2] @ metric[:, 1::2].mT
    cosines = cosines.masked_fill(~real[:, None, 1::2], float("-inf"))
    none = cosines.new_full((*cosines.shape[:2], 1), float("-inf"))
    scores = torch.full_like(metric[..., 0], float("inf"))
    scores[:, ::2] = -torch.cat([cosines, none], -1).amax(-1)
    return scores
