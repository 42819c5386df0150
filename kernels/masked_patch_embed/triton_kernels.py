"""masked_patch_embed in Triton: pack the visible patches into a matrix, then PyTorch's own matmul.

Forward: fold the normalization into the weight (uint8 clips, 16-bit weights); write the patches as
rows of a matrix and, in the same launch, bias + position as the initial value of the result; then
multiply. Backward: pack the same rows again for the weight; for the video and the positions list
the rows of each patch, and let a program sum those of one patch in a fixed order, so that the
result is deterministic.
"""

import itertools
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.patches.triton_ids import DTYPES, pick, sample_of, visible
from vidl.kernels.triton_launch import OPTIONS, block_size, on_device, strides_of
from vidl.kernels.triton_offsets import ascend, within
from vidl.kernels.triton_sums import add_compensated

# Pixels or channels a program holds at a time; at 128 threads that is two 16-byte loads of uint8.
TILE = 4096
# Ids that a program compares at a time, with as many patches or with as many other ids.
IDS_PER_STEP = 32
# Samples and channels whose gradients a program sums at a time.
POSITION_TILE = (16, 256)
# Packed rows that exist at a time for the gradient of the weight (96 MiB for ViT-B/16).
ROWS_PER_STEP = 65536
# A pixel x of channel c becomes (x - center[c]) * scale[c] + shift[c].
Affine = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@triton.jit
def _line_starts(
    sample,
    patch,
    line,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Where lines of patches begin in the video; a patch has its lines in (C_in, t, h) order."""
    channel = (line // (PATCH_T * PATCH_H)).to(tl.int64)
    frame = (patch // (grid_h * grid_w) * PATCH_T + line // PATCH_H % PATCH_T).to(tl.int64)
    y = (patch // grid_w % grid_h * PATCH_H + line % PATCH_H).to(tl.int64)
    x = (patch % grid_w * PATCH_W).to(tl.int64)
    return sample * stride_b + channel * stride_c + frame * stride_t + y * stride_h + x * stride_w


@triton.jit
def _prefill(
    block,
    ids_ptr,
    bias_ptr,
    space_ptr,
    time_ptr,
    out_ptr,
    N,
    P,
    first,
    num_rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[row] = bias + position[ids[first + row]] for a block of rows and channels."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    row = block // blocks_c * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = (block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    _, patch, inside = visible(first + row, ids_ptr, None, 1, 1, N, row < num_rows)
    value = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + c, mask=c < C, other=0).to(tl.float32)[None, :]
    mask = inside[:, None] & (c < C)[None, :]
    if space_ptr is not None:
        place = (patch % P).to(tl.int64)[:, None] * C + c[None, :]
        value += tl.load(space_ptr + place, mask=mask, other=0).to(tl.float32)
    if time_ptr is not None:
        place = (patch // P).to(tl.int64)[:, None] * C + c[None, :]
        value += tl.load(time_ptr + place, mask=mask, other=0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * C + c[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=(row < num_rows)[:, None] & (c < C)[None, :],
    )


@triton.jit(
    do_not_specialize=["B", "K", "N", "P", "grid_h", "grid_w", "first", "num_rows", "total"]
)
def pack_kernel(
    video_ptr,  # [B, C_in, T, H, W]
    ids_ptr,  # [total] or None: all patches in order
    cu_seqlens_ptr,  # [B + 1] or None: K rows a sample
    packed_ptr,  # [num_rows, C_in * t * h * w]
    bias_ptr,  # [C] or None
    space_ptr,  # [P, C] or None
    time_ptr,  # [N / P, C] or None
    out_ptr,  # [num_rows, C] or None
    center,
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
    P,
    grid_h,
    grid_w,
    first,
    num_rows,
    total,
    C,
    C_in: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows `first` on: packed = (patch - center) * scale + shift, out = bias + position."""
    LINES: tl.constexpr = C_in * PATCH_T * PATCH_H
    program = tl.program_id(0).to(tl.int64)
    fits = program >= 0
    if cu_seqlens_ptr is not None:
        if program == 0:  # only this program knows, and writes NaN if they do not ascend
            fits = ascend(cu_seqlens_ptr, B, total)
    pack_programs = tl.cdiv(num_rows.to(tl.int64) * LINES, BLOCK_LINES)
    if program < pack_programs:
        line = program * BLOCK_LINES + tl.arange(0, BLOCK_LINES)  # of all lines of all rows
        row = line // LINES
        within = (line % LINES).to(tl.int32)
        sample, patch, inside = visible(
            first + row, ids_ptr, cu_seqlens_ptr, B, K, N, row < num_rows
        )
        start = _line_starts(
            *(sample, patch, within, grid_h, grid_w),
            *(stride_b, stride_c, stride_t, stride_h, stride_w, PATCH_T, PATCH_H, PATCH_W),
        )
        x = tl.arange(0, BLOCK_W)[None, :]
        readable, writable = inside[:, None], (row < num_rows)[:, None]
        if PATCH_W < BLOCK_W:  # a mask that varies along a line would split its vector accesses
            readable, writable = readable & (x < PATCH_W), writable & (x < PATCH_W)
        place = video_ptr + start[:, None] + x.to(tl.int64) * stride_w
        pixels = tl.load(place, mask=readable, other=0).to(tl.float32)
        if NORMALIZE:
            channel = within // (PATCH_T * PATCH_H)
            pixels -= pick(center, channel, C_in)[:, None]
            pixels *= pick(scale, channel, C_in)[:, None]
            pixels += pick(shift, channel, C_in)[:, None]
        pixels = tl.where((inside & fits)[:, None], pixels, float("nan"))
        pixels = pixels.to(packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + line[:, None] * PATCH_W + x, pixels, mask=writable)
    elif out_ptr is not None:
        _prefill(
            *(program - pack_programs, ids_ptr, bias_ptr, space_ptr, time_ptr, out_ptr),
            *(N, P, first, num_rows, C, BLOCK_ROWS, BLOCK_C),
        )


@triton.jit
def fold_kernel(
    weight_ptr,  # [C, pixels]
    bias_ptr,  # [C] or None
    folded_ptr,  # [C, pixels]
    folded_bias_ptr,  # [C], float32
    scale,
    rest,
    pixels,
    C_in: tl.constexpr,
    CHANNEL_PIXELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """weight * scale, rounded, and bias + the rest of the mean times the *rounded* weight."""
    c = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_PIXELS], tl.float32)
    for start in range(0, pixels, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        channel = pixel // CHANNEL_PIXELS
        weight = tl.load(weight_ptr + c * pixels + pixel, mask=pixel < pixels, other=0)
        folded = weight.to(tl.float32) * pick(scale, channel, C_in)
        folded = folded.to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + c * pixels + pixel, folded, mask=pixel < pixels)
        total += folded.to(tl.float32) * pick(rest, channel, C_in)
    bias = tl.sum(total, 0)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c).to(tl.float32)
    tl.store(folded_bias_ptr + c, bias)


@triton.jit
def _visible_ids(ids_ptr, row, mask, N):
    """The ids of rows; -1 where they are not in [0, N) or masked."""
    number = tl.load(ids_ptr + row, mask=mask, other=-1)
    return tl.where((number >= 0) & (number < N), number, -1).to(tl.int32)


@triton.jit(do_not_specialize=["K", "N", "total"])
def first_kernel(
    ids_ptr,  # [total]
    cu_seqlens_ptr,  # [B + 1] or None: K rows a sample
    first_ptr,  # [B, N], int32
    K,
    N,
    total,
    BLOCK: tl.constexpr,
):
    """first[b, n] = the first row of sample b that shows patch n, -1 if there is none."""
    NONE: tl.constexpr = 2**31 - 1
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK)
    sample = program // blocks
    patch = (program % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    if cu_seqlens_ptr is None:
        start = sample * K
        end = start + K
    else:
        start = within(tl.load(cu_seqlens_ptr + sample), total).to(tl.int64)
        end = within(tl.load(cu_seqlens_ptr + sample + 1), total).to(tl.int64)
    first = tl.full([BLOCK], NONE, tl.int32)
    while start < end:
        row = (start + tl.arange(0, BLOCK)).to(tl.int32)
        shows = _visible_ids(ids_ptr, row, row < end, N)[None, :] == patch[:, None]
        first = tl.minimum(first, tl.min(tl.where(shows, row[None, :], NONE), 1))
        start += BLOCK
    first = tl.where(first == NONE, -1, first)
    tl.store(first_ptr + sample * N + patch, first, mask=patch < N)


@triton.jit(do_not_specialize=["B", "K", "N", "total"])
def next_kernel(
    ids_ptr,  # [total]
    cu_seqlens_ptr,  # [B + 1] or None: K rows a sample
    next_ptr,  # [total], int32
    B,
    K,
    N,
    total,
    BLOCK: tl.constexpr,
):
    """next[row] = the next row of its sample that shows its patch, -1 if there is none."""
    NONE: tl.constexpr = 2**31 - 1
    start = tl.program_id(0) * BLOCK
    row = start + tl.arange(0, BLOCK)
    inside = row < total
    if cu_seqlens_ptr is None:
        end = (row // K + 1) * K
    else:
        sample = sample_of(row, cu_seqlens_ptr, B, inside)
        end = within(tl.load(cu_seqlens_ptr + sample + 1, mask=inside, other=0), total)
    patch = _visible_ids(ids_ptr, row, inside, N)
    last = tl.max(tl.where(inside, end, 0), 0)
    following = tl.full([BLOCK], NONE, tl.int32)
    while start < last:
        other = start + tl.arange(0, BLOCK)
        shows = _visible_ids(ids_ptr, other, other < last, N)[None, :] == patch[:, None]
        shows &= other[None, :] > row[:, None]
        following = tl.minimum(following, tl.min(tl.where(shows, other[None, :], NONE), 1))
        start += BLOCK
    # Compared once here: in the loop, the ends of all rows would need registers.
    tl.store(next_ptr + row, tl.where(following < end, following, -1), mask=inside)


@triton.jit(do_not_specialize=["N", "grid_h", "grid_w"])
def unpack_kernel(
    packed_ptr,  # [total, C_in * t * h * w]
    first_ptr,  # [B, N] or None: all patches in order
    next_ptr,  # [total] or None
    video_ptr,  # [B, C_in, T, H, W]
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    N,
    grid_h,
    grid_w,
    C_in: tl.constexpr,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """video[patch] = sum of the packed rows that show it, in order; 0 if there are none."""
    LINES: tl.constexpr = C_in * PATCH_T * PATCH_H
    BLOCKS: tl.constexpr = (LINES + BLOCK_LINES - 1) // BLOCK_LINES
    program = tl.program_id(0).to(tl.int64)
    line = (program % BLOCKS * BLOCK_LINES + tl.arange(0, BLOCK_LINES)).to(tl.int32)
    patch = program // BLOCKS % N
    sample = program // BLOCKS // N
    x = tl.arange(0, BLOCK_W)[None, :]
    mask = (line < LINES)[:, None]
    if PATCH_W < BLOCK_W:
        mask &= x < PATCH_W
    offset = line[:, None] * PATCH_W + x
    total = tl.zeros([BLOCK_LINES, BLOCK_W], tl.float32)
    row = sample * N + patch
    if first_ptr is not None:
        row = tl.load(first_ptr + row).to(tl.int64)
    while row >= 0:
        row_ptr = packed_ptr + row * (LINES * PATCH_W)
        total += tl.load(row_ptr + offset, mask=mask, other=0).to(tl.float32)
        row = row * 0 - 1 if next_ptr is None else tl.load(next_ptr + row).to(tl.int64)
    start = _line_starts(
        *(sample, patch.to(tl.int32), line, grid_h, grid_w),
        *(stride_b, stride_c, stride_t, stride_h, 1, PATCH_T, PATCH_H, PATCH_W),
    )
    tl.store(video_ptr + start[:, None] + x, total.to(video_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "N"])
def position_kernel(
    grad_ptr,  # [total, C]
    first_ptr,  # [B, N] or None: all patches in order
    next_ptr,  # [total] or None
    position_ptr,  # [N, C], float32
    B,
    N,
    C,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """position[n] = sum of the rows that show patch n, in an order that depends on the ids only.

    The rows of BLOCK_B samples are loaded and summed together.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    patch = program // blocks
    c = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    total = tl.zeros([BLOCK_C], tl.float32)
    lost = tl.zeros([BLOCK_C], tl.float32)
    start = patch * 0
    while start < B:
        sample = start + tl.arange(0, BLOCK_B)
        row = tl.where(sample < B, sample * N + patch, -1)
        if first_ptr is not None:
            row = tl.load(first_ptr + row, mask=row >= 0, other=-1).to(tl.int64)
        while tl.max(row, 0) >= 0:
            mask = (row >= 0)[:, None] & (c < C)[None, :]
            x = tl.load(grad_ptr + row[:, None] * C + c[None, :], mask=mask, other=0)
            total, lost = add_compensated(tl.sum(x.to(tl.float32), 0), total, lost)
            if next_ptr is None:
                row = row * 0 - 1
            else:
                row = tl.load(next_ptr + row, mask=row >= 0, other=-1).to(tl.int64)
        start += BLOCK_B
    tl.store(position_ptr + patch * C + c, total, mask=c < C)


def masked_patch_embed(
    video: Tensor,  # [B, C_in, T, H, W]
    weight: Tensor,  # [C, C_in, t, h, w]
    bias: Tensor | None,  # [C]
    time: Tensor | None,  # [N / P, C]
    space: Tensor | None,  # [P, C]
    ids_keep: Tensor | None,  # [B, K] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cut out the visible patches, normalize them, project them, and add their positions."""
    clip = _Clip(video, weight.shape, ids_keep, cu_seqlens)
    C, matrix = weight.shape[0], weight.contiguous().flatten(1)
    clip.check_tables(C, bias, time, space)
    bias, space, time = (x if x is None else x.contiguous() for x in (bias, space, time))
    affine = _normalization(mean, std)
    if affine is not None and weight.dtype != torch.float32:
        matrix, bias, affine = _fold(matrix, bias, mean, std)
    out = matrix.new_empty(clip.total, C)
    packed = matrix.new_empty(clip.total, matrix.shape[1])
    prefill = bias is not None or space is not None
    clip.pack(packed, affine, out=out if prefill else None, position=(bias, space, time))
    if prefill:
        out.addmm_(packed, matrix.t())
    else:
        torch.mm(packed, matrix.t(), out=out)
    return out.view(*clip.shape, C)


def masked_patch_embed_bwd(
    grad_out: Tensor,  # [B, K, C] or [total, C], contiguous
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
    """The gradients of `video`, `weight` and all positions [N, C]; empty where not needed."""
    clip = _Clip(video, weight.shape, ids_keep, cu_seqlens)
    grad = grad_out.contiguous().flatten(0, -2)  # [total, C]
    C = weight.shape[0]
    grad_video, grad_weight = video.new_empty(0), weight.new_empty(0)
    grad_position = grad.new_empty(0, dtype=torch.float32)
    lists = clip.lists() if need_video or need_position else (None, None)
    if need_video:
        grad_video = clip.unpack(lists, grad @ weight.contiguous().flatten(1).to(grad.dtype))
    if need_weight:
        affine = _normalization(mean, std)
        total = weight.new_zeros(C, prod(weight.shape[1:]), dtype=torch.float32)
        for first in range(0, clip.total, ROWS_PER_STEP):
            part = grad[first : first + ROWS_PER_STEP]
            packed = weight.new_empty(part.shape[0], total.shape[1])
            clip.pack(packed, affine, first=first)
            total += _multiply_in_float32(part.t(), packed)
        grad_weight = total.to(weight.dtype).view(weight.shape)
    if need_position:
        grad_position = grad.new_empty(clip.N, C, dtype=torch.float32)
        sizes = (video.shape[0], C)
        samples, channels = map(block_size, sizes, POSITION_TILE)
        with on_device(grad):
            position_kernel[(clip.N * triton.cdiv(C, channels),)](
                *(grad, *lists, grad_position, video.shape[0], clip.N, C, samples, channels),
                **OPTIONS,
            )
    return grad_video, grad_weight, grad_position


class _Clip:
    """A clip cut into patches, and the ids of the visible ones: one row for each."""

    def __init__(
        self,
        video: Tensor,
        weight_shape: Sequence[int],
        ids_keep: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.video = video
        self.patch = tuple(weight_shape[1:])  # C_in, t, h, w
        B = video.shape[0]
        T, *self.grid = (n // p for n, p in zip(video.shape[2:], self.patch[1:], strict=True))
        self.N = T * prod(self.grid)
        self.shape = (B, self.N) if ids_keep is None else tuple(ids_keep.shape)
        self.total = prod(self.shape)
        self.ids = None if ids_keep is None else ids_keep.contiguous().flatten()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()

    def check_tables(
        self, C: int, bias: Tensor | None, time: Tensor | None, space: Tensor | None
    ) -> None:
        """Raise unless the kernels stay inside of what is added to the rows."""
        if time is not None and space is None:
            raise RuntimeError("masked_patch_embed: need space where time is given")
        P = prod(self.grid)
        wanted = {
            "bias": (bias, (C,)),
            "time": (time, (self.N // max(P, 1), C)),
            "space": (space, (self.N if time is None else P, C)),
        }
        for name, (table, shape) in wanted.items():
            if table is not None and table.shape != shape:
                raise RuntimeError(
                    f"masked_patch_embed: need {name} {list(shape)}, got {list(table.shape)}"
                )

    def pack(
        self,
        packed: Tensor,  # [num_rows, C_in * t * h * w]
        affine: Affine | None,
        *,
        first: int = 0,
        out: Tensor | None = None,  # [num_rows, C]
        position: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> None:
        """Write the rows from `first` on as a matrix, and bias + position of each into `out`."""
        num_rows = packed.shape[0]
        strides = strides_of(self.video)
        width = triton.next_power_of_2(self.patch[-1])
        lines = max(TILE // width, 1)
        if width != self.patch[-1] or strides[-1] != 1 or any(s % 16 for s in strides[:-1]):
            lines = max(
                lines // 4, 1
            )  # one address a pixel, not one a vector: registers would spill
        programs = triton.cdiv(num_rows * prod(self.patch[:-1]), lines)
        C = block_c = 1
        if out is not None:
            C = out.shape[1]
            block_c = block_size(C, 1024)
            programs += triton.cdiv(num_rows, TILE // block_c) * triton.cdiv(C, block_c)
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
                *self.grid,
                first,
                num_rows,
                self.total,
                C,
                *self.patch,
                NORMALIZE=affine is not None,
                BLOCK_LINES=lines,
                BLOCK_W=width,
                BLOCK_ROWS=TILE // block_c,
                BLOCK_C=block_c,
                **OPTIONS,
            )

    def lists(self) -> tuple[Tensor | None, Tensor | None]:
        """The first row of every patch [B, N] and the one after each row [total]; -1: none."""
        if self.total >= 2**31:
            raise RuntimeError(f"masked_patch_embed: need fewer than 2^31 rows, got {self.total}")
        if self.ids is None:
            return None, None
        B, K = self.video.shape[0], self.shape[-1]
        first = self.ids.new_empty((B, self.N), dtype=torch.int32)
        following = self.ids.new_empty(self.total, dtype=torch.int32)
        rows = (self.ids, self.cu_seqlens)
        with on_device(self.ids):
            if first.numel():
                programs = B * triton.cdiv(self.N, IDS_PER_STEP)
                first_kernel[(programs,)](
                    *(*rows, first, K, self.N, self.total, IDS_PER_STEP), **OPTIONS
                )
            if self.total:
                next_kernel[(triton.cdiv(self.total, IDS_PER_STEP),)](
                    *(*rows, following, B, K, self.N, self.total, IDS_PER_STEP), **OPTIONS
                )
        return first, following

    def unpack(
        self,
        lists: tuple[Tensor | None, Tensor | None],
        packed: Tensor,  # [total, C_in * t * h * w]
    ) -> Tensor:
        """The gradient of the video from that of its patches."""
        grad_video = torch.empty(self.video.shape, dtype=self.video.dtype, device=packed.device)
        width = triton.next_power_of_2(self.patch[-1])
        lines = block_size(prod(self.patch[:-1]), max(TILE // width, 1))
        programs = self.video.shape[0] * self.N * triton.cdiv(prod(self.patch[:-1]), lines)
        with on_device(packed):
            unpack_kernel[(programs,)](
                packed,
                *lists,
                grad_video,
                *grad_video.stride()[:-1],
                self.N,
                *self.grid,
                *self.patch,
                BLOCK_LINES=lines,
                BLOCK_W=width,
                **OPTIONS,
            )
        return grad_video


def _center(mean: Sequence[float]) -> tuple[int, ...]:
    """The pixel value nearest to the mean: differences from it are exact even in 16 bits."""
    return tuple(min(max(round(255 * m), 0), 255) for m in mean)


def _normalization(mean: Sequence[float], std: Sequence[float]) -> Affine | None:
    """(pixel / 255 - mean) / std = (pixel - center) * scale + shift."""
    if not len(mean):
        return None
    center = _center(mean)
    shift = ((c / 255 - m) / s for c, m, s in zip(center, mean, std, strict=True))
    return tuple(map(float, center)), tuple(1 / (255 * s) for s in std), tuple(shift)


def _fold(
    weight: Tensor, bias: Tensor | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor, Affine]:
    """The weight and the bias for (pixel - center) / 128, which is exact in 16 bits."""
    center = _center(mean)
    (C, pixels), C_in = weight.shape, len(mean)
    folded = torch.empty_like(weight)
    folded_bias = weight.new_empty(C, dtype=torch.float32)
    with on_device(weight):
        fold_kernel[(C,)](
            weight,
            bias,
            folded,
            folded_bias,
            tuple(128 / (255 * s) for s in std),
            tuple((c - 255 * m) / 128 for c, m in zip(center, mean, strict=True)),
            pixels,
            C_in,
            pixels // C_in,
            block_size(pixels, 1024),
            **OPTIONS,
        )
    return folded, folded_bias, (tuple(map(float, center)), (1 / 128,) * C_in, (0.0,) * C_in)


def _multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    packed, offsets = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 3, 8], dtype=torch.int32)
    rows = ((packed.view(2, 4), None), (packed, offsets), (None, None))
    for (video_dtype, dtype), (ids, cu_seqlens), p in itertools.product(DTYPES, rows, (16, 14)):
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
