"""space_time_attention: attention of packed tokens in groups.

    out[i] = sum over the keys j of i's group: softmax_j(scale q_i . k_j + bias_ij) v_j

Every query belongs to exactly one group; a key may belong to several. Different groups make this
spatial (per frame), temporal (per position), joint, windowed, divided, block-sparse or
cross-attention, with all tokens or after masking and pruning. Sources: Frozen in Time (arXiv
2104.00650, 3.1), TimeSformer (arXiv 2102.05095, 3), Video Swin (arXiv 2106.13230, 3.2), SViTT
(arXiv 2304.08809, 3.2).
"""

import os
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels import choices, gpu, library
from vidl.kernels.arguments import check_flag, check_tensors, finite, in_dtype
from vidl.kernels.groups import (
    BIAS_SCHEMA,
    NO_BIAS,
    SCHEMA,
    Arguments,
    Bias,
    Groups,
    Positions,
    bias_of,
    is_given,
    split,
)

from . import pytorch, reference

Scores = Literal["cls", "mean"]
HEAD_SIZES = (32, 64, 80, 96, 128)
BIASED_HEAD_SIZES = (32, 64)  # of the CUDA C++ kernels that take a bias


def _limits(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_size: int = 64,
    bias: bool = False,
    query_limits: bool = False,
) -> str | None:
    if head_size not in HEAD_SIZES:
        return f"head sizes are {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    if backend == "triton" or (backend, device) == ("native", "cpu"):
        return None
    if dtype == torch.float32:
        return "its CUDA kernels multiply in float16 and bfloat16 only"
    if bias and head_size not in BIASED_HEAD_SIZES:
        sizes = " and ".join(map(str, BIASED_HEAD_SIZES))
        return f"its CUDA kernels take a bias and a key_bias for heads of {sizes}, not {head_size}"
    if (backend, device) == ("native", "cuda") and (given := gpu.shared_memory()) is not None:
        # The backward of long groups (blocked.h): six tiles of 64 rows, and the log-sum-exp and
        # delta of two tiles of queries. All other kernels have one that needs less. Limits and a
        # bias add numbers of two tiles, the gradient of a table those of 64 x 64 pairs (table.h).
        needed = 6 * 64 * (head_size + 8) * 2 + 4 * 64 * 4
        needed += (1024 if bias or query_limits else 0) + (512 + 64 * 72 * 4 if bias else 0)
        if needed > given:
            return (
                f"heads of {head_size} need {needed} bytes of shared memory for a block, this GPU "
                f"has {given}"
            )
    return None


def _fake(q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor]:
    groups, _, (_, scores) = split(rest)
    entries = groups.num_entries(k.shape[0])
    high = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(*q.shape[:2], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=high),
        q.new_empty(entries if scores else 0, dtype=high),
    )


def _fake_bwd(
    grad_out, grad_scores, q, k, v, out, lse, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    _, bias, (need_bias, _, _) = split(rest)
    grad_bias = lse.new_empty(bias.table.shape if need_bias and bias.table is not None else 0)
    return grad_q, grad_k, grad_v, grad_bias


def _pairs(groups: Arguments) -> int:
    """Pairs of a query and a key that it sees: the useful work, without padding."""
    if groups.query_limits is not None:
        return int(groups.query_limits.sum())
    queries, keys = groups.query_offsets.diff().long(), groups.key_offsets.diff().long()
    return int((queries * keys).sum())


def _flops(q, k, v, *rest, **kwargs) -> int:
    _, H, D = q.shape
    return 2 * _pairs(split(rest)[0]) * H * (D + v.shape[2])


def _flops_bwd(grad_out, grad_scores, q, k, v, out, lse, *rest, **kwargs) -> int:
    _, H, D = q.shape
    # Three matmuls are as wide as q and k, two as v.
    return 2 * _pairs(split(rest)[0]) * H * (3 * D + 2 * v.shape[2])


def _setup_context(ctx, inputs, output) -> None:
    out, lse, _ = output
    *lists, ctx.max_queries, ctx.max_keys, limits, table, query_codes, key_codes = inputs[:15]
    ctx.shift, key_bias, ctx.scale, ctx.scores = inputs[15:]
    ctx.save_for_backward(*lists, limits, table, query_codes, key_codes, key_bias, out, lse)
    ctx.set_materialize_grads(False)


def _backward(bwd: Callable[..., Any], ctx, grad_out, grad_lse, grad_scores):
    q, k, v, *lists, limits, table, query_codes, key_codes, key_bias, out, lse = ctx.saved_tensors
    if not ctx.scores:  # scores that were not requested are empty, and may have an empty gradient
        grad_scores = None
    if grad_out is None and grad_scores is None:
        return (None,) * 19
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    need_bias = table is not None and ctx.needs_input_grad[12]
    grad_q, grad_k, grad_v, grad_bias = bwd(
        grad_out,
        grad_scores if grad_scores is None else grad_scores.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        *lists,
        ctx.max_queries,
        ctx.max_keys,
        limits,
        table,
        query_codes,
        key_codes,
        ctx.shift,
        key_bias,
        need_bias,
        ctx.scale,
        ctx.scores,
    )
    return grad_q, grad_k, grad_v, *(None,) * 9, grad_bias if need_bias else None, *(None,) * 6


def _adapt(
    call: Callable[..., Any], backend: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad v for kernels that need it as wide as q, and cut the output.

    With q and k of D channels and v of Dv, this costs a copy of v and of the output, of D channels
    each, and (D - Dv) / 2D of the FLOPs.
    """
    D, Dv = q.shape[2], v.shape[2]
    if Dv == D or (backend, q.device.type) == ("native", "cpu"):
        return call(q, k, v, *rest)
    out, lse, scores = call(q, k, F.pad(v, (0, D - Dv)), *rest)
    return out[..., :Dv].contiguous(), lse, scores


library.define(
    library.Op(
        "space_time_attention_bwd(Tensor grad_out, Tensor? grad_scores, Tensor q, Tensor k, "
        f"Tensor v, Tensor out, Tensor lse, {SCHEMA}, {BIAS_SCHEMA}, bool need_bias, float scale, "
        "str scores) -> (Tensor, Tensor, Tensor, Tensor)",
        module=__package__,
        fake=_fake_bwd,
        flops=_flops_bwd,
    )
)
library.define(
    library.Op(
        f"space_time_attention(Tensor q, Tensor k, Tensor v, {SCHEMA}, {BIAS_SCHEMA}, "
        "float scale, str scores) -> (Tensor out, Tensor lse, Tensor scores)",
        module=__package__,
        fake=_fake,
        flops=_flops,
        reference=reference.space_time_attention,
        torch=pytorch.space_time_attention,
        adapt=_adapt,
        limits=_limits,
        setup_context=_setup_context,
        backward=_backward,
    )
)


@overload
def space_time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = ...,
    positions: Positions | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    return_scores: None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def space_time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = ...,
    positions: Positions | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: bool = ...,
    return_scores: Scores | None = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, ...]: ...


def space_time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    positions: Positions | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_scores: Scores | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of every query to the keys of its group.

    The attention weights are never materialized. Deterministic, forward and backward. NaN or
    infinity in one group never reaches another; the gradient of `bias` is of all groups. A group
    without keys gives zeros, with zero gradients.

    Args:
        q: [num_queries, H, D] float32 (not for "native" on CUDA), float16 or bfloat16; D is 32, 64,
            80, 96 or 128 (any, for "torch" and "reference"). The last dimension is contiguous, or
            copied; the others have any stride: slices of a fused [total, 3, H, D] buffer need no
            copy.
        k: [num_keys, H, D], the same dtype and device.
        v: [num_keys, H, Dv], the same; Dv is at most D. Channels of q and k beyond Dv add to the
            logits only. "native" on the CPU computes Dv channels; "native" on CUDA, "triton" and
            fused attention of "torch" pad v to D: a copy of v and of the output, and (D - Dv) / 2D
            of the FLOPs.
        groups: which queries attend to which keys. With `query_limits` (`groups.causal`,
            `Groups.prefix`, `groups.padded`) a query sees the first keys of its group only; a query
            that sees none counts as one of a group without keys.
        bias: [positions.rows, H], any floating dtype: a table of what is added to the logits, by
            the relative position of query and key. Differentiable. "native" on CUDA takes `bias`
            and `key_bias` for heads of 32 and 64.
        positions: which row of `bias` belongs to a query and a key.
        key_bias: [num_keys] float32, added to all logits of a key: -inf hides it. A query whose
            keys are all hidden counts as one without keys. Not differentiable.
        scale: finite factor of the logits before the softmax; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of every query's logits, [H, num_queries] in
            float32, natural logarithm; not differentiable.
        return_scores: also return the attention that each key receives, averaged over heads,
            float32, [E] in the order of the groups' entries (the rows of k if `groups.key_rows` is
            None). "cls": from the first query of its group; "mean": from all queries of its group,
            on average. Differentiable.
        backend: "auto", "native", "triton", "torch" or "reference". "torch" calls the
            attention of PyTorch or of flash-attn: deterministic only under
            `torch.use_deterministic_algorithms`, as far as PyTorch makes them so, and
            differentiable twice only under `sdpa_kernel(SDPBackend.MATH)`.

    Returns:
        The output [num_queries, H, Dv]; with options a tuple of the output, the log-sum-exp and
        the scores, as far as requested.

    Raises:
        TypeError: a dtype is not one of those above, or `groups` is something else.
        ValueError: shapes, devices or options do not fit together.
        RuntimeError: a backend asked for by name cannot run here; or, on the CPU, the groups'
            offsets or rows are out of range. On CUDA `Groups` checks them once, when it is made;
            the kernels never read or write out of range, and the results of groups that were not
            checked have no meaning. `groups.check()` detects more; with VIDL_DEBUG=1 in the
            environment every call checks the groups.
    """
    _check(q, k, v, groups, return_scores)
    check_flag("return_lse", return_lse)
    dtype = library.autocast_dtype(q)
    q, k, v = in_dtype(q, dtype), in_dtype(k, dtype), in_dtype(v, dtype)
    scale = q.shape[2] ** -0.5 if scale is None else finite("scale", scale)
    added = bias_of(bias, positions, key_bias, groups, q.shape[1])
    chosen = choose(backend, q, k, v, groups, added, return_lse, return_scores)
    args = (q, k, v, *groups.arguments(), *added, scale, return_scores or "")
    hints = {"num_global": groups.num_global, "max_local_keys": groups.max_local_keys}
    if positions is not None:
        hints["period"] = positions.period
    if groups.is_causal:
        hints["is_causal"] = True
    out, lse, scores = library.run("space_time_attention", chosen, *args, lse=return_lse, **hints)
    results = [out, *([lse.detach()] if return_lse else []), *([scores] if return_scores else [])]
    return results[0] if len(results) == 1 else tuple(results)


def choose(
    backend: str,
    q: Tensor,  # in the dtype of the computation
    k: Tensor,
    v: Tensor,
    groups: Groups,
    bias: Bias = NO_BIAS,
    return_lse: bool = False,
    return_scores: Scores | None = None,
) -> str:
    """The backend of a call: see `library.choose`."""
    kind, (rows, H, D) = q.device.type, q.shape
    limited = groups.query_limits is not None
    narrow = {} if v.shape[2] == D else {"value_size": v.shape[2]}

    def key() -> choices.Key | None:
        return choices.key(
            "space_time_attention",
            kind,
            q.dtype,
            (q, k, v, bias.table),
            {"queries": groups.max_queries, "keys": groups.max_keys, "rows": rows * H},
            head_size=D,
            groups=groups.layout,
            bias=is_given(bias),
            query_limits=limited,
            lse=return_lse,
            scores=return_scores or "",
            **narrow,
        )

    facts = {"head_size": D, "bias": is_given(bias), "query_limits": limited}
    return library.choose(backend, "space_time_attention", kind, q.dtype, key, **facts)


def _check(q: Tensor, k: Tensor, v: Tensor, groups: Groups, return_scores: Scores | None) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(f"need groups made by vidl.ops.Groups, got {type(groups).__name__}")
    check_tensors(groups=groups.query_offsets, q=q, k=k, v=v)
    queries, keys, values = q.shape, k.shape, v.shape
    fits = len(queries) == len(keys) == len(values) == 3
    fits = fits and queries[1:] == keys[1:] and values[:2] == keys[:2]
    if not fits or values[2] > keys[2]:
        raise ValueError(
            "need q [num_queries, H, D], k [num_keys, H, D] and v [num_keys, H, Dv], Dv at most "
            f"D, got {tuple(queries)}, {tuple(keys)} and {tuple(values)}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"need q, k and v in one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if queries[0] != groups.num_queries or keys[0] != groups.num_keys:
        raise ValueError(
            f"need {groups.num_queries} queries and {groups.num_keys} keys in q and k for these "
            f"groups, got {queries[0]} and {keys[0]}"
        )
    if return_scores not in (None, "cls", "mean"):
        raise ValueError(f"need return_scores None, 'cls' or 'mean', got {return_scores!r}")
    if os.environ.get("VIDL_DEBUG") == "1":
        groups.check()
