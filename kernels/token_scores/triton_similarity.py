"""token_scores by the similarity of keys, in Triton: keys at even places meet those at odd ones."""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.groups.triton_rows import load_block, load_rows, span, store_rows
from vidl.kernels.triton_offsets import find_block

from .triton_call import ScoresCall


@triton.jit(do_not_specialize=["H", "num_keys"])
def directions_kernel(
    k_ptr,  # [num_keys, H, D]
    directions_ptr,  # [num_keys, D]
    k_row,
    k_head,
    H,
    num_keys,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The mean over heads of a block of keys, divided by its norm."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    real = row < num_keys
    mean = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    for h in range(0, H):
        start = row * k_row + tl.full([], 0, tl.int64) + h * k_head
        mean += load_rows(k_ptr, start, real, D, BLOCK_D).to(tl.float32)
    mean = mean / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    length = tl.where(length < 1e-12, 1e-12, length)
    store_rows(directions_ptr, row * D, mean / length[:, None], real, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "E", "num_keys", "blocks"])
def similarity_kernel(
    directions_ptr,  # [num_keys, D]
    key_offsets_ptr,
    key_rows_ptr,
    scores_ptr,  # [E]
    G,
    E,
    num_keys,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """-max cosine similarity to the odd keys for a block of even keys; inf for odd keys."""
    program = tl.program_id(0).to(tl.int64)
    g, start = find_block(program, key_offsets_ptr, G, blocks, 2 * BLOCK_KEYS, SEARCH)
    first_key, keys = span(key_offsets_ptr, g, True, E)
    if start >= keys:
        return
    even = start + 2 * tl.arange(0, BLOCK_KEYS)
    real, _, even_keys = load_block(
        directions_ptr, key_rows_ptr, first_key, keys, even, num_keys, D, D, BLOCK_D
    )
    highest = tl.full([BLOCK_KEYS], float("-inf"), tl.float32)
    nan = tl.zeros([BLOCK_KEYS], tl.float32)
    for at in range(1, keys, 2 * BLOCK_KEYS):
        odd = at + 2 * tl.arange(0, BLOCK_KEYS)
        real_odd, _, odd_keys = load_block(
            directions_ptr, key_rows_ptr, first_key, keys, odd, num_keys, D, D, BLOCK_D
        )
        cosines = tl.dot(even_keys, tl.trans(odd_keys), input_precision="tf32x3")
        nan += tl.sum(cosines - cosines, 1)  # NaN if a cosine is NaN or infinite
        cosines = tl.where(real_odd[None, :], cosines, float("-inf"))
        highest = tl.maximum(highest, tl.max(cosines, 1))
    tl.store(scores_ptr + first_key + even, -(highest + nan), mask=real)
    infinity = tl.full([BLOCK_KEYS], float("inf"), tl.float32)
    tl.store(scores_ptr + first_key + even + 1, infinity, mask=even + 1 < keys)


def similarity(call: ScoresCall) -> Tensor:
    directions, scores = call.empty(call.num_keys, call.D), call.empty(call.E)
    if call.num_keys:
        directions_kernel[(triton.cdiv(call.num_keys, 32),)](
            call.k,
            directions,
            *call.strides[-2:],
            call.H,
            call.num_keys,
            **call.head,
            BLOCK_KEYS=32,
            **call.options,
        )
    side = 32 if call.D <= 64 else 16  # a larger block spills registers
    programs, blocks, search = call.blocks(1, 2 * side, 1)
    if programs:
        similarity_kernel[(programs,)](
            directions,
            *call.key_index,
            scores,
            call.G,
            call.E,
            call.num_keys,
            blocks,
            **call.head,
            BLOCK_KEYS=side,
            SEARCH=search,
            **call.options,
        )
    return scores
