"""Whole groups: at most 128 keys, all of them in one block, so that a row has a plain softmax.

Forward a program has a block of queries. Backward it has them all, block after block, and keeps
the sums of the keys' and the values' gradients in registers. The limit is the memory: forward
4 queries * keys * D FLOPs for 2 (queries + keys) * D numbers, backward 10 for (3 queries + 4 keys)
* D. In half floats, with as many queries as keys, that is 1/2 and 5/7 of the keys a byte; tensor
cores become the limit at 150 to 300. float32 has none: FLOPs are its limit from about 40 keys on.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_rows import (
    check_offsets,
    check_rows,
    load_rows,
    rows_at,
    span,
    store_rows,
)

from .triton_call import Call, Tile
from .triton_softmax import (
    LOG2_E,
    key_scores,
    multiply,
    one_over,
    slope,
    softmax,
    transpose,
    weights_back,
)


@triton.jit(do_not_specialize=["G", "H", "Q", "E", "K", "blocks", "max_queries", "max_keys"])
def whole_forward_kernel(
    q_ptr,  # [Q, H, D]
    k_ptr,  # [K, H, D]
    v_ptr,  # [K, H, D]
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    query_rows_ptr,  # [Q] or None
    key_rows_ptr,  # [E] or None
    out_ptr,  # [Q, H, D]
    lse_ptr,  # [H, Q]
    scores_ptr,  # [H, E] or None
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
    SCORES: tl.constexpr,
):
    """A block of queries, or for mean scores all, of a group and a head; bound by memory."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    h = program % H
    g = program // H // blocks
    start = (program // H % blocks * BLOCK_M).to(tl.int32)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if (start == 0) & (h == 0):
        check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= tl.maximum(queries, 1):  # a group without queries has scores to write
        return
    j = tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    v = load_rows(v_ptr + h * v_head, key * v_row, real_key, D, BLOCK_D)
    q_ptr += h * q_head
    stop = queries if SCORES == "mean" else tl.minimum(queries, start + BLOCK_M)
    scores = tl.zeros([BLOCK_N], tl.float32)
    for at in range(start, stop, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = rows_at(query_rows_ptr, first_query + i, real_query)
        q = load_rows(q_ptr, query * q_row, real_query, D, BLOCK_D)
        logits = multiply(q, transpose(k)) * (scale * LOG2_E)
        logits = tl.where(real_key[None, :], logits, float("-inf"))
        weights, total, lse = softmax(logits, keys > 0)
        out = multiply(weights.to(v.dtype), v) / total[:, None]
        store_rows(out_ptr, (query * H + h) * D, out, real_query, D, BLOCK_D)
        tl.store(lse_ptr + h * Q + query, lse, mask=real_query)
        if SCORES != "":
            scores += key_scores(weights, total, i, real_query, queries, SCORES)
    if scores_ptr is not None:
        if start == 0:
            tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "Q"])
def whole_backward_kernel(
    grad_out_ptr,  # [Q, H, D]
    grad_scores_ptr,  # [E] or None
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [H, Q]
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    grad_q_ptr,  # [Q, H, D]
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
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """All gradients of a group and a head; bound by memory, 3 rows a query and 4 a key pass."""
    program = tl.program_id(0).to(tl.int64)
    h, g = program % H, program // H
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    j = tl.arange(0, BLOCK_N)
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
    factor = slope(keys, scale)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = rows_at(query_rows_ptr, first_query + i, real_query)
        here = (query * H + h) * D
        q = load_rows(q_ptr, query * q_row, real_query, D, BLOCK_D)
        grad_out = load_rows(grad_out_ptr, here, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
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
        )
        if q.dtype == tl.float32:
            weights *= one_over(tl.sum(weights, 0))[None, :]
        grad_v += multiply(weights.to(v.dtype), grad_out)
        delta = tl.sum(weights * grads, 0)
        grad_logits = (weights * (grads - delta[None, :])).to(q.dtype)
        grad_k += multiply(grad_logits, q)
        grad_q = multiply(transpose(grad_logits), k) * factor
        store_rows(grad_q_ptr, here, grad_q, real_query, D, BLOCK_D)
    entry = key
    if SHARED:
        entry = (first_key + j).to(tl.int64)
    store_rows(grad_k_ptr, (entry * H + h) * D, grad_k * factor, real_key, D, BLOCK_D)
    store_rows(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)


def forward(c: Call, tile: Tile, out: Tensor, lse: Tensor, scores: Tensor | None) -> None:
    blocks = 1 if c.scores == "mean" else max(1, triton.cdiv(c.most[0], tile.M))
    whole_forward_kernel[(c.G * blocks * c.H,)](
        *c.inputs,
        *c.index,
        out,
        lse,
        scores,
        *c.strides,
        *c.sizes,
        *c.most,
        blocks,
        c.scale,
        **c.channels,
        **tile.blocks,
        SCORES=c.scores,
        **tile.options,
    )


def backward(
    c: Call,
    tile: Tile,
    grad_out: Tensor,
    grad_scores: Tensor | None,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    whole_backward_kernel[(c.G * c.H,)](
        grad_out,
        grad_scores,
        *c.inputs,
        lse,
        *c.index,
        grad_q,
        grad_k,
        grad_v,
        *c.strides,
        *c.sizes[:3],
        c.scale,
        **c.channels,
        **tile.blocks,
        SCORES=c.scores,
        SHARED=c.entries is not None,
        **tile.options,
    )
