"""token_scores in Triton, forward and backward, without atomics.

triton_cls.py: the first query of a group against all keys ("cls", "value").
triton_mean.py: all queries ("mean").
triton_similarity.py: keys against keys ("similarity").
triton_table.py: the gradient of the table of relative positions.

PyTorch takes the mean over heads, in a fixed order. kernels/groups/ has what this op shares with
space_time_attention.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from vidl.kernels.groups import NO_BIAS, Bias, split
from vidl.kernels.triton_launch import on_device

from .triton_call import ScoresCall
from .triton_cls import cls_back, cls_weights, value_back, value_scores
from .triton_mean import mean_back, mean_scores
from .triton_similarity import similarity
from .triton_table import cls_table, mean_table


def token_scores(
    q: Tensor | None,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor | None,  # [num_keys, H, D]
    lse: Tensor | None,  # [H, num_queries]
    *rest: Any,  # the groups as in groups/triton_call.py, the bias, scale, kind
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores [E]; weights [H, E] or log-sum-exp [H, num_queries]; norms of v [num_keys]."""
    groups, bias, (scale, kind) = split(rest)
    call = ScoresCall(q, k, groups, bias)
    with on_device(k):
        if kind == "similarity":
            return similarity(call), call.empty(0), call.empty(0)
        if kind == "mean":
            return *mean_scores(call, lse, scale), call.empty(0)
        weights = cls_weights(call, scale)
        if kind == "cls":
            return weights.mean(0), weights, call.empty(0)
        assert v is not None
        scores, norms = value_scores(call, weights, v)
        return scores, weights, norms


def token_scores_bwd(
    grad_scores: Tensor,  # [E]
    weights: Tensor,  # [H, E], or for "mean" the log-sum-exp [H, num_queries]
    norms: Tensor,  # [num_keys]
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *rest: Any,  # as forward, but whether the bias needs a gradient before the scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; and that of the table [H, rows], or [0]."""
    groups, bias, (need_bias, scale, kind) = split(rest)
    call = ScoresCall(q, k, groups, bias)
    if need_bias and bias.table is None:
        raise RuntimeError("token_scores_bwd: need a bias for its gradient")
    grad_scores, weights = grad_scores.contiguous(), weights.contiguous()
    grad_v, grad_table = k.new_empty(0), call.empty(0)
    with on_device(k):
        if kind == "mean":
            grad_q, grad_k, total, delta = mean_back(call, grad_scores, weights, scale)
            if need_bias:
                grad_table = mean_table(call, grad_scores, weights, total, delta, scale)
            return grad_q, grad_k, grad_v, grad_table
        if kind == "value":
            assert v is not None
            grad_scores, grad_v = value_back(call, grad_scores, weights, norms, v)
        if need_bias:
            grad_table = cls_table(call, grad_scores, weights)
        return *cls_back(call, grad_scores, weights, scale), grad_v, grad_table


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    for kind in ("cls", "mean", "value", "similarity"):
        _launch(64, torch.bfloat16, kind)
        _launch(64, torch.float32, kind, shared=True)
        _launch(128, torch.bfloat16, kind, shared=True)
        _launch(128, torch.float32, kind)
        _launch(80, torch.float16, kind, many=True)
    for kind, D in itertools.product(("cls", "mean", "value"), (64, 128)):
        for dtype in (torch.bfloat16, torch.float32):
            _launch(D, dtype, kind, biased=True)
            _launch(D, dtype, kind, hidden=True, limited=True)
            _launch(D, dtype, kind, shared=True, many=True, biased=True, hidden=True, limited=True)


def _launch(
    D: int,
    dtype: torch.dtype,
    kind: str,
    shared: bool = False,
    many: bool = False,
    biased: bool = False,
    hidden: bool = False,
    limited: bool = False,
) -> None:
    q, k, v = torch.zeros(2, 3, 2, D, dtype=dtype).unbind(1)
    offsets, rows = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    index: Any = (offsets, offsets, None, None, None, None)
    if shared:
        entry_offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
        index = (offsets, offsets, rows, rows, entry_offsets, rows)
    bias = Bias(torch.zeros(2, 7), rows, rows, 3, None) if biased else NO_BIAS
    rest = (*index, *((8192, 8192) if many else (2, 2)), rows if limited else None)
    rest += (*bias[:4], torch.zeros(2) if hidden else None)
    values = v if kind == "value" else None
    scores, weights, norms = token_scores(q, k, values, None, *rest, 1.0, kind)
    if kind != "similarity":
        token_scores_bwd(scores, weights, norms, q, k, values, *rest, biased, 1.0, kind)
