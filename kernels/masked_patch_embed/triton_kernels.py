"""masked_patch_embed in Triton: pack the visible patches into a matrix, then PyTorch's own GEMM.

Forward: fold the normalisation into the weight (uint8 clips, 16-bit weights); write the patches as
rows of a matrix and, in the same launch, bias + position as the result's first value; multiply.
Backward: the same rows again for the weight; for the video and the positions one program a result,
which adds the rows of its patch in ascending order, so that nothing depends on timing.
"""

import itertools
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.patches.triton_ids import check_in_interpreter, check_offsets, pick, visible
from vidl.kernels.triton_launch import OPTIONS, block_size, on_device

# Pixels or features a program holds at a time; at 128 threads that is two 16-byte loads of uint8.
TILE = 4096
# Ids a program compares at a time: those of one sample, and those of all.
IDS_PER_STEP = 256
ALL_IDS_PER_STEP = 1024
# Rows of patches that exist at a time while the weight's gradient is summed (96 MiB for ViT-B/16).
ROWS_PER_STEP = 65536
# A pixel x of channel c becomes (x - centre[c]) * scale[c] + shift[c].
Affine = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@triton.jit
def _pixels(
    sample,
    patch,
    line,
    rows,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Where each line of a patch begins in the video; its lines are numbered channel, time, row."""
    channel = (line // (PATCH_T * PATCH_H)).to(tl.int64)
    frame = (patch // (rows * columns) * PATCH_T + line // PATCH_H % PATCH_T).to(tl.int64)
    y = (patch // columns % rows * PATCH_H + line % PATCH_H).to(tl.int64)
    x = (patch % columns * PATCH_W).to(tl.int64)
    return sample * stride_b + channel * stride_c + frame * stride_t + y * stride_h + x * stride_w


@triton.jit
def _pack(
    block,
    video_ptr,
    ids_ptr,
    cu_seqlens_ptr,
    packed_ptr,
    centre,
    scale,
    shift,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    B,
    K,
    N,
    rows,
    columns,
    first,
    M,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    LINES: tl.constexpr = C * PATCH_T * PATCH_H
    line = block * BLOCK_LINES + tl.arange(0, BLOCK_LINES)  # of all lines of all rows
    m = line // LINES
    within = (line % LINES).to(tl.int32)
    sample, patch, inside = visible(first + m, ids_ptr, cu_seqlens_ptr, B, K, N, m < M)
    start = _pixels(
        sample,
        patch,
        within,
        rows,
        columns,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        stride_w,
        PATCH_T,
        PATCH_H,
        PATCH_W,
    )
    x = tl.arange(0, BLOCK_W)[None, :]
    readable, writable = inside[:, None], (m < M)[:, None]
    if PATCH_W < BLOCK_W:  # a mask that varies along a line would split its vector accesses
        readable, writable = readable & (x < PATCH_W), writable & (x < PATCH_W)
    pixels = tl.load(
        video_ptr + start[:, None] + x.to(tl.int64) * stride_w, mask=readable, other=0
    ).to(tl.float32)
    if NORMALISE:
        channel = within // (PATCH_T * PATCH_H)
        pixels = (pixels - pick(centre, channel, C)[:, None]) * pick(scale, channel, C)[:, None]
        pixels += pick(shift, channel, C)[:, None]
    tl.store(
        packed_ptr + line[:, None] * PATCH_W + x,
        pixels.to(packed_ptr.dtype.element_ty),
        mask=writable,
    )


@triton.jit
def _prefill(
    block,
    ids_ptr,
    bias_ptr,
    space_ptr,
    time_ptr,
    out_ptr,
    N,
    S,
    first,
    M,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_d = tl.cdiv(D, BLOCK_D)
    m = block // blocks_d * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (block % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int32)
    _, patch, inside = visible(first + m, ids_ptr, None, 1, 1, N, m < M)
    value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + d, mask=d < D, other=0).to(tl.float32)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    if space_ptr is not None:
        place = (patch % S).to(tl.int64)[:, None] * D + d[None, :]
        value += tl.load(space_ptr + place, mask=mask, other=0).to(tl.float32)
    if time_ptr is not None:
        place = (patch // S).to(tl.int64)[:, None] * D + d[None, :]
        value += tl.load(time_ptr + place, mask=mask, other=0).to(tl.float32)
    tl.store(
        out_ptr + m[:, None] * D + d[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=["B", "K", "N", "S", "rows", "columns", "first", "M", "total"])
def pack_kernel(
    video_ptr,  # [B, C, T, H, W]
    ids_ptr,  # [total] or None: all patches in order
    cu_seqlens_ptr,  # [B + 1] or None: K rows a sample
    packed_ptr,  # [M, C * t * h * w]
    bias_ptr,  # [D] or None
    space_ptr,  # [S, D] or None
    time_ptr,  # [N / S, D] or None
    out_ptr,  # [M, D] or None
    centre,
    scale,
    shift,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    B,
    K,
    N,
    S,
    rows,
    columns,
    first,
    M,
    total,
    D,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """packed[m] = (patch - centre) * scale + shift, out[m] = bias + position, row `first` on."""
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:
        if program == 0:
            check_offsets(cu_seqlens_ptr, B, total, BLOCK=128)
    pack_programs = tl.cdiv(M.to(tl.int64) * (C * PATCH_T * PATCH_H), BLOCK_LINES)
    if program < pack_programs:
        _pack(
            program,
            video_ptr,
            ids_ptr,
            cu_seqlens_ptr,
            packed_ptr,
            centre,
            scale,
            shift,
            stride_b,
            stride_c,
            stride_t,
            stride_h,
            stride_w,
            B,
            K,
            N,
            rows,
            columns,
            first,
            M,
            C,
            PATCH_T,
            PATCH_H,
            PATCH_W,
            NORMALISE,
            BLOCK_LINES,
            BLOCK_W,
        )
    elif out_ptr is not None:
        _prefill(
            program - pack_programs,
            ids_ptr,
            bias_ptr,
            space_ptr,
            time_ptr,
            out_ptr,
            N,
            S,
            first,
            M,
            D,
            BLOCK_M,
            BLOCK_D,
        )


@triton.jit
def fold_kernel(
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    folded_ptr,  # [D, K]
    folded_bias_ptr,  # [D], float32
    scale,
    rest,
    K,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weight * scale, rounded, and bias + what of the mean is left to the *rounded* weight."""
    d = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + d * K + k, mask=k < K, other=0).to(tl.float32)
        folded = (weight * pick(scale, k // PIXELS, C)).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + d * K + k, folded, mask=k < K)
        total += folded.to(tl.float32) * pick(rest, k // PIXELS, C)
    bias = tl.sum(total, 0)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + d).to(tl.float32)
    tl.store(folded_bias_ptr + d, bias)


@triton.jit
def _sum_rows(
    x_ptr, stride, offset, mask, ids_ptr, patch, begin, end, step, BLOCK_IDS: tl.constexpr
):
    """Sum of x[row, offset] over the rows in [begin, end) that show `patch`, in ascending order.

    Without ids every `step`-th row does.
    """
    total = tl.zeros(offset.shape, tl.float32)
    if ids_ptr is None:
        row = begin
        while row < end:
            total += tl.load(x_ptr + row * stride + offset, mask=mask, other=0).to(tl.float32)
            row += step
    else:
        i = tl.arange(0, BLOCK_IDS)
        start = begin
        while start < end:
            shows = tl.load(ids_ptr + start + i, mask=start + i < end, other=-1) == patch
            found = tl.min(tl.where(shows, i, BLOCK_IDS), 0)
            while found < BLOCK_IDS:
                row = x_ptr + (start + found) * stride
                total += tl.load(row + offset, mask=mask, other=0).to(tl.float32)
                found = tl.min(tl.where(shows & (i > found), i, BLOCK_IDS), 0)
            start += BLOCK_IDS
    return total


@triton.jit(do_not_specialize=["K", "N", "rows", "columns"])
def unpack_kernel(
    packed_ptr,  # [M, C * t * h * w]
    ids_ptr,  # [M] or None
    cu_seqlens_ptr,  # [B + 1] or None
    video_ptr,  # [B, C, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    K,
    N,
    rows,
    columns,
    C: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    """video[patch] = sum of the packed rows that show it, in order; zeros where none does."""
    LINES: tl.constexpr = C * PATCH_T * PATCH_H
    BLOCKS: tl.constexpr = (LINES + BLOCK_LINES - 1) // BLOCK_LINES
    program = tl.program_id(0).to(tl.int64)
    line = (program % BLOCKS * BLOCK_LINES + tl.arange(0, BLOCK_LINES)).to(tl.int32)
    patch = program // BLOCKS % N
    sample = program // BLOCKS // N
    if ids_ptr is None:
        begin = sample * N + patch
        end = begin + 1
    elif cu_seqlens_ptr is None:
        begin = sample * K
        end = begin + K
    else:
        begin = tl.load(cu_seqlens_ptr + sample).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sample + 1).to(tl.int64)
    x = tl.arange(0, BLOCK_W)[None, :]
    mask = (line < LINES)[:, None]
    if PATCH_W < BLOCK_W:
        mask &= x < PATCH_W
    total = _sum_rows(
        packed_ptr,
        LINES * PATCH_W,
        line[:, None] * PATCH_W + x,
        mask,
        ids_ptr,
        patch,
        begin,
        end,
        1,
        BLOCK_IDS,
    )
    start = _pixels(
        sample,
        patch.to(tl.int32),
        line,
        rows,
        columns,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        1,
        PATCH_T,
        PATCH_H,
        PATCH_W,
    )
    tl.store(video_ptr + start[:, None] + x, total.to(video_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N"])
def position_kernel(
    grad_ptr,  # [M, D]
    ids_ptr,  # [M] or None
    position_ptr,  # [N, D], float32
    M,
    N,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    """position[n] = sum of the rows that show patch n, in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    patch = program // blocks
    d = (program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int32)
    begin = patch * 0
    if ids_ptr is None:
        begin = patch
    total = _sum_rows(grad_ptr, D, d, d < D, ids_ptr, patch, begin, M.to(tl.int64), N, BLOCK_IDS)
    tl.store(position_ptr + patch * D + d, total, mask=d < D)


def masked_patch_embed(
    video: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [D, C, t, h, w]
    bias: Tensor | None,  # [D]
    time: Tensor | None,  # [N / S, D]
    space: Tensor | None,  # [S, D]
    ids_keep: Tensor | None,  # [B, K] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cut the visible patches out, normalise them, project them, add their positions."""
    clip = _Clip(video, weight.shape, ids_keep, cu_seqlens)
    D, matrix = weight.shape[0], weight.contiguous().flatten(1)
    bias, space, time = (x if x is None else x.contiguous() for x in (bias, space, time))
    affine = _normalising(mean, std)
    if affine is not None and weight.dtype != torch.float32:
        matrix, bias, affine = _fold(matrix, bias, mean, std)
    out = matrix.new_empty(clip.M, D)
    packed = matrix.new_empty(clip.M, matrix.shape[1])
    prefill = bias is not None or space is not None
    clip.pack(packed, affine, out=out if prefill else None, position=(bias, space, time))
    if prefill:
        out.addmm_(packed, matrix.t())
    else:
        torch.mm(packed, matrix.t(), out=out)
    return out.view(*clip.shape, D)


def masked_patch_embed_bwd(
    grad_out: Tensor,  # [B, K, D] or [total, D], contiguous
    video: Tensor,
    weight: Tensor,
    ids_keep: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    need_video: bool,
    need_weight: bool,
    need_position: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `video`, `weight` and [N, D] of all positions; empty where not needed."""
    clip = _Clip(video, weight.shape, ids_keep, cu_seqlens)
    grad = grad_out.contiguous().flatten(0, -2)  # [M, D]
    D = weight.shape[0]
    grad_video, grad_weight = video.new_empty(0), weight.new_empty(0)
    grad_position = grad.new_empty(0, dtype=torch.float32)
    if need_video:
        grad_video = clip.unpack(grad @ weight.contiguous().flatten(1).to(grad.dtype))
    if need_weight:
        affine = _normalising(mean, std)
        total = weight.new_zeros(D, prod(weight.shape[1:]), dtype=torch.float32)
        for first in range(0, clip.M, ROWS_PER_STEP):
            part = grad[first : first + ROWS_PER_STEP]
            packed = weight.new_empty(part.shape[0], total.shape[1])
            clip.pack(packed, affine, first=first)
            total += _multiply_in_float32(part.t(), packed)
        grad_weight = total.to(weight.dtype).view(weight.shape)
    if need_position:
        grad_position = grad.new_empty(clip.N, D, dtype=torch.float32)
        block = block_size(D, 1024)
        with on_device(grad):
            position_kernel[(clip.N * triton.cdiv(D, block),)](
                grad, clip.ids, grad_position, clip.M, clip.N, D, block, ALL_IDS_PER_STEP, **OPTIONS
            )
    return grad_video, grad_weight, grad_position


class _Clip:
    """A clip cut into patches, and which of them are visible: one row each."""

    def __init__(
        self,
        video: Tensor,
        weight_shape: Sequence[int],
        ids_keep: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.video = video
        self.patch = tuple(weight_shape[1:])  # C, t, h, w
        B = video.shape[0]
        T, self.rows, self.columns = (
            n // p for n, p in zip(video.shape[2:], self.patch[1:], strict=True)
        )
        self.N = T * self.rows * self.columns
        self.shape = (B, self.N) if ids_keep is None else tuple(ids_keep.shape)
        self.M = prod(self.shape)
        self.ids = None if ids_keep is None else ids_keep.contiguous().flatten()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        check_in_interpreter("masked_patch_embed: ids_keep", self.ids, self.cu_seqlens, self.N)

    def pack(
        self,
        packed: Tensor,  # [M', C * t * h * w]
        affine: Affine | None,
        *,
        first: int = 0,
        out: Tensor | None = None,  # [M', D]
        position: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> None:
        """Write the rows from `first` on as a matrix; and into `out` bias and position of each."""
        M = packed.shape[0]
        # The stride of a dimension of size 1 means nothing; as 0 it leaves the others aligned.
        sizes = zip(self.video.shape, self.video.stride(), strict=True)
        strides = [stride if n > 1 else 0 for n, stride in sizes]
        width = triton.next_power_of_2(self.patch[-1])
        lines = max(TILE // width, 1)
        if width != self.patch[-1] or strides[-1] != 1 or any(s % 16 for s in strides[:-1]):
            lines = max(lines // 4, 1)  # an address a pixel, not one a vector: else registers spill
        programs = triton.cdiv(M * prod(self.patch[:-1]), lines)
        D = block_d = 1
        if out is not None:
            D = out.shape[1]
            block_d = block_size(D, 1024)
            programs += triton.cdiv(M, TILE // block_d) * triton.cdiv(D, block_d)
        if self.cu_seqlens is not None:
            programs = max(programs, 1)  # which checks the offsets
        with on_device(packed):
            pack_kernel[(programs,)](
                self.video,
                self.ids,
                self.cu_seqlens,
                packed,
                *position,
                out,
                *(affine or ((0.0,), (1.0,), (0.0,))),
                *strides,
                self.video.shape[0],
                max(1, self.shape[-1]),
                self.N,
                self.N if position[1] is None else position[1].shape[0],
                self.rows,
                self.columns,
                first,
                M,
                self.M,
                D,
                *self.patch,
                NORMALISE=affine is not None,
                BLOCK_LINES=lines,
                BLOCK_W=width,
                BLOCK_M=TILE // block_d,
                BLOCK_D=block_d,
                **OPTIONS,
            )

    def unpack(self, packed: Tensor) -> Tensor:  # [M, C * t * h * w]
        """The gradient of the video from that of its patches."""
        grad_video = torch.empty(self.video.shape, dtype=self.video.dtype, device=packed.device)
        width = triton.next_power_of_2(self.patch[-1])
        lines = block_size(prod(self.patch[:-1]), max(TILE // width, 1))
        programs = self.video.shape[0] * self.N * triton.cdiv(prod(self.patch[:-1]), lines)
        with on_device(packed):
            unpack_kernel[(programs,)](
                packed,
                self.ids,
                self.cu_seqlens,
                grad_video,
                *grad_video.stride()[:-1],
                self.shape[-1],
                self.N,
                self.rows,
                self.columns,
                *self.patch,
                BLOCK_LINES=lines,
                BLOCK_W=width,
                BLOCK_IDS=block_size(self.shape[-1], IDS_PER_STEP),
                **OPTIONS,
            )
        return grad_video


def _centre(mean: Sequence[float]) -> tuple[int, ...]:
    """The pixel nearest to the mean: differences from it are exact, in 16 bits too."""
    return tuple(min(max(round(255 * m), 0), 255) for m in mean)


def _normalising(mean: Sequence[float], std: Sequence[float]) -> Affine | None:
    """(pixel / 255 - mean) / std = (pixel - centre) * scale + shift."""
    if not len(mean):
        return None
    centre = _centre(mean)
    shift = ((c / 255 - m) / s for c, m, s in zip(centre, mean, std, strict=True))
    return tuple(map(float, centre)), tuple(1 / (255 * s) for s in std), tuple(shift)


def _fold(
    weight: Tensor, bias: Tensor | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor, Affine]:
    """A weight and a bias for (pixel - centre) / 128, which 16 bits hold exactly."""
    centre = _centre(mean)
    D, K = weight.shape
    C = len(mean)
    folded = torch.empty_like(weight)
    folded_bias = weight.new_empty(D, dtype=torch.float32)
    with on_device(weight):
        fold_kernel[(D,)](
            weight,
            bias,
            folded,
            folded_bias,
            tuple(128 / (255 * s) for s in std),
            tuple((c - 255 * m) / 128 for c, m in zip(centre, mean, strict=True)),
            K,
            C,
            K // C,
            block_size(K, 1024),
            **OPTIONS,
        )
    return folded, folded_bias, (tuple(map(float, centre)), (1 / 128,) * C, (0.0,) * C)


def _multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    dtypes = [
        (torch.uint8, torch.bfloat16),
        (torch.uint8, torch.float16),
        (torch.uint8, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]
    packed, offsets = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 3, 8], dtype=torch.int32)
    rows = ((packed.view(2, 4), None), (packed, offsets), (None, None))
    for (video_dtype, dtype), (ids, cu_seqlens), p in itertools.product(dtypes, rows, (16, 14)):
        video = torch.zeros(2, 3, 4, 3 * p, 3 * p).to(video_dtype)
        if p == 14:
            video = video.to(memory_format=torch.channels_last_3d)
        weight, bias = torch.zeros(768, 3, 2, p, p, dtype=dtype), torch.zeros(768)
        space, time = torch.zeros(9, 768), torch.zeros(2, 768, dtype=dtype)
        mean, std = ([0.5] * 3, [0.5] * 3) if video_dtype == torch.uint8 else ([], [])
        out = masked_patch_embed(video, weight, bias, time, space, ids, cu_seqlens, mean, std)
        masked_patch_embed(video, weight, None, None, None, ids, cu_seqlens, mean, std)
        need_video = video_dtype != torch.uint8
        masked_patch_embed_bwd(
            out, video, weight, ids, cu_seqlens, mean, std, need_video, True, True
        )
