"""Where a program of space_time_attention finds its group, its rows, and their channels.

A row beyond the end of its group is never read: it counts as zeros, so that a neighbour's NaN stays
there. Addresses are int64.
"""

import triton
import triton.language as tl


@triton.jit
def check_offsets(offsets_ptr, G, count, most, BLOCK: tl.constexpr):
    for start in range(0, G + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        this = tl.load(offsets_ptr + i, mask=i <= G, other=0)
        after = tl.load(offsets_ptr + i + 1, mask=i < G, other=0)
        size = after - this
        tl.device_assert(size >= 0, "offsets of groups must ascend", mask=i < G)
        tl.device_assert(size <= most, "a group is longer than max_queries, max_keys", mask=i < G)
        tl.device_assert(this == 0, "offsets of groups must begin with 0", mask=i == 0)
        tl.device_assert(this == count, "offsets of groups must end with their rows", mask=i == G)


@triton.jit
def check_rows(rows_ptr, begin, members, count, BLOCK: tl.constexpr):
    """In a loop of its own: an assertion among the products would keep loads from running ahead."""
    if rows_ptr is not None:
        for start in range(0, members, BLOCK):
            i = start + tl.arange(0, BLOCK)
            row = tl.load(rows_ptr + begin + i, mask=i < members, other=0)
            right = (row >= 0) & (row < count)
            tl.device_assert(right, "a row of the groups is out of range", mask=i < members)


@triton.jit
def span(offsets_ptr, g, mask):
    """Where a group's members begin and how many they are; none where the mask is off."""
    begin = tl.load(offsets_ptr + g, mask=mask, other=0)
    return begin, tl.load(offsets_ptr + g + 1, mask=mask, other=0) - begin


@triton.jit
def find_work(program, offsets_ptr, G, H, blocks, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
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
def rows_at(rows_ptr, place, mask):
    """The rows of q, or of k and v, at these places of the list of all groups' members."""
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=mask, other=0)
    return row.to(tl.int64)


@triton.jit
def load_rows(ptr, start, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[..., BLOCK_D] channels from each start; zeros where the mask is off."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    return tl.load(ptr + (tl.expand_dims(start, -1) + d), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, start, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(mask, -1)
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + (tl.expand_dims(start, -1) + d), x.to(ptr.dtype.element_ty), mask=mask)
