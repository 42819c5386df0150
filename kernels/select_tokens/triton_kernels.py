"""select_tokens in Triton: one launch forward, one backward.

Forward, every program computes by itself which tokens of its sample are kept, from scores that fit
into the cache, so nothing passes from one launch to another. Some programs copy blocks of rows, and
read the kept rows only. Others sum the dropped rows in a slice of columns. triton_places.py
computes the place of a token among the kept ones.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS, block_size, on_device
from vidl.kernels.triton_offsets import ascend, find_block, within

from .triton_places import place_by_index, place_by_score, score_keys, threshold_of

# Keys that a program compares at a time, at most; and those that it compares with each of a block.
KEYS_PER_STEP = 1024
RIVALS_PER_STEP = 64
# Elements of a tile of rows, and the columns of a copying program, at most.
TILE = 8192
COLUMNS = 8192
# Elements and rows of a tile of rows that are summed, at most.
FUSED_TILE, FUSED_ROWS = 2048, 32


@triton.jit
def _offsets_of(offsets_ptr, sample, B, total):
    """Where a sample begins and ends, and whether that fits offsets that ascend from 0 to total."""
    begin = tl.load(offsets_ptr + sample).to(tl.int64)
    end = tl.load(offsets_ptr + sample + 1).to(tl.int64)
    fits = (begin >= 0) & (begin <= end) & (end <= total)
    fits = fits & ((sample > 0) | (begin == 0)) & ((sample + 1 < B) | (end == total))
    return begin, end, fits


@triton.jit
def _rows_of(sample, cu_seqlens_ptr, B, N, total, prefix):
    """The first row of a sample in packed x (else 0), and its number of tokens after the prefix.

    That number is -prefix where the offsets do not fit: the sample has no rows then.
    """
    if cu_seqlens_ptr is None:
        begin = sample * 0
        tokens = N
    else:
        begin, end, fits = _offsets_of(cu_seqlens_ptr, sample, B, total)
        fits = fits & (begin + prefix <= end)
        begin = tl.where(fits, begin, 0)
        tokens = tl.where(fits, end - begin - prefix, -prefix).to(tl.int32)
    return begin, tokens


@triton.jit
def _kept_of(sample, cu_kept_ptr, B, K, num_kept, tokens):
    """The first place and the number of the kept tokens of a sample, and whether it can keep them.

    If not, they become NaN. An assertion would end the CUDA context of the process.
    """
    if cu_kept_ptr is None:
        begin = sample * K
        count = K
        fits = sample >= 0
    else:
        begin, end, fits = _offsets_of(cu_kept_ptr, sample, B, num_kept)
        begin = within(begin, num_kept)
        count = tl.maximum(within(end, num_kept) - begin, 0).to(tl.int32)
        fits = fits & (count <= tokens)
    return begin, count, fits


@triton.jit
def _fuse(
    x_ptr, ranks_ptr, weights_ptr, row_ptr, mean_ptr, mass_ptr, stride_r, stride_ranks,
    stride_weights, N, K, C, part, index_bits, fits,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a slice of the fused token: the sum of weight * token over the dropped tokens.

    NaN where the offsets of the sample do not fit.
    """
    threshold = threshold_of(ranks_ptr, stride_ranks, N, K, index_bits, BLOCK)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    masses = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        key = score_keys(ranks_ptr, stride_ranks, n, N, index_bits)
        at = weights_ptr + n.to(tl.int64) * stride_weights
        weight = tl.load(at, mask=n < N, other=0)
        used = (n < N) & (key < threshold) & (tl.abs(weight) < float("inf"))
        weight = tl.where(used, weight, 0.0)
        row = x_ptr + n.to(tl.int64)[:, None] * stride_r
        x = tl.load(row + c[None, :], mask=used[:, None] & (c < C)[None, :], other=0)
        total += weight[:, None] * x.to(tl.float32)
        masses += weight
    value = tl.sum(total, 0)
    if mean_ptr is not None:
        mass = tl.sum(masses, 0)
        value = tl.where(mass == 0, 0.0, value / tl.where(mass == 0, 1.0, mass))
        if part == 0:
            tl.store(mass_ptr, mass)
    value = tl.where(fits, value, float("nan"))
    if mean_ptr is not None:
        tl.store(mean_ptr + c, value, mask=c < C)
    tl.store(row_ptr + c, value.to(row_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _copy(
    x_ptr, tokens_ptr, r, to, copied, stride_r, C, first,
    BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy the rows r of a sample to the rows `to` of all tokens, where `copied` is set."""
    row = r.to(tl.int64) * stride_r
    for step in range(first, tl.minimum(C, first + COLUMNS), BLOCK_C):
        c = step + tl.arange(0, BLOCK_C)
        mask = copied[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row[:, None] + c[None, :], mask=mask)
        tl.store(tokens_ptr + to[:, None] * C + c[None, :], x, mask=mask)


@triton.jit
def _fill_nan(tokens_ptr, to, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write NaN to `rows` rows of all tokens, from row `to` on."""
    nan = tl.full([BLOCK_N, BLOCK_C], float("nan"), tl.float32).to(tokens_ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_N):
        r = start + tl.arange(0, BLOCK_N)
        for step in range(0, C, BLOCK_C):
            c = step + tl.arange(0, BLOCK_C)
            mask = (r < rows)[:, None] & (c < C)[None, :]
            tl.store(tokens_ptr + (to + r)[:, None] * C + c[None, :], nan, mask=mask)


@triton.jit(
    do_not_specialize=[
        "B", "N", "K", "total", "num_kept", "prefix", "blocks", "chunks", "slices", "index_bits",
    ]
)  # fmt: skip
def select_kernel(
    x_ptr,  # [B, prefix + N, C] or [total, C]
    ranks_ptr,  # [B, N] or [total]
    weights_ptr,  # as ranks, or None
    cu_seqlens_ptr,  # [B + 1] or None
    cu_kept_ptr,  # [B + 1] or None
    tokens_ptr,  # [B, prefix + K + FUSE, C], or packed
    ids_ptr,  # [B, K] or [num_kept]
    inverse_ptr,  # as ranks
    offsets_ptr,  # [B + 1]
    mean_ptr,  # [B, C] or None
    mass_ptr,  # [B] or None
    stride_b,
    stride_r,
    stride_ranks_b,
    stride_ranks,
    stride_weights_b,
    stride_weights,
    B,
    N,
    K,
    C,
    total,
    num_kept,
    prefix,
    blocks,
    chunks,
    slices,
    index_bits,
    BY_SCORE: tl.constexpr,
    FUSE: tl.constexpr,
    BLOCK: tl.constexpr,
    RIVALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    FUSED_ROWS: tl.constexpr,
    FUSED_COLUMNS: tl.constexpr,
):
    """B x slices programs write fused tokens; blocks x chunks programs after them copy rows."""
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    program = tl.program_id(0).to(tl.int64)
    fused = B.to(tl.int64) * slices
    all_fit = program >= 0
    if PACKED:
        if program == 0:  # only this program knows, and writes NaN if they do not ascend
            all_fit = ascend(cu_seqlens_ptr, B, total) & ascend(cu_kept_ptr, B, num_kept)
    if program < fused:
        sample = program // slices
        start = tl.zeros([], tl.int32)
    else:
        item = (program - fused) // chunks
        sample, start = find_block(item, cu_seqlens_ptr, B, blocks, BLOCK_N, PACKED)
    sample = tl.where(all_fit, sample, 0)
    start = tl.where(all_fit, start, 0)
    begin, tokens = _rows_of(sample, cu_seqlens_ptr, B, N, total, prefix)
    first, kept, fits = _kept_of(sample, cu_kept_ptr, B, K, num_kept, tokens)
    fits = fits & all_fit
    tokens = tl.where(fits, tokens, -prefix)
    out = first + sample * (prefix + FUSE)  # the first row of the sample in tokens
    x_ptr += sample * stride_b + begin * stride_r
    if not PACKED:
        ranks_ptr += sample * stride_ranks_b
        inverse_ptr += sample * N
        if FUSE:
            weights_ptr += sample * stride_weights_b
    else:
        ranks_ptr += (begin + prefix) * stride_ranks
        inverse_ptr += begin + prefix
        if FUSE:
            weights_ptr += (begin + prefix) * stride_weights

    if program < fused:
        if FUSE:
            if mean_ptr is not None:
                mean_ptr += sample * C
                mass_ptr += sample
            _fuse(
                x_ptr + prefix * stride_r, ranks_ptr, weights_ptr,
                tokens_ptr + (out + prefix + kept) * C, mean_ptr, mass_ptr,
                stride_r, stride_ranks, stride_weights, tokens, kept, C,
                (program % slices).to(tl.int32), index_bits, fits, BLOCK, FUSED_ROWS, FUSED_COLUMNS,
            )  # fmt: skip
    else:
        r = start + tl.arange(0, BLOCK_N)
        n = r - prefix
        if BY_SCORE:
            is_kept, place = place_by_score(
                ranks_ptr, stride_ranks, n, tokens, kept, index_bits, RIVALS, BLOCK_N
            )
        else:
            is_kept, place = place_by_index(
                ranks_ptr, stride_ranks, n, tokens, kept, index_bits, BLOCK
            )
        chunk = ((program - fused) % chunks).to(tl.int32)
        if chunk == 0:
            real = (n >= 0) & (n < tokens)
            if PACKED:
                real |= (n < 0) & (r < prefix + tokens)
            tl.store(inverse_ptr + n, tl.where(is_kept, place, -1).to(tl.int64), mask=real)
            tl.store(ids_ptr + first + place, n.to(tl.int64), mask=is_kept)
            if start == 0:
                end = out + prefix + kept + FUSE
                tl.store(offsets_ptr + sample + 1, end.to(tl.int32))
                if sample == 0:
                    tl.store(offsets_ptr, 0)
            if PACKED:
                if (start == 0) & (fits == 0):
                    _fill_nan(tokens_ptr, out, prefix + kept, C, BLOCK_N, BLOCK_C)
        to = out + tl.where(n < 0, r, prefix + place)
        _copy(
            x_ptr,
            tokens_ptr,
            r,
            to,
            is_kept | ((n < 0) & (r < prefix + tokens)),
            stride_r,
            C,
            chunk * COLUMNS,
            BLOCK_C,
            COLUMNS,
        )


@triton.jit(do_not_specialize=["B", "N", "total", "rows", "prefix", "blocks", "chunks"])
def backward_kernel(
    grad_ptr,  # of the tokens
    x_ptr,  # or None
    weights_ptr,  # or None
    inverse_ptr,
    cu_seqlens_ptr,  # [B + 1] or None
    offsets_ptr,  # [B + 1], of the tokens
    mean_ptr,  # [B, C] or None
    mass_ptr,  # [B] or None
    grad_x_ptr,  # or None
    grad_weights_ptr,  # or None
    stride_b,
    stride_r,
    stride_weights_b,
    stride_weights,
    B,
    N,
    C,
    total,
    rows,
    prefix,
    blocks,
    chunks,
    FUSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each row of x gets the gradient of its token, or its share of the fused token's, or zeros."""
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    program = tl.program_id(0).to(tl.int64)
    sample, start = find_block(program // chunks, cu_seqlens_ptr, B, blocks, BLOCK_N, PACKED)
    begin, tokens = _rows_of(sample, cu_seqlens_ptr, B, N, total, prefix)
    out = tl.load(offsets_ptr + sample).to(tl.int64)
    last = tl.load(offsets_ptr + sample + 1).to(tl.int64) - 1
    r = start + tl.arange(0, BLOCK_N)
    n = r - prefix
    scored = (n >= 0) & (n < tokens)
    if not PACKED:
        number = sample * N + n
        row = sample * (prefix + N) + r
    else:
        number = begin + prefix + n
        row = begin + r
    place = tl.load(inverse_ptr + number, mask=scored, other=-1)
    is_kept = (n < 0) | (place >= 0)
    source = out + tl.where(n < 0, r, prefix + place)
    scale = tl.full([BLOCK_N], 1, tl.float32)
    has_grad = is_kept
    if FUSE:
        if not PACKED:
            at = sample * stride_weights_b + n * stride_weights
        else:
            at = number * stride_weights
        weight = tl.load(weights_ptr + at, mask=scored & ~is_kept, other=float("inf"))
        used = scored & ~is_kept & (tl.abs(weight) < float("inf"))
        share = tl.full([], 1, tl.float32)
        if mass_ptr is not None:
            mass = tl.load(mass_ptr + sample)
            share = tl.where(mass == 0, 0.0, 1 / tl.where(mass == 0, 1.0, mass))
        source = tl.where(used, last, source)
        scale = tl.where(used, weight * share, scale)
        has_grad = is_kept | used
    has_grad = has_grad & (source >= 0) & (source < rows)

    x_row = sample * stride_b + (begin + r) * stride_r
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    first = (program % chunks).to(tl.int32) * COLUMNS
    for step in range(first, tl.minimum(C, first + COLUMNS), BLOCK_C):
        c = step + tl.arange(0, BLOCK_C)
        inside = (c < C)[None, :]
        from_row = grad_ptr + source[:, None] * C
        grad = tl.load(from_row + c[None, :], mask=has_grad[:, None] & inside, other=0).to(
            tl.float32
        )
        if grad_x_ptr is not None:
            value = (grad * scale[:, None]).to(grad_x_ptr.dtype.element_ty)
            real = (r < prefix + tokens)[:, None] & inside
            tl.store(grad_x_ptr + row[:, None] * C + c[None, :], value, mask=real)
        if grad_weights_ptr is not None:
            mask = used[:, None] & inside
            x = tl.load(x_ptr + x_row[:, None] + c[None, :], mask=mask, other=0).to(tl.float32)
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + sample * C + c, mask=c < C, other=0)[None, :]
            product += tl.where(mask, grad * x, 0.0)
    if grad_weights_ptr is not None:
        real = scored
        if PACKED:
            real |= (n < 0) & (r < prefix + tokens)
        grad_weight = tl.where(used, tl.sum(product, 1) * share, 0.0)
        tl.store(grad_weights_ptr + number, grad_weight, mask=real)


def select_tokens(
    x: Tensor,  # [B, prefix + N, C], or [total, C] with offsets
    ranks: Tensor,  # [B, N] or [total]
    weights: Tensor | None,  # as ranks
    cu_seqlens: Tensor | None,  # [B + 1]
    cu_kept: Tensor | None,  # [B + 1]
    keep: int,
    prefix: int,
    order: str,
    fuse: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, ids_keep, inverse, offsets; means and sums of weights, empty unless needed."""
    samples = _Samples(x, cu_seqlens, prefix)
    samples.check_numbers("scores", ranks)
    samples.check_numbers("weights", weights)
    B, C, extra = samples.B, samples.C, prefix + (1 if fuse else 0)
    if cu_seqlens is None:
        tokens, ids_shape = x.new_empty(B, keep + extra, C), [B, keep]
    else:
        tokens, ids_shape = x.new_empty(keep + B * extra, C), [keep]
    if cu_kept is not None:
        cu_kept = cu_kept.contiguous()
    ids_keep = ranks.new_empty(ids_shape, dtype=torch.int64)
    inverse = ranks.new_empty(ranks.shape, dtype=torch.int64)
    offsets = (ranks.new_zeros if B == 0 else ranks.new_empty)(B + 1, dtype=torch.int32)
    # Without channels no program writes the sums of weights.
    new = ranks.new_empty if C else ranks.new_zeros
    means = new(B * (C + 1) if fuse == "mean" else 0)
    block_n, block_c = samples.tile()
    fused_rows = block_size(samples.N or samples.total, FUSED_ROWS)
    fused_columns = block_size(C, FUSED_TILE // fused_rows)
    chunks, slices = samples.chunks(COLUMNS), triton.cdiv(C, fused_columns) if fuse else 0
    programs = samples.programs(block_n) * chunks + B * slices
    with on_device(x):
        select_kernel[(programs,)](
            samples.x, ranks, weights, samples.cu_seqlens, cu_kept,
            tokens, ids_keep, inverse, offsets,
            *((means, means[B * C :]) if fuse == "mean" else (None, None)),
            *samples.strides, *_strides(ranks), *((0, 0) if weights is None else _strides(weights)),
            B, samples.N, keep, C, samples.total, keep, prefix,
            samples.blocks(block_n), chunks, slices,
            max(samples.N or samples.total, 1).bit_length(),
            BY_SCORE=order == "score",
            FUSE=int(bool(fuse)),
            BLOCK=block_size(samples.N or samples.total, KEYS_PER_STEP),
            RIVALS=RIVALS_PER_STEP,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            COLUMNS=COLUMNS,
            FUSED_ROWS=fused_rows,
            FUSED_COLUMNS=fused_columns,
            # Left to itself, the compiler spills on sm_89 in order not to use more than 80.
            maxnreg=168 if fuse else None,
            **OPTIONS,
        )  # fmt: skip
    return tokens, ids_keep, inverse, offsets, means


def select_tokens_bwd(
    grad_tokens: Tensor,
    x: Tensor | None,
    weights: Tensor | None,
    inverse: Tensor,
    cu_seqlens: Tensor | None,
    offsets: Tensor,
    means: Tensor | None,
    prefix: int,
    fuse: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights; empty where not needed."""
    grad_tokens, inverse = grad_tokens.contiguous(), inverse.contiguous()
    B, C = offsets.shape[0] - 1, grad_tokens.shape[-1]
    rows = (inverse.shape[0], C) if cu_seqlens is not None else (B, prefix + inverse.shape[1], C)
    grad_x = grad_tokens.new_empty(rows if need_x else (0,))
    grad_weights = inverse.new_empty(inverse.shape if need_weights else (0,), dtype=torch.float32)
    # Without gradients of the weights x is not saved, and only its shape matters.
    samples = _Samples(
        grad_tokens.new_empty(()).expand(rows) if x is None else x, cu_seqlens, prefix
    )
    block_n, block_c = samples.tile(
        TILE // 2 if need_weights else TILE
    )  # products need registers too
    # One program sums over all columns.
    columns = max(triton.cdiv(C, block_c), 1) * block_c if need_weights else COLUMNS
    chunks = samples.chunks(columns)
    with on_device(grad_tokens):
        backward_kernel[(samples.programs(block_n) * chunks,)](
            grad_tokens, None if x is None else samples.x, weights, inverse, samples.cu_seqlens,
            offsets, *((None, None) if means is None else (means, means[B * C :])),
            grad_x if need_x else None, grad_weights if need_weights else None,
            *samples.strides, *((0, 0) if weights is None else _strides(weights)),
            B, samples.N, C, samples.total, grad_tokens.shape[:-1].numel(), prefix,
            samples.blocks(block_n), chunks,
            FUSE=int(bool(fuse)),
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            COLUMNS=columns,
            **OPTIONS,
        )  # fmt: skip
    return grad_x, grad_weights


class _Samples:
    """B samples of rows, and the blocks they are divided into."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, prefix: int) -> None:
        self.x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        self.C, self.prefix = x.shape[-1], prefix
        self.cu_seqlens = cu_seqlens
        if cu_seqlens is None:
            self.B, self.N = x.shape[0], x.shape[1] - prefix
            self.total = self.B * x.shape[1]
        else:
            self.cu_seqlens = cu_seqlens.contiguous()
            self.B, self.N, self.total = cu_seqlens.shape[0] - 1, 0, x.shape[0]
        self.strides = (0, *self.x.stride()[:-1])[-2:]

    def tile(self, most: int = TILE) -> tuple[int, int]:
        """The rows and columns that a program holds at a time: at most `most` elements."""
        columns = block_size(self.C, 256 if self.C <= 4096 else 1024)
        longest = self.prefix + self.N if self.cu_seqlens is None else self.total
        return block_size(longest, min(32, most // columns)), columns

    def blocks(self, rows: int) -> int:
        """Blocks of a sample; not meant for packed samples, which differ in length."""
        return max(triton.cdiv(self.prefix + self.N, rows), 1)

    def programs(self, rows: int) -> int:
        """Blocks of all samples."""
        if self.cu_seqlens is None:
            return self.B * self.blocks(rows)
        return self.total // rows + self.B if self.B else 0

    def chunks(self, columns: int) -> int:
        """Parts of the columns; at least one, which writes ids and offsets."""
        return max(triton.cdiv(self.C, columns), 1)

    def check_numbers(self, name: str, numbers: Tensor | None) -> None:
        """Raise unless there is one number for every token, and if packed for the prefix too."""
        shape = (self.B, self.N) if self.cu_seqlens is None else (self.total,)
        if numbers is not None and numbers.shape != shape:
            raise RuntimeError(
                f"select_tokens: need {name} {list(shape)}, got {list(numbers.shape)}"
            )


def _strides(numbers: Tensor) -> tuple[int, int]:
    return numbers.stride(0) if numbers.ndim == 2 else 0, numbers.stride(-1)


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    offsets = torch.tensor([0, 40, 100], dtype=torch.int32)
    kept = torch.tensor([0, 20, 50], dtype=torch.int32)
    variants = itertools.product(
        (torch.bfloat16, torch.float32), ("score", "index"), ("sum", "", "mean"), (768,)
    )
    others = ((torch.float16, "score", "sum", 768), (torch.bfloat16, "index", "mean", 8192))
    for dtype, order, fuse, C in itertools.chain(variants, others):
        x, scores = torch.zeros(2, 51, C, dtype=dtype), torch.zeros(2, 50)
        flat = torch.zeros(100, C, dtype=dtype)
        uniform = (x, scores, scores if fuse else None, None, None, 25, 1, order, fuse)
        numbers = torch.zeros(100)
        packed = (flat, numbers, numbers if fuse else None, offsets, kept, 50, 1, order, fuse)
        for args in (uniform, packed):
            tokens, _, inverse, ends, means = select_tokens(*args)
            saved = means if fuse == "mean" else None
            for need in (False, True) if fuse else (False,):
                given = (args[0] if need else None, args[2], inverse, args[3], ends, saved)
                select_tokens_bwd(tokens, *given, 1, fuse, True, need)
