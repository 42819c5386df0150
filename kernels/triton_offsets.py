"""Offsets in Triton: group (or sample) g owns the rows from offsets[g] up to offsets[g + 1]."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def check_offsets(offsets_ptr, count, rows, longest):
    """Assert that the offsets of `count` groups ascend from 0 to `rows`.

    No group may have more than `longest` rows, unless that is None.
    """
    BLOCK: tl.constexpr = 128
    for start in range(0, count + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        begin = tl.load(offsets_ptr + i, mask=i <= count, other=0)
        end = tl.load(offsets_ptr + i + 1, mask=i < count, other=0)
        tl.device_assert(begin <= end, "offsets must ascend", mask=i < count)
        if longest is not None:
            short = end - begin <= longest
            tl.device_assert(short, "a group exceeds max_queries or max_keys", mask=i < count)
        tl.device_assert(begin == 0, "offsets must begin with 0", mask=i == 0)
        tl.device_assert(begin == rows, "offsets must end with the number of rows", mask=i == count)


@triton.jit
def find_block(item, offsets_ptr, count, blocks, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """The group that block number `item` belongs to, and the block's first row in that group.

    Without SEARCH every group has `blocks` blocks. With SEARCH the blocks of group g begin at
    number offsets[g] // BLOCK + g: always enough, with few unused ones even for unequal groups.
    """
    if SEARCH:
        g = item * 0
        high = g + count
        while high - g > 1:
            middle = (g + high) // 2
            below = tl.load(offsets_ptr + middle) // BLOCK + middle <= item
            g = tl.where(below, middle, g)
            high = tl.where(below, high, middle)
        start = (item - tl.load(offsets_ptr + g) // BLOCK - g) * BLOCK
    else:
        g = item // blocks
        start = item % blocks * BLOCK
    return g, start.to(tl.int32)


def check_on_host(op: str, name: str, offsets: Tensor, rows: int) -> None:
    """Raise what check_offsets() asserts; for Triton's interpreter, which ignores assertions."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        raise RuntimeError(f"{op}: {name} must ascend from 0 to {rows}, got {values}")
