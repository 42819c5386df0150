"""Rows of keys that several groups share: their gradient is the sum of what every entry left."""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS

from .triton_call import Call

# Entries added at a time for a row, and the channels of a program.
ENTRIES_PER_STEP = 8
CHANNELS = 256


@triton.jit(do_not_specialize=["C", "E"])
def sum_entries_kernel(
    entry_k_ptr,  # [E, C]
    entry_v_ptr,
    entry_offsets_ptr,  # [K + 1]
    entries_ptr,  # [E]
    grad_k_ptr,  # [K, C]
    grad_v_ptr,
    C,
    E,
    D: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of a row: the sum of its entries, in order; bound by memory, each read once."""
    program = tl.program_id(0).to(tl.int64)
    C = C // D * D  # so that the compiler knows it for a multiple of D
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)[None, :]
    begin = tl.load(entry_offsets_ptr + row)
    end = tl.load(entry_offsets_ptr + row + 1)
    grad_k = tl.zeros([BLOCK_C], tl.float32)
    grad_v = tl.zeros([BLOCK_C], tl.float32)
    for at in range(begin, end, STEP):
        i = at + tl.arange(0, STEP)
        entry = tl.load(entries_ptr + i, mask=i < end, other=0)
        tl.device_assert((entry >= 0) & (entry < E), "entries are out of range", mask=i < end)
        place = entry.to(tl.int64)[:, None] * C + c
        mask = (i < end)[:, None] & (c < C)
        grad_k += tl.sum(tl.load(entry_k_ptr + place, mask=mask, other=0.0), 0)
        grad_v += tl.sum(tl.load(entry_v_ptr + place, mask=mask, other=0.0), 0)
    place = row * C + c
    mask = c < C
    tl.store(grad_k_ptr + place, grad_k[None, :].to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + place, grad_v[None, :].to(grad_v_ptr.dtype.element_ty), mask=mask)


def sum_entries(c: Call, entry_k: Tensor, entry_v: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    channels = c.H * c.D
    sum_entries_kernel[(c.K * triton.cdiv(channels, CHANNELS),)](
        entry_k,
        entry_v,
        c.entry_offsets,
        c.entries,
        grad_k,
        grad_v,
        channels,
        c.E,
        c.D,
        ENTRIES_PER_STEP,
        CHANNELS,
        **OPTIONS,
    )
