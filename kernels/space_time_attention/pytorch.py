"""space_time_attention by PyTorch's own attention, or that of flash-attn."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vidl.kernels import library
from vidl.kernels.constant import assume_constant
from vidl.kernels.groups import (
    Arguments,
    Batched,
    Bias,
    batched,
    batched_parts,
    cls_attention,
    is_given,
    logits_of,
    mask_of,
    mean_attention,
    put_back,
    split,
)

# A batch of more fails on CUDA (pytorch #146704).
LARGEST_BATCH = 65535
HALF = (torch.float16, torch.bfloat16)


def space_time_attention(
    q: Tensor,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor,  # [num_keys, H, Dv]
    *rest: Any,  # the arguments of the groups, those of the bias, scale, scores
    lse: bool = True,
    num_global: int = 0,
    max_local_keys: int = 0,
    period: int = 0,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention for packed sequences on CUDA; otherwise SDPA of a batch of groups.

    Scores of all queries need the weights; those of the first query are a product of its own.

    Args:
        lse: whether the log-sum-exp is needed: it takes the logits, which SDPA does not return.
        num_global, max_local_keys: of `Groups`; groups of global queries are a batch of their own.
        period: of `Positions`; see `mask_of`.
        is_causal: of `Groups`; without a bias, SDPA needs no mask of the limits then.

    Returns:
        The output [num_queries, H, Dv], the log-sum-exp [H, num_queries] or [0], the scores [E] or
        [0].
    """
    groups, bias, (scale, scores) = split(rest)
    limits = groups.query_limits
    parts = batched_parts(groups, q.shape[0], k.shape[0], num_global, max_local_keys)
    equal = all(members.equal for part in parts for members in part)
    packed = not equal and not lse and not scores and not is_given(bias) and limits is None
    if packed and (call := packed_attention(q)):
        queries, keys = batched(groups, q.shape[0], k.shape[0])
        values = keys.gather(_widened(v, q.shape[-1]))  # it takes tensors of one width
        out = call(queries.gather(q), keys.gather(k), values, groups, scale)
        out = _cut(out, v.shape[-1])
        nothing = q.new_empty(0, dtype=torch.float32)
        return put_back(out, groups.query_rows), nothing, nothing
    results = [
        _attend(q, k, v, *part, limits, bias, period, is_causal, scale, scores, lse)
        for part in parts
    ]
    # The members of all groups, one part after the other.
    out, log_sum, importance = (
        x[0] if len(x) == 1 else torch.cat(x) for x in zip(*results, strict=True)
    )
    if lse:
        log_sum = put_back(log_sum, groups.query_rows).T.contiguous()
    return put_back(out, groups.query_rows), log_sum, importance


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Batched,
    keys: Batched,
    limits: Tensor | None,
    bias: Bias,
    period: int,
    is_causal: bool,
    scale: float,
    scores: str,
    lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the log-sum-exp of the members of some groups, and the scores of their keys.

    Returns:
        The output [members, H, Dv], the log-sum-exp [members, H] or [0], the scores [entries] or
        [0].
    """
    high = torch.promote_types(q.dtype, torch.float32)
    importance = log_sum = q.new_empty(0, dtype=high)
    first = q
    q, k, v = queries.batch(q), keys.batch(k), keys.batch(v)  # [G, longest, H, D]
    is_causal = is_causal and not is_given(bias) and q.shape[1] == k.shape[1]
    if is_causal and not lse and not scores and not _has_tangent(q, k, v):
        return queries.members(_sdpa(q, k, v, None, scale, is_causal)), log_sum, importance
    if bias.table is not None:  # NaN in keys without queries would reach the table's gradient
        k = queries.cleared(k)
    mask, unseen = mask_of(queries, keys, limits, bias, period)
    # Queries that see none of the keys that their group has.
    hidden = None if limits is None and bias.key_bias is None else unseen
    if unseen is not None:  # 0 x infinity is NaN
        q = q.masked_fill(unseen[:, :, None, None], 0)
    if hidden is not None:
        v = v.masked_fill(hidden.all(1)[:, None, None, None], 0)
    if scores == "mean":
        logits = logits_of(q, k, mask, scale)
        weights = logits.softmax(-1)
        if hidden is not None:
            weights = weights.masked_fill(hidden[:, None, :, None], 0)
        out = (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)
        importance = keys.members(mean_attention(weights, queries))
    else:
        out = _sdpa(q, k, v, mask, scale, is_causal)
        if scores:
            by_key = cls_attention(first, k, queries, mask, hidden, scale)
            importance = keys.members(by_key)
    if limits is not None and hidden is not None:
        out = out.masked_fill(hidden[:, :, None, None], 0)
    if lse:
        with torch.no_grad():
            logits = logits if scores == "mean" else logits_of(q, k, mask, scale)
            log_sum = logits.logsumexp(-1).transpose(1, 2)  # [G, longest, H]
            if unseen is not None:
                log_sum = log_sum.masked_fill(unseen[:, :, None], float("-inf"))
            log_sum = queries.members(log_sum)
    return queries.members(out), log_sum, importance


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """PyTorch's choice of cuDNN, flash, memory-efficient or plain attention.

    Args:
        is_causal: the mask is that of causal attention.
    """
    if _has_tangent(q, k, v):  # the fused kernels of SDPA have no forward-mode derivative
        weights = logits_of(q, k, mask, scale).softmax(-1)
        return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)
    D, Dv = q.shape[-1], v.shape[-1]
    if Dv < D and q.device.type == "cpu":
        # Its fused attention takes tensors of one width.
        return _cut(_sdpa(q, k, _widened(v, D), mask, scale, is_causal), Dv)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_causal:
        mask = None
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=scale)
    if q.shape[0] <= LARGEST_BATCH:
        return attend(q, k, v, mask).transpose(1, 2)
    outs = []
    for start in range(0, q.shape[0], LARGEST_BATCH):
        part = slice(start, start + LARGEST_BATCH)
        some = mask if mask is None or mask.shape[0] == 1 else mask[part]
        outs.append(attend(q[part], k[part], v[part], some))
    return torch.cat(outs).transpose(1, 2)


def _widened(x: Tensor, width: int) -> Tensor:
    """x with zeros as further channels."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _cut(x: Tensor, width: int) -> Tensor:
    """The first channels of x."""
    return x if x.shape[-1] == width else x[..., :width].contiguous()


def _has_tangent(*tensors: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


Packed = Callable[[Tensor, Tensor, Tensor, Arguments, float], Tensor]


def packed_attention(q: Tensor) -> Packed | None:
    """The attention for packed sequences that can run for queries [..., D] like q, if any."""
    D = q.shape[-1]
    if not q.is_cuda or D % 8 or D > 256 or library.autocast_dtype(q) not in HALF:
        return None
    if provides("flash_attn", "flash_attn_varlen_func"):
        return _flash_attn
    return _varlen_attn if provides("torch.nn.attention.varlen", "varlen_attn") else None


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, groups: Arguments, scale: float) -> Tensor:
    call: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    sizes = (groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys)
    out: Tensor = call(q, k, v, *sizes, softmax_scale=scale, deterministic=deterministic)
    return out


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, groups: Arguments, scale: float) -> Tensor:
    call: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    sizes = (groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys)
    out: Tensor = call(q, k, v, *sizes, scale=scale)
    return out


@assume_constant
@functools.cache
def provides(module: str, name: str) -> bool:
    """Whether a module is installed and has a function."""
    # The function, not the package: a wheel of FlashAttention 4 has only flash_attn.cute.
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False
