"""Whole groups: at most 128 keys, all of them in one block, so a plain softmax suffices.

Forward, a program handles a block of queries. Backward, it loops over all blocks of queries and
keeps the sums for the gradients of keys and values in registers. The limit is the memory: forward
4 queries * keys * D FLOPs for 2 (queries + keys) * D numbers, backward 10 for (3 queries + 4 keys)
* D. In 16 bits, with as many queries as keys, that is 1/2 and 5/7 of `keys` FLOPs a byte; tensor
cores are the limit from 150 to 300 on. float32 has no tensor cores: FLOPs are its limit from about
40 keys on.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import (
    add_bias,
    any_seen,
    head_table,
    load_keys,
    query_codes,
)
from vidl.kernels.groups.triton_limits import (
    has_seen,
    key_limits,
    seen_by,
    zero_single,
    zero_unseeing,
)
from vidl.kernels.groups.triton_rows import (
    find_group,
    load_block,
    load_rows,
    store_rows,
)
from vidl.kernels.groups.triton_softmax import (
    LOG2_E,
    key_scores,
    logit_slope,
    multiply,
    normalizer,
    softmax,
    transpose,
    weights_back,
)

from .triton_call import AttentionCall, Tile


@triton.jit(
    do_not_specialize=[
        "G",
        "H",
        "num_queries",
        "E",
        "num_keys",
        "shift",
        "last",
        "blocks",
    ]
)
def whole_forward_kernel(
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
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Attention of a block of queries, all for mean scores, of one group and head."""
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_QUERIES, False),
    )
    if start >= tl.maximum(queries, 1):  # a group without queries still has scores to write
        return
    j = tl.arange(0, BLOCK_KEYS)
    k_ptr += h * k_head
    real_key, seen, key, k, key_code, key_bias = load_keys(
        *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys, k_row),
        *(D, BLOCK_D),
    )
    v = load_rows(v_ptr + h * v_head, key * v_row, seen, D, BLOCK_D)
    group_has_keys = any_seen(keys, seen, key_bias_ptr)
    table = head_table(last, h)
    q_ptr += h * q_head
    # Places in the list of queries take fewer registers than numbers within the group.
    last_query = first_query + queries
    stop = last_query
    if SCORES != "mean":
        stop = tl.minimum(last_query, first_query + start + BLOCK_QUERIES)
    scores = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(first_query + start, stop, BLOCK_QUERIES):
        i = at + tl.arange(0, BLOCK_QUERIES)
        real_query, query, q = load_block(
            q_ptr, query_rows_ptr, 0, last_query, i, num_queries, q_row, D, BLOCK_D
        )
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
        limit = key_limits(query_limits_ptr, query, real_query, keys)
        logits = multiply(q, transpose(k)) * (scale * LOG2_E)
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table),
            *(query_code[:, None], key_code[None, :], key_bias[None, :]),
        )
        pair = seen_by(query_limits_ptr, seen[None, :], j[None, :], limit[:, None])
        has_keys = has_seen(query_limits_ptr, group_has_keys, pair)
        logits = tl.where(pair, logits, float("-inf"))
        weights, total, lse = softmax(logits, has_keys)
        out = multiply(weights.to(v.dtype), v) / total[:, None]
        out = zero_unseeing(query_limits_ptr, out, has_keys)
        store_rows(out_ptr, (query * H + h) * D, out, real_query, D, BLOCK_D)
        tl.store(lse_ptr + h * num_queries + query, lse, mask=real_query)
        if SCORES != "":
            scores += key_scores(weights, total, i - first_query, real_query, queries, SCORES)
    if scores_ptr is not None:
        if start == 0:
            tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last"])
def whole_backward_kernel(
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
    inverse_ptr,  # [H, num_queries] or None
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
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """All gradients of one group and head; bound by memory, 3 rows a query and 4 a key."""
    program = tl.program_id(0).to(tl.int64)
    h, _, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, 1, BLOCK_QUERIES, False),
    )
    j = tl.arange(0, BLOCK_KEYS)
    k_ptr += h * k_head
    real_key, seen, key, k, key_code, key_bias = load_keys(
        *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys, k_row),
        *(D, BLOCK_D),
    )
    v = load_rows(v_ptr + h * v_head, key * v_row, seen, D, BLOCK_D)
    table = head_table(last, h)
    grad_score = tl.zeros([BLOCK_KEYS], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) / H
        if SCORES == "mean":
            grad_score = grad_score / tl.maximum(queries, 1)
    q_ptr += h * q_head
    lse_ptr += h * num_queries
    factor = logit_slope(keys, scale)
    grad_k = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_QUERIES):
        i = at + tl.arange(0, BLOCK_QUERIES)
        real_query, query, q = load_block(
            q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
        )
        here = (query * H + h) * D
        grad_out = load_rows(grad_out_ptr, here, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
        limit = key_limits(query_limits_ptr, query, real_query, keys)
        weights, grads = weights_back(  # [keys, queries]
            q,
            k,
            v,
            grad_out,
            lse[None, :],
            grad_score[:, None],
            (i == 0)[None, :],
            seen_by(
                query_limits_ptr,
                seen[:, None] & real_query[None, :],
                j[:, None],
                limit[None, :],
            ),
            scale,
            (
                table_ptr,
                key_bias_ptr,
                last,
                table,
                query_code[None, :],
                key_code[:, None],
                key_bias[:, None],
            ),
            SCORES,
            KEYS_FIRST=True,
        )
        if q.dtype == tl.float32:
            inverse = normalizer(tl.sum(weights, 0))
            weights *= inverse[None, :]
            if inverse_ptr is not None:
                tl.store(inverse_ptr + h * num_queries + query, inverse, mask=real_query)
        grad_v += multiply(weights.to(v.dtype), grad_out)
        delta = tl.sum(weights * grads, 0)
        if delta_ptr is not None:
            tl.store(delta_ptr + h * num_queries + query, delta, mask=real_query)
        grad_logits = weights * (grads - delta[None, :])
        grad_logits = zero_single(query_limits_ptr, grad_logits, limit[None, :]).to(q.dtype)
        grad_k += multiply(grad_logits, q)
        grad_q = multiply(transpose(grad_logits), k) * factor
        store_rows(grad_q_ptr, here, grad_q, real_query, D, BLOCK_D)
    entry = key
    if SHARED:
        entry = (first_key + j).to(tl.int64)
    store_rows(grad_k_ptr, (entry * H + h) * D, grad_k * factor, real_key, D, BLOCK_D)
    store_rows(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)


def forward(
    call: AttentionCall, tile: Tile, out: Tensor, lse: Tensor, scores: Tensor | None
) -> None:
    blocks = 1 if call.scores == "mean" else max(1, triton.cdiv(call.longest[0], tile.queries))
    whole_forward_kernel[(call.G * blocks * call.H,)](
        *call.inputs,
        *call.index,
        out,
        lse,
        scores,
        *call.strides,
        *call.sizes,
        blocks,
        call.scale,
        **call.head,
        **tile.blocks,
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
    inverse: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    whole_backward_kernel[(call.G * call.H,)](
        grad_out,
        grad_scores,
        *call.inputs,
        lse,
        *call.index,
        delta,
        inverse,
        grad_q,
        grad_k,
        grad_v,
        *call.strides,
        *call.sizes,
        call.scale,
        **call.head,
        **tile.blocks,
        SCORES=call.scores,
        SHARED=call.shared,
        **tile.options,
    )
