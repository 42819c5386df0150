"""What Triton kernels share that read patches: which patch a row is."""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels import library


@triton.jit
def pick(values, index, C: tl.constexpr):
    """values[index]: scalars that came as arguments have no address."""
    result = tl.zeros(index.shape, tl.float32) + values[0]
    for c in tl.static_range(1, C):
        result = tl.where(index == c, values[c], result)
    return result


@triton.jit
def sample_of(row, cu_seqlens_ptr, B, mask):
    """The last sample that begins at or before each row: a binary search, always within [0, B)."""
    low = tl.zeros(row.shape, tl.int32)
    high = low + B
    size = B
    while size > 1:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle, mask=mask, other=0) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
        size = (size + 1) // 2
    begin = tl.load(cu_seqlens_ptr + low, mask=mask, other=0)
    end = tl.load(cu_seqlens_ptr + low + 1, mask=mask, other=0)
    tl.device_assert((begin <= row) & (row < end), "cu_seqlens must ascend from 0", mask=mask)
    return low


@triton.jit
def check_offsets(cu_seqlens_ptr, B, M, BLOCK: tl.constexpr):
    for start in range(0, B + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        this = tl.load(cu_seqlens_ptr + i, mask=i <= B, other=0)
        after = tl.load(cu_seqlens_ptr + i + 1, mask=i < B, other=0)
        tl.device_assert(this <= after, "cu_seqlens must ascend", mask=i < B)
        tl.device_assert(this == 0, "cu_seqlens must begin with 0", mask=i == 0)
        tl.device_assert(this == M, "cu_seqlens must end with the rows of ids", mask=i == B)


@triton.jit
def visible(row, ids_ptr, cu_seqlens_ptr, B, K, N, mask):
    """The sample and the patch of each row, and whether there is such a patch."""
    if ids_ptr is None:
        sample = row // N
        patch = (row % N).to(tl.int32)
        inside = mask
    else:
        if cu_seqlens_ptr is None:
            sample = row // K
        else:
            sample = sample_of(row, cu_seqlens_ptr, B, mask).to(tl.int64)
        number = tl.load(ids_ptr + row, mask=mask, other=0)
        inside = mask & (number >= 0) & (number < N)
        tl.device_assert(inside, "ids must lie in [0, N)", mask=mask)
        patch = tl.where(inside, number, 0).to(tl.int32)
    return sample, patch, inside


def check_in_interpreter(name: str, ids: Tensor | None, cu_seqlens: Tensor | None, N: int) -> None:
    """What the kernels assert on CUDA: Triton's interpreter leaves assertions out."""
    if not library.interpreting() or ids is None:
        return
    if not ((ids >= 0) & (ids < N)).all():
        raise RuntimeError(f"{name} must lie in [0, {N})")
    if cu_seqlens is None:
        return
    offsets, total = cu_seqlens.tolist(), ids.numel()
    if offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
        raise RuntimeError(f"{name.split(':')[0]}: cu_seqlens must ascend from 0 to {total}")
