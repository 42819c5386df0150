"""space_time_attention in Triton: three size classes, forward and backward, without atomics.

triton_packed.py: groups of at most 16 queries and keys, several in a program.
triton_whole.py: groups of at most 128 keys, all of them in one block.
triton_blocked.py: longer groups, in blocks of queries and blocks of keys.

Keys in several groups get a gradient for every entry; triton_entries.py adds them in order. What
the classes share is in triton_softmax.py and kernels/triton_groups.py; on the host, in
triton_call.py.

Heads of 80 and 96 channels are padded to 128. In two blocks (64 + 16, 64 + 32) they would take 37%
and 25% fewer instructions of the tensor cores, but two sets of addresses, which the registers of
sm_80 cannot hold in the backward kernels.
"""

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from vidl.kernels.triton_launch import on_device

from . import triton_blocked, triton_packed, triton_whole
from .triton_call import Call, Tile
from .triton_entries import sum_entries
from .triton_packed import PACK, SLOT


def space_time_attention(
    q: Tensor,  # [Q, H, D]
    k: Tensor,  # [K, H, D]
    v: Tensor,  # [K, H, D]
    query_offsets: Tensor,  # [G + 1]
    key_offsets: Tensor,  # [G + 1]
    query_rows: Tensor | None,  # [Q]
    key_rows: Tensor | None,  # [E]
    entry_offsets: Tensor | None,  # [K + 1]
    entries: Tensor | None,  # [E]
    max_queries: int,
    max_keys: int,
    scale: float,
    scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [Q, H, D], the log-sum-exp [H, Q], and the scores [E] or [0]."""
    index = (query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries)
    c = Call(q, k, v, *index, max_queries, max_keys, scale, scores)
    c.check()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(c.H, c.Q, dtype=torch.float32)
    head_scores = q.new_empty(c.H, c.E, dtype=torch.float32) if scores else None
    tile = forward_tile(max_queries, max_keys, c.D, q.dtype)
    forward = {
        "packed": triton_packed.forward,
        "whole": triton_whole.forward,
        "blocked": triton_blocked.forward,
    }[tile.kind]
    with on_device(q):
        forward(c, tile, out, lse, head_scores)
    return out, lse, lse.new_empty(0) if head_scores is None else head_scores.mean(0)


def space_time_attention_bwd(
    grad_out: Tensor,  # [Q, H, D]
    grad_scores: Tensor | None,  # [E]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    entry_offsets: Tensor | None,
    entries: Tensor | None,
    max_queries: int,
    max_keys: int,
    scale: float,
    scores: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if grad_scores is None or not scores:
        grad_scores, scores = None, ""
    else:
        grad_scores = grad_scores.contiguous()
    grad_out = grad_out.contiguous()
    index = (query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries)
    c = Call(q, k, v, *index, max_queries, max_keys, scale, scores)
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    entry_k, entry_v = grad_k, grad_v
    if entries is not None:
        entry_k, entry_v = (k.new_empty(c.E, c.H, c.D, dtype=torch.float32) for _ in range(2))
    query_tile, key_tile = backward_tiles(max_queries, max_keys, c.D, q.dtype, scores)
    results = (grad_q, entry_k, entry_v)
    with on_device(q):
        if key_tile.kind == "packed":
            triton_packed.backward(c, key_tile, grad_out, grad_scores, lse, *results)
        elif key_tile.kind == "whole":
            triton_whole.backward(c, key_tile, grad_out, grad_scores, lse, *results)
        else:
            triton_blocked.backward(
                c, query_tile, key_tile, grad_out, grad_scores, out, lse, *results
            )
        if entries is not None:
            sum_entries(c, entry_k, entry_v, grad_k, grad_v)
    return grad_q, grad_k, grad_v


def forward_tile(max_queries: int, max_keys: int, D: int, dtype: torch.dtype) -> Tile:
    """The size class of a forward pass."""
    if dtype == torch.float32:
        return _float32_tile(max_keys, D)
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D)
    M = 16 if max_queries <= 16 else 64
    if max_keys <= 128:  # 256 keys would leave one program a multiprocessor, or spill on sm_80
        N = _power_of_2(max_keys)
        return Tile("whole", M=M, N=N, warps=4 if D <= 64 or N <= 64 else 8)
    return Tile("blocked", M=M, N=64, warps=4 if D <= 64 else 8, stages=2)


def backward_tiles(
    max_queries: int, max_keys: int, D: int, dtype: torch.dtype, scores: str
) -> tuple[Tile, Tile]:
    """The size class of a backward pass: of its kernel for queries, and of that for keys.

    Only blocked groups need the former. The limits are the registers of sm_80, where the warps hold
    all keys and values next to both sums.
    """
    if dtype == torch.float32:
        return _float32_tile(max_keys, D), _float32_tile(max_keys, D)
    if max(max_queries, max_keys) <= SLOT:
        return _packed_tile(D), _packed_tile(D)
    N = _power_of_2(max_keys)
    if N <= 32 or (D <= 64 and N <= 64):
        tile = Tile("whole", M=32, N=N, warps=4, stages=2)
    elif N <= 64 or (N <= 128 and (D <= 32 or (D <= 64 and scores != "mean"))):
        tile = Tile("whole", M=32, N=N, warps=8, stages=2)
    elif D <= 64:
        tile = Tile("blocked", M=32, N=128, warps=8, stages=2)
    else:
        tile = Tile("blocked", M=64, N=64, warps=8, stages=2)
    return Tile("blocked", M=64, N=64, warps=4 if D <= 64 else 8, stages=2), tile


def _float32_tile(max_keys: int, D: int) -> Tile:
    """Exact products have no tensor cores and are unrolled: larger blocks spill registers.

    Blocked groups have the same blocks in both backward kernels, and so the same rounding.
    """
    if max_keys <= (64 if D <= 64 else 32):
        N = max(SLOT, triton.next_power_of_2(max_keys))
        return Tile("whole", M=16, N=N, warps=4 if N == SLOT else 8)
    side = 32 if D <= 64 else 16
    return Tile("blocked", M=side, N=side, warps=8)


def _packed_tile(D: int) -> Tile:
    """A warp has a pair of its own; with longer rows two warps share the loads of one."""
    return Tile("packed", M=SLOT, N=SLOT, warps=PACK if D <= 64 else 2 * PACK)


def _power_of_2(keys: int) -> int:
    return max(2 * SLOT, triton.next_power_of_2(keys))


def ahead_of_time() -> None:
    """Launch every variant of every kernel once (tests/test_triton_aot.py compiles them)."""
    # Queries and keys of a group, for every tile. What bfloat16 needs, float16 needs too.
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


def _launch(
    D: int,
    dtype: torch.dtype,
    max_queries: int,
    max_keys: int,
    scores: str = "",
    shared: bool = False,
) -> None:
    q, k, v = torch.zeros(2, 3, 2, D, dtype=dtype).unbind(1)
    offsets, rows = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rest: Any = (offsets, offsets, None, None, None, None)
    if shared:
        rest = (offsets, offsets, rows, rows, offsets, rows)
    rest += (max_queries, max_keys, 1.0, scores)
    out, lse, importance = space_time_attention(q, k, v, *rest)
    grad_scores = importance if scores else None
    space_time_attention_bwd(out, grad_scores, q, k, v, out, lse, *rest)
