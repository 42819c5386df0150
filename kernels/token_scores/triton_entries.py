"""Rows of keys that several groups share: their gradient is the sum of what every entry left."""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS

from .triton_call import Call

# Channels of a program.
CHANNELS = 256


@triton.jit(do_not_specialize=["E"])
def sum_entries_kernel(
    entry_ptr,  # [E, C]
    entry_offsets_ptr,  # [K + 1]
    entries_ptr,  # [E]
    rows_ptr,  # [K, C]
    C,
    E,
    BLOCK_C: tl.constexpr,
):
    """What a row that several groups share gets: the sum of its entries, in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for i in range(tl.load(entry_offsets_ptr + row), tl.load(entry_offsets_ptr + row + 1)):
        entry = tl.load(entries_ptr + i).to(tl.int64)
        tl.device_assert((entry >= 0) & (entry < E), "entries are out of range")
        total += tl.load(entry_ptr + entry * C + c, mask=c < C, other=0.0)
    tl.store(rows_ptr + row * C + c, total.to(rows_ptr.dtype.element_ty), mask=c < C)


def sum_entries(c: Call, entries: Tensor, rows: Tensor) -> Tensor:
    """`rows` [K, ...], filled with the sums of `entries` [E, channels]."""
    channels = entries.shape[1]
    programs = c.K * triton.cdiv(channels, CHANNELS)
    if programs:
        sum_entries_kernel[(programs,)](
            entries, *c.entries, rows, channels, c.E, BLOCK_C=CHANNELS, **OPTIONS
        )
    return rows
