"""Rows of keys that several groups share: their gradient is the sum over their entries."""

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS
from vidl.kernels.triton_sums import add_compensated

from .triton_call import Call
from .triton_rows import rows_at, span

# Channels of a program.
CHANNELS = 256


@triton.jit(do_not_specialize=["C", "E"])
def sum_entries_kernel(
    entry_offsets_ptr,  # [num_keys + 1]
    entries_ptr,  # [E]
    first_entry_ptr,  # [E, C]
    first_row_ptr,  # [num_keys, C]
    second_entry_ptr,  # [E, C] or None
    second_row_ptr,
    C,
    E,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """row = sum of the row's entries, in order; bound by memory, every entry is read once."""
    program = tl.program_id(0).to(tl.int64)
    C = C // D * D  # tells the compiler that D divides C
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)[None, :]
    begin, members = span(entry_offsets_ptr, row, True, E)
    end = begin + members
    first = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    lost_first = tl.zeros([BLOCK_C], tl.float32)
    lost_second = tl.zeros([BLOCK_C], tl.float32)
    for at in range(begin, end, STEP):
        i = at + tl.arange(0, STEP)
        place = rows_at(entries_ptr, i, i < end, E)[:, None] * C + c
        mask = (i < end)[:, None] & (c < C)
        x = tl.sum(tl.load(first_entry_ptr + place, mask=mask, other=0.0), 0)
        first, lost_first = add_compensated(x, first, lost_first)
        if second_entry_ptr is not None:
            x = tl.sum(tl.load(second_entry_ptr + place, mask=mask, other=0.0), 0)
            second, lost_second = add_compensated(x, second, lost_second)
    place = row * C + c
    mask = c < C
    tl.store(first_row_ptr + place, first[None, :].to(first_row_ptr.dtype.element_ty), mask=mask)
    if second_row_ptr is not None:
        second = second[None, :].to(second_row_ptr.dtype.element_ty)
        tl.store(second_row_ptr + place, second, mask=mask)


def sum_entries(
    call: Call,
    entries: Sequence[Tensor],  # one or two tensors [E, ..., D], float32
    rows: Sequence[Tensor],  # as many [num_keys, ..., D], to be filled
    step: int = 1,
) -> None:
    """Add up the entries of every row, `step` at a time."""
    channels = prod(entries[0].shape[1:])
    programs = call.num_keys * triton.cdiv(channels, CHANNELS)
    if programs:
        sum_entries_kernel[(programs,)](
            *call.entries,
            *(x for pair in zip(entries, rows, strict=True) for x in pair),
            *(None,) * (4 - 2 * len(rows)),
            channels,
            call.E,
            entries[0].shape[-1],
            step,
            CHANNELS,
            **OPTIONS,
        )
