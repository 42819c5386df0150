"""The gradient of a table of relative positions in Triton: sums of gradients of logits, by row.

A kernel of each op divides the work, alike on every device, into at most MOST_PARTS parts. A
program adds up one head of one part in a table of its own in global memory; a second kernel adds
the tables in order. There are no atomics: the queries of a tile are added one after the other, and
the keys of one query have different rows of the table, but for two kinds.

- Rows at the ends of the table, where the codes of global tokens are limited, are masked sums.
- Keys with equal codes are numbered, and added one number after the other. Keys at different places
  all have number 0.

The limit is the latency of the cache: 8 bytes read and written a pair of a query and a key, in as
many steps as there are pairs of a query and a block of keys, which depend on each other.
"""

import triton
import triton.language as tl
from torch import Tensor

from vidl.kernels.triton_launch import OPTIONS
from vidl.kernels.triton_sums import add_compensated

# Tables that are added up, at most.
MOST_PARTS = 64
# Numbers of a program that adds them.
SUMS = 256


@triton.jit
def rank_of(key_code, real, BLOCK_KEYS: tl.constexpr):
    """How many keys before each have the same code, and the greatest such number."""
    j = tl.arange(0, BLOCK_KEYS)
    code = tl.where(real, key_code, 0)
    same = (code[:, None] == code[None, :]) & (j[:, None] < j[None, :])
    rank = tl.where(real, tl.sum((same & real[:, None]).to(tl.int32), 0), 0)
    return rank, tl.max(rank, 0)


@triton.jit
def add_query(grad_logits, row, now, last, sums_ptr):
    """Add the gradients of the logits of one query, [keys], to the inner rows of the table.

    Args:
        row: of the table, [keys].
        now: the keys to add, [keys]: their rows differ.
        sums_ptr: the table of this program, [last + 1].
    """
    mask = now & (row > 0) & (row < last)
    total = tl.load(sums_ptr + row, mask=mask, other=0.0) + grad_logits
    tl.store(sums_ptr + row, total, mask=mask)
    tl.debug_barrier()  # the next query may have the same rows


@triton.jit
def add_queries(grad_logits, row, now, last, sums_ptr):
    """The same for a tile, [keys, queries], one query after the other.

    It is split into halves until a query is a vector: the numbers stay in the registers of their
    thread. Masks that select a query would execute all loads and stores of the tile for each.
    """
    KEYS: tl.constexpr = grad_logits.shape[0]
    HALF: tl.constexpr = grad_logits.shape[1] // 2
    even, odd = tl.split(tl.reshape(grad_logits, [KEYS, HALF, 2]))
    even_row, odd_row = tl.split(tl.reshape(row, [KEYS, HALF, 2]))
    if HALF > 1:
        add_queries(even, even_row, now, last, sums_ptr)
        add_queries(odd, odd_row, now, last, sums_ptr)
    else:
        even, even_row = tl.reshape(even, [KEYS]), tl.reshape(even_row, [KEYS])
        odd, odd_row = tl.reshape(odd, [KEYS]), tl.reshape(odd_row, [KEYS])
        add_query(even, even_row, now, last, sums_ptr)
        add_query(odd, odd_row, now, last, sums_ptr)


@triton.jit(do_not_specialize=["parts", "count"])
def table_sum_kernel(
    sums_ptr,  # [parts, count]
    grad_ptr,  # [count]
    parts,
    count,
    BLOCK: tl.constexpr,
):
    """The sum of all parts, in order; bound by memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        x = tl.load(sums_ptr + at, mask=at < count, other=0.0)
        total, lost = add_compensated(x, total, lost)
        sums_ptr += count
    tl.store(grad_ptr + at, total, mask=at < count)


def sum_of_tables(sums: Tensor) -> Tensor:
    """[parts, H, rows] to their sum in order, [H, rows]."""
    grad = sums.new_empty(sums.shape[1:])
    table_sum_kernel[(triton.cdiv(grad.numel(), SUMS),)](
        sums, grad, sums.shape[0], grad.numel(), SUMS, **OPTIONS
    )
    return grad
