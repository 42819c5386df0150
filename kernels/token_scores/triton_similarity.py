"""token_scores by the similarity of keys, in Triton: even places meet blocks of odd ones."""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_rows import (
    check_offsets,
    check_rows,
    find_work,
    load_rows,
    rows_at,
    span,
    store_rows,
    strides_of,
)

from .triton_call import Call


@triton.jit(do_not_specialize=["H", "K"])
def directions_kernel(
    k_ptr,  # [K, H, D]
    directions_ptr,  # [K, D]
    k_row,
    k_head,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean over heads of a block of keys, divided by their lengths."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < K
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for h in range(0, H):
        start = row * k_row + tl.full([], 0, tl.int64) + h * k_head
        mean += load_rows(k_ptr, start, real, D, BLOCK_D).to(tl.float32)
    mean = mean / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    length = tl.where(length < 1e-12, 1e-12, length)
    store_rows(directions_ptr, row * D, mean / length[:, None], real, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "K", "E", "max_keys", "blocks"])
def similarity_kernel(
    directions_ptr,  # [K, D]
    key_offsets_ptr,
    key_rows_ptr,
    scores_ptr,  # [E]
    G,
    K,
    E,
    max_keys,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The scores of a block of keys: the even ones meet blocks of odd ones."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        check_offsets(key_offsets_ptr, G, E, max_keys, BLOCK=128)
    g, start, _ = find_work(program, key_offsets_ptr, G, 1, blocks, 2 * BLOCK_N, SEARCH)
    first_key, keys = span(key_offsets_ptr, g, True)
    if start == 0:
        check_rows(key_rows_ptr, first_key, keys, K, BLOCK=128)
    if start >= keys:
        return
    even = start + 2 * tl.arange(0, BLOCK_N)
    real = even < keys
    row = rows_at(key_rows_ptr, first_key + even, real)
    ours = load_rows(directions_ptr, row * D, real, D, BLOCK_D)
    most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    wrong = tl.zeros([BLOCK_N], tl.float32)
    for at in range(1, keys, 2 * BLOCK_N):
        odd = at + 2 * tl.arange(0, BLOCK_N)
        real_odd = odd < keys
        row = rows_at(key_rows_ptr, first_key + odd, real_odd)
        theirs = load_rows(directions_ptr, row * D, real_odd, D, BLOCK_D)
        cosines = tl.dot(ours, tl.trans(theirs), input_precision="tf32x3")
        wrong += tl.sum(cosines - cosines, 1)  # NaN, if a cosine is
        cosines = tl.where(real_odd[None, :], cosines, float("-inf"))
        most = tl.maximum(most, tl.max(cosines, 1))
    tl.store(scores_ptr + first_key + even, -(most + wrong), mask=real)
    never = tl.full([BLOCK_N], float("inf"), tl.float32)
    tl.store(scores_ptr + first_key + even + 1, never, mask=even + 1 < keys)


def similarity(c: Call) -> Tensor:
    directions, scores = c.empty(c.K, c.D), c.empty(c.E)
    if c.K:
        directions_kernel[(triton.cdiv(c.K, 32),)](
            c.k,
            directions,
            *strides_of(c.k),
            c.H,
            c.K,
            **c.head,
            BLOCK_N=32,
            **c.options,
        )
    side = 32 if c.D <= 64 else 16  # larger ones spill registers
    programs, blocks, search = c.blocks(1, 2 * side, 1)
    if programs:
        similarity_kernel[(programs,)](
            directions,
            *c.key_index,
            scores,
            c.G,
            c.K,
            c.E,
            c.most[1],
            blocks,
            **c.head,
            BLOCK_N=side,
            SEARCH=search,
            **c.options,
        )
    return scores
