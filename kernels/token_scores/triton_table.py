"""The gradient of the table of relative positions, of "cls" and of "mean".

The groups, or blocks of their keys, are divided into parts; kernels/groups/triton_table.py adds
them up. For "cls" the weights are read, 8 bytes a key and head twice; for "mean" the matmul of the
logits is computed once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import add_bias, head_table, key_codes, load_keys, query_codes
from vidl.kernels.groups.triton_limits import key_limits, queries_of_keys, seen_by, zero_single
from vidl.kernels.groups.triton_rows import find_group, load_block, rows_at, span
from vidl.kernels.groups.triton_softmax import multiply
from vidl.kernels.groups.triton_table import (
    MOST_PARTS,
    add_queries,
    add_query,
    rank_of,
    sum_of_tables,
)
from vidl.kernels.triton_launch import OPTIONS
from vidl.kernels.triton_offsets import within
from vidl.kernels.triton_sums import add_compensated

from .triton_call import ScoresCall

# Queries and keys of a tile, and keys of a step of "cls".
QUERIES, KEYS = 16, 64


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "parts"])
def cls_table_kernel(
    grad_scores_ptr,  # [E]
    weights_ptr,  # [H, E]
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    query_rows_ptr,  # [num_queries] or None
    key_rows_ptr,  # [E] or None
    query_codes_ptr,  # [num_queries]
    key_codes_ptr,  # [num_keys]
    sums_ptr,  # [parts, H, last + 1], zeros
    G,
    H,
    num_queries,
    E,
    num_keys,
    shift,
    last,
    parts,
    BLOCK_KEYS: tl.constexpr,
):
    """The sums of one head over one part of the groups."""
    program = tl.program_id(0).to(tl.int64)
    h, part = program % H, program // H
    sums_ptr += program * (last + 1)
    weights_ptr += h * E
    j = tl.arange(0, BLOCK_KEYS)
    least = tl.zeros([BLOCK_KEYS], tl.float32)  # what the first row of the table gets
    most = tl.zeros([BLOCK_KEYS], tl.float32)
    lost_least = tl.zeros([BLOCK_KEYS], tl.float32)
    lost_most = tl.zeros([BLOCK_KEYS], tl.float32)
    for g in range(G * part // parts, G * (part + 1) // parts):
        first_query, queries = span(query_offsets_ptr, g, True, num_queries)
        first_key, keys = span(key_offsets_ptr, g, True, E)
        keys = tl.where(queries > 0, keys, 0)
        one = tl.arange(0, 1)
        real_query = one < queries
        query = rows_at(query_rows_ptr, first_query + one, real_query, num_queries)
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
        products = tl.zeros([BLOCK_KEYS], tl.float32)
        for at in range(0, keys, BLOCK_KEYS):
            entry = first_key + at + j
            weights = tl.load(weights_ptr + entry, mask=at + j < keys, other=0.0)
            grad = tl.load(grad_scores_ptr + entry, mask=at + j < keys, other=0.0)
            products += weights * grad
        delta = tl.sum(products, 0)
        for at in range(0, keys, BLOCK_KEYS):
            real = at + j < keys
            entry = first_key + at + j
            key = rows_at(key_rows_ptr, entry, real, num_keys)
            key_code = key_codes(key_codes_ptr, key, real)
            weights = tl.load(weights_ptr + entry, mask=real, other=0.0)
            grad = tl.load(grad_scores_ptr + entry, mask=real, other=0.0)
            grad = weights * (grad - delta) / H
            row = within(key_code - query_code, last)
            least, lost_least = add_compensated(tl.where(row == 0, grad, 0.0), least, lost_least)
            ends = tl.where((row == last) & (row > 0), grad, 0.0)
            most, lost_most = add_compensated(ends, most, lost_most)
            rank, highest_rank = rank_of(key_code, real, BLOCK_KEYS)
            for number in range(0, highest_rank + 1):
                add_query(grad, row, real & (rank == number), last, sums_ptr)
    tl.store(sums_ptr, tl.sum(least, 0))
    tl.store(sums_ptr + last, tl.sum(most, 0), mask=last > 0)


@triton.jit(
    do_not_specialize=[
        *("G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks", "units", "parts")
    ]
)
def mean_table_kernel(
    grad_scores_ptr,  # [E]
    lse_ptr,  # [H, num_queries]
    total_ptr,  # [H, num_queries]
    delta_ptr,  # [H, num_queries]
    q_ptr,
    k_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    query_limits_ptr,  # [num_queries] or None
    table_ptr,  # [H, last + 1]
    query_codes_ptr,  # [num_queries]
    key_codes_ptr,  # [num_keys]
    key_bias_ptr,  # [num_keys] or None
    sums_ptr,  # [parts, H, last + 1], zeros
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
    units,
    parts,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The sums of one head over one part of the blocks of keys."""
    program = tl.program_id(0).to(tl.int64)
    h, part = program % H, program // H
    table = head_table(last, h)
    sums_ptr += program * (last + 1)
    q_ptr += h * q_head
    k_ptr += h * k_head
    lse_ptr += h * num_queries
    total_ptr += h * num_queries
    delta_ptr += h * num_queries
    least = tl.zeros([BLOCK_KEYS], tl.float32)  # what the first row of the table gets
    most = tl.zeros([BLOCK_KEYS], tl.float32)
    lost_least = tl.zeros([BLOCK_KEYS], tl.float32)
    lost_most = tl.zeros([BLOCK_KEYS], tl.float32)
    for unit in range(units * part // parts, units * (part + 1) // parts):
        _, start, first_query, queries, first_key, keys = find_group(
            *(unit, key_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
            *(G, 1, num_queries, E, blocks, BLOCK_KEYS, SEARCH),
        )
        share = 1.0 / (H * tl.maximum(queries, 1).to(tl.float32))
        # A single key always has all the weight.
        queries = tl.where((start < keys) & (keys > 1), queries, 0)
        j = start + tl.arange(0, BLOCK_KEYS)
        real_key, seen, _, k, key_code, key_bias = load_keys(
            *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys),
            *(k_row, D, BLOCK_D),
            BASE_2=False,
        )
        grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
        rank, highest_rank = rank_of(key_code, real_key, BLOCK_KEYS)
        begin, end = queries_of_keys(
            query_limits_ptr, query_rows_ptr, first_query, queries, num_queries, start
        )
        for at in range(begin // BLOCK_QUERIES * BLOCK_QUERIES, end, BLOCK_QUERIES):
            i = at + tl.arange(0, BLOCK_QUERIES)
            real_query, query, q = load_block(
                q_ptr, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
            )
            limit = key_limits(query_limits_ptr, query, real_query, keys)
            lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
            total = tl.load(total_ptr + query, mask=real_query, other=1.0)
            delta = tl.load(delta_ptr + query, mask=real_query, other=0.0)
            query_code = query_codes(query_codes_ptr, query, real_query, shift)
            logits = multiply(q, tl.trans(k)) * scale
            logits = add_bias(
                *(logits, table_ptr, key_bias_ptr, last, table),
                *(query_code[:, None], key_code[None, :], key_bias[None, :]),
                BASE_2=False,
            )
            real = seen[None, :] & real_query[:, None]
            pair = seen_by(query_limits_ptr, real, j[None, :], limit[:, None])
            weights = tl.where(pair, tl.exp(logits - lse[:, None]), 0.0) / total[:, None]
            grad_logits = weights * (grad[None, :] - delta[:, None]) * share
            grad_logits = zero_single(query_limits_ptr, grad_logits, limit[:, None])
            row = within(key_code[None, :] - query_code[:, None], last)
            ends = tl.sum(tl.where(row == 0, grad_logits, 0.0), 0)
            least, lost_least = add_compensated(ends, least, lost_least)
            ends = tl.sum(tl.where((row == last) & (row > 0), grad_logits, 0.0), 0)
            most, lost_most = add_compensated(ends, most, lost_most)
            row = tl.where(real, row, 0)
            grad_logits, row = tl.trans(grad_logits), tl.trans(row)
            for number in range(0, highest_rank + 1):
                add_queries(grad_logits, row, rank == number, last, sums_ptr)
    tl.store(sums_ptr, tl.sum(least, 0))
    tl.store(sums_ptr + last, tl.sum(most, 0), mask=last > 0)


def cls_table(call: ScoresCall, grad_scores: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the table, [H, rows], from that of the scores [E] and the weights [H, E]."""
    table = call.bias.table
    assert table is not None
    parts = min(call.G, MOST_PARTS)
    sums = table.new_zeros(parts, *table.shape)
    if parts:
        cls_table_kernel[(parts * call.H,)](
            grad_scores,
            weights,
            *call.members,
            call.bias.query_codes,
            call.bias.key_codes,
            sums,
            *call.sizes,
            parts,
            BLOCK_KEYS=KEYS,
            maxnreg=168,  # left to itself, the compiler spills on sm_80 to use 128
            **OPTIONS,
        )
    return sum_of_tables(sums)


def mean_table(
    call: ScoresCall, grad_scores: Tensor, lse: Tensor, total: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """The gradient of the table, [H, rows].

    Args:
        grad_scores: [E].
        lse, total, delta: [H, num_queries] each, as `mean_back` has them.
    """
    table = call.bias.table
    assert table is not None
    keys = KEYS if call.D <= 64 else KEYS // 2
    units, blocks, search = call.blocks(1, keys, 1)
    parts = min(units, MOST_PARTS)
    sums = table.new_zeros(parts, *table.shape)
    if parts:
        mean_table_kernel[(parts * call.H,)](
            grad_scores,
            lse,
            total,
            delta,
            call.q,
            call.k,
            *call.index,
            sums,
            *call.strides,
            *call.sizes,
            blocks,
            units,
            parts,
            scale,
            **call.head,
            BLOCK_QUERIES=QUERIES,
            BLOCK_KEYS=keys,
            SEARCH=search,
            num_warps=4,
            **OPTIONS,
        )
    return sum_of_tables(sums)
