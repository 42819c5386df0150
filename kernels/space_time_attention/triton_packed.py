"""Packed groups: at most 16 queries and keys, several pairs of a group and a head in a program.

Each pair is a matrix of its own in a batched matmul, so pairs cannot affect one another. The limit
is the memory: forward, q, k, v and out pass once, 8 queries * D bytes a pair in 16 bits with as
many keys, for 4 * queries * keys * D useful FLOPs; 16 queries and keys are always computed.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import (
    add_bias,
    any_seen,
    head_table,
    key_codes,
    query_codes,
    seen_keys,
)
from vidl.kernels.groups.triton_limits import (
    has_seen,
    key_limits,
    seen_by,
    zero_single,
    zero_unseeing,
)
from vidl.kernels.groups.triton_rows import load_rows, rows_at, span, store_rows
from vidl.kernels.groups.triton_softmax import (
    LOG2_E,
    key_scores,
    multiply,
    softmax,
    transpose,
    weights_back,
)

from .triton_call import AttentionCall, Tile

# The queries and the keys of a packed group, at most: the smallest matrix of a tensor core.
SLOT = 16
# Pairs of a group and a head in a program.
PACK = 4


@triton.jit
def packed_work(query_offsets_ptr, key_offsets_ptr, G, H, num_queries, E, PACK: tl.constexpr):
    """For each pair, [PACK, 1]: its head, first query, queries, first key and keys."""
    item = tl.program_id(0).to(tl.int64) * PACK + tl.arange(0, PACK)[:, None]
    mask = item < G.to(tl.int64) * H
    first_query, queries = span(query_offsets_ptr, item // H, mask, num_queries)
    first_key, keys = span(key_offsets_ptr, item // H, mask, E)
    return item % H, first_query, queries, first_key, keys


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last"])
def packed_forward_kernel(
    q_ptr,  # [num_queries, H, D]
    k_ptr,  # [num_keys, H, D]
    v_ptr,  # [num_keys, H, D]
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    query_rows_ptr,  # [num_queries] or None
    key_rows_ptr,  # [E] or None
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
    out_ptr,  # [num_queries, H, D]
    lse_ptr,  # [H, num_queries]
    scores_ptr,  # [H, E] or None
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    num_queries,
    E,
    num_keys,
    shift,
    last,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    SLOT: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Attention of all queries of PACK pairs of a group and a head; bound by memory."""
    h, first_query, queries, first_key, keys = packed_work(
        query_offsets_ptr, key_offsets_ptr, G, H, num_queries, E, PACK
    )
    i = tl.arange(0, SLOT)[None, :]
    real_query, real_key = i < queries, i < keys  # [PACK, SLOT]
    query = rows_at(query_rows_ptr, first_query + i, real_query, num_queries)
    key = rows_at(key_rows_ptr, first_key + i, real_key, num_keys)
    seen, key_bias = seen_keys(key_bias_ptr, key, real_key)
    limit = key_limits(query_limits_ptr, query, real_query, keys)
    q = load_rows(q_ptr, query * q_row + h * q_head, real_query, D, BLOCK_D)
    k = load_rows(k_ptr, key * k_row + h * k_head, seen, D, BLOCK_D)
    v = load_rows(v_ptr, key * v_row + h * v_head, seen, D, BLOCK_D)
    query_code = query_codes(query_codes_ptr, query, real_query, shift)[:, :, None]
    key_code = key_codes(key_codes_ptr, key, real_key)[:, None, :]
    table = head_table(last, h)[:, :, None]
    logits = multiply(q, transpose(k)) * (scale * LOG2_E)  # [PACK, SLOT, SLOT]
    logits = add_bias(
        *(logits, table_ptr, key_bias_ptr, last, table, query_code, key_code),
        key_bias[:, None, :],
    )
    pair = seen_by(query_limits_ptr, seen[:, None, :], i[:, None, :], limit[:, :, None])
    has_keys = has_seen(query_limits_ptr, any_seen(keys, seen, key_bias_ptr), pair)
    logits = tl.where(pair, logits, float("-inf"))
    weights, total, lse = softmax(logits, has_keys)
    out = multiply(weights.to(v.dtype), v) / total[:, :, None]
    out = zero_unseeing(query_limits_ptr, out, has_keys)
    store_rows(out_ptr, (query * H + h) * D, out, real_query, D, BLOCK_D)
    tl.store(lse_ptr + h * num_queries + query, lse, mask=real_query)
    if scores_ptr is not None:
        scores = key_scores(weights, total, i, real_query, queries, SCORES)
        tl.store(scores_ptr + h * E + first_key + i, scores, mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last"])
def packed_backward_kernel(
    grad_out_ptr,  # [num_queries, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [H, num_queries]
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
    delta_ptr,  # [H, num_queries] or None
    grad_q_ptr,  # [num_queries, H, D]
    grad_k_ptr,  # [num_keys, H, D], or [E, H, D]
    grad_v_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    num_queries,
    E,
    num_keys,
    shift,
    last,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    SLOT: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """All gradients of PACK pairs; bound by memory, 7 rows of D numbers a token."""
    h, first_query, queries, first_key, keys = packed_work(
        query_offsets_ptr, key_offsets_ptr, G, H, num_queries, E, PACK
    )
    i = tl.arange(0, SLOT)[None, :]
    real_query, real_key = i < queries, i < keys
    query = rows_at(query_rows_ptr, first_query + i, real_query, num_queries)
    key = rows_at(key_rows_ptr, first_key + i, real_key, num_keys)
    seen, key_bias = seen_keys(key_bias_ptr, key, real_key)
    limit = key_limits(query_limits_ptr, query, real_query, keys)
    query_code = query_codes(query_codes_ptr, query, real_query, shift)
    key_code = key_codes(key_codes_ptr, key, real_key)
    table = head_table(last, h)
    q = load_rows(q_ptr, query * q_row + h * q_head, real_query, D, BLOCK_D)
    grad_out = load_rows(grad_out_ptr, (query * H + h) * D, real_query, D, BLOCK_D)
    k = load_rows(k_ptr, key * k_row + h * k_head, seen, D, BLOCK_D)
    v = load_rows(v_ptr, key * v_row + h * v_head, seen, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * num_queries + query, mask=real_query, other=0.0)
    grad_score = tl.zeros([PACK, SLOT], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + first_key + i, mask=real_key, other=0.0) / H
        if SCORES == "mean":
            grad_score = grad_score / tl.maximum(queries, 1)
    weights, grads = weights_back(  # [PACK, keys, queries]
        q,
        k,
        v,
        grad_out,
        lse[:, None, :],
        grad_score[:, :, None],
        (i == 0)[:, None, :],
        seen_by(
            query_limits_ptr,
            seen[:, :, None] & real_query[:, None, :],
            i[:, :, None],
            limit[:, None, :],
        ),
        scale,
        (
            table_ptr,
            key_bias_ptr,
            last,
            table[:, :, None],
            query_code[:, None, :],
            key_code[:, :, None],
            key_bias[:, :, None],
        ),
        SCORES,
        KEYS_FIRST=True,
    )
    delta = tl.sum(weights * grads, 1)
    if delta_ptr is not None:
        tl.store(delta_ptr + h * num_queries + query, delta, mask=real_query)
    grad_logits = weights * (grads - delta[:, None, :])
    grad_logits = zero_single(query_limits_ptr, grad_logits, limit[:, None, :]).to(q.dtype)
    entry = key
    if SHARED:
        entry = (first_key + i).to(tl.int64)
    grad_v = multiply(weights.to(v.dtype), grad_out)
    store_rows(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)
    grad_k = multiply(grad_logits, q) * scale
    store_rows(grad_k_ptr, (entry * H + h) * D, grad_k, real_key, D, BLOCK_D)
    grad_q = multiply(transpose(grad_logits), k) * scale
    store_rows(grad_q_ptr, (query * H + h) * D, grad_q, real_query, D, BLOCK_D)


def forward(
    call: AttentionCall, tile: Tile, out: Tensor, lse: Tensor, scores: Tensor | None
) -> None:
    packed_forward_kernel[(triton.cdiv(call.G * call.H, PACK),)](
        *call.inputs,
        *call.index,
        out,
        lse,
        scores,
        *call.strides,
        *call.sizes,
        call.scale,
        **call.head,
        PACK=PACK,
        SLOT=SLOT,
        SCORES=call.scores,
        **tile.options,
    )


def backward(
    call: AttentionCall,
    tile: Tile,
    grad_out: Tensor,
    grad_scores: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    packed_backward_kernel[(triton.cdiv(call.G * call.H, PACK),)](
        grad_out,
        grad_scores,
        *call.inputs,
        lse,
        *call.index,
        delta,
        grad_q,
        grad_k,
        grad_v,
        *call.strides,
        *call.sizes,
        call.scale,
        **call.head,
        PACK=PACK,
        SLOT=SLOT,
        SCORES=call.scores,
        SHARED=call.shared,
        **tile.options,
    )
