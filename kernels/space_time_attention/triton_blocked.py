"""Blocked groups, of any length: blocks of queries meet blocks of keys, one after another.

Forward an online softmax. Backward one kernel for queries, which also leaves the sum of every
query's weights times their gradients behind, then one for keys and values. The limit is the tensor
cores (in float32 the ordinary ones): 4 queries * keys * D FLOPs forward, 14 backward, where the
weights and their gradients are computed twice; 18 in float32 or with scores, where the first pass
computes them once more. A program reads (2 keys + 2 BLOCK_M) * D numbers, mostly from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_rows import (
    check_offsets,
    check_rows,
    find_work,
    load_rows,
    rows_at,
    span,
    store_rows,
)

from .triton_call import Call, Tile
from .triton_softmax import (
    LN_2,
    LOG2_E,
    multiply,
    one_over,
    slope,
    transpose,
    weights_back,
)


@triton.jit(do_not_specialize=["G", "H", "Q", "E", "K", "blocks", "max_queries", "max_keys"])
def blocked_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    out_ptr,
    lse_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    Q,
    E,
    K,
    max_queries,
    max_keys,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """A block of queries of a group and a head meets block after block of keys; bound by FLOPs."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g, start, h = find_work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if (start == 0) & (h == 0):
        check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = rows_at(query_rows_ptr, first_query + i, real_query)
    q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    k_ptr += h * k_head
    v_ptr += h * v_head
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = rows_at(key_rows_ptr, first_key + j, real_key)
        k = load_rows(k_ptr, key * k_row, real_key, D, BLOCK_D)
        v = load_rows(v_ptr, key * v_row, real_key, D, BLOCK_D)
        logits = multiply(q, transpose(k)) * (scale * LOG2_E)
        logits = tl.where(real_key[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + multiply(weights.to(v.dtype), v)
        highest = higher
    total = tl.where(keys > 0, total, 1.0)
    lse = (highest + tl.log2(total)) * LN_2  # -inf without keys
    store_rows(out_ptr, (query * H + h) * D, out / total[:, None], real_query, D, BLOCK_D)
    tl.store(lse_ptr + h * Q + query, lse, mask=real_query)


@triton.jit(do_not_specialize=["G", "H", "Q", "E", "blocks"])
def blocked_scores_kernel(
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    lse_ptr,
    scores_ptr,  # [H, E]
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    E,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Once the log-sum-exp is known: the scores of a block of keys of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = find_work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start >= keys:
        return
    first_query, queries = span(query_offsets_ptr, g, True)
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    q_ptr += h * q_head
    lse_ptr += h * Q
    scores = tl.zeros([BLOCK_N], tl.float32)
    if SCORES == "cls":
        if queries > 0:
            query = tl.zeros([1], tl.int32) + first_query
            query = rows_at(query_rows_ptr, query, query >= 0)
            q = load_rows(q_ptr, query * q_row, query >= 0, D, BLOCK_D).to(tl.float32)
            logits = tl.sum(k.to(tl.float32) * q, 1) * scale
            scores = tl.exp2((logits - tl.load(lse_ptr + query)) * LOG2_E)
    else:
        for at in range(0, queries, BLOCK_M):
            i = at + tl.arange(0, BLOCK_M)
            real_query = i < queries
            query = rows_at(query_rows_ptr, first_query + i, real_query)
            q = load_rows(q_ptr, query * q_row, real_query, D, BLOCK_D)
            lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
            logits = multiply(k, transpose(q)) * (scale * LOG2_E)
            weights = tl.exp2(logits - (lse * LOG2_E)[None, :])
            scores += tl.sum(tl.where(real_query[None, :], weights, 0.0), 1)
        scores = scores / tl.maximum(queries, 1)
    tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


@triton.jit
def block_back(
    at,
    q,
    grad_out,
    lse,
    i,
    grad_scores_ptr,
    k_ptr,  # of this head
    v_ptr,  # of this head
    key_rows_ptr,
    k_row,
    v_row,
    first_key,
    keys,
    share,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORES: tl.constexpr,
):
    """The keys from `at` on; the queries' weights of them, and the gradient that reaches these."""
    j = at + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr, key * k_row, real_key, D, BLOCK_D)
    v = load_rows(v_ptr, key * v_row, real_key, D, BLOCK_D)
    grad_score = tl.zeros([BLOCK_N], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) * share
    weights, grads = weights_back(  # [queries, keys]
        q,
        k,
        v,
        grad_out,
        lse[:, None],
        grad_score[None, :],
        (i == 0)[:, None],
        real_key[None, :],
        scale,
        SCORES,
        KEYS_FIRST=False,
    )
    return k, weights, grads


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def query_backward_kernel(
    grad_out_ptr,  # [Q, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [Q, H, D]
    lse_ptr,  # [H, Q]
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    delta_ptr,  # [H, Q]
    inverse_ptr,  # [H, Q] or None
    grad_q_ptr,  # [Q, H, D]
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    Q,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradient of a block of queries, and delta = sum of the weights times their gradients.

    delta is also the sum of the output times its gradient, without a pass over the keys, for
    queries that have no scores. In float32 that is not exact enough: a first pass adds up delta,
    and the weights, for whose sum see one_over().
    """
    program = tl.program_id(0).to(tl.int64)
    g, start, h = find_work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    if start >= queries:
        return
    first_key, keys = span(key_offsets_ptr, g, True)
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = rows_at(query_rows_ptr, first_query + i, real_query)
    here = (query * H + h) * D
    q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    grad_out = load_rows(grad_out_ptr, here, real_query, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
    k_ptr += h * k_head
    v_ptr += h * v_head
    share = 1.0 / H
    if SCORES == "mean":
        share = share / queries
    out = load_rows(out_ptr, here, real_query, D, BLOCK_D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    if inverse_ptr is not None or SCORES != "":
        first_pass = keys
        if inverse_ptr is None and SCORES == "cls":  # only the first query has scores
            first_pass = tl.where(start == 0, keys, 0)
        total = tl.zeros([BLOCK_M], tl.float32)
        products = tl.zeros([BLOCK_M], tl.float32)
        for at in range(0, first_pass, BLOCK_N):
            _, weights, grads = block_back(
                at,
                q,
                grad_out,
                lse,
                i,
                grad_scores_ptr,
                k_ptr,
                v_ptr,
                key_rows_ptr,
                k_row,
                v_row,
                first_key,
                keys,
                share,
                scale,
                D,
                BLOCK_D,
                BLOCK_N,
                SCORES,
            )
            total += tl.sum(weights, 1)
            products += tl.sum(weights * grads, 1)
        inverse = one_over(total)
        delta = tl.where(total == 0.0, delta, products * inverse)
    tl.store(delta_ptr + h * Q + query, delta, mask=real_query)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + h * Q + query, inverse, mask=real_query)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        k, weights, grads = block_back(
            at,
            q,
            grad_out,
            lse,
            i,
            grad_scores_ptr,
            k_ptr,
            v_ptr,
            key_rows_ptr,
            k_row,
            v_row,
            first_key,
            keys,
            share,
            scale,
            D,
            BLOCK_D,
            BLOCK_N,
            SCORES,
        )
        grad_logits = weights * inverse[:, None] * (grads - delta[:, None])
        grad_q += multiply(grad_logits.to(k.dtype), k)
    store_rows(grad_q_ptr, here, grad_q * slope(keys, scale), real_query, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def key_backward_kernel(
    grad_out_ptr,  # [Q, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [H, Q]
    delta_ptr,  # [H, Q]
    inverse_ptr,  # [H, Q] or None
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    grad_k_ptr,  # [K, H, D], or [E, H, D]
    grad_v_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    Q,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradients of a block of keys and values, of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = find_work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start >= keys:
        return
    first_query, queries = span(query_offsets_ptr, g, True)
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    v = load_rows(v_ptr + h * v_head, key * v_row, real_key, D, BLOCK_D)
    grad_score = tl.zeros([BLOCK_N], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) / H
        if SCORES == "mean":
            grad_score = grad_score / tl.maximum(queries, 1)
    q_ptr += h * q_head
    lse_ptr += h * Q
    delta_ptr += h * Q
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = rows_at(query_rows_ptr, first_query + i, real_query)
        q = load_rows(q_ptr, query * q_row, real_query, D, BLOCK_D)
        grad_out = load_rows(grad_out_ptr, (query * H + h) * D, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
        delta = tl.load(delta_ptr + query, mask=real_query, other=0.0)
        weights, grads = weights_back(  # [keys, queries]
            q,
            k,
            v,
            grad_out,
            lse[None, :],
            grad_score[:, None],
            (i == 0)[None, :],
            real_key[:, None] & real_query[None, :],
            scale,
            SCORES,
            KEYS_FIRST=True,
            SAME_BITS=inverse_ptr is not None,  # as delta and the inverse were added up
        )
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + h * Q + query, mask=real_query, other=0.0)
            weights *= inverse[None, :]
        grad_v += multiply(weights.to(v.dtype), grad_out)
        grad_logits = weights * (grads - delta[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q)
    entry = key
    if SHARED:
        entry = (first_key + j).to(tl.int64)
    grad_k *= slope(keys, scale)
    store_rows(grad_k_ptr, (entry * H + h) * D, grad_k, real_key, D, BLOCK_D)
    store_rows(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)


def forward(c: Call, tile: Tile, out: Tensor, lse: Tensor, scores: Tensor | None) -> None:
    programs, blocks, search = c.blocks(0, tile.M)
    blocked_forward_kernel[(programs,)](
        *c.inputs,
        *c.index,
        out,
        lse,
        *c.strides,
        *c.sizes,
        *c.most,
        blocks,
        c.scale,
        **c.channels,
        **tile.blocks,
        SEARCH=search,
        **tile.options,
    )
    if scores is None:
        return
    programs, blocks, search = c.blocks(1, tile.N)
    blocked_scores_kernel[(programs,)](
        *c.inputs[:2],
        *c.index,
        lse,
        scores,
        *c.strides[:4],
        *c.sizes[:4],
        blocks,
        c.scale,
        **c.channels,
        **tile.blocks,
        SCORES=c.scores,
        SEARCH=search,
        **tile.options,
    )


def backward(
    c: Call,
    query_tile: Tile,
    key_tile: Tile,
    grad_out: Tensor,
    grad_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    delta = torch.empty_like(lse)
    inverse = torch.empty_like(lse) if out.dtype == torch.float32 else None
    programs, blocks, search = c.blocks(0, query_tile.M)
    query_backward_kernel[(programs,)](
        grad_out,
        grad_scores,
        *c.inputs,
        out,
        lse,
        *c.index,
        delta,
        inverse,
        grad_q,
        *c.strides,
        *c.sizes[:3],
        blocks,
        c.scale,
        **c.channels,
        **query_tile.blocks,
        SCORES=c.scores,
        SEARCH=search,
        **query_tile.options,
    )
    programs, blocks, search = c.blocks(1, key_tile.N)
    key_backward_kernel[(programs,)](
        grad_out,
        grad_scores,
        *c.inputs,
        lse,
        delta,
        inverse,
        *c.index,
        grad_k,
        grad_v,
        *c.strides,
        *c.sizes[:3],
        blocks,
        c.scale,
        **c.channels,
        **key_tile.blocks,
        SCORES=c.scores,
        SHARED=c.entries is not None,
        SEARCH=search,
        **key_tile.options,
    )
