"""masked_patch_loss in Triton: a program reads a few patches in the order of the prediction.

A row of a tile is a patch, as differences from its first pixel: those of uint8 are small integers,
whose sums are exact, and those of a patch of one colour are zero. The backward reads the pixels
again, and takes the mean and deviation that the forward left.
"""

import itertools
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.patches.triton_ids import DTYPES, check_in_interpreter, pick, visible
from vidl.kernels.triton_launch import OPTIONS, on_device
from vidl.kernels.triton_offsets import check_offsets

# Numbers that a program holds at a time, unless one patch has more.
TILE = 2048
# Offsets within a patch that are smaller than this are computed in 32 bits.
NARROW = 2**31


@triton.jit
def _offsets(
    number,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the numbers of a patch, in the order (t, h, w, C), are from its first pixel on."""
    pixel = number // C
    channel, x = number % C, pixel % PATCH_W
    y, frame = pixel // PATCH_W % PATCH_H, pixel // (PATCH_W * PATCH_H)
    if WIDE:  # strides of 32 bits are widened by the multiplication
        channel, x = channel.to(tl.int64), x.to(tl.int64)
        y, frame = y.to(tl.int64), frame.to(tl.int64)
    return channel * stride_c + frame * stride_t + y * stride_h + x * stride_w


@triton.jit
def _corner(
    sample,
    patch,
    rows,
    columns,
    stride_b,
    stride_t,
    stride_h,
    stride_w,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Where each patch begins in the video."""
    frame = (patch // (rows * columns) * PATCH_T).to(tl.int64)
    y = (patch // columns % rows * PATCH_H).to(tl.int64)
    x = (patch % columns * PATCH_W).to(tl.int64)
    return sample * stride_b + frame * stride_t + y * stride_h + x * stride_w


@triton.jit
def _differences(
    video_ptr,
    start,  # [BLOCK_M]
    number,  # [BLOCK_K]
    mask,  # [BLOCK_M, BLOCK_K]
    scale,
    shift,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The pixels of each patch, less its first where it is normalised; 0 outside the mask."""
    within = _offsets(number, stride_c, stride_t, stride_h, stride_w, C, PATCH_H, PATCH_W, WIDE)
    x = tl.load(video_ptr + start[:, None] + within[None, :], mask=mask, other=0).to(tl.float32)
    if AFFINE:
        x = x * pick(scale, number % C, C)[None, :] + pick(shift, number % C, C)[None, :]
    if STATISTICS == "patch":
        first = tl.load(video_ptr + start[:, None] + tl.zeros_like(number)[None, :], mask=mask)
        x -= first.to(tl.float32)
    if STATISTICS == "channel":
        channel = number % C
        if WIDE:
            channel = channel.to(tl.int64)
        first = tl.load(video_ptr + start[:, None] + (channel * stride_c)[None, :], mask=mask)
        x -= first.to(tl.float32)
    return tl.where(mask, x, 0.0)


@triton.jit
def _prediction(m, rows, stride_b, stride_m):
    """Where each row of a prediction begins; `rows` of them every stride_b."""
    return m // rows * stride_b + m % rows * stride_m


@triton.jit
def _normalise(x, channel, part, mean, factor, STATISTICS: tl.constexpr):
    """(x - mean) * factor, in channel `part` alone if each has its own."""
    normal = (x - mean[:, None]) * factor[:, None]
    if STATISTICS == "channel":
        normal = tl.where((channel == part)[None, :], normal, x)
    return normal


@triton.jit(do_not_specialize=["B", "K", "N", "M", "per_sample", "rows", "columns"])
def forward_kernel(
    prediction_ptr,  # [B, K, numbers] or [M, numbers]
    between,  # samples of a prediction, and its rows
    prediction_stride,
    per_sample,
    video_ptr,  # [B, C, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    ids_ptr,  # [M]
    cu_seqlens_ptr,  # [B + 1] or None: K rows a sample
    losses_ptr,  # [M], float32
    moments_ptr,  # [M, PARTS, 2], float32
    scale,
    shift,
    eps,
    B,
    K,
    N,
    M,
    rows,
    columns,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """losses[m] = mean of (prediction[m] - target)^2; moments[m] = mean and 1 / deviation."""
    NUMBERS: tl.constexpr = C * PATCH_T * PATCH_H * PATCH_W
    PARTS: tl.constexpr = C if STATISTICS == "channel" else 1
    COUNT: tl.constexpr = NUMBERS // PARTS
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:
        if program == 0:
            check_offsets(cu_seqlens_ptr, B, M, None)
    m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < M
    sample, patch, inside = visible(m, ids_ptr, cu_seqlens_ptr, B, K, N, real)
    start = _corner(
        *(sample, patch, rows, columns, stride_b, stride_t, stride_h, stride_w),
        *(PATCH_T, PATCH_H, PATCH_W),
    )
    number = tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (number < NUMBERS)[None, :]
    x = _differences(
        *(video_ptr, start, number, mask, scale, shift),
        *(stride_c, stride_t, stride_h, stride_w),
        *(C, PATCH_H, PATCH_W, STATISTICS, AFFINE, WIDE),
    )
    if STATISTICS != "none":
        for part in tl.static_range(PARTS):
            mine = mask & ((number % PARTS) == part)[None, :]
            mean = tl.sum(tl.where(mine, x, 0.0), 1) / COUNT
            away = tl.where(mine, x - mean[:, None], 0.0)
            var = tl.sum(away * away, 1) / (COUNT - 1)
            if STATISTICS == "patch":
                factor = 1.0 / tl.sqrt_rn(var + eps[part])
            else:
                factor = 1.0 / (tl.sqrt_rn(var) + eps[part])
            x = _normalise(x, number % PARTS, part, mean, factor, STATISTICS)
            place = moments_ptr + (m * PARTS + part) * 2
            tl.store(place, mean, mask=real)
            tl.store(place + 1, factor, mask=real)
    line = _prediction(m, per_sample, between, prediction_stride)
    given = tl.load(prediction_ptr + line[:, None] + number[None, :], mask=mask, other=0)
    error = tl.where(mask, given.to(tl.float32) - x, 0.0)
    tl.store(losses_ptr + m, tl.sum(error * error, 1) / NUMBERS, mask=real)


@triton.jit(do_not_specialize=["B", "K", "N", "M", "per_sample", "rows", "columns"])
def backward_kernel(
    grad_ptr,  # [M], float32
    moments_ptr,  # [M, PARTS, 2], float32
    prediction_ptr,  # [B, K, numbers] or [M, numbers]
    between,  # samples of a prediction, and its rows
    prediction_stride,
    per_sample,
    video_ptr,  # [B, C, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    ids_ptr,  # [M]
    cu_seqlens_ptr,  # [B + 1] or None
    out_ptr,  # [M, numbers]
    scale,
    shift,
    B,
    K,
    N,
    M,
    rows,
    columns,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m] = 2 (prediction[m] - target) * grad[m] / numbers."""
    NUMBERS: tl.constexpr = C * PATCH_T * PATCH_H * PATCH_W
    PARTS: tl.constexpr = C if STATISTICS == "channel" else 1
    program = tl.program_id(0).to(tl.int64)
    m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < M
    sample, patch, inside = visible(m, ids_ptr, cu_seqlens_ptr, B, K, N, real)
    start = _corner(
        *(sample, patch, rows, columns, stride_b, stride_t, stride_h, stride_w),
        *(PATCH_T, PATCH_H, PATCH_W),
    )
    number = tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (number < NUMBERS)[None, :]
    x = _differences(
        *(video_ptr, start, number, mask, scale, shift),
        *(stride_c, stride_t, stride_h, stride_w),
        *(C, PATCH_H, PATCH_W, STATISTICS, AFFINE, WIDE),
    )
    if STATISTICS != "none":
        for part in tl.static_range(PARTS):
            place = moments_ptr + (m * PARTS + part) * 2
            mean = tl.load(place, mask=real, other=0)
            factor = tl.load(place + 1, mask=real, other=0)
            x = _normalise(x, number % PARTS, part, mean, factor, STATISTICS)
    line = _prediction(m, per_sample, between, prediction_stride)
    given = tl.load(prediction_ptr + line[:, None] + number[None, :], mask=mask, other=0)
    factor = tl.load(grad_ptr + m, mask=real, other=0) * (2.0 / NUMBERS)
    grad = (given.to(tl.float32) - x) * factor[:, None]
    writable = real[:, None] & (number < NUMBERS)[None, :]
    tl.store(
        out_ptr + (m * NUMBERS)[:, None] + number[None, :],
        grad.to(out_ptr.dtype.element_ty),
        mask=writable,
    )


def masked_patch_loss(
    prediction: Tensor,  # [B, K, numbers] or [M, numbers]
    video: Tensor,  # [B, C, T, H, W]
    ids_masked: Tensor,  # [B, K] or [M]
    cu_seqlens: Tensor | None,  # [B + 1]
    patch: Sequence[int],  # t, h, w
    statistics: str,
    scale: Sequence[float],
    shift: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The mean squared error of each patch, and what the backward needs of it."""
    launch = _Launch(prediction, video, ids_masked, cu_seqlens, patch, statistics)
    rows = prediction.shape[:-1]
    parts = {"none": 0, "patch": 1, "channel": video.shape[1]}[statistics]
    losses = prediction.new_empty(rows, dtype=torch.float32)
    moments = prediction.new_empty((*rows, parts, 2), dtype=torch.float32)
    scale, shift, epsilons = _relative(statistics, scale, shift, eps)
    # Even where there are no rows, a program checks the offsets.
    programs = max(launch.programs, 0 if cu_seqlens is None else 1)
    with on_device(video):
        forward_kernel[(programs,)](
            *launch.inputs,
            losses,
            moments,
            scale,
            shift,
            epsilons,
            *launch.sizes,
            AFFINE=_is_affine(scale, shift),
            **launch.constants,
        )
    return losses, moments


def masked_patch_loss_bwd(
    grad: Tensor,  # [B, K] or [M], float32
    moments: Tensor,
    prediction: Tensor,
    video: Tensor,
    ids_masked: Tensor,
    cu_seqlens: Tensor | None,
    patch: Sequence[int],
    statistics: str,
    scale: Sequence[float],
    shift: Sequence[float],
    eps: float,
) -> Tensor:
    """The gradient of `prediction`, contiguous."""
    launch = _Launch(prediction, video, ids_masked, cu_seqlens, patch, statistics)
    out = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    scale, shift, _ = _relative(statistics, scale, shift, eps)
    with on_device(video):
        backward_kernel[(launch.programs,)](
            grad.contiguous(),
            moments.contiguous(),
            *launch.inputs,
            out,
            scale,
            shift,
            *launch.sizes,
            AFFINE=_is_affine(scale, shift),
            **launch.constants,
        )
    return out


class _Launch:
    """What both kernels take, and how many programs there are."""

    def __init__(
        self,
        prediction: Tensor,
        video: Tensor,
        ids_masked: Tensor,
        cu_seqlens: Tensor | None,
        patch: Sequence[int],
        statistics: str,
    ) -> None:
        B, C = video.shape[:2]
        T, rows, columns = (n // p for n, p in zip(video.shape[2:], patch, strict=True))
        N, M, numbers = T * rows * columns, ids_masked.numel(), C * prod(patch)
        ids = ids_masked.contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        check_in_interpreter("masked_patch_loss: ids_masked", ids, offsets, N)
        if prediction.stride(-1) != 1:
            prediction = prediction.contiguous()
        per_sample = max(prediction.shape[-2], 1)
        between = prediction.stride(0) if prediction.ndim == 3 else 0
        # The stride of a dimension of size 1 means nothing; as 0 it leaves the others aligned.
        sizes = zip(video.shape, video.stride(), strict=True)
        stride_b, *strides = (stride if n > 1 else 0 for n, stride in sizes)
        reach = sum((n - 1) * s for n, s in zip((C, *patch), strides, strict=True))
        block_k = triton.next_power_of_2(numbers)
        block_m = max(TILE // block_k, 1)
        self.programs = triton.cdiv(M, block_m)
        self.inputs = (
            prediction,
            between,
            prediction.stride(-2),
            per_sample,
            video,
            stride_b,
            *strides,
            ids,
            offsets,
        )
        self.sizes = (B, max(ids_masked.shape[-1], 1), N, M, rows, columns)
        self.constants = {
            "C": C,
            "PATCH_T": patch[0],
            "PATCH_H": patch[1],
            "PATCH_W": patch[2],
            "STATISTICS": statistics,
            "WIDE": reach >= NARROW,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
            "num_warps": min(max(block_m * block_k // 256, 4), 16),
            **OPTIONS,
        }


def _relative(
    statistics: str, scale: Sequence[float], shift: Sequence[float], eps: float
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Scale and shift relative to the first channel, or none: what all share cancels but in eps."""
    if statistics == "none":
        return tuple(scale), tuple(shift), (eps,) * len(scale)
    if statistics == "channel":
        return (1.0,) * len(scale), (0.0,) * len(scale), tuple(eps / s for s in scale)
    unit, origin = scale[0], shift[0]
    relative = tuple((s - origin) / unit for s in shift)
    return tuple(s / unit for s in scale), relative, (eps / unit**2,) * len(scale)


def _is_affine(scale: Sequence[float], shift: Sequence[float]) -> bool:
    return any(s != 1 for s in scale) or any(s != 0 for s in shift)


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    dtypes = [
        (torch.uint8, torch.float32),
        (torch.uint8, torch.bfloat16),
        (torch.uint8, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]
    targets = (("patch", 0.5), ("channel", 1.0), ("none", 0.5))
    ids, offsets = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 3, 8], dtype=torch.int32)
    cases = itertools.chain(
        itertools.product([(2, 16, False)], dtypes, targets),
        itertools.product([(1, 16, True), (1, 14, False), (2, 32, True)], dtypes[:1], targets[:2]),
    )
    for (t, p, last), (video_dtype, dtype), (statistics, scale) in cases:
        video = torch.zeros(2, 3, 2 * t, 2 * p, 2 * p).to(video_dtype)
        if last:
            video = video.to(memory_format=torch.channels_last_3d)
        for rows, cu_seqlens in ((ids.view(2, 4), None), (ids, offsets)):
            prediction = torch.zeros(*rows.shape, 3 * t * p * p, dtype=dtype)
            args = (video, rows, cu_seqlens, (t, p, p), statistics)
            affine = ([1.0, scale, scale], [0.0, scale - 1, 0.0], 1e-6)
            losses, moments = masked_patch_loss(prediction, *args, *affine)
            masked_patch_loss_bwd(losses, moments, prediction, *args, *affine)
