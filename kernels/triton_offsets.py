"""Offsets in Triton: group (or sample) g owns the rows from offsets[g] up to offsets[g + 1]."""

import triton
import triton.language as tl


@triton.jit
def ascend(offsets_ptr, count, rows):
    """Whether the offsets of `count` groups ascend from 0 to `rows`."""
    BLOCK: tl.constexpr = 128
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        begin = tl.load(offsets_ptr + i, mask=i <= count, other=0)
        end = tl.load(offsets_ptr + i + 1, mask=i < count, other=0)
        bad = (i < count) & (begin > end)
        bad |= (i == 0) & (begin != 0)
        bad |= (i == count) & (begin != rows)
        wrong |= bad.to(tl.int32)
    return tl.max(wrong, 0) == 0


@triton.jit
def within(x, end):
    """x, limited to [0, end]."""
    return tl.minimum(tl.maximum(x, 0), end)


@triton.jit
def find_block(item, offsets_ptr, count, blocks, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """The group that block number `item` belongs to, and the block's first row in that group.

    Without SEARCH every group has `blocks` blocks. With SEARCH the blocks of group g begin at
    number offsets[g] // BLOCK + g: always enough, with few unused ones even for unequal groups. If
    the offsets do not ascend, a block may begin behind every group.
    """
    LAST: tl.constexpr = 2**31 - BLOCK
    if SEARCH:
        g = item * 0
        high = g + count
        while high - g > 1:
            middle = (g + high) // 2
            below = tl.load(offsets_ptr + middle) // BLOCK + middle <= item
            g = tl.where(below, middle, g)
            high = tl.where(below, high, middle)
        start = (item - tl.load(offsets_ptr + g) // BLOCK - g) * BLOCK
        start = tl.where((start < 0) | (start > LAST), LAST, start)
    else:
        g = item // blocks
        start = item % blocks * BLOCK
    return g, start.to(tl.int32)
