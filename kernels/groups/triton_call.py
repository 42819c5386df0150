"""What all launches of Triton kernels on groups share, on the host."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor


class Call:
    """One call of an op on groups: the arguments that its kernels share.

    Args:
        op: its name, for errors.
        q: [num_queries, H, D], or None if the op reads no queries.
        k: [num_keys, H, D].
        groups: query_offsets [G + 1], key_offsets [G + 1], query_rows [num_queries] or None,
            key_rows [E] or None, entry_offsets [num_keys + 1] or None, entries [E] or None,
            max_queries, max_keys, query_limits, which must be None: the order of the schemas.
    """

    def __init__(self, op: str, q: Tensor | None, k: Tensor, groups: Sequence[Any]) -> None:
        if groups[8] is not None:
            raise RuntimeError(f"{op}: the Triton kernels take no groups with query_limits")
        self.k = readable(k)
        self.q = self.k if q is None else readable(q)
        self.index, self.entries, self.longest = groups[:4], groups[4:6], (groups[6], groups[7])
        query_offsets, key_offsets, query_rows, key_rows = self.index
        self.shared = self.entries[1] is not None
        self.G = key_offsets.shape[0] - 1
        self.num_queries = 0 if q is None else q.shape[0]
        self.num_keys, self.H, self.D = k.shape
        self.E = self.num_keys if key_rows is None else key_rows.shape[0]
        if self.E and not self.num_keys:  # kernels limit rows: there must be one
            raise RuntimeError(f"{op}: need rows of k for {self.E} entries, got none")
        self.sizes = (self.G, self.H, self.num_queries, self.E, self.num_keys)
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
