"""Blocked groups, of any length: programs loop over blocks of queries and blocks of keys.

Forward: online softmax. Backward: one kernel for queries, which also stores delta, the sum of the
weights times their gradients; then one for keys and values. The limit is the tensor cores (the
ordinary ones in float32): 4 queries * keys * D FLOPs forward; 14 backward, where both kernels
compute the weights and their gradients; 18 in float32 or with scores, where a first pass computes
them once more. A program reads 2 (keys + BLOCK_QUERIES) * D numbers, mostly from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import add_bias, head_table, load_keys, query_codes
from vidl.kernels.groups.triton_limits import (
    key_limits,
    queries_of_keys,
    seen_by,
    zero_single,
    zero_unseeing,
)
from vidl.kernels.groups.triton_rows import (
    find_group,
    load_block,
    load_rows,
    rows_at,
    store_rows,
)
from vidl.kernels.groups.triton_softmax import (
    LN_2,
    LOG2_E,
    logit_slope,
    multiply,
    normalizer,
    online_softmax,
    transpose,
    weights_back,
)
from vidl.kernels.triton_sums import add_compensated

from .triton_call import AttentionCall, Tile


@triton.jit(
    do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"],
)
def blocked_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
    out_ptr,
    lse_ptr,
    highest_ptr,  # [H, num_queries] or None, as total_ptr
    total_ptr,
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
    SEARCH: tl.constexpr,
):
    """Attention of a block of queries of one group and head to all its keys; bound by FLOPs.

    `highest` and `total` are the maximum of the base-2 logits and the denominator.
    """
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_QUERIES, SEARCH),
    )
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_QUERIES)
    q_ptr += h * q_head
    real_query, query, q = load_block(
        q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
    )
    query_code = query_codes(query_codes_ptr, query, real_query, shift)
    limit = first_key + key_limits(query_limits_ptr, query, real_query, keys)
    table = head_table(last, h)
    k_ptr += h * k_head
    v_ptr += h * v_head
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    # Places in the list of keys take fewer registers than numbers within the group.
    last_key = first_key + keys
    if query_limits_ptr is not None:
        last_key = tl.max(limit, 0)
    for at in range(first_key, last_key, BLOCK_KEYS):
        j = at + tl.arange(0, BLOCK_KEYS)
        _, seen, key, k, key_code, key_bias = load_keys(
            *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, 0, last_key, j, num_keys, k_row),
            *(D, BLOCK_D),
        )
        v = load_rows(v_ptr, key * v_row, seen, D, BLOCK_D)
        logits = multiply(q, transpose(k)) * (scale * LOG2_E)
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table),
            *(query_code[:, None], key_code[None, :], key_bias[None, :]),
        )
        pair = seen_by(query_limits_ptr, seen[None, :], j[None, :], limit[:, None])
        logits = tl.where(pair, logits, float("-inf"))
        weights, rescale, highest, total = online_softmax(
            *(logits, highest, total),
            BASE_2=True,
            HIDDEN=key_bias_ptr is not None or query_limits_ptr is not None,
        )
        out = out * rescale[:, None] + multiply(weights.to(v.dtype), v)
    out = zero_unseeing(query_limits_ptr, out, total != 0.0)
    total = tl.where(total == 0.0, 1.0, total)
    lse = (highest + tl.log2(total)) * LN_2  # -inf without keys
    store_rows(out_ptr, (query * H + h) * D, out / total[:, None], real_query, D, BLOCK_D)
    at = h * num_queries + query
    tl.store(lse_ptr + at, lse, mask=real_query)
    if highest_ptr is not None:
        tl.store(highest_ptr + at, highest, mask=real_query)
        tl.store(total_ptr + at, total, mask=real_query)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def blocked_scores_kernel(
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
    highest_ptr,  # [H, num_queries]
    total_ptr,  # [H, num_queries]
    scores_ptr,  # [H, E]
    q_row,
    q_head,
    k_row,
    k_head,
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
    SEARCH: tl.constexpr,
):
    """The scores of a block of keys of one group and head.

    They come from the maximum and the denominator of each query. The rounding error of a float32
    log-sum-exp is several units in the last place of the weights, for all keys alike.
    """
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, key_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_KEYS, SEARCH),
    )
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_KEYS)
    k_ptr += h * k_head
    real_key, seen, _, k, key_code, key_bias = load_keys(
        *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys, k_row),
        *(D, BLOCK_D),
    )
    table = head_table(last, h)
    q_ptr += h * q_head
    highest_ptr += h * num_queries
    total_ptr += h * num_queries
    scores = tl.zeros([BLOCK_KEYS], tl.float32)
    lost = tl.zeros([BLOCK_KEYS], tl.float32)
    if SCORES == "cls":
        if queries > 0:
            query = tl.zeros([1], tl.int32) + first_query
            query = rows_at(query_rows_ptr, query, query >= 0, num_queries)
            q = load_rows(q_ptr, query * q_row, query >= 0, D, BLOCK_D).to(tl.float32)
            query_code = query_codes(query_codes_ptr, query, query >= 0, shift)
            logits = tl.sum(k.to(tl.float32) * q, 1) * (scale * LOG2_E)
            logits = add_bias(
                *(logits, table_ptr, key_bias_ptr, last, table, query_code, key_code, key_bias)
            )
            weights = tl.exp2(logits - tl.load(highest_ptr + query))
            scores = weights / tl.load(total_ptr + query)
            if query_limits_ptr is not None:
                limit = key_limits(query_limits_ptr, query, query >= 0, keys)
                scores = tl.where(seen & (j < limit), scores, 0.0)
    else:
        begin, end = queries_of_keys(
            query_limits_ptr, query_rows_ptr, first_query, queries, num_queries, start
        )
        for at in range(begin // BLOCK_QUERIES * BLOCK_QUERIES, end, BLOCK_QUERIES):
            i = at + tl.arange(0, BLOCK_QUERIES)
            real_query, query, q = load_block(
                q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
            )
            limit = key_limits(query_limits_ptr, query, real_query, keys)
            highest = tl.load(highest_ptr + query, mask=real_query, other=0.0)
            share = 1.0 / tl.load(total_ptr + query, mask=real_query, other=1.0)
            query_code = query_codes(query_codes_ptr, query, real_query, shift)
            logits = multiply(k, transpose(q)) * (scale * LOG2_E)
            logits = add_bias(
                *(logits, table_ptr, key_bias_ptr, last, table),
                *(query_code[None, :], key_code[:, None], key_bias[:, None]),
            )
            weights = tl.exp2(logits - highest[None, :]) * share[None, :]
            pair = real_query[None, :]
            if query_limits_ptr is not None:
                pair = seen_by(query_limits_ptr, seen[:, None], j[:, None], limit[None, :])
            weights = tl.sum(tl.where(pair, weights, 0.0), 1)
            scores, lost = add_compensated(weights, scores, lost)
        scores = scores / tl.maximum(queries, 1)
    if key_bias_ptr is not None:  # without keys that count, the maximum is -inf
        scores = tl.where(seen, scores, 0.0)
    tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


@triton.jit
def block_back(
    at,
    q,
    grad_out,
    lse,
    i,
    query_code,
    limit,
    grad_scores_ptr,
    k_ptr,  # of this head
    v_ptr,  # of this head
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,
    key_codes_ptr,
    key_bias_ptr,
    last,
    table,
    k_row,
    v_row,
    last_key,
    num_keys,
    share,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """A block of keys from place `at` on: k, the weights of the queries, and their gradients."""
    j = at + tl.arange(0, BLOCK_KEYS)
    real_key, seen, key, k, key_code, key_bias = load_keys(
        *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, 0, last_key, j, num_keys, k_row),
        *(D, BLOCK_D),
    )
    v = load_rows(v_ptr, key * v_row, seen, D, BLOCK_D)
    grad_score = tl.zeros([BLOCK_KEYS], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + j, mask=real_key, other=0.0) * share
    weights, grads = weights_back(  # [queries, keys]
        q,
        k,
        v,
        grad_out,
        lse[:, None],
        grad_score[None, :],
        (i == 0)[:, None],
        seen_by(query_limits_ptr, seen[None, :], j[None, :], limit[:, None]),
        scale,
        (
            table_ptr,
            key_bias_ptr,
            last,
            table,
            query_code[:, None],
            key_code[None, :],
            key_bias[None, :],
        ),
        SCORES,
        KEYS_FIRST=False,
    )
    return k, weights, grads


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def query_backward_kernel(
    grad_out_ptr,  # [num_queries, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [num_queries, H, D]
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
    delta_ptr,  # [H, num_queries]
    inverse_ptr,  # [H, num_queries] or None
    grad_q_ptr,  # [num_queries, H, D]
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
    SEARCH: tl.constexpr,
):
    """The gradient of a block of queries, and delta = sum of the weights times their gradients.

    For queries without scores delta is also the sum of the output times its gradient, which takes
    no pass over the keys. In float32 that is too inexact: a first pass sums the products for delta,
    and the weights for normalizer().
    """
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_QUERIES, SEARCH),
    )
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_QUERIES)
    q_ptr += h * q_head
    real_query, query, q = load_block(
        q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
    )
    here = (query * H + h) * D
    grad_out = load_rows(grad_out_ptr, here, real_query, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * num_queries + query, mask=real_query, other=0.0)
    k_ptr += h * k_head
    v_ptr += h * v_head
    share = 1.0 / H
    if SCORES == "mean":
        share = share / queries
    query_code = query_codes(query_codes_ptr, query, real_query, shift)
    limit = first_key + key_limits(query_limits_ptr, query, real_query, keys)
    query_side = (q, grad_out, lse, i, query_code, limit)
    bias = (table_ptr, key_codes_ptr, key_bias_ptr, last, head_table(last, h))
    key_side = (grad_scores_ptr, k_ptr, v_ptr, key_rows_ptr, query_limits_ptr)
    # Places in the list of keys take fewer registers than numbers within the group.
    last_key = first_key + keys
    if query_limits_ptr is not None:
        last_key = tl.max(limit, 0)
    members = (k_row, v_row, last_key, num_keys, share)
    out = load_rows(out_ptr, here, real_query, D, BLOCK_D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    inverse = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
    if inverse_ptr is not None or SCORES != "":
        end = last_key
        if inverse_ptr is None and SCORES == "cls":  # only the first query has scores
            end = tl.where(start == 0, last_key, first_key)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        products = tl.zeros([BLOCK_QUERIES], tl.float32)
        lost = tl.zeros([BLOCK_QUERIES], tl.float32)
        lost_products = tl.zeros([BLOCK_QUERIES], tl.float32)
        for at in range(first_key, end, BLOCK_KEYS):
            _, weights, grads = block_back(
                at, *query_side, *key_side, *bias, *members, scale, D, BLOCK_D, BLOCK_KEYS, SCORES
            )
            total, lost = add_compensated(tl.sum(weights, 1), total, lost)
            products, lost_products = add_compensated(
                tl.sum(weights * grads, 1), products, lost_products
            )
        inverse = normalizer(total)
        delta = tl.where(total == 0.0, delta, products * inverse)
    tl.store(delta_ptr + h * num_queries + query, delta, mask=real_query)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + h * num_queries + query, inverse, mask=real_query)
    grad_q = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    for at in range(first_key, last_key, BLOCK_KEYS):
        k, weights, grads = block_back(
            at, *query_side, *key_side, *bias, *members, scale, D, BLOCK_D, BLOCK_KEYS, SCORES
        )
        grad_logits = weights * inverse[:, None] * (grads - delta[:, None])
        grad_logits = zero_single(query_limits_ptr, grad_logits, limit[:, None] - first_key)
        grad_q += multiply(grad_logits.to(k.dtype), k)
    store_rows(grad_q_ptr, here, grad_q * logit_slope(keys, scale), real_query, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def key_backward_kernel(
    grad_out_ptr,  # [num_queries, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [H, num_queries]
    delta_ptr,  # [H, num_queries]
    inverse_ptr,  # [H, num_queries] or None
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
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
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradients of a block of keys and values of one group and head."""
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, key_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_KEYS, SEARCH),
    )
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_KEYS)
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
    delta_ptr += h * num_queries
    grad_k = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    begin, end = queries_of_keys(
        query_limits_ptr, query_rows_ptr, first_query, queries, num_queries, start
    )
    for at in range(begin // BLOCK_QUERIES * BLOCK_QUERIES, end, BLOCK_QUERIES):
        i = at + tl.arange(0, BLOCK_QUERIES)
        real_query, query, q = load_block(
            q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
        )
        limit = key_limits(query_limits_ptr, query, real_query, keys)
        grad_out = load_rows(grad_out_ptr, (query * H + h) * D, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
        delta = tl.load(delta_ptr + query, mask=real_query, other=0.0)
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
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
            SAME_BITS=inverse_ptr is not None,  # as in the sums of query_backward_kernel
        )
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + h * num_queries + query, mask=real_query, other=0.0)
            weights *= inverse[None, :]
        grad_v += multiply(weights.to(v.dtype), grad_out)
        grad_logits = weights * (grads - delta[None, :])
        grad_logits = zero_single(query_limits_ptr, grad_logits, limit[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q)
    entry = key
    if SHARED:
        entry = (first_key + j).to(tl.int64)
    grad_k *= logit_slope(keys, scale)
    store_rows(grad_k_ptr, (entry * H + h) * D, grad_k, real_key, D, BLOCK_D)
    store_rows(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)


def forward(
    call: AttentionCall, tile: Tile, out: Tensor, lse: Tensor, scores: Tensor | None
) -> None:
    sums = (None, None) if scores is None else (torch.empty_like(lse), torch.empty_like(lse))
    programs, blocks, search = call.blocks(0, tile.queries, call.H)
    blocked_forward_kernel[(programs,)](
        *call.inputs,
        *call.index,
        out,
        lse,
        *sums,
        *call.strides,
        *call.sizes,
        blocks,
        call.scale,
        **call.head,
        **tile.blocks,
        SEARCH=search,
        **tile.options,
    )
    if scores is None:
        return
    programs, blocks, search = call.blocks(1, tile.keys, call.H)
    blocked_scores_kernel[(programs,)](
        *call.inputs[:2],
        *call.index,
        *sums,
        scores,
        *call.strides[:4],
        *call.sizes,
        blocks,
        call.scale,
        **call.head,
        **tile.blocks,
        SCORES=call.scores,
        SEARCH=search,
        **tile.options,
    )


def backward(
    call: AttentionCall,
    query_tile: Tile,
    key_tile: Tile,
    grad_out: Tensor,
    grad_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    inverse: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    programs, blocks, search = call.blocks(0, query_tile.queries, call.H)
    query_backward_kernel[(programs,)](
        grad_out,
        grad_scores,
        *call.inputs,
        out,
        lse,
        *call.index,
        delta,
        inverse,
        grad_q,
        *call.strides,
        *call.sizes,
        blocks,
        call.scale,
        **call.head,
        **query_tile.blocks,
        SCORES=call.scores,
        SEARCH=search,
        **query_tile.options,
    )
    programs, blocks, search = call.blocks(1, key_tile.keys, call.H)
    key_backward_kernel[(programs,)](
        grad_out,
        grad_scores,
        *call.inputs,
        lse,
        delta,
        inverse,
        *call.index,
        grad_k,
        grad_v,
        *call.strides,
        *call.sizes,
        blocks,
        call.scale,
        **call.head,
        **key_tile.blocks,
        SCORES=call.scores,
        SHARED=call.shared,
        SEARCH=search,
        **key_tile.options,
    )
