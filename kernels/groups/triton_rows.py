"""Where a Triton program finds its group, and how it reads the rows of that group.

Rows beyond the end of a group are never read and count as zeros, so that a NaN of a neighbouring
group cannot leak in. Addresses are int64. `Groups` checks its lists once, when it is made. Kernels
only make sure that no address is out of range: a group whose offsets do not fit has no members, and
rows are limited. An assertion would end the CUDA context of the process.
"""

import triton
import triton.language as tl

from vidl.kernels.triton_offsets import find_block, within


@triton.jit
def span(offsets_ptr, g, mask, places):
    """The first member of a group and the number of its members.

    A group has no members where the mask is off, or its offsets do not lie in the list.

    Args:
        places: the length of the list of members.
    """
    begin = tl.load(offsets_ptr + g, mask=mask, other=0)
    end = tl.load(offsets_ptr + g + 1, mask=mask, other=0)
    fits = (begin >= 0) & (begin <= end) & (end <= places)
    return tl.where(fits, begin, 0), tl.where(fits, end - begin, 0)


@triton.jit
def find_group(
    program,
    offsets_ptr,  # of the members that the blocks divide: queries or keys
    query_offsets_ptr,  # [G + 1]
    key_offsets_ptr,  # [G + 1]
    G,
    H,
    num_queries,
    E,
    blocks,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The work of a program: a head, the start of a block, and the queries and keys of its group.

    Blocks are numbered as in find_block(); the heads of a block are neighbours.
    """
    h = program % H
    g, start = find_block(program // H, offsets_ptr, G, blocks, BLOCK, SEARCH)
    first_query, queries = span(query_offsets_ptr, g, True, num_queries)
    first_key, keys = span(key_offsets_ptr, g, True, E)
    return h, start, first_query, queries, first_key, keys


@triton.jit
def rows_at(rows_ptr, place, mask, count):
    """The rows of q, or of k and v, at these places in the list of the members of all groups.

    Args:
        count: the number of rows, which limits them; where the mask is on, there is one or more.
    """
    row = place
    if rows_ptr is not None:
        row = within(tl.load(rows_ptr + place, mask=mask, other=0), count - 1)
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
    count,
    row_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Members number i of a group: whether they exist, their rows, and D numbers of each.

    Args:
        count: the number of rows of q, or of k and v.
    """
    real = i < members
    row = rows_at(rows_ptr, first + i, real, count)
    return real, row, load_rows(ptr, row * row_stride, real, D, BLOCK_D)


@triton.jit
def store_rows(ptr, start, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows()."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + (tl.expand_dims(start, -1) + d), x.to(ptr.dtype.element_ty), mask=mask)
