"""token_scores of one query of each group, in Triton: "cls", and "value" on top of it.

A program takes a group and a head; it writes the products of its keys, reads them back once their
greatest and their sum are known, and leaves the weights for the backward pass. Bound by memory: the
keys are read once, forward and backward, and their gradients are written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups import group_of
from vidl.kernels.groups.triton_rows import (
    check_offsets,
    check_rows,
    load_rows,
    rows_at,
    span,
    store_rows,
    strides_of,
)
from vidl.kernels.triton_launch import OPTIONS

from .triton_call import Call
from .triton_entries import sum_entries


@triton.jit
def _first_query(q_ptr, query_rows_ptr, first_query, q_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first query of a group, [BLOCK_D], and its row."""
    row = rows_at(query_rows_ptr, first_query + tl.arange(0, 1), tl.arange(0, 1) == 0)
    q = load_rows(q_ptr, row * q_row, row >= 0, D, BLOCK_D)
    return tl.sum(q.to(tl.float32), 0), tl.sum(row)


@triton.jit(do_not_specialize=["G", "H", "Q", "K", "E", "max_queries", "max_keys"])
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
    max_queries,
    max_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The attention of the first query of a group, of one head."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        check_offsets(query_offsets_ptr, G, Q, max_queries, BLOCK=128)
        check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g = program // H
    h = program % H
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    if h == 0:
        check_rows(query_rows_ptr, first_query, queries, Q, BLOCK=128)
        check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
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
        key = rows_at(key_rows_ptr, first_key + at + j, real)
        k = load_rows(k_ptr, key * k_row, real, D, BLOCK_D).to(tl.float32)
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
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
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
        key = rows_at(key_rows_ptr, first_key + at + j, real)
        k = load_rows(k_ptr + h * k_head, key * k_row, real, D, BLOCK_D).to(tl.float32)
        weights = tl.load(weights_ptr + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        grad = weights * (grad - delta) * (scale / H)
        grad_q += tl.sum(grad[:, None] * k, 0)
        if grad_k_ptr is not None:
            store_rows(grad_k_ptr, (key * H + h) * D, grad[:, None] * q[None, :], real, D, BLOCK_D)
        else:
            tl.store(grad_logits_ptr + h * E + first_key + at + j, grad, mask=real)
    if queries > 0:
        store_rows(grad_q_ptr, (row * H + h) * D, grad_q[None, :], row >= 0, D, BLOCK_D)


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
        first_query, queries = span(query_offsets_ptr, tl.load(group_ptr + entry), True)
        if queries > 0:
            query = rows_at(query_rows_ptr, first_query + tl.zeros([BLOCK_H], tl.int32), h < H)
            q = load_rows(q_ptr, query * q_row + h * q_head, h < H, D, BLOCK_D).to(tl.float32)
            grad_k += tl.load(grad_logits_ptr + h * E + entry, mask=h < H, other=0.0)[:, None] * q
    store_rows(grad_k_ptr, (row * H + h) * D, grad_k, h < H, D, BLOCK_D)


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
    first_key, keys = span(key_offsets_ptr, tl.program_id(0).to(tl.int64), True)
    j = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        sums += attention * tl.load(norms_ptr + key, mask=real, other=0.0)
    total = tl.sum(sums, 0)
    total = tl.where(total == 0, 1.0, total)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real)
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
    first_key, keys = span(key_offsets_ptr, tl.program_id(0).to(tl.int64), True)
    j = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    reached = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, keys, BLOCK_N):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real)
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
        key = rows_at(key_rows_ptr, entry, real)
        attention = tl.load(attention_ptr + entry, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + entry, mask=real, other=0.0)
        norm = tl.load(norms_ptr + key, mask=real, other=0.0)
        grad = tl.where(some, (grad - delta) / total, 0.0)
        tl.store(grad_attention_ptr + entry, grad * norm, mask=real)
        place = entry if SHARED else key
        tl.store(grad_norms_ptr + place, grad * attention, mask=real)


def cls_weights(c: Call, scale: float) -> Tensor:
    """The attention of the first query of every group, [H, E]."""
    weights = c.empty(c.H, c.E)
    if c.G * c.H:
        cls_forward_kernel[(c.G * c.H,)](
            c.q,
            c.k,
            *c.index,
            weights,
            *strides_of(c.q, c.k),
            *c.sizes,
            *c.most,
            scale,
            **c.head,
            **c.keys,
            **c.options,
        )
    return weights


def cls_back(c: Call, grad_scores: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
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
            *strides_of(c.q, c.k),
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
            *strides_of(c.q),
            c.H,
            c.E,
            **c.head,
            BLOCK_H=heads,
            **c.options,
        )
    return grad_q, grad_k


def value_scores(c: Call, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [E] from the attention [H, E], and the lengths of the values [K]."""
    norms = torch.linalg.vector_norm(v, dim=(1, 2), dtype=torch.float32)
    scores = c.empty(c.E)
    if c.G:
        value_forward_kernel[(c.G,)](
            weights.mean(0), norms, *c.key_index, scores, BLOCK_N=1024, **OPTIONS
        )
    return scores, norms


def value_back(
    c: Call, grad_scores: Tensor, weights: Tensor, norms: Tensor, v: Tensor
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
        grad_norms = sum_entries(c, grad_norms[:, None], c.empty(c.K, 1))[:, 0]
    factor = torch.where(norms == 0, 0, grad_norms / norms)
    return grad_attention, (v * factor[:, None, None]).to(v.dtype).contiguous()
