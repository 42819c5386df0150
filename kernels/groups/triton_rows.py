"""Where a Triton program finds its group, and how it reads the rows of that group.

Rows beyond the end of a group are never read and count as zeros, so that a NaN of a neighbouring
group cannot leak in. Addresses are int64.
"""

import triton
import triton.language as tl

from vidl.kernels.triton_offsets import check_offsets, find_block


@triton.jit
def span(offsets_ptr, g, mask):
    """The first member of a group and the number of its members; 0 where the mask is off."""
    begin = tl.load(offsets_ptr + g, mask=mask, other=0)
    return begin, tl.load(offsets_ptr + g + 1, mask=mask, other=0) - begin


@triton.jit
def find_group(
    program,
    offsets_ptr,  # of the members that the blocks divide: queries or keys
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    G,
    H,
    blocks,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The work of a program: a head, the start of a block, and the queries and keys of its group.

    Blocks are numbered as in find_block(); the heads of a block are neighbours.
    """
    h = program % H
    g, start = find_block(program // H, offsets_ptr, G, blocks, BLOCK, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True)
    first_key, keys = span(key_offsets_ptr, g, True)
    return h, start, first_query, queries, first_key, keys


@triton.jit
def check_rows(rows_ptr, first, members, count):
    """Assert that the rows of a group's members lie in [0, count).

    This loop is separate because an assertion between the matmuls would stop the compiler from
    prefetching loads.
    """
    BLOCK: tl.constexpr = 128
    if rows_ptr is not None:
        for start in range(0, members, BLOCK):
            i = start + tl.arange(0, BLOCK)
            row = tl.load(rows_ptr + first + i, mask=i < members, other=0)
            valid = (row >= 0) & (row < count)
            tl.device_assert(valid, "a row of the groups is out of range", mask=i < members)


@triton.jit
def check_groups(
    program,
    h,
    start,
    first_query,
    queries,
    first_key,
    keys,
    query_offsets_ptr,
    key_offsets_ptr,
    query_rows_ptr,
    key_rows_ptr,
    G,
    num_queries,
    E,
    num_keys,
    max_queries,
    max_keys,
):
    """Assert once that all offsets are valid, and once a group that its rows are."""
    if program == 0:
        check_offsets(query_offsets_ptr, G, num_queries, max_queries)
        check_offsets(key_offsets_ptr, G, E, max_keys)
    if (start == 0) & (h == 0):
        check_rows(query_rows_ptr, first_query, queries, num_queries)
        check_rows(key_rows_ptr, first_key, keys, num_keys)


@triton.jit
def rows_at(rows_ptr, place, mask):
    """The rows of q, or of k and v, at these places in the list of the members of all groups."""
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=mask, other=0)
    return row.to(tl.int64)


@triton.jit
def load_rows(ptr, start, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """D numbers from each start on, [..., BLOCK_D]; zeros where the mask is off."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    return tl.load(ptr + (tl.expand_dims(start, -1) + d), mask=mask, other=0.0)


@triton.jit
def load_block(
    ptr,
    rows_ptr,
    first,
    members,
    i,
    row_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Members number i of a group: whether they exist, their rows, and D numbers of each."""
    real = i < members
    row = rows_at(rows_ptr, first + i, real)
    return real, row, load_rows(ptr, row * row_stride, real, D, BLOCK_D)


@triton.jit
def store_rows(ptr, start, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows()."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + (tl.expand_dims(start, -1) + d), x.to(ptr.dtype.element_ty), mask=mask)
