"""What all launches of Triton kernels on groups share, on the host."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .bias import Bias, is_given


class Call:
    """One call of an op on groups: the arguments that its kernels share.

    Args:
        op: its name, for errors.
        q: [num_queries, H, D], or None if the op reads no queries.
        k: [num_keys, H, D].
        groups: query_offsets [G + 1], key_offsets [G + 1], query_rows [num_queries] or None,
            key_rows [E] or None, entry_offsets [num_keys + 1] or None, entries [E] or None,
            max_queries, max_keys, query_limits [num_queries] or None: the order of the schemas.
        bias: what is added to the logits.
    """

    def __init__(
        self, op: str, q: Tensor | None, k: Tensor, groups: Sequence[Any], bias: Bias
    ) -> None:
        self.k = readable(k)
        self.q = self.k if q is None else readable(q)
        query_offsets, key_offsets, query_rows, key_rows = groups[:4]
        self.entries, self.longest, limits = groups[4:6], (groups[6], groups[7]), groups[8]
        self.limited, self.bias, self.biased = limits is not None, bias, is_given(bias)
        self.index = (*groups[:4], limits, bias.table, *bias[1:3], bias.key_bias)
        self.shared = self.entries[1] is not None
        self.G = key_offsets.shape[0] - 1
        self.num_queries = 0 if q is None else q.shape[0]
        self.num_keys, self.H, self.D = k.shape
        self.E = self.num_keys if key_rows is None else key_rows.shape[0]
        if self.E and not self.num_keys:  # kernels limit rows: there must be one
            raise RuntimeError(f"{op}: need rows of k for {self.E} entries, got none")
        # Without a table, kernels are compiled without the shift and the last row.
        last = (None, None) if bias.table is None else (bias.shift, bias.table.shape[-1] - 1)
        self.sizes = (self.G, self.H, self.num_queries, self.E, self.num_keys, *last)
        wanted = {
            "entry_offsets": (self.entries[0], self.num_keys + 1),
            "entries": (self.entries[1], self.E),
        }
        if q is not None:
            wanted["query_offsets"] = (query_offsets, self.G + 1)
            wanted["query_rows"] = (query_rows, self.num_queries)
        for name, (members, size) in wanted.items():
            if members is not None and members.shape != (size,):
                raise RuntimeError(f"{op}: need {name} [{size}], got {list(members.shape)}")
        self._check_bias(op)
        for name, x, count, dtype in (
            ("query_limits", None if q is None else limits, self.num_queries, torch.int32),
            ("query_codes", bias.query_codes, self.num_queries, torch.int32),
            ("key_codes", bias.key_codes, self.num_keys, torch.int32),
            ("key_bias", bias.key_bias, self.num_keys, torch.float32),
        ):
            if x is None:
                continue
            if x.shape != (count,) or x.dtype != dtype or not x.is_contiguous():
                raise RuntimeError(
                    f"{op}: need {name} [{count}] in {str(dtype).removeprefix('torch.')}, "
                    f"contiguous, got {list(x.shape)} in {x.dtype}"
                )

    def _check_bias(self, op: str) -> None:
        """The table's shape and dtype; kernels limit the codes."""
        table = self.bias.table
        if table is None:
            return
        rows = table.shape[-1]
        fits = table.dtype == torch.float32 and table.shape == (self.H, rows) and rows > 0
        if not fits or not table.is_contiguous():
            raise RuntimeError(
                f"{op}: need bias [{self.H}, rows] in float32, contiguous, got "
                f"{list(table.shape)} in {table.dtype}"
            )
        if self.bias.query_codes is None or self.bias.key_codes is None:
            raise RuntimeError(f"{op}: need query_codes and key_codes with a bias")
        if not 0 <= self.bias.shift < rows:
            raise RuntimeError(f"{op}: need 0 <= shift < {rows}, got {self.bias.shift}")

    def grad_of_keys(self, x: Tensor) -> Tensor:
        """Memory for the gradient of k or v: zeros where the groups may not list every row."""
        every = self.shared or self.num_keys == self.E
        empty = torch.empty_like if every else torch.zeros_like
        return empty(x, memory_format=torch.contiguous_format)

    def blocks(self, of: int, size: int, heads: int) -> tuple[int, int, bool]:
        """How many programs to launch, the blocks of a group, and whether programs must search.

        Args:
            of: 0 for blocks of queries, 1 for blocks of keys.
            size: members of a block.
            heads: programs of a block.
        """
        blocks = max(1, triton.cdiv(self.longest[of], size))
        total = (self.num_queries, self.E)[of] // size + self.G  # of find_block(), with SEARCH
        search = self.G * blocks > 2 * total
        return heads * (total if search else self.G * blocks), blocks, search


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy whose channels are contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()
