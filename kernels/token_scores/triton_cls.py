"""token_scores of the first query of each group, in Triton: "cls", and "value" on top of it.

A program handles a group and a head. It stores the logits of its keys, reads them back once their
maximum and the sum of their exponentials are known, and keeps the weights for the backward pass.
Bound by memory: forward and backward read the keys once, and their gradients are written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups import group_of
from vidl.kernels.groups.triton_bias import add_bias, head_table, load_keys, query_codes
from vidl.kernels.groups.triton_entries import sum_entries
from vidl.kernels.groups.triton_limits import key_limits
from vidl.kernels.groups.triton_rows import (
    find_group,
    load_rows,
    rows_at,
    span,
    store_rows,
)
from vidl.kernels.triton_launch import OPTIONS
from vidl.kernels.triton_sums import add_compensated

from .triton_call import ScoresCall


@triton.jit
def _first_query(
    q_ptr, query_rows_ptr, first_query, num_queries, q_row, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The first query of a group, [BLOCK_D], and its row, [1]."""
    one = tl.arange(0, 1)
    row = rows_at(query_rows_ptr, first_query + one, one == 0, num_queries)
    q = load_rows(q_ptr, row * q_row, row >= 0, D, BLOCK_D)
    return tl.sum(q.to(tl.float32), 0), row


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last"])
def cls_forward_kernel(
    q_ptr,  # [num_queries, H, D]
    k_ptr,  # [num_keys, H, D]
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    query_rows_ptr,  # [num_queries] or None
    key_rows_ptr,  # [E] or None
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1] or None
    query_codes_ptr,  # [num_queries] or None
    key_codes_ptr,  # [num_keys] or None
    key_bias_ptr,  # [num_keys] or None
    weights_ptr,  # [H, E]
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
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The attention weights of the first query of one group and head."""
    program = tl.program_id(0).to(tl.int64)
    h, _, first_query, queries, first_key, keys = find_group(
        *(program, key_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, 1, BLOCK_KEYS, False),
    )
    weights_ptr += h * E + first_key
    j = tl.arange(0, BLOCK_KEYS)
    if queries == 0:
        for at in range(0, keys, BLOCK_KEYS):
            tl.store(weights_ptr + at + j, tl.zeros([BLOCK_KEYS], tl.float32), mask=at + j < keys)
        return
    k_ptr += h * k_head
    q, query = _first_query(
        q_ptr + h * q_head, query_rows_ptr, first_query, num_queries, q_row, D, BLOCK_D
    )
    seen_keys = keys
    if query_limits_ptr is not None:
        seen_keys = tl.max(key_limits(query_limits_ptr, query, query >= 0, keys), 0)
    query_code = query_codes(query_codes_ptr, query, query >= 0, shift)
    table = head_table(last, h)
    highest = tl.full([BLOCK_KEYS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(0, seen_keys, BLOCK_KEYS):
        real, seen, key, k, key_code, key_bias = load_keys(
            *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, seen_keys, at + j),
            *(num_keys, k_row, D, BLOCK_D),
            BASE_2=False,
        )
        k = k.to(tl.float32)
        logits = tl.sum(k * q[None, :], 1) * scale
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table, query_code, key_code, key_bias),
            BASE_2=False,
        )
        tl.store(weights_ptr + at + j, logits, mask=real)
        # An online softmax in every lane; a lane that has no key yet contributes nothing.
        higher = tl.where(seen, tl.where(logits > highest, logits, highest), highest)
        rescale = tl.where(higher == highest, 1.0, tl.exp(highest - higher))
        total = total * rescale + tl.where(seen, tl.exp(logits - higher), 0.0)
        highest = higher
    top = tl.max(highest, 0)
    total = tl.sum(tl.where(total == 0, 0.0, total * tl.exp(highest - top)), 0)
    if query_limits_ptr is not None or key_bias_ptr is not None:  # perhaps no key is seen
        top = tl.where(total == 0, 0.0, top)
        total = tl.where(total == 0, 1.0, total)
    tl.debug_barrier()  # makes the logits of other threads visible
    for at in range(0, keys, BLOCK_KEYS):
        logits = tl.load(weights_ptr + at + j, mask=at + j < seen_keys, other=float("-inf"))
        tl.store(weights_ptr + at + j, tl.exp(logits - top) / total, mask=at + j < keys)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys"])
def cls_backward_kernel(
    grad_scores_ptr,  # [E]
    weights_ptr,  # [H, E]
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    key_bias_ptr,  # [num_keys] or None
    grad_q_ptr,  # [num_queries, H, D], zeros
    grad_k_ptr,  # [num_keys, H, D], or None where rows are shared
    grad_logits_ptr,  # [H, E], or None where they are not
    q_row,
    q_head,
    k_row,
    k_head,
    G,
    H,
    num_queries,
    E,
    num_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The gradients of the first query and of the keys of one group and head."""
    program = tl.program_id(0).to(tl.int64)
    h, _, first_query, queries, first_key, keys = find_group(
        *(program, key_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, 1, BLOCK_KEYS, False),
    )
    weights_ptr += h * E + first_key
    j = tl.arange(0, BLOCK_KEYS)
    products = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(0, keys, BLOCK_KEYS):
        real = at + j < keys
        weights = tl.load(weights_ptr + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        products += weights * grad
    delta = tl.sum(products, 0)
    # A group without queries has weights and gradients of 0.
    q = tl.zeros([BLOCK_D], tl.float32)
    row = tl.zeros([1], tl.int64)
    if queries > 0:
        q, row = _first_query(
            q_ptr + h * q_head, query_rows_ptr, first_query, num_queries, q_row, D, BLOCK_D
        )
    grad_q = tl.zeros([BLOCK_D], tl.float32)
    for at in range(0, keys, BLOCK_KEYS):
        real, seen, key, k, code, added = load_keys(
            *(k_ptr + h * k_head, key_rows_ptr, None, key_bias_ptr, first_key, keys, at + j),
            *(num_keys, k_row, D, BLOCK_D),
        )
        k = k.to(tl.float32)
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


@triton.jit(do_not_specialize=["G", "num_queries", "E"])
def cls_rows_kernel(
    grad_logits_ptr,  # [H, E]
    group_ptr,  # [E]
    q_ptr,
    query_offsets_ptr,
    query_rows_ptr,
    entry_offsets_ptr,  # [num_keys + 1]
    entries_ptr,  # [E]
    grad_k_ptr,  # [num_keys, H, D]
    q_row,
    q_head,
    G,
    H,
    num_queries,
    E,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gradient of a shared row of keys, for a block of heads: its entries, in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H, BLOCK_H)
    row = program // blocks
    h = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    begin, members = span(entry_offsets_ptr, row, True, E)
    grad_k = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    lost = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i in range(begin, begin + members):
        entry = rows_at(entries_ptr, i, i >= begin, E)
        group = tl.load(group_ptr + entry)
        first_query, queries = span(query_offsets_ptr, group, group < G, num_queries)
        if queries > 0:
            place = first_query + tl.zeros([BLOCK_H], tl.int32)
            query = rows_at(query_rows_ptr, place, h < H, num_queries)
            q = load_rows(q_ptr, query * q_row + h * q_head, h < H, D, BLOCK_D).to(tl.float32)
            grad = tl.load(grad_logits_ptr + h * E + entry, mask=h < H, other=0.0)
            grad_k, lost = add_compensated(grad[:, None] * q, grad_k, lost)
    store_rows(grad_k_ptr, (row * H + h) * D, grad_k, h < H, D, BLOCK_D)


@triton.jit(do_not_specialize=["E", "num_keys"])
def value_forward_kernel(
    attention_ptr,  # [E]
    norms_ptr,  # [num_keys]
    key_offsets_ptr,
    key_rows_ptr,
    scores_ptr,  # [E]
    E,
    num_keys,
    BLOCK_KEYS: tl.constexpr,
):
    """scores = attention * norm of the value, divided by the sum over the group."""
    first_key, keys = span(key_offsets_ptr, tl.program_id(0).to(tl.int64), True, E)
    j = tl.arange(0, BLOCK_KEYS)
    sums = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(0, keys, BLOCK_KEYS):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real, num_keys)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        sums += attention * tl.load(norms_ptr + key, mask=real, other=0.0)
    total = tl.sum(sums, 0)
    total = tl.where(total == 0, 1.0, total)
    for at in range(0, keys, BLOCK_KEYS):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real, num_keys)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        weighted = attention * tl.load(norms_ptr + key, mask=real, other=0.0)
        tl.store(scores_ptr + first_key + at + j, weighted / total, mask=real)


@triton.jit(do_not_specialize=["E", "num_keys"])
def value_backward_kernel(
    grad_scores_ptr,  # [E]
    attention_ptr,  # [E]
    norms_ptr,  # [num_keys]
    key_offsets_ptr,
    key_rows_ptr,
    grad_attention_ptr,  # [E]
    grad_norms_ptr,  # [num_keys], or [E] where rows are shared
    E,
    num_keys,
    SHARED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """With w = attention * norm and gradients g: d w = (g - sum(g w) / sum(w)) / sum(w)."""
    first_key, keys = span(key_offsets_ptr, tl.program_id(0).to(tl.int64), True, E)
    j = tl.arange(0, BLOCK_KEYS)
    sums = tl.zeros([BLOCK_KEYS], tl.float32)
    products = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(0, keys, BLOCK_KEYS):
        real = at + j < keys
        key = rows_at(key_rows_ptr, first_key + at + j, real, num_keys)
        attention = tl.load(attention_ptr + first_key + at + j, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + first_key + at + j, mask=real, other=0.0)
        weighted = attention * tl.load(norms_ptr + key, mask=real, other=0.0)
        sums += weighted
        products += grad * weighted
    total = tl.sum(sums, 0)
    valid = total != 0
    total = tl.where(valid, total, 1.0)
    delta = tl.sum(products, 0) / total
    for at in range(0, keys, BLOCK_KEYS):
        real = at + j < keys
        entry = first_key + at + j
        key = rows_at(key_rows_ptr, entry, real, num_keys)
        attention = tl.load(attention_ptr + entry, mask=real, other=0.0)
        grad = tl.load(grad_scores_ptr + entry, mask=real, other=0.0)
        norm = tl.load(norms_ptr + key, mask=real, other=0.0)
        grad = tl.where(valid, (grad - delta) / total, 0.0)
        tl.store(grad_attention_ptr + entry, grad * norm, mask=real)
        place = entry if SHARED else key
        tl.store(grad_norms_ptr + place, grad * attention, mask=real)


def cls_weights(call: ScoresCall, scale: float) -> Tensor:
    """The attention weights of the first query of every group, [H, E]."""
    weights = call.empty(call.H, call.E)
    if call.G * call.H:
        cls_forward_kernel[(call.G * call.H,)](
            call.q,
            call.k,
            *call.index,
            weights,
            *call.strides,
            *call.sizes,
            scale,
            **call.head,
            **call.keys,
            **call.options,
        )
    return weights


def cls_back(
    call: ScoresCall, grad_scores: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
    grad_k = call.grad_of_keys(call.k)
    grad_logits = call.empty(call.H, call.E) if call.shared else None
    if call.G * call.H:
        cls_backward_kernel[(call.G * call.H,)](
            grad_scores,
            weights,
            call.q,
            call.k,
            *call.members,
            call.bias.key_bias,
            grad_q,
            None if call.shared else grad_k,
            grad_logits,
            *call.strides,
            *call.sizes[:5],
            scale,
            **call.head,
            **call.keys,
            **call.options,
        )
    if call.shared and call.num_keys * call.H:
        query_offsets, key_offsets, query_rows, _ = call.members
        heads = min(triton.next_power_of_2(call.H), 16)
        cls_rows_kernel[(call.num_keys * triton.cdiv(call.H, heads),)](
            grad_logits,
            group_of(key_offsets, call.E),
            call.q,
            query_offsets,
            query_rows,
            *call.entries,
            grad_k,
            *call.strides[:2],
            *call.sizes[:4],
            **call.head,
            BLOCK_H=heads,
            **call.options,
        )
    return grad_q, grad_k


def value_scores(call: ScoresCall, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [E], from the weights [H, E], and the norms of the values [num_keys]."""
    norms = torch.linalg.vector_norm(v, dim=(1, 2), dtype=torch.float32)
    scores = call.empty(call.E)
    if call.G:
        value_forward_kernel[(call.G,)](
            weights.mean(0),
            norms,
            *call.key_index,
            scores,
            *call.sizes[3:5],
            BLOCK_KEYS=1024,
            **OPTIONS,
        )
    return scores, norms


def value_back(
    call: ScoresCall, grad_scores: Tensor, weights: Tensor, norms: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the attention [E] and of v."""
    grad_attention = call.empty(call.E)
    grad_norms = call.empty(call.E) if call.shared else call.grad_of_keys(norms)
    if call.G:
        value_backward_kernel[(call.G,)](
            grad_scores,
            weights.mean(0),
            norms,
            *call.key_index,
            grad_attention,
            grad_norms,
            *call.sizes[3:5],
            SHARED=call.shared,
            BLOCK_KEYS=1024,
            **OPTIONS,
        )
    if call.shared:
        entry_norms, grad_norms = grad_norms, call.empty(call.num_keys)
        sum_entries(call, [entry_norms[:, None]], [grad_norms[:, None]])
    factor = torch.where((norms == 0) | (grad_norms == 0), 0, grad_norms / norms)
    # A row of no group may be NaN, and its gradient is zero.
    grad_v = torch.where(factor[:, None, None] == 0, 0, v * factor[:, None, None])
    return grad_attention, grad_v.to(v.dtype).contiguous()
