"""space_time_attention in Triton: three size classes, forward and backward, without atomics.

packed: groups of at most 16 queries and keys. A program takes several (group, head) pairs, each in
    a matrix of its own of a batched product; so no pair ever meets another's numbers.
whole: all keys of a group in one block. One softmax; backward one program writes all gradients.
blocked: longer groups. Forward an online softmax over blocks of keys; backward one kernel for
    queries, which also leaves every query's `delta` behind, then one for keys and values.

A row beyond the end of its group is never read: it counts as zeros, so that a neighbour's NaN stays
there. Keys in several groups get a gradient for every entry; a last kernel adds them in order.
"""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels import library

# debug keeps the assertions about indices; it would also check every addition for overflow.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}
# The smallest side of a matrix that a tensor core multiplies, and so the slot of a packed group.
SLOT = 16
# Pairs of a group and a head in a program of the packed kernels: one for each of its warps.
PACK = 4
# Entries added at a time for a row that several groups share, and the channels of a program.
ENTRIES_PER_STEP = 8
CHANNELS = 256
# softmax works with powers of two, which the hardware has.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ---- Where things are ---------------------------------------------------------------------------


@triton.jit
def _check_offsets(offsets_ptr, G, count, most, BLOCK: tl.constexpr):
    for start in range(0, G + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        this = tl.load(offsets_ptr + i, mask=i <= G, other=0)
        after = tl.load(offsets_ptr + i + 1, mask=i < G, other=0)
        size = after - this
        tl.device_assert(size >= 0, "offsets of groups must ascend", mask=i < G)
        tl.device_assert(size <= most, "a group is longer than max_queries, max_keys", mask=i < G)
        tl.device_assert(this == 0, "offsets of groups must begin with 0", mask=i == 0)
        tl.device_assert(this == count, "offsets of groups must end with their rows", mask=i == G)


@triton.jit
def _check_rows(rows_ptr, begin, members, count, BLOCK: tl.constexpr):
    """In a loop of its own: an assertion among the products would keep loads from running ahead."""
    if rows_ptr is not None:
        for start in range(0, members, BLOCK):
            i = start + tl.arange(0, BLOCK)
            row = tl.load(rows_ptr + begin + i, mask=i < members, other=0)
            right = (row >= 0) & (row < count)
            tl.device_assert(right, "a row of the groups is out of range", mask=i < members)


@triton.jit
def _span(offsets_ptr, g, mask):
    """Where a group's members begin and how many they are; none where the mask is off."""
    begin = tl.load(offsets_ptr + g, mask=mask, other=0)
    return begin, tl.load(offsets_ptr + g + 1, mask=mask, other=0) - begin


@triton.jit
def _work(program, offsets_ptr, G, H, blocks, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """The group, the first of its members, and the head that a program works on.

    Either every group has `blocks` blocks, or group g has those from offsets[g] // BLOCK + g on:
    always enough, and seldom more, however unequal the groups are.
    """
    h = program % H
    item = program // H
    if SEARCH:
        g = item * 0
        high = g + G
        while high - g > 1:
            middle = (g + high) // 2
            below = tl.load(offsets_ptr + middle) // BLOCK + middle <= item
            g = tl.where(below, middle, g)
            high = tl.where(below, high, middle)
        start = (item - tl.load(offsets_ptr + g) // BLOCK - g) * BLOCK
    else:
        g = item // blocks
        start = item % blocks * BLOCK
    return g, start.to(tl.int32), h


@triton.jit
def _rows(rows_ptr, place, mask):
    """The rows of q, or of k and v, at these places of the list of all groups' members."""
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=mask, other=0)
    return row.to(tl.int64)


@triton.jit
def _load(ptr, start, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[..., BLOCK_D] channels from each start; zeros where the mask is off."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    return tl.load(ptr + (tl.expand_dims(start, -1) + d), mask=mask, other=0.0)


@triton.jit
def _store(ptr, start, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + (tl.expand_dims(start, -1) + d), x.to(ptr.dtype.element_ty), mask=mask)


# ---- The mathematics, for one pair (2-D) or several (3-D) ---------------------------------------


@triton.jit
def _transpose(x):
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.trans(x)


@triton.jit
def _multiply(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _softmax(logits, some):
    """Numerators, denominators and the log-sum-exp of rows of base-2 logits; where `some` keys."""
    highest = tl.where(some, tl.max(logits, len(logits.shape) - 1), 0.0)
    weights = tl.exp2(logits - tl.expand_dims(highest, -1))
    total = tl.where(some, tl.sum(weights, len(logits.shape) - 1), 1.0)
    lse = tl.where(some, (highest + tl.log2(total)) * LN_2, float("-inf"))
    return weights, total, lse


@triton.jit
def _scores(weights, total, i, real_query, queries, SCORES: tl.constexpr):
    """What these queries add to the scores of their keys, of one head."""
    share = tl.where(real_query, 1.0 / total, 0.0)
    share = tl.where(i == 0, share, 0.0) if SCORES == "cls" else share / tl.maximum(queries, 1)
    return tl.sum(weights * tl.expand_dims(share, -1), len(weights.shape) - 2)


@triton.jit
def _weights_back(
    q, k, v, grad_out, lse, grad_score, i, real_query, real_key, scale, SCORES: tl.constexpr
):
    """Transposed, [keys, queries]: the softmax and the gradient that reaches it."""
    both = tl.expand_dims(real_key, -1) & tl.expand_dims(real_query, -2)
    logits = _multiply(k, _transpose(q)) * (scale * LOG2_E)
    weights = tl.where(both, tl.exp2(logits - tl.expand_dims(lse * LOG2_E, -2)), 0.0)
    grads = _multiply(v, _transpose(grad_out))
    if SCORES == "cls":
        grads += tl.where(tl.expand_dims(i == 0, -2), tl.expand_dims(grad_score, -1), 0.0)
    elif SCORES == "mean":
        grads += tl.expand_dims(grad_score, -1)
    return weights, grads


# ---- packed -------------------------------------------------------------------------------------


@triton.jit
def _packed_work(query_offsets_ptr, key_offsets_ptr, G, H, PACK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * PACK + tl.arange(0, PACK)
    mask = item < G.to(tl.int64) * H
    g = item // H
    first_query, queries = _span(query_offsets_ptr, g, mask)
    first_key, keys = _span(key_offsets_ptr, g, mask)
    return (
        (item % H)[:, None],
        first_query[:, None],
        queries[:, None],
        first_key[:, None],
        keys[:, None],
    )


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "max_queries", "max_keys"])
def packed_forward_kernel(
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
    K,
    E,
    max_queries,
    max_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    SLOT: tl.constexpr,
    SCORES: tl.constexpr,
):
    """PACK pairs of a group and a head, all their queries and keys."""
    if tl.program_id(0) == 0:
        _check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        _check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    h, first_query, queries, first_key, keys = _packed_work(
        query_offsets_ptr, key_offsets_ptr, G, H, PACK
    )
    i = tl.arange(0, SLOT)[None, :]
    real_query, real_key = i < queries, i < keys  # [PACK, SLOT]
    query = _rows(query_rows_ptr, first_query + i, real_query)
    key = _rows(key_rows_ptr, first_key + i, real_key)
    tl.device_assert((query >= 0) & (query < Q), "query_rows are out of range", mask=real_query)
    tl.device_assert((key >= 0) & (key < K), "key_rows are out of range", mask=real_key)
    q = _load(q_ptr, query * q_row + h * q_head, real_query, D, BLOCK_D)
    k = _load(k_ptr, key * k_row + h * k_head, real_key, D, BLOCK_D)
    v = _load(v_ptr, key * v_row + h * v_head, real_key, D, BLOCK_D)
    logits = _multiply(q, _transpose(k)) * (scale * LOG2_E)  # [PACK, SLOT, SLOT]
    logits = tl.where(real_key[:, None, :], logits, float("-inf"))
    weights, total, lse = _softmax(logits, keys > 0)
    out = _multiply(weights.to(v.dtype), v) / total[:, :, None]
    _store(out_ptr, (query * H + h) * D, out, real_query, D, BLOCK_D)
    tl.store(lse_ptr + h * Q + query, lse, mask=real_query)
    if scores_ptr is not None:
        scores = _scores(weights, total, i, real_query, queries, SCORES)
        tl.store(scores_ptr + h * E + first_key + i, scores, mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "Q"])
def packed_backward_kernel(
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
    PACK: tl.constexpr,
    SLOT: tl.constexpr,
    SCORES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """All gradients of PACK pairs of a group and a head."""
    h, first_query, queries, first_key, keys = _packed_work(
        query_offsets_ptr, key_offsets_ptr, G, H, PACK
    )
    i = tl.arange(0, SLOT)[None, :]
    real_query, real_key = i < queries, i < keys
    query = _rows(query_rows_ptr, first_query + i, real_query)
    key = _rows(key_rows_ptr, first_key + i, real_key)
    q = _load(q_ptr, query * q_row + h * q_head, real_query, D, BLOCK_D)
    grad_out = _load(grad_out_ptr, (query * H + h) * D, real_query, D, BLOCK_D)
    k = _load(k_ptr, key * k_row + h * k_head, real_key, D, BLOCK_D)
    v = _load(v_ptr, key * v_row + h * v_head, real_key, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
    grad_score = tl.zeros([PACK, SLOT], tl.float32)
    if grad_scores_ptr is not None:
        share = 1.0 / H
        if SCORES == "mean":
            share = share / tl.maximum(queries, 1)
        grad_score = tl.load(grad_scores_ptr + first_key + i, mask=real_key, other=0.0) * share
    weights, grads = _weights_back(
        q, k, v, grad_out, lse, grad_score, i, real_query, real_key, scale, SCORES
    )
    delta = tl.sum(weights * grads, 1)
    grad_logits = (weights * (grads - delta[:, None, :])).to(q.dtype)
    entry = key
    if SHARED:
        entry = (first_key + i).to(tl.int64)
    grad_v = _multiply(weights.to(v.dtype), grad_out)
    _store(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)
    grad_k = _multiply(grad_logits, q) * scale
    _store(grad_k_ptr, (entry * H + h) * D, grad_k, real_key, D, BLOCK_D)
    grad_q = _multiply(_transpose(grad_logits), k) * scale
    _store(grad_q_ptr, (query * H + h) * D, grad_q, real_query, D, BLOCK_D)


# ---- whole --------------------------------------------------------------------------------------


@triton.jit
def _whole_block(
    q_ptr,  # of this head
    query_rows_ptr,
    out_ptr,  # of this head
    lse_ptr,  # of this head
    k,
    v,
    real_key,
    first_query,
    start,
    queries,
    keys,
    q_row,
    H,
    Q,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Queries from `start` on meet all their keys."""
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = _rows(query_rows_ptr, first_query + i, real_query)
    q = _load(q_ptr, query * q_row, real_query, D, BLOCK_D)
    logits = _multiply(q, _transpose(k)) * (scale * LOG2_E)
    logits = tl.where(real_key[None, :], logits, float("-inf"))
    weights, total, lse = _softmax(logits, keys > 0)
    out = _multiply(weights.to(v.dtype), v) / total[:, None]
    _store(out_ptr, query * H * D, out, real_query, D, BLOCK_D)
    tl.store(lse_ptr + query, lse, mask=real_query)
    scores = tl.zeros(real_key.shape, tl.float32)
    if SCORES != "":
        scores = _scores(weights, total, i, real_query, queries, SCORES)
    return scores


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "blocks", "max_queries", "max_keys"])
def whole_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    G,
    H,
    Q,
    K,
    E,
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
    """A block of queries, or for mean scores all queries, of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        _check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g, start, h = _work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, False)
    first_query, queries = _span(query_offsets_ptr, g, True)
    first_key, keys = _span(key_offsets_ptr, g, True)
    if (start == 0) & (h == 0):
        _check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        _check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= tl.maximum(queries, 1):  # a group without queries has scores to write
        return
    j = tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = _rows(key_rows_ptr, first_key + j, real_key)
    k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    v = _load(v_ptr + h * v_head, key * v_row, real_key, D, BLOCK_D)
    q_ptr += h * q_head
    out_ptr += h * D
    lse_ptr += h * Q
    if SCORES == "mean":
        scores = tl.zeros([BLOCK_N], tl.float32)
        for at in range(0, queries, BLOCK_M):
            scores += _whole_block(
                q_ptr,
                query_rows_ptr,
                out_ptr,
                lse_ptr,
                k,
                v,
                real_key,
                first_query,
                at,
                queries,
                keys,
                q_row,
                H,
                Q,
                scale,
                D,
                BLOCK_D,
                BLOCK_M,
                SCORES,
            )
    else:
        scores = _whole_block(
            q_ptr,
            query_rows_ptr,
            out_ptr,
            lse_ptr,
            k,
            v,
            real_key,
            first_query,
            start,
            queries,
            keys,
            q_row,
            H,
            Q,
            scale,
            D,
            BLOCK_D,
            BLOCK_M,
            SCORES,
        )
    if scores_ptr is not None:
        if start == 0:
            tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


# ---- blocked forward ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "blocks", "max_queries", "max_keys"])
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
    K,
    E,
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
    """A block of queries of a group and a head meets block after block of keys."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        _check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g, start, h = _work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g, True)
    first_key, keys = _span(key_offsets_ptr, g, True)
    if (start == 0) & (h == 0):
        _check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        _check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = _rows(query_rows_ptr, first_query + i, real_query)
    q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    k_ptr += h * k_head
    v_ptr += h * v_head
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = _rows(key_rows_ptr, first_key + j, real_key)
        k = _load(k_ptr, key * k_row, real_key, D, BLOCK_D)
        v = _load(v_ptr, key * v_row, real_key, D, BLOCK_D)
        logits = _multiply(q, _transpose(k)) * (scale * LOG2_E)
        logits = tl.where(real_key[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + _multiply(weights.to(v.dtype), v)
        highest = higher
    total = tl.where(keys > 0, total, 1.0)
    lse = (highest + tl.log2(total)) * LN_2  # -inf without keys
    _store(out_ptr, (query * H + h) * D, out / total[:, None], real_query, D, BLOCK_D)
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
    g, start, h = _work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_key, keys = _span(key_offsets_ptr, g, True)
    if start >= keys:
        return
    first_query, queries = _span(query_offsets_ptr, g, True)
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = _rows(key_rows_ptr, first_key + j, real_key)
    k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    q_ptr += h * q_head
    lse_ptr += h * Q
    scores = tl.zeros([BLOCK_N], tl.float32)
    if SCORES == "cls":
        if queries > 0:
            query = tl.zeros([1], tl.int32) + first_query
            query = _rows(query_rows_ptr, query, query >= 0)
            q = _load(q_ptr, query * q_row, query >= 0, D, BLOCK_D).to(tl.float32)
            logits = tl.sum(k.to(tl.float32) * q, 1) * scale
            scores = tl.exp2((logits - tl.load(lse_ptr + query)) * LOG2_E)
    else:
        for at in range(0, queries, BLOCK_M):
            i = at + tl.arange(0, BLOCK_M)
            real_query = i < queries
            query = _rows(query_rows_ptr, first_query + i, real_query)
            q = _load(q_ptr, query * q_row, real_query, D, BLOCK_D)
            lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
            logits = _multiply(k, _transpose(q)) * (scale * LOG2_E)
            weights = tl.exp2(logits - (lse * LOG2_E)[None, :])
            scores += tl.sum(tl.where(real_query[None, :], weights, 0.0), 1)
        scores = scores / tl.maximum(queries, 1)
    tl.store(scores_ptr + h * E + first_key + j, scores, mask=real_key)


# ---- whole and blocked backward -----------------------------------------------------------------


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def query_backward_kernel(
    grad_out_ptr,
    grad_scores_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    delta_ptr,  # [H, Q]
    grad_q_ptr,
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
    """The gradient of a block of queries, and delta = sum of the weights times their gradients."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = _work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g, True)
    if start >= queries:
        return
    first_key, keys = _span(key_offsets_ptr, g, True)
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = _rows(query_rows_ptr, first_query + i, real_query)
    here = (query * H + h) * D
    q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    grad_out = _load(grad_out_ptr, here, real_query, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0) * LOG2_E
    out = _load(out_ptr, here, real_query, D, BLOCK_D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    k_ptr += h * k_head
    v_ptr += h * v_head
    share = 1.0 / H
    if grad_scores_ptr is not None:
        scored = keys
        if SCORES == "mean":
            share = share / queries
        else:  # only the first query has scores
            scored = tl.where(start == 0, keys, 0)
        more = tl.zeros([BLOCK_M], tl.float32)
        for at in range(0, scored, BLOCK_N):
            j = at + tl.arange(0, BLOCK_N)
            real_key = j < keys
            key = _rows(key_rows_ptr, first_key + j, real_key)
            k = _load(k_ptr, key * k_row, real_key, D, BLOCK_D)
            grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
            weights = tl.exp2(_multiply(q, _transpose(k)) * (scale * LOG2_E) - lse[:, None])
            weights = tl.where(real_key[None, :], weights, 0.0)
            more += tl.sum(weights * (grad_score * share)[None, :], 1)
        if SCORES == "cls":
            more = tl.where(i == 0, more, 0.0)
        delta += more
    tl.store(delta_ptr + h * Q + query, delta, mask=real_query)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = _rows(key_rows_ptr, first_key + j, real_key)
        k = _load(k_ptr, key * k_row, real_key, D, BLOCK_D)
        v = _load(v_ptr, key * v_row, real_key, D, BLOCK_D)
        weights = tl.exp2(_multiply(q, _transpose(k)) * (scale * LOG2_E) - lse[:, None])
        weights = tl.where(real_key[None, :], weights, 0.0)
        grads = _multiply(grad_out, _transpose(v))
        if grad_scores_ptr is not None:
            grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) * share
            if SCORES == "cls":
                grads += tl.where((i == 0)[:, None], grad_score[None, :], 0.0)
            else:
                grads += grad_score[None, :]
        grad_logits = (weights * (grads - delta[:, None])).to(k.dtype)
        grad_q += _multiply(grad_logits, k)
    _store(grad_q_ptr, here, grad_q * scale, real_query, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def key_backward_kernel(
    grad_out_ptr,
    grad_scores_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,  # [H, Q]; None: the block has all keys of its group, whose sum is delta
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    grad_q_ptr,  # None where query_backward_kernel writes it
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
    """The gradients of a block of keys and values; if those are all, also of the queries."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = _work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_key, keys = _span(key_offsets_ptr, g, True)
    if start >= tl.maximum(keys, 1):  # without keys the queries' gradients are zero
        return
    first_query, queries = _span(query_offsets_ptr, g, True)
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = _rows(key_rows_ptr, first_key + j, real_key)
    k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    v = _load(v_ptr + h * v_head, key * v_row, real_key, D, BLOCK_D)
    grad_score = tl.zeros([BLOCK_N], tl.float32)
    if grad_scores_ptr is not None:
        grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) / H
        if SCORES == "mean":
            grad_score = grad_score / tl.maximum(queries, 1)
    q_ptr += h * q_head
    lse_ptr += h * Q
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = _rows(query_rows_ptr, first_query + i, real_query)
        here = (query * H + h) * D
        q = _load(q_ptr, query * q_row, real_query, D, BLOCK_D)
        grad_out = _load(grad_out_ptr, here, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
        weights, grads = _weights_back(
            q, k, v, grad_out, lse, grad_score, i, real_query, real_key, scale, SCORES
        )
        grad_v += _multiply(weights.to(v.dtype), grad_out)
        if delta_ptr is None:
            delta = tl.sum(weights * grads, 0)
        else:
            delta = tl.load(delta_ptr + h * Q + query, mask=real_query, other=0.0)
        grad_logits = (weights * (grads - delta[None, :])).to(q.dtype)
        grad_k += _multiply(grad_logits, q)
        if grad_q_ptr is not None:
            grad_q = _multiply(_transpose(grad_logits), k) * scale
            _store(grad_q_ptr, here, grad_q, real_query, D, BLOCK_D)
    entry = key
    if SHARED:
        entry = (first_key + j).to(tl.int64)
    _store(grad_k_ptr, (entry * H + h) * D, grad_k * scale, real_key, D, BLOCK_D)
    _store(grad_v_ptr, (entry * H + h) * D, grad_v, real_key, D, BLOCK_D)


@triton.jit(do_not_specialize=["C", "E"])
def sum_entries_kernel(
    entry_k_ptr,  # [E, C]
    entry_v_ptr,
    entry_offsets_ptr,  # [K + 1]
    entries_ptr,  # [E]
    grad_k_ptr,  # [K, C]
    grad_v_ptr,
    C,
    E,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of a row that several groups share: the sum of its entries, in order."""
    program = tl.program_id(0).to(tl.int64)
    C = C // D * D  # so that the compiler knows it for a multiple of D
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)[None, :]
    begin = tl.load(entry_offsets_ptr + row)
    end = tl.load(entry_offsets_ptr + row + 1)
    grad_k = tl.zeros([BLOCK_C], tl.float32)
    grad_v = tl.zeros([BLOCK_C], tl.float32)
    for at in range(begin, end, STEP):
        i = at + tl.arange(0, STEP)
        entry = tl.load(entries_ptr + i, mask=i < end, other=0)
        tl.device_assert((entry >= 0) & (entry < E), "entries are out of range", mask=i < end)
        place = entry.to(tl.int64)[:, None] * C + c
        mask = (i < end)[:, None] & (c < C)
        grad_k += tl.sum(tl.load(entry_k_ptr + place, mask=mask, other=0.0), 0)
        grad_v += tl.sum(tl.load(entry_v_ptr + place, mask=mask, other=0.0), 0)
    place = row * C + c
    mask = c < C
    tl.store(grad_k_ptr + place, grad_k[None, :].to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + place, grad_v[None, :].to(grad_v_ptr.dtype.element_ty), mask=mask)


# ---- Launches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time, of groups in one of the three size classes."""

    kind: str  # packed, whole or blocked
    M: int = SLOT  # queries
    N: int = SLOT  # keys
    warps: int = PACK
    stages: int = 1


def forward_tile(max_queries: int, max_keys: int, D: int, dtype: torch.dtype) -> Tile:
    """The size class of a forward pass."""
    if dtype == torch.float32:
        return _float32_tile(max_keys, D)
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D)
    M = 16 if max_queries <= 16 else 64
    if max_keys <= 128:  # 256 keys would leave one program a multiprocessor, or spill on sm_80
        N = _power_of_2(max_keys)
        return Tile("whole", M=M, N=N, warps=4 if D <= 64 or N <= 64 else 8)
    return Tile("blocked", M=M, N=64, warps=4 if D <= 64 else 8, stages=2)


def backward_tiles(
    max_queries: int, max_keys: int, D: int, dtype: torch.dtype, scores: str
) -> tuple[Tile, Tile]:
    """The size class of a backward pass: of its kernel for queries, and of that for keys.

    Only blocked groups need the former. The limits are the registers of sm_80, where the warps hold
    all keys and values next to both sums.
    """
    if dtype == torch.float32:
        return _float32_tile(max_keys, D), _float32_tile(max_keys, D)
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D), _packed_tile(D)
    N = _power_of_2(max_keys)
    if N <= 32 or (D <= 64 and N <= 64):
        tile = Tile("whole", M=32, N=N, warps=4, stages=2)
    elif N <= 64 or (N <= 128 and (D <= 32 or (D <= 64 and scores != "mean"))):
        tile = Tile("whole", M=32, N=N, warps=8, stages=2)
    elif D <= 64:
        tile = Tile("blocked", M=32, N=128, warps=8, stages=2)
    else:
        tile = Tile("blocked", M=64, N=64, warps=8, stages=2)
    return Tile("blocked", M=64, N=64, warps=4 if D <= 64 else 8, stages=2), tile


def _float32_tile(max_keys: int, D: int) -> Tile:
    """Exact products have no tensor cores and are unrolled: larger blocks spill registers."""
    whole = max_keys <= 16 and D <= 64
    return Tile("whole" if whole else "blocked", M=16, N=16, warps=8)


def _packed_tile(D: int) -> Tile:
    """A warp has a pair of its own; with longer rows two warps share the loads of one."""
    return Tile("packed", warps=PACK if D <= 64 else 2 * PACK)


def _power_of_2(keys: int) -> int:
    return max(2 * SLOT, triton.next_power_of_2(keys))


class _Call:
    """What all kernels of a call are given."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        query_rows: Tensor | None,
        key_rows: Tensor | None,
        max_queries: int,
        max_keys: int,
    ) -> None:
        self.q, self.k, self.v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        self.index = (query_offsets, key_offsets, query_rows, key_rows)
        self.G = query_offsets.shape[0] - 1
        self.Q, self.H, self.D = q.shape
        self.K = k.shape[0]
        self.E = self.K if key_rows is None else key_rows.shape[0]
        self.most = (max_queries, max_keys)
        self.block_d = triton.next_power_of_2(self.D)

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of rows and heads; as 0 a stride that means nothing leaves the addresses aligned."""
        return [x.stride(d) if x.shape[d] > 1 else 0 for x in tensors for d in (0, 1)]

    def blocks(self, of: int, size: int) -> tuple[int, int, bool]:
        """Programs, blocks of each group, and whether a program has to search for its group.

        Args:
            of: 0 for blocks of queries, 1 for blocks of keys.
        """
        count = max(1, triton.cdiv(self.most[of], size))
        total = (self.Q, self.E)[of] // size + self.G  # of _work(), with SEARCH
        search = self.G * count > 2 * total
        return self.H * (total if search else self.G * count), count, search

    def check(self, entry_offsets: Tensor | None, entries: Tensor | None) -> None:
        """What the kernels assert on CUDA: Triton's interpreter leaves assertions out."""
        query_offsets, key_offsets, query_rows, key_rows = self.index
        for offsets, rows, members, count, most in (
            (query_offsets, query_rows, self.Q, self.Q, self.most[0]),
            (key_offsets, key_rows, self.E, self.K, self.most[1]),
            (entry_offsets, entries, self.E, self.E, self.E),
        ):
            if offsets is None:
                continue
            steps = offsets.tolist()
            if steps[0] != 0 or steps[-1] != members or steps != sorted(steps):
                raise RuntimeError(
                    f"space_time_attention: offsets must ascend from 0 to {members}, got {steps}"
                )
            longest = int(offsets.diff().max()) if len(steps) > 1 else 0
            if longest > most:
                raise RuntimeError(
                    f"space_time_attention: need groups of at most {most} rows, got {longest}"
                )
            if rows is not None and not ((rows >= 0) & (rows < count)).all():
                raise RuntimeError(f"space_time_attention: rows must lie in [0, {count})")


def space_time_attention(
    q: Tensor,  # [Q, H, D]
    k: Tensor,  # [K, H, D]
    v: Tensor,  # [K, H, D]
    query_offsets: Tensor,  # [G + 1]
    key_offsets: Tensor,  # [G + 1]
    query_rows: Tensor | None,  # [Q]
    key_rows: Tensor | None,  # [E]
    entry_offsets: Tensor | None,  # [K + 1]
    entries: Tensor | None,  # [E]
    max_queries: int,
    max_keys: int,
    scale: float,
    scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [Q, H, D], the log-sum-exp [H, Q], and the scores [E] or [0]."""
    c = _Call(q, k, v, query_offsets, key_offsets, query_rows, key_rows, max_queries, max_keys)
    if library.interpreting():
        c.check(entry_offsets, entries)
    tile = forward_tile(max_queries, max_keys, c.D, q.dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(c.H, c.Q, dtype=torch.float32)
    head_scores = q.new_empty(c.H, c.E, dtype=torch.float32) if scores else None
    sizes = (c.G, c.H, c.Q, c.K, c.E, *c.most)
    strides = c.strides(c.q, c.k, c.v)
    constants = {"D": c.D, "BLOCK_D": c.block_d}
    options = _options(tile)
    with _device(q):
        if tile.kind == "packed":
            packed_forward_kernel[(triton.cdiv(c.G * c.H, PACK),)](
                c.q,
                c.k,
                c.v,
                *c.index,
                out,
                lse,
                head_scores,
                *strides,
                *sizes,
                scale,
                **constants,
                PACK=PACK,
                SLOT=SLOT,
                SCORES=scores,
                **options,
            )
        elif tile.kind == "whole":
            blocks = 1 if scores == "mean" else max(1, triton.cdiv(max_queries, tile.M))
            whole_forward_kernel[(c.G * blocks * c.H,)](
                c.q,
                c.k,
                c.v,
                *c.index,
                out,
                lse,
                head_scores,
                *strides,
                *sizes,
                blocks,
                scale,
                **constants,
                BLOCK_M=tile.M,
                BLOCK_N=tile.N,
                SCORES=scores,
                **options,
            )
        else:
            constants |= {"BLOCK_M": tile.M, "BLOCK_N": tile.N}
            programs, blocks, search = c.blocks(0, tile.M)
            blocked_forward_kernel[(programs,)](
                c.q,
                c.k,
                c.v,
                *c.index,
                out,
                lse,
                *strides,
                *sizes,
                blocks,
                scale,
                **constants,
                SEARCH=search,
                **options,
            )
            if head_scores is not None:
                programs, blocks, search = c.blocks(1, tile.N)
                blocked_scores_kernel[(programs,)](
                    c.q,
                    c.k,
                    *c.index,
                    lse,
                    head_scores,
                    *c.strides(c.q, c.k),
                    c.G,
                    c.H,
                    c.Q,
                    c.E,
                    blocks,
                    scale,
                    **constants,
                    SCORES=scores,
                    SEARCH=search,
                    **options,
                )
    return out, lse, lse.new_empty(0) if head_scores is None else head_scores.mean(0)


def space_time_attention_bwd(
    grad_out: Tensor,  # [Q, H, D]
    grad_scores: Tensor | None,  # [E]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    entry_offsets: Tensor | None,
    entries: Tensor | None,
    max_queries: int,
    max_keys: int,
    scale: float,
    scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if not scores:
        grad_scores = None
    c = _Call(q, k, v, query_offsets, key_offsets, query_rows, key_rows, max_queries, max_keys)
    grad_out = grad_out.contiguous()
    if grad_scores is None:
        scores = ""
    else:
        grad_scores = grad_scores.contiguous()
    query_tile, key_tile = backward_tiles(max_queries, max_keys, c.D, q.dtype, scores)
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    shared = entries is not None
    entry_k, entry_v = grad_k, grad_v
    if shared:
        entry_k, entry_v = (k.new_empty(c.E, c.H, c.D, dtype=torch.float32) for _ in range(2))
    sizes = (c.G, c.H, c.Q)
    strides = c.strides(c.q, c.k, c.v)
    constants = {"D": c.D, "BLOCK_D": c.block_d, "SCORES": scores}
    with _device(q):
        if key_tile.kind == "packed":
            packed_backward_kernel[(triton.cdiv(c.G * c.H, PACK),)](
                grad_out,
                grad_scores,
                c.q,
                c.k,
                c.v,
                lse,
                *c.index,
                grad_q,
                entry_k,
                entry_v,
                *strides,
                *sizes,
                scale,
                **constants,
                PACK=PACK,
                SLOT=SLOT,
                SHARED=shared,
                **_options(key_tile),
            )
        else:
            delta = None
            programs, blocks, search = c.G * c.H, 1, False
            if key_tile.kind == "blocked":
                delta = torch.empty_like(lse)
                programs, blocks, search = c.blocks(0, query_tile.M)
                query_backward_kernel[(programs,)](
                    grad_out,
                    grad_scores,
                    c.q,
                    c.k,
                    c.v,
                    out,
                    lse,
                    *c.index,
                    delta,
                    grad_q,
                    *strides,
                    *sizes,
                    blocks,
                    scale,
                    **constants,
                    BLOCK_M=query_tile.M,
                    BLOCK_N=query_tile.N,
                    SEARCH=search,
                    **_options(query_tile),
                )
                programs, blocks, search = c.blocks(1, key_tile.N)
            key_backward_kernel[(programs,)](
                grad_out,
                grad_scores,
                c.q,
                c.k,
                c.v,
                lse,
                delta,
                *c.index,
                grad_q if delta is None else None,
                entry_k,
                entry_v,
                *strides,
                *sizes,
                blocks,
                scale,
                **constants,
                BLOCK_M=key_tile.M,
                BLOCK_N=key_tile.N,
                SHARED=shared,
                SEARCH=search,
                **_options(key_tile),
            )
        if shared:
            channels = c.H * c.D
            sum_entries_kernel[(c.K * triton.cdiv(channels, CHANNELS),)](
                entry_k,
                entry_v,
                entry_offsets,
                entries,
                grad_k,
                grad_v,
                channels,
                c.E,
                c.D,
                ENTRIES_PER_STEP,
                CHANNELS,
                **OPTIONS,
            )
    return grad_q, grad_k, grad_v


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages} | OPTIONS


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    # Queries and keys of a group, for every tile. What bfloat16 needs, float16 needs too.
    sizes = [(64, 64), (128, 128), (785, 785), (8, 8), (32, 32), (16, 300)]
    for D, size in itertools.product((64, 128), sizes[:5]):
        _launch(D, torch.bfloat16, *size)
    _launch(64, torch.bfloat16, *sizes[5])
    for size, scores in itertools.product(sizes[:4], ("cls", "mean")):
        _launch(64, torch.bfloat16, *size, scores=scores, shared=scores == "mean")
    for size in sizes[:4]:
        _launch(128, torch.bfloat16, *size, scores="mean", shared=True)
    for D, size in itertools.product((32, 80), sizes[1:4]):
        _launch(D, torch.bfloat16, *size, shared=True)
    _launch(64, torch.float16, *sizes[1], shared=True)
    for D, size in itertools.product((64, 128), sizes[2:4]):
        _launch(D, torch.float32, *size, scores="mean", shared=True)


def _launch(
    D: int,
    dtype: torch.dtype,
    max_queries: int,
    max_keys: int,
    scores: str = "",
    shared: bool = False,
) -> None:
    q, k, v = torch.zeros(2, 3, 2, D, dtype=dtype).unbind(1)
    offsets, rows = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rest: Any = (offsets, offsets, None, None, None, None)
    if shared:
        rest = (offsets, offsets, rows, rows, offsets, rows)
    rest += (max_queries, max_keys, 1.0, scores)
    out, lse, importance = space_time_attention(q, k, v, *rest)
    grad_scores = importance if scores else None
    space_time_attention_bwd(out, grad_scores, q, k, v, out, lse, *rest)
