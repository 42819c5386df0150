"""token_scores in Triton, forward and backward, without atomics.

triton_cls.py: one query against all keys ("cls", "value").
triton_mean.py: all queries ("mean").
triton_similarity.py: keys against keys ("similarity").

PyTorch takes the mean over heads, in fixed order. What they share is in kernels/triton_groups.py
and, on the host, in triton_call.py.
"""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.triton_launch import on_device

from .triton_call import Call
from .triton_cls import cls_back, cls_weights, value_back, value_scores
from .triton_mean import mean_back, mean_scores
from .triton_similarity import similarity


def token_scores(
    q: Tensor | None,  # [Q, H, D]
    k: Tensor,  # [K, H, D]
    v: Tensor | None,  # [K, H, D]
    lse: Tensor | None,  # [H, Q]
    query_offsets: Tensor,  # [G + 1]
    key_offsets: Tensor,  # [G + 1]
    query_rows: Tensor | None,  # [Q]
    key_rows: Tensor | None,  # [E]
    entry_offsets: Tensor | None,  # [K + 1]
    entries: Tensor | None,  # [E]
    max_queries: int,
    max_keys: int,
    scale: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores [E]; the weights [H, E], or the log-sum-exp [H, Q]; the lengths of values [K]."""
    index = (query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries)
    c = Call(q, k, *index, max_queries, max_keys)
    with on_device(k):
        if kind == "similarity":
            return similarity(c), c.empty(0), c.empty(0)
        if kind == "mean":
            return *mean_scores(c, lse, scale), c.empty(0)
        weights = cls_weights(c, scale)
        if kind == "cls":
            return weights.mean(0), weights, c.empty(0)
        assert v is not None
        scores, norms = value_scores(c, weights, v)
        return scores, weights, norms


def token_scores_bwd(
    grad_scores: Tensor,  # [E]
    weights: Tensor,  # [H, E], or for "mean" the log-sum-exp [H, Q]
    norms: Tensor,  # [K]
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    entry_offsets: Tensor | None,
    entries: Tensor | None,
    max_queries: int,
    max_keys: int,
    scale: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    index = (query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries)
    c = Call(q, k, *index, max_queries, max_keys)
    grad_scores, weights = grad_scores.contiguous(), weights.contiguous()
    grad_v = k.new_empty(0)
    with on_device(k):
        if kind == "mean":
            return *mean_back(c, grad_scores, weights, scale), grad_v
        if kind == "value":
            assert v is not None
            grad_scores, grad_v = value_back(c, grad_scores, weights, norms, v)
        return *cls_back(c, grad_scores, weights, scale), grad_v


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    for kind in ("cls", "mean", "value", "similarity"):
        _launch(64, torch.bfloat16, kind)
        _launch(64, torch.float32, kind, shared=True)
        _launch(128, torch.bfloat16, kind, shared=True)
        _launch(128, torch.float32, kind)
        _launch(80, torch.float16, kind, many=True)


def _launch(
    D: int, dtype: torch.dtype, kind: str, shared: bool = False, many: bool = False
) -> None:
    q, k, v = torch.zeros(2, 3, 2, D, dtype=dtype).unbind(1)
    offsets, rows = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    index: Any = (offsets, offsets, None, None, None, None)
    if shared:
        index = (offsets, offsets, rows, rows, offsets, rows)
    rest = (*index, *((8192, 8192) if many else (2, 2)), 1.0, kind)
    scores, weights, norms = token_scores(q, k, v if kind == "value" else None, None, *rest)
    if kind != "similarity":
        token_scores_bwd(scores, weights, norms, q, k, v if kind == "value" else None, *rest)
