"""token_scores of all queries of each group, in Triton: "mean".

First the log-sum-exp of every query, unless it is given; then a program for a block of keys of a
group and a head adds up their weights over blocks of queries. Backward: one kernel for queries,
which also stores `delta` and the sum of the weights of every query, then one for keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_bias import add_bias, head_table, load_keys, query_codes
from vidl.kernels.groups.triton_entries import sum_entries
from vidl.kernels.groups.triton_limits import key_limits, queries_of_keys, seen_by, zero_single
from vidl.kernels.groups.triton_rows import find_group, load_block, store_rows
from vidl.kernels.groups.triton_softmax import logit_slope, multiply, online_softmax
from vidl.kernels.triton_sums import add_compensated

from .triton_call import ScoresCall


@triton.jit
def _key_block(
    at,
    q,
    lse,
    query_code,
    limit,
    grad_scores_ptr,
    k_ptr,  # of this head
    key_rows_ptr,
    query_limits_ptr,
    table_ptr,
    key_codes_ptr,
    key_bias_ptr,
    last,
    table,
    k_row,
    first_key,
    keys,
    num_keys,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A block of keys from number `at` on: k, the weights, and the gradients of the scores."""
    j = at + tl.arange(0, BLOCK_KEYS)
    real_key, seen, _, k, key_code, key_bias = load_keys(
        *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys, k_row),
        *(D, BLOCK_D),
        BASE_2=False,
    )
    grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
    logits = multiply(q, tl.trans(k)) * scale
    logits = add_bias(
        *(logits, table_ptr, key_bias_ptr, last, table),
        *(query_code[:, None], key_code[None, :], key_bias[None, :]),
        BASE_2=False,
    )
    pair = seen_by(query_limits_ptr, seen[None, :], j[None, :], limit[:, None])
    return k, tl.where(pair, tl.exp(logits - lse[:, None]), 0.0), grad


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def lse_kernel(
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
    lse_ptr,  # [H, num_queries]
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
    SEARCH: tl.constexpr,
):
    """The log-sum-exp of a block of queries of one group and head."""
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_QUERIES, SEARCH),
    )
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_QUERIES)
    real_query, query, q = load_block(
        q_ptr + h * q_head, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
    )
    query_code = query_codes(query_codes_ptr, query, real_query, shift)
    limit = key_limits(query_limits_ptr, query, real_query, keys)
    end = keys
    if query_limits_ptr is not None:
        end = tl.max(limit, 0)
    table = head_table(last, h)
    k_ptr += h * k_head
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    for at in range(0, end, BLOCK_KEYS):
        j = at + tl.arange(0, BLOCK_KEYS)
        _, seen, _, k, key_code, key_bias = load_keys(
            *(k_ptr, key_rows_ptr, key_codes_ptr, key_bias_ptr, first_key, keys, j, num_keys),
            *(k_row, D, BLOCK_D),
            BASE_2=False,
        )
        logits = multiply(q, tl.trans(k)) * scale
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table),
            *(query_code[:, None], key_code[None, :], key_bias[None, :]),
            BASE_2=False,
        )
        pair = seen_by(query_limits_ptr, seen[None, :], j[None, :], limit[:, None])
        logits = tl.where(pair, logits, float("-inf"))
        _, _, highest, total = online_softmax(
            *(logits, highest, total),
            BASE_2=False,
            HIDDEN=key_bias_ptr is not None or query_limits_ptr is not None,
        )
    lse = highest + tl.log(tl.where(total == 0.0, 1.0, total))  # -inf without keys
    tl.store(lse_ptr + h * num_queries + query, lse, mask=real_query)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def mean_forward_kernel(
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
    lse_ptr,  # [H, num_queries]
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
    blocks,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The mean attention to a block of keys of one group and head."""
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
        BASE_2=False,
    )
    table = head_table(last, h)
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    lost = tl.zeros([BLOCK_KEYS], tl.float32)
    begin, end = queries_of_keys(
        query_limits_ptr, query_rows_ptr, first_query, queries, num_queries, start
    )
    for at in range(begin // BLOCK_QUERIES * BLOCK_QUERIES, end, BLOCK_QUERIES):
        i = at + tl.arange(0, BLOCK_QUERIES)
        real_query, query, q = load_block(
            q_ptr + h * q_head,
            query_rows_ptr,
            first_query,
            queries,
            i,
            num_queries,
            q_row,
            D,
            BLOCK_D,
        )
        lse = tl.load(lse_ptr + h * num_queries + query, mask=real_query, other=0.0)
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
        limit = key_limits(query_limits_ptr, query, real_query, keys)
        logits = multiply(k, tl.trans(q)) * scale
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table),
            *(query_code[None, :], key_code[:, None], key_bias[:, None]),
            BASE_2=False,
        )
        weights = tl.exp(logits - lse[None, :])
        pair = real_query[None, :]
        if query_limits_ptr is not None or key_bias_ptr is not None:
            pair = seen_by(query_limits_ptr, pair & seen[:, None], j[:, None], limit[None, :])
        weights = tl.sum(tl.where(pair, weights, 0.0), 1)
        total, lost = add_compensated(weights, total, lost)
    tl.store(weights_ptr + h * E + first_key + j, total / tl.maximum(queries, 1), mask=real_key)


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def mean_queries_kernel(
    grad_scores_ptr,  # [E]
    lse_ptr,  # [H, num_queries]
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
    total_ptr,  # [H, num_queries]
    delta_ptr,  # [H, num_queries]
    grad_q_ptr,  # [num_queries, H, D]
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
    SEARCH: tl.constexpr,
):
    """The gradient of a block of queries, and for each query the sum of its weights, and delta.

    The log-sum-exp is rounded, so the weights are divided by their sum: the gradient, a difference,
    would show the error. delta is the sum of the weights times their gradients.
    """
    program = tl.program_id(0).to(tl.int64)
    h, start, first_query, queries, first_key, keys = find_group(
        *(program, query_offsets_ptr, query_offsets_ptr, key_offsets_ptr),
        *(G, H, num_queries, E, blocks, BLOCK_QUERIES, SEARCH),
    )
    if start >= queries:
        return
    i = start + tl.arange(0, BLOCK_QUERIES)
    real_query, query, q = load_block(
        q_ptr + h * q_head, query_rows_ptr, first_query, queries, i, num_queries, q_row, D, BLOCK_D
    )
    lse = tl.load(lse_ptr + h * num_queries + query, mask=real_query, other=0.0)
    k_ptr += h * k_head
    query_code = query_codes(query_codes_ptr, query, real_query, shift)
    limit = key_limits(query_limits_ptr, query, real_query, keys)
    end = keys
    if query_limits_ptr is not None:
        end = tl.max(limit, 0)
    query_side = (q, lse, query_code, limit)
    key_side = (grad_scores_ptr, k_ptr, key_rows_ptr, query_limits_ptr)
    bias = (table_ptr, key_codes_ptr, key_bias_ptr, last, head_table(last, h))
    members = (k_row, first_key, keys, num_keys)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    delta = tl.zeros([BLOCK_QUERIES], tl.float32)
    lost = tl.zeros([BLOCK_QUERIES], tl.float32)
    lost_delta = tl.zeros([BLOCK_QUERIES], tl.float32)
    for at in range(0, end, BLOCK_KEYS):
        _, weights, grad = _key_block(
            at, *query_side, *key_side, *bias, *members, scale, D, BLOCK_D, BLOCK_KEYS
        )
        total, lost = add_compensated(tl.sum(weights, 1), total, lost)
        delta, lost_delta = add_compensated(tl.sum(weights * grad[None, :], 1), delta, lost_delta)
    total = tl.where(total == 0, 1.0, total)  # no keys
    delta = delta / total
    tl.store(total_ptr + h * num_queries + query, total, mask=real_query)
    tl.store(delta_ptr + h * num_queries + query, delta, mask=real_query)
    grad_q = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    for at in range(0, end, BLOCK_KEYS):
        k, weights, grad = _key_block(
            at, *query_side, *key_side, *bias, *members, scale, D, BLOCK_D, BLOCK_KEYS
        )
        grad_logits = weights / total[:, None] * (grad[None, :] - delta[:, None])
        grad_logits = zero_single(query_limits_ptr, grad_logits, limit[:, None])
        grad_q += multiply(grad_logits.to(k.dtype), k)
    share = scale / (H * queries.to(tl.float32))
    store_rows(
        grad_q_ptr, (query * H + h) * D, grad_q * logit_slope(keys, share), real_query, D, BLOCK_D
    )


@triton.jit(do_not_specialize=["G", "H", "num_queries", "E", "num_keys", "shift", "last", "blocks"])
def mean_keys_kernel(
    grad_scores_ptr,  # [E]
    lse_ptr,  # [H, num_queries]
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
    total_ptr,  # [H, num_queries]
    delta_ptr,  # [H, num_queries]
    grad_k_ptr,  # [num_keys, H, D], or [E, H, D] where rows are shared
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
    SHARED: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The gradient of a block of keys."""
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
        BASE_2=False,
    )
    table = head_table(last, h)
    grad = tl.load(grad_scores_ptr + first_key + j, mask=real_key, other=0.0)
    grad_k = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    begin, end = queries_of_keys(
        query_limits_ptr, query_rows_ptr, first_query, queries, num_queries, start
    )
    for at in range(begin // BLOCK_QUERIES * BLOCK_QUERIES, end, BLOCK_QUERIES):
        i = at + tl.arange(0, BLOCK_QUERIES)
        real_query, query, q = load_block(
            q_ptr + h * q_head,
            query_rows_ptr,
            first_query,
            queries,
            i,
            num_queries,
            q_row,
            D,
            BLOCK_D,
        )
        lse = tl.load(lse_ptr + h * num_queries + query, mask=real_query, other=0.0)
        total = tl.load(total_ptr + h * num_queries + query, mask=real_query, other=1.0)
        delta = tl.load(delta_ptr + h * num_queries + query, mask=real_query, other=0.0)
        query_code = query_codes(query_codes_ptr, query, real_query, shift)
        limit = key_limits(query_limits_ptr, query, real_query, keys)
        logits = multiply(k, tl.trans(q)) * scale
        logits = add_bias(
            *(logits, table_ptr, key_bias_ptr, last, table),
            *(query_code[None, :], key_code[:, None], key_bias[:, None]),
            BASE_2=False,
        )
        weights = tl.exp(logits - lse[None, :]) / total[None, :]
        pair = seen[:, None] & real_query[None, :]
        pair = seen_by(query_limits_ptr, pair, j[:, None], limit[None, :])
        weights = tl.where(pair, weights, 0.0)
        grad_logits = weights * (grad[:, None] - delta[None, :])
        grad_logits = zero_single(query_limits_ptr, grad_logits, limit[None, :])
        grad_k += multiply(grad_logits.to(q.dtype), q)
    if SHARED:
        key = (first_key + j).to(tl.int64)
    share = scale / (H * tl.maximum(queries, 1).to(tl.float32))
    store_rows(
        grad_k_ptr, (key * H + h) * D, grad_k * logit_slope(keys, share), real_key, D, BLOCK_D
    )


def mean_scores(call: ScoresCall, lse: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The scores [E], and the log-sum-exp unless it is given."""
    weights, new_lse = call.empty(call.H, call.E), call.empty(0)
    if lse is None:
        lse = new_lse = call.empty(call.H, call.num_queries)
        programs, blocks, search = call.blocks(0, call.side, call.H)
        if programs:
            lse_kernel[(programs,)](
                call.q,
                call.k,
                *call.index,
                lse,
                *call.strides,
                *call.sizes,
                blocks,
                scale,
                **call.head,
                **call.tile,
                SEARCH=search,
                **call.options,
            )
    programs, blocks, search = call.blocks(1, call.side, call.H)
    if programs:
        mean_forward_kernel[(programs,)](
            call.q,
            call.k,
            *call.index,
            lse,
            weights,
            *call.strides,
            *call.sizes,
            blocks,
            scale,
            **call.head,
            **call.tile,
            SEARCH=search,
            **call.options,
        )
    return weights.mean(0), new_lse


def mean_back(
    call: ScoresCall, grad_scores: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q and k; the sum of the weights of every query, and delta."""
    grad_q = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    grad_k = call.grad_of_keys(call.k)
    entry_k = call.empty(call.E, call.H, call.D) if call.shared else grad_k
    total, delta = torch.empty_like(lse), torch.empty_like(lse)
    programs, blocks, search = call.blocks(0, call.side, call.H)
    if programs:
        mean_queries_kernel[(programs,)](
            grad_scores,
            lse,
            call.q,
            call.k,
            *call.index,
            total,
            delta,
            grad_q,
            *call.strides,
            *call.sizes,
            blocks,
            scale,
            **call.head,
            **call.tile,
            SEARCH=search,
            **call.options,
        )
    programs, blocks, search = call.blocks(1, call.side, call.H)
    if programs:
        mean_keys_kernel[(programs,)](
            grad_scores,
            lse,
            call.q,
            call.k,
            *call.index,
            total,
            delta,
            entry_k,
            *call.strides,
            *call.sizes,
            blocks,
            scale,
            **call.head,
            **call.tile,
            SHARED=call.shared,
            SEARCH=search,
            **call.options,
        )
    if call.shared:
        sum_entries(call, [entry_k], [grad_k])
    return grad_q, grad_k, total, delta
