"""masked_patch_loss in Triton: a program reads a few patches in the order of the prediction.

A row of a tile is a patch, as differences from its first pixel. Differences of uint8 are small
integers, so their sums are exact, and those of a patch of a single color are 0. The backward pass
reads the pixels again and reuses the mean and the standard deviation of the forward pass.
"""

import itertools
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.patches.triton_ids import DTYPES, pick, visible
from vidl.kernels.triton_launch import OPTIONS, on_device, strides_of
from vidl.kernels.triton_offsets import ascend

# Pixels that a program holds at a time, unless one patch has more.
TILE = 2048
# Offsets within a patch that are smaller than this are computed in 32 bits.
NARROW = 2**31


@triton.jit
def _offsets_fit(program, cu_seqlens_ptr, B, total):
    """Whether cu_seqlens ascend. Only the first program knows, and writes NaN if they do not."""
    fits = program >= 0
    if cu_seqlens_ptr is not None:
        if program == 0:
            fits = ascend(cu_seqlens_ptr, B, total)
    return fits


@triton.jit
def _pixel_offsets(
    pixel,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets of pixels, numbered in (t, h, w, C) order, from the first pixel of their patch."""
    place = pixel // C
    channel, x = pixel % C, place % PATCH_W
    y, frame = place // PATCH_W % PATCH_H, place // (PATCH_W * PATCH_H)
    if WIDE:  # the multiplication widens strides of 32 bits
        channel, x = channel.to(tl.int64), x.to(tl.int64)
        y, frame = y.to(tl.int64), frame.to(tl.int64)
    return channel * stride_c + frame * stride_t + y * stride_h + x * stride_w


@triton.jit
def _load_patches(
    row,
    real,
    pixel,
    video_ptr,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    ids_ptr,
    cu_seqlens_ptr,
    scale,
    shift,
    B,
    per_sample,
    N,
    grid_h,
    grid_w,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The pixels of the patch of each row of ids, which of them exist, and which patches exist.

    Pixels that do not exist are 0. A patch that will be normalized is given as differences from its
    first pixel.
    """
    sample, patch, inside = visible(row, ids_ptr, cu_seqlens_ptr, B, per_sample, N, real)
    frame = (patch // (grid_h * grid_w) * PATCH_T).to(tl.int64)
    y = (patch // grid_w % grid_h * PATCH_H).to(tl.int64)
    x = (patch % grid_w * PATCH_W).to(tl.int64)
    start = sample * stride_b + frame * stride_t + y * stride_h + x * stride_w
    mask = inside[:, None] & (pixel < C * PATCH_T * PATCH_H * PATCH_W)[None, :]
    patch_ptr = video_ptr + start[:, None]
    strides = (stride_c, stride_t, stride_h, stride_w)
    offsets = _pixel_offsets(pixel, *strides, C, PATCH_H, PATCH_W, WIDE)
    value = tl.load(patch_ptr + offsets[None, :], mask=mask, other=0).to(tl.float32)
    if AFFINE:
        value = value * pick(scale, pixel % C, C)[None, :] + pick(shift, pixel % C, C)[None, :]
    if STATISTICS == "patch":
        first = tl.load(patch_ptr + tl.zeros_like(pixel)[None, :], mask=mask)
        value -= first.to(tl.float32)
    if STATISTICS == "channel":
        channel = pixel % C
        if WIDE:
            channel = channel.to(tl.int64)
        first = tl.load(patch_ptr + (channel * stride_c)[None, :], mask=mask)
        value -= first.to(tl.float32)
    return tl.where(mask, value, 0.0), mask, inside


@triton.jit
def _load_prediction(row, pixel, mask, prediction_ptr, stride_b, stride_row, per_sample):
    """The prediction of each row; a sample, every stride_b, has `per_sample` rows."""
    start = row // per_sample * stride_b + row % per_sample * stride_row
    return tl.load(prediction_ptr + start[:, None] + pixel[None, :], mask=mask, other=0)


@triton.jit
def _normalize(x, channel, part, mean, factor, STATISTICS: tl.constexpr):
    """(x - mean) * factor; if every channel has its own statistics, in channel `part` only."""
    normal = (x - mean[:, None]) * factor[:, None]
    if STATISTICS == "channel":
        normal = tl.where((channel == part)[None, :], normal, x)
    return normal


@triton.jit(do_not_specialize=["B", "masked", "N", "total", "prediction_rows", "grid_h", "grid_w"])
def forward_kernel(
    prediction_ptr,  # [B, masked, pixels] or [total, pixels]
    prediction_b,
    prediction_row,
    prediction_rows,
    video_ptr,  # [B, C, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    ids_ptr,  # [total]
    cu_seqlens_ptr,  # [B + 1] or None: `masked` rows a sample
    losses_ptr,  # [total], float32
    moments_ptr,  # [total, PARTS, 2], float32
    scale,
    shift,
    eps,
    B,
    masked,
    N,
    total,
    grid_h,
    grid_w,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """losses = mean of (prediction - target)^2; moments = mean and 1 / standard deviation."""
    PIXELS: tl.constexpr = C * PATCH_T * PATCH_H * PATCH_W
    PARTS: tl.constexpr = C if STATISTICS == "channel" else 1
    COUNT: tl.constexpr = PIXELS // PARTS
    program = tl.program_id(0).to(tl.int64)
    fits = _offsets_fit(program, cu_seqlens_ptr, B, total)
    row = program * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    real = row < total
    pixel = tl.arange(0, BLOCK_PIXELS)
    x, mask, inside = _load_patches(
        *(row, real, pixel, video_ptr, stride_b, stride_c, stride_t, stride_h, stride_w),
        *(ids_ptr, cu_seqlens_ptr, scale, shift, B, masked, N, grid_h, grid_w),
        *(C, PATCH_T, PATCH_H, PATCH_W, STATISTICS, AFFINE, WIDE),
    )
    if STATISTICS != "none":
        for part in tl.static_range(PARTS):
            of_part = mask & ((pixel % PARTS) == part)[None, :]
            mean = tl.sum(tl.where(of_part, x, 0.0), 1) / COUNT
            deviation = tl.where(of_part, x - mean[:, None], 0.0)
            var = tl.sum(deviation * deviation, 1) / (COUNT - 1)
            if STATISTICS == "patch":
                factor = 1.0 / tl.sqrt_rn(var + eps[part])
            else:
                factor = 1.0 / (tl.sqrt_rn(var) + eps[part])
            x = _normalize(x, pixel % PARTS, part, mean, factor, STATISTICS)
            place = moments_ptr + (row * PARTS + part) * 2
            tl.store(place, mean, mask=real)
            tl.store(place + 1, factor, mask=real)
    prediction = _load_prediction(
        *(row, pixel, mask, prediction_ptr, prediction_b, prediction_row, prediction_rows)
    )
    error = tl.where(mask, prediction.to(tl.float32) - x, 0.0)
    loss = tl.where(inside & fits, tl.sum(error * error, 1) / PIXELS, float("nan"))
    tl.store(losses_ptr + row, loss, mask=real)


@triton.jit(do_not_specialize=["B", "masked", "N", "total", "prediction_rows", "grid_h", "grid_w"])
def backward_kernel(
    grad_ptr,  # [total], float32
    moments_ptr,  # [total, PARTS, 2], float32
    prediction_ptr,  # [B, masked, pixels] or [total, pixels]
    prediction_b,
    prediction_row,
    prediction_rows,
    video_ptr,  # [B, C, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    ids_ptr,  # [total]
    cu_seqlens_ptr,  # [B + 1] or None
    out_ptr,  # [total, pixels]
    scale,
    shift,
    B,
    masked,
    N,
    total,
    grid_h,
    grid_w,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STATISTICS: tl.constexpr,
    AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """out = 2 (prediction - target) * grad / pixels."""
    PIXELS: tl.constexpr = C * PATCH_T * PATCH_H * PATCH_W
    PARTS: tl.constexpr = C if STATISTICS == "channel" else 1
    program = tl.program_id(0).to(tl.int64)
    fits = _offsets_fit(program, cu_seqlens_ptr, B, total)
    row = program * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    real = row < total
    pixel = tl.arange(0, BLOCK_PIXELS)
    x, mask, inside = _load_patches(
        *(row, real, pixel, video_ptr, stride_b, stride_c, stride_t, stride_h, stride_w),
        *(ids_ptr, cu_seqlens_ptr, scale, shift, B, masked, N, grid_h, grid_w),
        *(C, PATCH_T, PATCH_H, PATCH_W, STATISTICS, AFFINE, WIDE),
    )
    if STATISTICS != "none":
        for part in tl.static_range(PARTS):
            place = moments_ptr + (row * PARTS + part) * 2
            mean = tl.load(place, mask=real, other=0)
            factor = tl.load(place + 1, mask=real, other=0)
            x = _normalize(x, pixel % PARTS, part, mean, factor, STATISTICS)
    prediction = _load_prediction(
        *(row, pixel, mask, prediction_ptr, prediction_b, prediction_row, prediction_rows)
    )
    factor = tl.load(grad_ptr + row, mask=real, other=0) * (2.0 / PIXELS)
    grad = (prediction.to(tl.float32) - x) * factor[:, None]
    grad = tl.where((inside & fits)[:, None], grad, float("nan"))
    tl.store(
        out_ptr + (row * PIXELS)[:, None] + pixel[None, :],
        grad.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (pixel < PIXELS)[None, :],
    )


def masked_patch_loss(
    prediction: Tensor,  # [B, masked, pixels] or [total, pixels]
    video: Tensor,  # [B, C, T, H, W]
    ids_masked: Tensor,  # [B, masked] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    patch: Sequence[int],  # t, h, w
    statistics: str,
    scale: Sequence[float],
    shift: Sequence[float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The mean squared error of each patch, and the moments that the backward pass needs."""
    launch = _Launch(prediction, video, ids_masked, cu_seqlens, patch, statistics)
    rows = prediction.shape[:-1]
    parts = {"none": 0, "patch": 1, "channel": video.shape[1]}[statistics]
    losses = prediction.new_empty(rows, dtype=torch.float32)
    moments = prediction.new_empty((*rows, parts, 2), dtype=torch.float32)
    scale, shift, epsilons = _relative(statistics, scale, shift, eps)
    with on_device(video):
        forward_kernel[(launch.programs,)](
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
    grad: Tensor,  # [B, masked] or [total], float32
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
    """The arguments that both kernels share, and the number of their programs."""

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
        grid = [n // p for n, p in zip(video.shape[2:], patch, strict=True)]
        N, total = prod(grid), ids_masked.numel()
        rows = (*ids_masked.shape, C * prod(patch))
        if prediction.shape != rows:
            raise RuntimeError(
                f"masked_patch_loss: need a prediction {list(rows)}, got {list(prediction.shape)}"
            )
        ids = ids_masked.contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        if prediction.stride(-1) != 1:
            prediction = prediction.contiguous()
        strides = strides_of(video)
        reach = sum((n - 1) * s for n, s in zip((C, *patch), strides[1:], strict=True))
        block_pixels = triton.next_power_of_2(C * prod(patch))
        block_patches = max(TILE // block_pixels, 1)
        self.programs = triton.cdiv(total, block_patches)
        self.inputs = (
            prediction,
            prediction.stride(0) if prediction.ndim == 3 else 0,
            prediction.stride(-2),
            max(prediction.shape[-2], 1),
            video,
            *strides,
            ids,
            offsets,
        )
        self.sizes = (B, max(ids_masked.shape[-1], 1), N, total, *grid[1:])
        self.constants = {
            "C": C,
            "PATCH_T": patch[0],
            "PATCH_H": patch[1],
            "PATCH_W": patch[2],
            "STATISTICS": statistics,
            "WIDE": reach >= NARROW,
            "BLOCK_PATCHES": block_patches,
            "BLOCK_PIXELS": block_pixels,
            "num_warps": min(max(block_patches * block_pixels // 256, 4), 16),
            **OPTIONS,
        }


def _relative(
    statistics: str, scale: Sequence[float], shift: Sequence[float], eps: float
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Scale, shift and eps that give the same target with less to compute.

    Normalization cancels the scale and shift of the first channel if all channels of a patch share
    its statistics, those of every channel if each has its own, but eps must be rescaled.
    """
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
    targets = (("patch", 0.5), ("channel", 1.0), ("none", 0.5))
    ids, offsets = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 3, 8], dtype=torch.int32)
    cases = itertools.chain(
        itertools.product([(2, 16, False)], DTYPES, targets),
        itertools.product([(1, 16, True), (1, 14, False), (2, 32, True)], DTYPES[2:3], targets[:2]),
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
