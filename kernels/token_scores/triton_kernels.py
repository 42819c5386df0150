"""token_scores in Triton, forward and backward, without atomics.

One query against all keys ("cls", "value"): a program takes a group and a head; it writes the
products of its keys, reads them back once their greatest and their sum are known, and leaves the
weights for the backward pass. All queries ("mean"): the log-sum-exp of every query, unless it is
given, then a program for a block of keys of a group and a head adds up their weights over blocks of
queries; backward one kernel for queries, which leaves every query's `delta` and the sum of its
weights behind, then one for keys. PyTorch takes the mean over heads, in fixed order.

A row beyond the end of its group is never read: it counts as zeros, so that a neighbour's NaN stays
there.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels import library
from vidl.kernels.groups import group_of

# debug keeps the assertions about indices; it would also check every addition for overflow.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}
# Numbers of k that a program of "cls" holds at a time.
TILE = 8192
# Heads times channels of a program for a row that several groups share.
CHANNELS = 256


# ---- Where things are ---------------------------------------------------------------------------


@triton.jit
def _check_offsets(offsets_ptr, G, count, BLOCK: tl.constexpr):
    for start in range(0, G + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        this = tl.load(offsets_ptr + i, mask=i <= G, other=0)
        after = tl.load(offsets_ptr + i + 1, mask=i < G, other=0)
        tl.device_assert(this <= after, "offsets of groups must ascend", mask=i < G)
        tl.device_assert(this == 0, "offsets of groups must begin with 0", mask=i == 0)
        tl.device_assert(this == count, "offsets of groups must end with their rows", mask=i == G)


@triton.jit
def _check_rows(rows_ptr, begin, members, count, BLOCK: tl.constexpr):
    if rows_ptr is not None:
        for start in range(0, members, BLOCK):
            i = start + tl.arange(0, BLOCK)
            row = tl.load(rows_ptr + begin + i, mask=i < members, other=0)
            right = (row >= 0) & (row < count)
            tl.device_assert(right, "a row of the groups is out of range", mask=i < members)


@triton.jit
def _span(offsets_ptr, g):
    """Where a group's members begin, and how many they are."""
    begin = tl.load(offsets_ptr + g)
    return begin, tl.load(offsets_ptr + g + 1) - begin


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
    """[rows, BLOCK_D] channels from each start; zeros where the mask is off."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = mask[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)
    return tl.load(ptr + (start[:, None] + d), mask=mask, other=0.0)


@triton.jit
def _store(ptr, start, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = mask[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + (start[:, None] + d), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _multiply(a, b):
    return tl.dot(a, b, input_precision="ieee")


# ---- cls ----------------------------------------------------------------------------------------


@triton.jit
def _first_query(q_ptr, query_rows_ptr, first_query, q_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first query of a group, [BLOCK_D], and its row."""
    row = _rows(query_rows_ptr, first_query + tl.arange(0, 1), tl.arange(0, 1) == 0)
    return tl.sum(_load(q_ptr, row * q_row, row >= 0, D, BLOCK_D).to(tl.float32), 0), tl.sum(row)


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E"])
def cls_forward_kernel(
    q_ptr,  # [Q, H, D]
    k_ptr,  # [K, H, D]
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    query_rows_ptr,  # [Q] or None
    key_rows_ptr,  # [E] or None
    weights_ptr,  # [H, E]
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    K,
    E,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The attention of the first query of a group, of one head."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _check_offsets(query_offsets_ptr, G, Q, BLOCK=128)
        _check_offsets(key_offsets_ptr, G, E, BLOCK=128)
    g = program // H
    h = program % H
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    if h == 0:
        _check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        _check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    weights_ptr += h * E + first_key
    j = tl.arange(0, BLOCK_N)
    if queries == 0:
        for at in range(0, keys, BLOCK_N):
            tl.store(weights_ptr + at + j, tl.zeros([BLOCK_N], tl.float32), mask=at + j < keys)
        return
    k_ptr += h * k_head
    q, _ = _first_query(q_ptr + h * q_head, query_rows_ptr, first_query, q_row, D, BLOCK_D)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = _rows(key_rows_ptr, first_key + at + j, real)
        k = _load(k_ptr, key * k_row, real, D, BLOCK_D).to(tl.float32)
        logits = tl.sum(k * q[None, :], 1) * scale
        tl.store(weights_ptr + at + j, logits, mask=real)
        # Every lane has a softmax of its own; where it has no key yet, nothing is taken from it.
        higher = tl.where(real, tl.where(logits > highest, logits, highest), highest)
        shrink = tl.where(higher == highest, 1.0, tl.exp(highest - higher))
        total = total * shrink + tl.where(real, tl.exp(logits - higher), 0.0)
        highest = higher
    top = tl.max(highest, 0)
    total = tl.sum(tl.where(total == 0, 0.0, total * tl.exp(highest - top)), 0)
    tl.debug_barrier()  # other threads' products
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        logits = tl.load(weights_ptr + at + j, mask=real, other=0.0)
        tl.store(weights_ptr + at + j, tl.exp(logits - top) / total, mask=real)


@triton.jit(do_not_specialize=["H", "E"])
def cls_backward_kernel(
    grad_scores_ptr,  # [E]
    weights_ptr,  # [H, E]
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    grad_q_ptr,  # [Q, H, D], zeros
    grad_k_ptr,  # [K, H, D], or None where rows are shared
    grad_logits_ptr,  # [H, E], or None where they are not
    q_row,
    q_head,
    k_row,
    k_head,
    H,
    E,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of the first query of a group and of its keys, of one head."""
    program = tl.program_id(0).to(tl.int64)
    g = program // H
    h = program % H
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    weights_ptr += h * E + first_key
    j = tl.arange(0, BLOCK_N)
    reached = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        weights = tl.load(weights_ptr + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        reached += weights * grad
    delta = tl.sum(reached, 0)
    # A group without queries has zero weights, and its keys zero gradients.
    q = tl.zeros([BLOCK_D], tl.float32)
    row = tl.zeros([1], tl.int64)
    if queries > 0:
        q, one = _first_query(q_ptr + h * q_head, query_rows_ptr, first_query, q_row, D, BLOCK_D)
        row += one
    grad_q = tl.zeros([BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = _rows(key_rows_ptr, first_key + at + j, real)
        k = _load(k_ptr + h * k_head, key * k_row, real, D, BLOCK_D).to(tl.float32)
        weights = tl.load(weights_ptr + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        grad = weights * (grad - delta) * (scale / H)
        grad_q += tl.sum(grad[:, None] * k, 0)
        if grad_k_ptr is not None:
            _store(grad_k_ptr, (key * H + h) * D, grad[:, None] * q[None, :], real, D, BLOCK_D)
        else:
            tl.store(grad_logits_ptr + h * E + first_key + at + j, grad, mask=real)
    if queries > 0:
        _store(grad_q_ptr, (row * H + h) * D, grad_q[None, :], row >= 0, D, BLOCK_D)


@triton.jit(do_not_specialize=["E"])
def cls_rows_kernel(
    grad_logits_ptr,  # [H, E]
    group_ptr,  # [E]
    q_ptr,
    query_offsets_ptr,
    query_rows_ptr,
    entry_offsets_ptr,  # [K + 1]
    entries_ptr,  # [E]
    grad_k_ptr,  # [K, H, D]
    q_row,
    q_head,
    H,
    E,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gradient of a row that several groups share, of some heads: its entries in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H, BLOCK_H)
    row = program // blocks
    h = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    begin = tl.load(entry_offsets_ptr + row)
    end = tl.load(entry_offsets_ptr + row + 1)
    grad_k = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i in range(begin, end):
        entry = tl.load(entries_ptr + i).to(tl.int64)
        tl.device_assert((entry >= 0) & (entry < E), "entries are out of range")
        first_query, queries = _span(query_offsets_ptr, tl.load(group_ptr + entry))
        if queries > 0:
            query = _rows(query_rows_ptr, first_query + tl.zeros([BLOCK_H], tl.int32), h < H)
            q = _load(q_ptr, query * q_row + h * q_head, h < H, D, BLOCK_D).to(tl.float32)
            grad_k += tl.load(grad_logits_ptr + h * E + entry, mask=h < H, other=0.0)[:, None] * q
    _store(grad_k_ptr, (row * H + h) * D, grad_k, h < H, D, BLOCK_D)


# ---- value --------------------------------------------------------------------------------------


@triton.jit
def value_forward_kernel(
    attention_ptr,  # [E]
    norms_ptr,  # [K]
    key_offsets_ptr,
    key_rows_ptr,
    scores_ptr,  # [E]
    BLOCK_N: tl.constexpr,
):
    """Attention times the length of the value, and then divided by its sum over a group."""
    first_key, keys = _span(key_offsets_ptr, tl.program_id(0).to(tl.int64))
    j = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = _rows(key_rows_ptr, first_key + at + j, real)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        sums += attention * tl.load(norms_ptr + key, mask=real, other=0.0)
    total = tl.sum(sums, 0)
    total = tl.where(total == 0, 1.0, total)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = _rows(key_rows_ptr, first_key + at + j, real)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        weighted = attention * tl.load(norms_ptr + key, mask=real, other=0.0)
        tl.store(scores_ptr + first_key + at + j, weighted / total, mask=real)


@triton.jit
def value_backward_kernel(
    grad_scores_ptr,  # [E]
    attention_ptr,  # [E]
    norms_ptr,  # [K]
    key_offsets_ptr,
    key_rows_ptr,
    grad_attention_ptr,  # [E]
    grad_norms_ptr,  # [K], or [E] where rows are shared
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With w = attention x length and a gradient g, both get (g - sum(g w) / sum(w)) / sum(w)."""
    first_key, keys = _span(key_offsets_ptr, tl.program_id(0).to(tl.int64))
    j = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    reached = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = _rows(key_rows_ptr, first_key + at + j, real)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        weighted = attention * tl.load(norms_ptr + key, mask=real, other=0.0)
        sums += weighted
        reached += grad * weighted
    total = tl.sum(sums, 0)
    some = total != 0
    total = tl.where(some, total, 1.0)
    delta = tl.sum(reached, 0) / total
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        entry = first_key + at + j
        key = _rows(key_rows_ptr, entry, real)
        attention = tl.load(attention_ptr + entry, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + entry, mask=real, other=0.0)
        norm = tl.load(norms_ptr + key, mask=real, other=0.0)
        grad = tl.where(some, (grad - delta) / total, 0.0)
        tl.store(grad_attention_ptr + entry, grad * norm, mask=real)
        place = entry if SHARED else key
        tl.store(grad_norms_ptr + place, grad * attention, mask=real)


@triton.jit(do_not_specialize=["E"])
def sum_entries_kernel(
    entry_ptr,  # [E, C]
    entry_offsets_ptr,  # [K + 1]
    entries_ptr,  # [E]
    rows_ptr,  # [K, C]
    C,
    E,
    BLOCK_C: tl.constexpr,
):
    """What a row that several groups share gets: the sum of its entries, in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for i in range(tl.load(entry_offsets_ptr + row), tl.load(entry_offsets_ptr + row + 1)):
        entry = tl.load(entries_ptr + i).to(tl.int64)
        tl.device_assert((entry >= 0) & (entry < E), "entries are out of range")
        total += tl.load(entry_ptr + entry * C + c, mask=c < C, other=0.0)
    tl.store(rows_ptr + row * C + c, total.to(rows_ptr.dtype.element_ty), mask=c < C)


# ---- mean ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "blocks"])
def lse_kernel(
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    lse_ptr,  # [H, Q]
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    K,
    E,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The log-sum-exp of a block of queries of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = _work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = _rows(query_rows_ptr, first_query + i, real_query)
    q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = _rows(key_rows_ptr, first_key + j, real_key)
        k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
        logits = _multiply(q, tl.trans(k)) * scale
        logits = tl.where(real_key[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        total = total * tl.exp(highest - higher) + tl.sum(weights, 1)
        highest = higher
    lse = highest + tl.log(tl.where(keys > 0, total, 1.0))  # -inf without keys
    tl.store(lse_ptr + h * Q + query, lse, mask=real_query)


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "blocks"])
def mean_forward_kernel(
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    lse_ptr,  # [H, Q]
    weights_ptr,  # [H, E]
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    K,
    E,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The mean attention to a block of keys of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _check_offsets(query_offsets_ptr, G, Q, BLOCK=128)
        _check_offsets(key_offsets_ptr, G, E, BLOCK=128)
    g, start, h = _work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    if (start == 0) & (h == 0):
        _check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        _check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = _rows(key_rows_ptr, first_key + j, real_key)
    k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    total = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = _rows(query_rows_ptr, first_query + i, real_query)
        q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
        logits = _multiply(k, tl.trans(q)) * scale
        weights = tl.exp(logits - lse[None, :])
        total += tl.sum(tl.where(real_query[None, :], weights, 0.0), 1)
    tl.store(weights_ptr + h * E + first_key + j, total / tl.maximum(queries, 1), mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def mean_queries_kernel(
    grad_scores_ptr,  # [E]
    lse_ptr,  # [H, Q]
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    total_ptr,  # [H, Q]
    delta_ptr,  # [H, Q]
    grad_q_ptr,  # [Q, H, D]
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradient of a block of queries, the sums of their weights, and delta.

    Divided by their sum, the weights add up to one, as far as rounding in the log-sum-exp let them
    stray: their gradient is a difference that would show it. delta is the sum of the weights times
    their gradients.
    """
    program = tl.program_id(0).to(tl.int64)
    g, start, h = _work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = _rows(query_rows_ptr, first_query + i, real_query)
    q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
    k_ptr += h * k_head
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = _rows(key_rows_ptr, first_key + j, real_key)
        k = _load(k_ptr, key * k_row, real_key, D, BLOCK_D)
        grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
        logits = _multiply(q, tl.trans(k)) * scale
        weights = tl.where(real_key[None, :], tl.exp(logits - lse[:, None]), 0.0)
        total += tl.sum(weights, 1)
        delta += tl.sum(weights * grad[None, :], 1)
    total = tl.where(total == 0, 1.0, total)  # no keys
    delta = delta / total
    tl.store(total_ptr + h * Q + query, total, mask=real_query)
    tl.store(delta_ptr + h * Q + query, delta, mask=real_query)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = _rows(key_rows_ptr, first_key + j, real_key)
        k = _load(k_ptr, key * k_row, real_key, D, BLOCK_D)
        grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
        logits = _multiply(q, tl.trans(k)) * scale
        weights = tl.where(real_key[None, :], tl.exp(logits - lse[:, None]), 0.0)
        grad_logits = weights / total[:, None] * (grad[None, :] - delta[:, None])
        grad_q += _multiply(grad_logits.to(k.dtype), k)
    share = scale / (H * queries.to(tl.float32))
    share = tl.where(keys == 1, 0.0, share)  # one key always has all the weight
    _store(grad_q_ptr, (query * H + h) * D, grad_q * share, real_query, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "H", "Q", "blocks"])
def mean_keys_kernel(
    grad_scores_ptr,  # [E]
    lse_ptr,  # [H, Q]
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    total_ptr,  # [H, Q]
    delta_ptr,  # [H, Q]
    grad_k_ptr,  # [K, H, D], or [E, H, D] where rows are shared
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    Q,
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARED: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradient of a block of keys."""
    program = tl.program_id(0).to(tl.int64)
    g, start, h = _work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_query, queries = _span(query_offsets_ptr, g)
    first_key, keys = _span(key_offsets_ptr, g)
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = _rows(key_rows_ptr, first_key + j, real_key)
    k = _load(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = _rows(query_rows_ptr, first_query + i, real_query)
        q = _load(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
        total = tl.load(total_ptr + h * Q + query, mask=real_query, other=1.0)
        delta = tl.load(delta_ptr + h * Q + query, mask=real_query, other=0.0)
        logits = _multiply(k, tl.trans(q)) * scale
        weights = tl.exp(logits - lse[None, :]) / total[None, :]
        weights = tl.where(real_key[:, None] & real_query[None, :], weights, 0.0)
        grad_logits = weights * (grad[:, None] - delta[None, :])
        grad_k += _multiply(grad_logits.to(q.dtype), q)
    if SHARED:
        key = (first_key + j).to(tl.int64)
    share = scale / (H * tl.maximum(queries, 1).to(tl.float32))
    share = tl.where(keys == 1, 0.0, share)
    _store(grad_k_ptr, (key * H + h) * D, grad_k * share, real_key, D, BLOCK_D)


# ---- similarity ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "K"])
def directions_kernel(
    k_ptr,  # [K, H, D]
    directions_ptr,  # [K, D]
    k_row,
    k_head,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean over heads of a block of keys, divided by their lengths."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < K
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in range(0, H):
        start = row * k_row + tl.full([], 0, tl.int64) + h * k_head
        mean += _load(k_ptr, start, real, D, BLOCK_D).to(tl.float32)
    mean = mean / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    length = tl.where(length < 1e-12, 1e-12, length)
    _store(directions_ptr, row * D, mean / length[:, None], real, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "K", "E", "blocks"])
def similarity_kernel(
    directions_ptr,  # [K, D]
    key_offsets_ptr,
    key_rows_ptr,
    scores_ptr,  # [E]
    G,
    K,
    E,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The scores of a block of keys: the even ones meet blocks of odd ones."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        _check_offsets(key_offsets_ptr, G, E, BLOCK=128)
    g, start, _ = _work(program, key_offsets_ptr, G, 1, blocks, 2 * BLOCK_N, SEARCH)
    first_key, keys = _span(key_offsets_ptr, g)
    if start == 0:
        _check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= keys:
        return
    even = start + 2 * tl.arange(0, BLOCK_N)
    real = even < keys
    row = _rows(key_rows_ptr, first_key + even, real)
    ours = _load(directions_ptr, row * D, real, D, BLOCK_D)
    most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    wrong = tl.zeros([BLOCK_N], tl.float32)
    for at in range(1, keys, 2 * BLOCK_N):
        odd = at + 2 * tl.arange(0, BLOCK_N)
        real_odd = odd < keys
        row = _rows(key_rows_ptr, first_key + odd, real_odd)
        theirs = _load(directions_ptr, row * D, real_odd, D, BLOCK_D)
        cosines = tl.dot(ours, tl.trans(theirs), input_precision="tf32x3")
        wrong += tl.sum(cosines - cosines, 1)  # NaN, if a cosine is
        cosines = tl.where(real_odd[None, :], cosines, float("-inf"))
        most = tl.maximum(most, tl.max(cosines, 1))
    tl.store(scores_ptr + first_key + even, -(most + wrong), mask=real)
    never = tl.full([BLOCK_N], float("inf"), tl.float32)
    tl.store(scores_ptr + first_key + even + 1, never, mask=even + 1 < keys)


# ---- Launches -----------------------------------------------------------------------------------


class _Call:
    """What all kernels of a call are given."""

    def __init__(
        self,
        q: Tensor | None,
        k: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        query_rows: Tensor | None,
        key_rows: Tensor | None,
        entry_offsets: Tensor | None,
        entries: Tensor | None,
        max_queries: int,
        max_keys: int,
    ) -> None:
        self.k = _readable(k)
        self.q = self.k if q is None else _readable(q)
        self.key_index = (key_offsets, key_rows)
        self.index = (query_offsets, key_offsets, query_rows, key_rows)
        self.shared = entries is not None
        self.entries = (entry_offsets, entries)
        self.G = key_offsets.shape[0] - 1
        self.Q = 0 if q is None else q.shape[0]
        self.K, self.H, self.D = k.shape
        self.E = self.K if key_rows is None else key_rows.shape[0]
        self.most = (max_queries, max_keys)
        self.head = {"D": self.D, "BLOCK_D": max(16, triton.next_power_of_2(self.D))}
        # Of "cls": a tile of keys; of products: a side, as large as registers allow.
        self.keys = {"BLOCK_N": max(16, TILE // self.head["BLOCK_D"])}
        self.side = 16 if k.dtype == torch.float32 else 64 if self.D <= 64 else 32
        self.tile = {"BLOCK_M": self.side, "BLOCK_N": self.side}
        self.options: dict[str, Any] = {"num_warps": 4 if self.D <= 64 else 8, **OPTIONS}
        self.sizes = (self.G, self.H, self.Q, self.K, self.E)
        if library.interpreting():
            self.check(q is None)

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of rows and heads; as 0 a stride that means nothing leaves the addresses aligned."""
        return [x.stride(d) if x.shape[d] > 1 else 0 for x in tensors for d in (0, 1)]

    def blocks(self, of: int, size: int, heads: int) -> tuple[int, int, bool]:
        """Programs, blocks of each group, and whether a program has to search for its group.

        Args:
            of: 0 for blocks of queries, 1 for blocks of keys.
        """
        count = max(1, triton.cdiv(self.most[of], size))
        total = (self.Q, self.E)[of] // size + self.G  # of _work(), with SEARCH
        search = self.G * count > 2 * total
        return heads * (total if search else self.G * count), count, search

    def empty(self, *shape: int) -> Tensor:
        return self.k.new_empty(*shape, dtype=torch.float32)

    def check(self, keys_only: bool) -> None:
        """What the kernels assert on CUDA: Triton's interpreter leaves assertions out."""
        query_offsets, key_offsets, query_rows, key_rows = self.index
        for offsets, rows, members, count in (
            (query_offsets, query_rows, self.Q, self.Q),
            (key_offsets, key_rows, self.E, self.K),
            (*self.entries, self.E, self.E),
        )[keys_only:]:
            if offsets is None:
                continue
            steps = offsets.tolist()
            if steps[0] != 0 or steps[-1] != members or steps != sorted(steps):
                raise RuntimeError(
                    f"token_scores: offsets must ascend from 0 to {members}, got {steps}"
                )
            if rows is not None and not ((rows >= 0) & (rows < count)).all():
                raise RuntimeError(f"token_scores: rows must lie in [0, {count})")


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


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
    c = _Call(q, k, *index, max_queries, max_keys)
    with _device(k):
        if kind == "similarity":
            return _similarity(c), c.empty(0), c.empty(0)
        if kind == "mean":
            return *_mean(c, lse, scale), c.empty(0)
        weights = c.empty(c.H, c.E)
        if c.G * c.H:
            cls_forward_kernel[(c.G * c.H,)](
                c.q,
                c.k,
                *c.index,
                weights,
                *c.strides(c.q, c.k),
                *c.sizes,
                scale,
                **c.head,
                **c.keys,
                **c.options,
            )
        if kind == "cls":
            return weights.mean(0), weights, c.empty(0)
        assert v is not None
        norms = torch.linalg.vector_norm(v, dim=(1, 2), dtype=torch.float32)
        scores = c.empty(c.E)
        if c.G:
            value_forward_kernel[(c.G,)](
                weights.mean(0), norms, *c.key_index, scores, BLOCK_N=1024, **OPTIONS
            )
        return scores, weights, norms


def _mean(c: _Call, lse: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The scores, and the log-sum-exp unless it was given."""
    weights, found = c.empty(c.H, c.E), c.empty(0)
    if lse is None:
        lse = found = c.empty(c.H, c.Q)
        programs, blocks, search = c.blocks(0, c.side, c.H)
        if programs:
            lse_kernel[(programs,)](
                c.q,
                c.k,
                *c.index,
                lse,
                *c.strides(c.q, c.k),
                *c.sizes,
                blocks,
                scale,
                **c.head,
                **c.tile,
                SEARCH=search,
                **c.options,
            )
    programs, blocks, search = c.blocks(1, c.side, c.H)
    if programs:
        mean_forward_kernel[(programs,)](
            c.q,
            c.k,
            *c.index,
            lse,
            weights,
            *c.strides(c.q, c.k),
            *c.sizes,
            blocks,
            scale,
            **c.head,
            **c.tile,
            SEARCH=search,
            **c.options,
        )
    return weights.mean(0), found


def _similarity(c: _Call) -> Tensor:
    directions, scores = c.empty(c.K, c.D), c.empty(c.E)
    if c.K:
        directions_kernel[(triton.cdiv(c.K, 32),)](
            c.k,
            directions,
            *c.strides(c.k),
            c.H,
            c.K,
            **c.head,
            BLOCK_N=32,
            **c.options,
        )
    side = 32 if c.D <= 64 else 16  # larger ones spill registers
    programs, blocks, search = c.blocks(1, 2 * side, 1)
    if programs:
        similarity_kernel[(programs,)](
            directions,
            *c.key_index,
            scores,
            c.G,
            c.K,
            c.E,
            blocks,
            **c.head,
            BLOCK_N=side,
            SEARCH=search,
            **c.options,
        )
    return scores


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
    c = _Call(q, k, *index, max_queries, max_keys)
    grad_scores, weights = grad_scores.contiguous(), weights.contiguous()
    grad_v = k.new_empty(0)
    with _device(k):
        if kind == "mean":
            return *_mean_back(c, grad_scores, weights, scale), grad_v
        if kind == "value":
            assert v is not None
            grad_scores, grad_v = _value_back(c, grad_scores, weights, norms, v)
        return *_cls_back(c, grad_scores, weights, scale), grad_v


def _cls_back(
    c: _Call, grad_scores: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q = torch.zeros_like(c.q, memory_format=torch.contiguous_format)
    grad_k = torch.empty_like(c.k, memory_format=torch.contiguous_format)
    grad_logits = c.empty(c.H, c.E) if c.shared else None
    if c.G * c.H:
        cls_backward_kernel[(c.G * c.H,)](
            grad_scores,
            weights,
            c.q,
            c.k,
            *c.index,
            grad_q,
            None if c.shared else grad_k,
            grad_logits,
            *c.strides(c.q, c.k),
            c.H,
            c.E,
            scale,
            **c.head,
            **c.keys,
            **c.options,
        )
    if c.shared and c.K * c.H:
        query_offsets, key_offsets, query_rows, _ = c.index
        heads = min(triton.next_power_of_2(c.H), 16)
        cls_rows_kernel[(c.K * triton.cdiv(c.H, heads),)](
            grad_logits,
            group_of(key_offsets, c.E),
            c.q,
            query_offsets,
            query_rows,
            *c.entries,
            grad_k,
            *c.strides(c.q),
            c.H,
            c.E,
            **c.head,
            BLOCK_H=heads,
            **c.options,
        )
    return grad_q, grad_k


def _value_back(
    c: _Call, grad_scores: Tensor, weights: Tensor, norms: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the attention, and of v."""
    grad_attention = c.empty(c.E)
    grad_norms = c.empty(c.E if c.shared else c.K)
    if c.G:
        value_backward_kernel[(c.G,)](
            grad_scores,
            weights.mean(0),
            norms,
            *c.key_index,
            grad_attention,
            grad_norms,
            SHARED=c.shared,
            BLOCK_N=1024,
            **OPTIONS,
        )
    if c.shared:
        grad_norms = _sum_entries(c, grad_norms[:, None], c.empty(c.K, 1))[:, 0]
    factor = torch.where(norms == 0, 0, grad_norms / norms)
    return grad_attention, (v * factor[:, None, None]).to(v.dtype).contiguous()


def _mean_back(c: _Call, grad_scores: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (c.q, c.k)
    )
    entry_k = c.empty(c.E, c.H, c.D) if c.shared else grad_k
    total, delta = torch.empty_like(lse), torch.empty_like(lse)
    strides, sizes = c.strides(c.q, c.k), (c.G, c.H, c.Q)
    programs, blocks, search = c.blocks(0, c.side, c.H)
    if programs:
        mean_queries_kernel[(programs,)](
            grad_scores,
            lse,
            c.q,
            c.k,
            *c.index,
            total,
            delta,
            grad_q,
            *strides,
            *sizes,
            blocks,
            scale,
            **c.head,
            **c.tile,
            SEARCH=search,
            **c.options,
        )
    programs, blocks, search = c.blocks(1, c.side, c.H)
    if programs:
        mean_keys_kernel[(programs,)](
            grad_scores,
            lse,
            c.q,
            c.k,
            *c.index,
            total,
            delta,
            entry_k,
            *strides,
            *sizes,
            blocks,
            scale,
            **c.head,
            **c.tile,
            SHARED=c.shared,
            SEARCH=search,
            **c.options,
        )
    if c.shared:
        _sum_entries(c, entry_k.flatten(1), grad_k)
    return grad_q, grad_k


def _sum_entries(c: _Call, entries: Tensor, rows: Tensor) -> Tensor:
    """`rows` [K, ...], filled with the sums of `entries` [E, channels]."""
    channels = entries.shape[1]
    programs = c.K * triton.cdiv(channels, CHANNELS)
    if programs:
        sum_entries_kernel[(programs,)](
            entries, *c.entries, rows, channels, c.E, BLOCK_C=CHANNELS, **OPTIONS
        )
    return rows


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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
