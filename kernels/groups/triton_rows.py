"""What Triton kernels share that work on groups: where a program finds its group and its rows.

A row beyond the end of its group is never read: it counts as zeros, so that a neighbour's NaN stays
there. Addresses are int64. On the host: how many programs there are, and what they assert.
"""

from collections.abc import Iterable

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels import library


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


def strides_of(*tensors: Tensor) -> list[int]:
    """Of rows and heads; as 0 a stride that means nothing leaves the addresses aligned."""
    return [x.stride(d) if x.shape[d] > 1 else 0 for x in tensors for d in (0, 1)]


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy whose channels are contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def programs_for(G: int, members: int, most: int, size: int, heads: int) -> tuple[int, int, bool]:
    """Programs, blocks of each group, and whether a program has to search for its group.

    Args:
        G: groups.
        members: of all groups.
        most: members of any group.
        size: members of a block.
        heads: programs for a block.
    """
    count = max(1, triton.cdiv(most, size))
    total = members // size + G  # of find_work(), with SEARCH
    search = G * count > 2 * total
    return heads * (total if search else G * count), count, search


def check_in_interpreter(
    op: str, parts: Iterable[tuple[Tensor | None, Tensor | None, int, int, int]]
) -> None:
    """What the kernels assert on CUDA: Triton's interpreter leaves assertions out.

    Args:
        parts: offsets, rows, members of all groups, bound of the rows, and most members of a group.
    """
    if not library.interpreting():
        return
    for offsets, rows, members, count, most in parts:
        if offsets is None:
            continue
        steps = offsets.tolist()
        if steps[0] != 0 or steps[-1] != members or steps != sorted(steps):
            raise RuntimeError(f"{op}: offsets must ascend from 0 to {members}, got {steps}")
        longest = int(offsets.diff().max()) if len(steps) > 1 else 0
        if longest > most:
            raise RuntimeError(f"{op}: need groups of at most {most} rows, got {longest}")
        if rows is not None and not ((rows >= 0) & (rows < count)).all():
            raise RuntimeError(f"{op}: rows must lie in [0, {count})")
