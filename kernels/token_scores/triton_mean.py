"""token_scores of all queries of each group, in Triton: "mean".

First the log-sum-exp of every query, unless it is given; then a program for a block of keys of a
group and a head adds up their weights over blocks of queries. Backward one kernel for queries,
which leaves every query's `delta` and the sum of its weights behind, then one for keys.
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
    strides_of,
)

from .triton_call import Call
from .triton_entries import sum_entries


@triton.jit
def multiply(a, b):
    return tl.dot(a, b, input_precision="ieee")


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
    g, start, h = find_work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = rows_at(query_rows_ptr, first_query + i, real_query)
    q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = rows_at(key_rows_ptr, first_key + j, real_key)
        k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
        logits = multiply(q, tl.trans(k)) * scale
        logits = tl.where(real_key[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        total = total * tl.exp(highest - higher) + tl.sum(weights, 1)
        highest = higher
    lse = highest + tl.log(tl.where(keys > 0, total, 1.0))  # -inf without keys
    tl.store(lse_ptr + h * Q + query, lse, mask=real_query)


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "max_queries", "max_keys", "blocks"])
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
    """The mean attention to a block of keys of a group and a head."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g, start, h = find_work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if (start == 0) & (h == 0):
        check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    total = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = rows_at(query_rows_ptr, first_query + i, real_query)
        q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
        logits = multiply(k, tl.trans(q)) * scale
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
    g, start, h = find_work(program, query_offsets_ptr, G, H, blocks, BLOCK_M, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_M)
    real_query = i < queries
    query = rows_at(query_rows_ptr, first_query + i, real_query)
    q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
    lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
    k_ptr += h * k_head
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, keys, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        real_key = j < keys
        key = rows_at(key_rows_ptr, first_key + j, real_key)
        k = load_rows(k_ptr, key * k_row, real_key, D, BLOCK_D)
        grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
        logits = multiply(q, tl.trans(k)) * scale
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
        key = rows_at(key_rows_ptr, first_key + j, real_key)
        k = load_rows(k_ptr, key * k_row, real_key, D, BLOCK_D)
        grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
        logits = multiply(q, tl.trans(k)) * scale
        weights = tl.where(real_key[None, :], tl.exp(logits - lse[:, None]), 0.0)
        grad_logits = weights / total[:, None] * (grad[None, :] - delta[:, None])
        grad_q += multiply(grad_logits.to(k.dtype), k)
    share = scale / (H * queries.to(tl.float32))
    share = tl.where(keys == 1, 0.0, share)  # one key always has all the weight
    store_rows(grad_q_ptr, (query * H + h) * D, grad_q * share, real_query, D, BLOCK_D)


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
    g, start, h = find_work(program, key_offsets_ptr, G, H, blocks, BLOCK_N, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start >= keys:
        return
    j = start + tl.arange(0, BLOCK_N)
    real_key = j < keys
    key = rows_at(key_rows_ptr, first_key + j, real_key)
    k = load_rows(k_ptr + h * k_head, key * k_row, real_key, D, BLOCK_D)
    grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        real_query = i < queries
        query = rows_at(query_rows_ptr, first_query + i, real_query)
        q = load_rows(q_ptr + h * q_head, query * q_row, real_query, D, BLOCK_D)
        lse = tl.load(lse_ptr + h * Q + query, mask=real_query, other=0.0)
        total = tl.load(total_ptr + h * Q + query, mask=real_query, other=1.0)
        delta = tl.load(delta_ptr + h * Q + query, mask=real_query, other=0.0)
        logits = multiply(k, tl.trans(q)) * scale
        weights = tl.exp(logits - lse[None, :]) / total[None, :]
        weights = tl.where(real_key[:, None] & real_query[None, :], weights, 0.0)
        grad_logits = weights * (grad[:, None] - delta[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q)
    if SHARED:
        key = (first_key + j).to(tl.int64)
    share = scale / (H * tl.maximum(queries, 1).to(tl.float32))
    share = tl.where(keys == 1, 0.0, share)
    store_rows(grad_k_ptr, (key * H + h) * D, grad_k * share, real_key, D, BLOCK_D)


def mean_scores(c: Call, lse: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
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
                *strides_of(c.q, c.k),
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
            *strides_of(c.q, c.k),
            *c.sizes,
            *c.most,
            blocks,
            scale,
            **c.head,
            **c.tile,
            SEARCH=search,
            **c.options,
        )
    return weights.mean(0), found


def mean_back(c: Call, grad_scores: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (c.q, c.k)
    )
    entry_k = c.empty(c.E, c.H, c.D) if c.shared else grad_k
    total, delta = torch.empty_like(lse), torch.empty_like(lse)
    strides, sizes = strides_of(c.q, c.k), (c.G, c.H, c.Q)
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
        sum_entries(c, entry_k.flatten(1), grad_k)
    return grad_q, grad_k
