"""space_time_attention in Triton: three size classes, forward and backward, without atomics.

triton_packed.py: groups of at most 16 queries and keys, several in a program.
triton_whole.py: groups of at most 128 keys, all of them in one block.
triton_blocked.py: longer groups, in blocks of queries and blocks of keys.
triton_table.py: the gradient of the table of relative positions, for groups of any length.

A key of several groups gets a gradient from every entry; kernels/groups/triton_entries.py adds them
in order. kernels/groups/ also has what this op shares with token_scores.

A table of relative positions is read once more for each pair of a query and a key, 4 bytes from the
cache, at a row that the codes of both give. Hidden keys are not read.

Queries with limits see the first keys of their group. Blocked kernels end with the last key that a
query of their block sees, and leave out the queries before the first and after the last that see a
key of their block.

Heads of 80 and 96 channels are padded to 128. Two blocks (64 + 16, 64 + 32) would need 37% and 25%
fewer tensor core instructions, but two sets of addresses, which do not fit the registers of sm_80
in the backward kernels.
"""

import itertools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from vidl.kernels.groups import NO_BIAS, Bias, split
from vidl.kernels.groups.triton_entries import sum_entries
from vidl.kernels.triton_launch import on_device

from . import triton_blocked, triton_packed, triton_table, triton_whole
from .triton_call import AttentionCall, Tile
from .triton_packed import PACK, SLOT

# Entries of a shared row that are added at a time.
ENTRIES_PER_STEP = 8


def space_time_attention(
    q: Tensor,  # [num_queries, H, D]
    k: Tensor,  # [num_keys, H, D]
    v: Tensor,  # [num_keys, H, D]
    *rest: Any,  # the groups as in groups/triton_call.py, the bias, scale, scores
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the log-sum-exp [H, num_queries], and the scores [E] or [0]."""
    groups, bias, (scale, scores) = split(rest)
    call = AttentionCall(q, k, v, groups, bias, scale, scores)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(call.H, call.num_queries, dtype=torch.float32)
    head_scores = q.new_empty(call.H, call.E, dtype=torch.float32) if scores else None
    tile = forward_tile(*call.longest, call.D, q.dtype, call.biased or call.limited)
    forward = {
        "packed": triton_packed.forward,
        "whole": triton_whole.forward,
        "blocked": triton_blocked.forward,
    }[tile.kind]
    with on_device(q):
        forward(call, tile, out, lse, head_scores)
    return out, lse, lse.new_empty(0) if head_scores is None else head_scores.mean(0)


def space_time_attention_bwd(
    grad_out: Tensor,  # [num_queries, H, D]
    grad_scores: Tensor | None,  # [E]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,  # as forward, but whether the bias needs a gradient before the scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; and that of the table [H, rows], or [0]."""
    groups, bias, (need_bias, scale, scores) = split(rest)
    if grad_scores is None or not scores:
        grad_scores, scores = None, ""
    else:
        grad_scores = grad_scores.contiguous()
    grad_out = grad_out.contiguous()
    call = AttentionCall(q, k, v, groups, bias, scale, scores)
    if need_bias and call.bias.table is None:
        raise RuntimeError("space_time_attention_bwd: need a bias for its gradient")
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = call.grad_of_keys(k), call.grad_of_keys(v)
    entry_k, entry_v = grad_k, grad_v
    if call.shared:
        entry_k, entry_v = (
            k.new_empty(call.E, call.H, call.D, dtype=torch.float32) for _ in range(2)
        )
    query_tile, key_tile = backward_tiles(
        *(*call.longest, call.D, q.dtype, scores), call.biased, call.limited
    )
    results = (grad_q, entry_k, entry_v)
    delta = inverse = None
    if key_tile.kind == "blocked" or need_bias:
        delta = torch.empty_like(lse)
        inverse = torch.empty_like(lse) if q.dtype == torch.float32 else None
    grad_table = lse.new_empty(0)
    with on_device(q):
        if key_tile.kind == "packed":
            triton_packed.backward(call, key_tile, grad_out, grad_scores, lse, delta, *results)
        elif key_tile.kind == "whole":
            triton_whole.backward(
                call, key_tile, grad_out, grad_scores, lse, delta, inverse, *results
            )
        else:
            assert delta is not None
            triton_blocked.backward(
                *(call, query_tile, key_tile, grad_out, grad_scores, out, lse, delta, inverse),
                *results,
            )
        if need_bias:
            assert delta is not None
            tile = table_tile(call.longest[1], call.D, q.dtype)
            grad_table = triton_table.backward(
                call, tile, grad_out, grad_scores, lse, delta, inverse
            )
        if call.shared:
            sum_entries(call, (entry_k, entry_v), (grad_k, grad_v), ENTRIES_PER_STEP)
    return grad_q, grad_k, grad_v, grad_table


def forward_tile(
    max_queries: int, max_keys: int, D: int, dtype: torch.dtype, selective: bool = False
) -> Tile:
    """The size class and the tile of a forward pass.

    Args:
        selective: whether there is a bias, or queries have limits.
    """
    if dtype == torch.float32:
        tile = _float32_tile(max_keys, D, selective)
        # Left to itself, the compiler spills on sm_89 in order not to use more than 72 registers.
        if selective and tile.keys == SLOT:
            return replace(tile, registers=128 if D <= 64 else 255)
        return tile
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D)
    queries = 16 if max_queries <= 16 else 64
    if max_keys <= 128:  # 256 keys would leave one program a multiprocessor, or spill on sm_80
        keys = _power_of_2(max_keys)
        if selective and keys > 64:
            queries = min(queries, 32)
        few = (keys < 64 and D <= 64) if selective else (keys <= 64 or D <= 64)
        # Left to itself, the compiler spills on sm_90 in order not to use more than 128 registers.
        registers = 255 if selective and not few else None
        return Tile("whole", queries, keys, warps=4 if few else 8, registers=registers)
    return _blocked_tile(queries, D)


def backward_tiles(
    max_queries: int,
    max_keys: int,
    D: int,
    dtype: torch.dtype,
    scores: str,
    biased: bool = False,
    limited: bool = False,
) -> tuple[Tile, Tile]:
    """The tiles of the kernel for queries, which only blocked groups need, and of that for keys.

    The limits are the registers of sm_80, which hold all keys and values and both of their
    gradients.
    """
    if dtype == torch.float32:
        tile = _float32_tile(max_keys, D, biased or limited)
        return tile, tile
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D), _packed_tile(D)
    keys = _power_of_2(max_keys)
    if biased or limited:
        # Rows of the table and limits take registers: smaller tiles, or more warps.
        few = D <= 32 or (D <= 64 and not scores and not (biased and limited))
        if keys <= 64 or (keys <= 128 and few):
            tile = Tile("whole", 32, keys, warps=4 if keys <= 32 else 8, stages=2)
        else:
            tile = Tile("blocked", 32, keys=64, warps=8, stages=2)
        query_tile = replace(_blocked_tile(32, D), warps=8)
        # Left to itself, the compiler spills on sm_90 in order not to use more than 128 registers.
        return replace(query_tile, registers=168) if limited and D > 64 else query_tile, tile
    if keys <= 32 or (D <= 64 and keys <= 64):
        tile = Tile("whole", 32, keys, warps=4, stages=2)
    elif keys <= 64 or (keys <= 128 and (D <= 32 or (D <= 64 and scores != "mean"))):
        tile = Tile("whole", 32, keys, warps=8, stages=2)
    elif D <= 64:
        tile = Tile("blocked", 32, keys=128, warps=8, stages=2)
    else:
        tile = Tile("blocked", 64, keys=64, warps=8, stages=2)
    return _blocked_tile(64, D), tile


def table_tile(max_keys: int, D: int, dtype: torch.dtype) -> Tile:
    """The tile of the kernel for the gradient of the table.

    More keys are fewer steps, but leave one program a multiprocessor, or spill on sm_89.
    """
    if dtype == torch.float32:
        side = 64 if max_keys > 32 and D <= 64 else 32
        return Tile("blocked", SLOT, side, warps=4)
    keys = min(_power_of_2(max_keys), 64)
    # Left to itself, the compiler spills on sm_80 in order not to use more than 168 registers.
    return Tile("blocked", SLOT, keys, warps=1 if keys == 32 else 4, registers=255)


def _float32_tile(max_keys: int, D: int, selective: bool) -> Tile:
    """Exact matmuls have no tensor cores and are unrolled: larger blocks spill registers.

    Both backward kernels of blocked groups use the same blocks, and so round alike.
    """
    if max_keys <= (64 if D <= 64 else 32):
        keys = max(SLOT, triton.next_power_of_2(max_keys))
        # Left to itself, the compiler spills on sm_80 in order not to use more than 80 registers.
        registers = (168 if selective else 128) if keys == 32 and D <= 64 else None
        return Tile("whole", 16, keys, warps=4 if keys == SLOT else 8, registers=registers)
    side = 32 if D <= 64 else 16
    return Tile("blocked", side, side, warps=8, registers=168 if selective and D <= 32 else None)


def _blocked_tile(queries: int, D: int) -> Tile:
    """The tile of kernels that loop over blocks of keys."""
    # Padded heads: for sm_80 the compiler would rather spill than use more than 128 registers.
    registers = 168 if 64 < D < 128 else None
    return Tile("blocked", queries, 64, warps=4 if D <= 64 else 8, stages=2, registers=registers)


def _packed_tile(D: int) -> Tile:
    """One warp for each pair of a group and a head; two where longer rows need more loads."""
    return Tile("packed", SLOT, SLOT, warps=PACK if D <= 64 else 2 * PACK)


def _power_of_2(keys: int) -> int:
    return max(2 * SLOT, triton.next_power_of_2(keys))


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    # Queries and keys of a group, for every tile. float16 needs no more registers than bfloat16.
    sizes = [(64, 64), (128, 128), (785, 785), (8, 8), (32, 32), (16, 300)]
    for D, size in itertools.product((64, 128), sizes[:5]):
        _launch(D, torch.bfloat16, *size)
    _launch(64, torch.bfloat16, *sizes[5])
    for size, scores in itertools.product(sizes[:4], ("cls", "mean")):
        _launch(64, torch.bfloat16, *size, scores=scores, shared=scores == "mean")
    for size in sizes[:4]:
        _launch(128, torch.bfloat16, *size, scores="mean", shared=True)
    for D, size in itertools.product((32, 80), sizes[1:4]):
        _launch(D, torch.bfloat16, *size, shared=True)
    _launch(64, torch.float16, *sizes[1], shared=True)
    for D, keys in itertools.product((64, 128), (785, 8, 32, 64)):
        _launch(D, torch.float32, 785, keys, scores="mean", shared=True)
    for D, size in itertools.product((64, 32, 128), sizes[:5]):
        _launch(D, torch.bfloat16, *size, biased=True)
    for D, size in itertools.product((64, 128), sizes[:4]):
        _launch(D, torch.bfloat16, *size, scores="mean", shared=True, biased=True, hidden=True)
    _launch(64, torch.bfloat16, *sizes[2], scores="cls", biased=True, hidden=True)
    _launch(64, torch.float16, *sizes[1], biased=True, hidden=True)
    for D, keys in itertools.product((32, 64, 128), (785, 8, 32, 64)):
        _launch(D, torch.float32, 785, keys, biased=True, hidden=D == 64)
    for D, size in itertools.product((64, 32, 128), sizes[:5]):
        _launch(D, torch.bfloat16, *size, limited=True)
    for D, size in itertools.product((64, 128), sizes[:4]):
        _launch(D, torch.bfloat16, *size, scores="mean", shared=True, limited=True)
        _launch(D, torch.bfloat16, *size, biased=True, hidden=D == 64, limited=True)
    _launch(64, torch.bfloat16, *sizes[2], scores="cls", limited=True)
    for D, keys in itertools.product((64, 128), (785, 8, 32, 64)):
        _launch(D, torch.float32, 785, keys, limited=True)
        _launch(D, torch.float32, 785, keys, scores="mean", biased=True, limited=True)


def _launch(
    D: int,
    dtype: torch.dtype,
    max_queries: int,
    max_keys: int,
    scores: str = "",
    shared: bool = False,
    biased: bool = False,
    hidden: bool = False,
    limited: bool = False,
) -> None:
    q, k, v = torch.zeros(2, 3, 2, D, dtype=dtype).unbind(1)
    offsets, rows = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rest: Any = (offsets, offsets, None, None, None, None)
    if shared:
        entry_offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
        rest = (offsets, offsets, rows, rows, entry_offsets, rows)
    bias = Bias(torch.zeros(2, 7), rows, rows, 3, None) if biased else NO_BIAS
    rest += (max_queries, max_keys, rows if limited else None)
    rest += (*bias[:4], torch.zeros(2) if hidden else None)
    out, lse, importance = space_time_attention(q, k, v, *rest, 1.0, scores)
    grad_scores = importance if scores else None
    space_time_attention_bwd(out, grad_scores, q, k, v, out, lse, *rest, biased, 1.0, scores)
