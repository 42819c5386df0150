"""What is added to the logits of attention in Triton: see kernels/groups/bias.py.

Codes may be any numbers: their differences wrap around, and rows of the table are limited. So no
address depends on them being right. A hidden key is never read and counts as zeros, so that its NaN
cannot leak.
"""

import triton
import triton.language as tl

from vidl.kernels.triton_offsets import within

from .triton_rows import load_rows, rows_at

# The hardware computes powers of 2.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_codes(codes_ptr, query, real, shift):
    """The codes of queries, less the shift; zeros without a table."""
    if codes_ptr is None:
        return tl.zeros(query.shape, tl.int32)
    else:
        return tl.load(codes_ptr + query, mask=real, other=0) - shift


@triton.jit
def key_codes(codes_ptr, key, real):
    """The codes of keys; zeros without a table."""
    if codes_ptr is None:
        return tl.zeros(key.shape, tl.int32)
    else:
        return tl.load(codes_ptr + key, mask=real, other=0)


@triton.jit
def seen_keys(key_bias_ptr, key, real, BASE_2: tl.constexpr = True):
    """Which keys are not hidden, and what is added to the logits of each."""
    if key_bias_ptr is None:
        return real, tl.zeros(key.shape, tl.float32)
    else:
        key_bias = tl.load(key_bias_ptr + key, mask=real, other=float("-inf"))
        if BASE_2:
            key_bias *= LOG2_E
        return key_bias != float("-inf"), key_bias


@triton.jit
def load_keys(
    k_ptr,
    rows_ptr,
    key_codes_ptr,
    key_bias_ptr,
    first,
    members,
    j,
    count,
    row_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BASE_2: tl.constexpr = True,
):
    """Keys number j of a group.

    Returns:
        Whether they exist, whether they are not hidden either, their rows, D numbers of each, their
        codes, and what is added to their logits.
    """
    real = j < members
    row = rows_at(rows_ptr, first + j, real, count)
    seen, key_bias = seen_keys(key_bias_ptr, row, real, BASE_2)
    k = load_rows(k_ptr, row * row_stride, seen, D, BLOCK_D)
    return real, seen, row, k, key_codes(key_codes_ptr, row, real), key_bias


@triton.jit
def any_seen(keys, seen, key_bias_ptr):
    """Whether queries have keys that are not hidden, for the number of keys of their groups."""
    if key_bias_ptr is None:
        return keys > 0
    else:
        any_of = tl.max(seen.to(tl.int32), len(seen.shape) - 1, keep_dims=len(seen.shape) > 1)
        return any_of > 0


@triton.jit
def head_table(last, h):
    """Where the rows of a head begin in the table, whose last row is `last`; 0 without a table."""
    if last is None:
        return h * 0
    else:
        return h * (last + 1)


@triton.jit
def add_bias(
    logits,
    table_ptr,
    key_bias_ptr,
    last,
    table,
    query_code,
    key_code,
    key_bias,
    BASE_2: tl.constexpr = True,
):
    """Logits with the bias, to base 2 or to base e.

    Args:
        last: the last row of the table, or None.
        table: from head_table().
        query_code, key_code, key_bias: from the functions above. They and `table` broadcast to the
            shape of the logits.
    """
    if table_ptr is not None:
        row = within(key_code - query_code, last)
        added = tl.load(table_ptr + table + row)
        if BASE_2:
            added *= LOG2_E
        logits += added
    if key_bias_ptr is not None:
        logits += key_bias
    return logits
