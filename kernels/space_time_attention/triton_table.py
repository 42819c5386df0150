"""The gradient of the table of relative positions: sums of the gradients of logits, by row.

The keys of all groups, in blocks, are divided into parts; kernels/groups/triton_table.py adds them
up. The matmuls of a tile, 4 * D FLOPs a pair of a query and a key, are computed once more.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import head_table, load_keys, query_codes
from vidl.kernels.groups.triton_limits import key_limits, queries_of_keys, seen_by, zero_single
from vidl.kernels.groups.triton_rows import find_group, load_block, load_rows
from vidl.kernels.groups.triton_softmax import weights_back
from vidl.kernels.groups.triton_table import MOST_PARTS, add_queries, rank_of, sum_of_tables
from vidl.kernels.triton_offsets import within
from vidl.kernels.triton_sums import add_compensated

from .triton_call import AttentionCall, Tile


@triton.jit(
    do_not_specialize=[
        *("G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks", "units", "parts")
    ]
)
def table_backward_kernel(
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
    table_ptr,  # [H, last + 1]
    query_codes_ptr,  # [num_queries]
    key_codes_ptr,  # [num_keys]
    key_bias_ptr,  # [num_keys] or None
    sums_ptr,  # [parts, H, last + 1], zeros
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
    units,
    parts,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCORES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The sums of one head over one part of the blocks of keys."""
    program = tl.program_id(0).to(tl.int64)
    h, part = program % H, program // H
    table = head_table(last, h)
    sums_ptr += part * H * (last + 1) + table
    q_ptr += h * q_head
    k_ptr += h * k_head
    v_ptr += h * v_head
    lse_ptr += h * num_queries
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
        # A single key always has all the weight.
        queries = tl.where((start < keys) & (keys > 1), queries, 0)
        j = start + tl.arange(0, BLOCK_KEYS)
        real_key, seen, key, k, key_code, key_bias = load_keys(
            *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys),
            *(k_row, D, BLOCK_D),
        )
        v = load_rows(v_ptr, key * v_row, seen, D, BLOCK_D)
        grad_score = tl.zeros([BLOCK_KEYS], tl.float32)
        if grad_scores_ptr is not None:
            grad_score = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0) / H
            if SCORES == "mean":
                grad_score = grad_score / tl.maximum(queries, 1)
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
            grad_out = load_rows(grad_out_ptr, (query * H + h) * D, real_query, D, BLOCK_D)
            lse = tl.load(lse_ptr + query, mask=real_query, other=0.0)
            delta = tl.load(delta_ptr + query, mask=real_query, other=0.0)
            query_code = query_codes(query_codes_ptr, query, real_query, shift)
            weights, grads = weights_back(  # [queries, keys]
                q,
                k,
                v,
                grad_out,
                lse[:, None],
                grad_score[None, :],
                (i == 0)[:, None],
                seen_by(
                    query_limits_ptr,
                    seen[None, :] & real_query[:, None],
                    j[None, :],
                    limit[:, None],
                ),
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
            if inverse_ptr is not None:
                inverse = tl.load(inverse_ptr + h * num_queries + query, mask=real_query, other=0.0)
                weights *= inverse[:, None]
            grad_logits = weights * (grads - delta[:, None])
            grad_logits = zero_single(query_limits_ptr, grad_logits, limit[:, None])
            row = within(key_code[None, :] - query_code[:, None], last)
            ends = tl.sum(tl.where(row == 0, grad_logits, 0.0), 0)
            least, lost_least = add_compensated(ends, least, lost_least)
            ends = tl.sum(tl.where((row == last) & (row > 0), grad_logits, 0.0), 0)
            most, lost_most = add_compensated(ends, most, lost_most)
            row = tl.where(seen[None, :] & real_query[:, None], row, 0)
            grad_logits, row = tl.trans(grad_logits), tl.trans(row)
            for number in range(0, highest_rank + 1):
                add_queries(grad_logits, row, rank == number, last, sums_ptr)
    tl.store(sums_ptr, tl.sum(least, 0))
    tl.store(sums_ptr + last, tl.sum(most, 0), mask=last > 0)


def backward(
    call: AttentionCall,
    tile: Tile,
    grad_out: Tensor,
    grad_scores: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    inverse: Tensor | None,
) -> Tensor:
    """The gradient of the table, [H, rows]."""
    table = call.bias.table
    assert table is not None
    units, blocks, search = call.blocks(1, tile.keys, 1)
    parts = min(units, MOST_PARTS)
    sums = table.new_zeros(parts, *table.shape)
    if parts:
        table_backward_kernel[(parts * call.H,)](
            grad_out,
            grad_scores,
            *call.inputs,
            lse,
            delta,
            inverse,
            *call.index,
            sums,
            *call.strides,
            *call.sizes,
            blocks,
            units,
            parts,
            call.scale,
            **call.head,
            **tile.blocks,
            SCORES=call.scores,
            SEARCH=search,
            **tile.options,
        )
    return sum_of_tables(sums)
