"""frame_difference in Triton: a program scores a block of patches of one row of a slice."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS, on_device

# Pixels that a program holds at a time of each of the two frames.
TILE = 4096
# Tiles that are added before their sum.
STEPS = 64


@triton.jit
def frame_difference_kernel(
    video_ptr,  # [B, C, T, H, W]
    out_ptr,  # [B, N]
    std,
    divisor,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    slices,
    rows,
    columns,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    INTEGERS: tl.constexpr,
    STD: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The mean of |last frame of the slice - first frame of the slice before|; inf in the first."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    column = (program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int32)
    line = program // blocks  # a row of patches: (b, slice, row)
    row = line % rows
    step = line // rows % slices
    out_ptr += line * columns
    if step == 0:
        new = tl.full([BLOCK_COLUMNS], float("inf"), tl.float32)
        tl.store(out_ptr + column, new, mask=column < columns)
        return
    video_ptr += line // rows // slices * stride_b + row * PATCH_H * stride_h
    last_ptr = video_ptr + (step * PATCH_T + PATCH_T - 1) * stride_t
    first_ptr = video_ptr + (step - 1) * PATCH_T * stride_t
    y = tl.arange(0, BLOCK_H)[:, None, None]
    x = tl.arange(0, BLOCK_W)[None, None, :]
    across = (column[None, :, None] * PATCH_W + x).to(tl.int64) * stride_w
    inside = (column < columns)[None, :, None] & (x < PATCH_W)
    # A sum of 2^23 differences of bytes may not fit into 32 bits.
    INTEGER: tl.constexpr = tl.int64 if C * PATCH_H * PATCH_W >= 8388608 else tl.int32
    SUM: tl.constexpr = INTEGER if INTEGERS else tl.float32
    total = tl.zeros([BLOCK_COLUMNS], SUM if not STD else tl.float32)
    for c in tl.static_range(0, C):
        sums = tl.zeros([BLOCK_COLUMNS], SUM)
        # Floats are summed in blocks: rounding errors grow with the terms of one sum.
        for begin in range(0, PATCH_H, BLOCK_H * STEPS):
            pixels = tl.zeros([BLOCK_H, BLOCK_COLUMNS, BLOCK_W], SUM)
            for at in range(begin, min(begin + BLOCK_H * STEPS, PATCH_H), BLOCK_H):
                offset = (at + y).to(tl.int64) * stride_h + across
                offset += tl.full([], c, tl.int64) * stride_c
                mask = inside & (at + y < PATCH_H)
                last = tl.load(last_ptr + offset, mask=mask, other=0)
                first = tl.load(first_ptr + offset, mask=mask, other=0)
                pixels += tl.abs(last.to(SUM) - first.to(SUM))
            sums += tl.sum(tl.sum(pixels, 2), 0)
        if STD:
            total += tl.div_rn(sums.to(tl.float32), tl.zeros([BLOCK_COLUMNS], tl.float32) + std[c])
        else:
            total += sums
    divisors = tl.zeros([BLOCK_COLUMNS], tl.float32) + divisor
    mean = tl.div_rn(total.to(tl.float32), divisors)
    tl.store(out_ptr + column, mean, mask=column < columns)


def frame_difference(video: Tensor, patch: Sequence[int], std: Sequence[float]) -> Tensor:
    """The scores [B, N]."""
    (B, C, T, H, W), (t, h, w) = video.shape, patch
    slices, rows, columns = T // t, H // h, W // w
    out = video.new_empty(B, slices * rows * columns, dtype=torch.float32)
    integers = video.dtype == torch.uint8
    block_w = triton.next_power_of_2(w)
    block_columns = min(triton.next_power_of_2(columns), max(1, TILE // (block_w * 16)))
    block_h = max(1, TILE // (block_w * block_columns))
    programs = B * slices * rows * triton.cdiv(columns, block_columns)
    if programs:
        with on_device(video):
            frame_difference_kernel[(programs,)](
                video,
                out,
                tuple(std) if std else (1.0,),
                float(C * h * w * (255 if integers else 1)),
                *video.stride(),
                slices,
                rows,
                columns,
                C=C,
                PATCH_T=t,
                PATCH_H=h,
                PATCH_W=w,
                INTEGERS=integers,
                STD=bool(std),
                BLOCK_COLUMNS=block_columns,
                BLOCK_H=min(triton.next_power_of_2(h), block_h),
                BLOCK_W=block_w,
                STEPS=STEPS,
                **OPTIONS,
            )
    return out


def ahead_of_time() -> None:
    """Launch every variant of the kernel once (tests/test_triton_aot.py compiles them)."""
    arguments: list[tuple[torch.dtype, int, list[float]]] = [
        (torch.uint8, 16, []),
        (torch.uint8, 14, [0.2, 0.3, 0.4]),
        (torch.bfloat16, 16, []),
        (torch.float16, 14, []),
        (torch.float32, 32, []),
    ]
    for dtype, side, std in arguments:
        clip: Any = torch.zeros(1, 3, 4, 2 * side, 14 * side, dtype=dtype)
        frame_difference(clip, (2, side, side), std)
        frame_difference(clip.transpose(3, 4), (1, side, side), std)
