"""Which patch of which clip a row of ids is, for the Triton kernels that read patches."""

import torch
import triton
import triton.language as tl

# Clips and computations that kernels are compiled for ahead of time.
DTYPES = (
    (torch.uint8, torch.bfloat16),
    (torch.uint8, torch.float16),
    (torch.uint8, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)


@triton.jit
def pick(values, index, C: tl.constexpr):
    """values[index]: a tuple of scalar arguments cannot be indexed at run time."""
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
    return low


@triton.jit
def visible(row, ids_ptr, cu_seqlens_ptr, B, per_sample, N, mask):
    """The sample and the patch of each row of ids, and whether there is such a patch.

    A sample has `per_sample` rows, unless there are offsets. Without ids it has all N patches. An
    id that is not in [0, N) has no patch: kernels write NaN to its row. An assertion would end the
    CUDA context of the process.
    """
    if ids_ptr is None:
        sample = row // N
        patch = (row % N).to(tl.int32)
        inside = mask
    else:
        if cu_seqlens_ptr is None:
            sample = row // per_sample
        else:
            sample = sample_of(row, cu_seqlens_ptr, B, mask).to(tl.int64)
            mask = mask & (sample < B)
        number = tl.load(ids_ptr + row, mask=mask, other=0)
        inside = mask & (number >= 0) & (number < N)
        patch = tl.where(inside, number, 0).to(tl.int32)
    return sample, patch, inside
