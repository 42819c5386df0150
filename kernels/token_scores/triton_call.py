"""What the launches of token_scores' Triton kernels have in common, on the host."""

from typing import Any

import torch
import triton
from torch import Tensor

from vidl.kernels.groups.triton_rows import check_in_interpreter, programs_for, readable
from vidl.kernels.triton_launch import OPTIONS

# Numbers of k that a program of "cls" holds at a time.
TILE = 8192


class Call:
    """What all kernels of a call are given."""

    def __init__(
        self,
        q: Tensor | None,
        k: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        query_rows: Tensor | None,
        key_rows: Tensor | None,
        entry_offsets: Tensor | None,
        entries: Tensor | None,
        max_queries: int,
        max_keys: int,
    ) -> None:
        self.k = readable(k)
        self.q = self.k if q is None else readable(q)
        self.key_index = (key_offsets, key_rows)
        self.index = (query_offsets, key_offsets, query_rows, key_rows)
        self.shared = entries is not None
        self.entries = (entry_offsets, entries)
        self.G = key_offsets.shape[0] - 1
        self.Q = 0 if q is None else q.shape[0]
        self.K, self.H, self.D = k.shape
        self.E = self.K if key_rows is None else key_rows.shape[0]
        self.most = (max_queries, max_keys)
        self.head = {"D": self.D, "BLOCK_D": max(16, triton.next_power_of_2(self.D))}
        # Of "cls": a tile of keys; of products: a side, as large as registers allow.
        self.keys = {"BLOCK_N": max(16, TILE // self.head["BLOCK_D"])}
        self.side = 16 if k.dtype == torch.float32 else 64 if self.D <= 64 else 32
        self.tile = {"BLOCK_M": self.side, "BLOCK_N": self.side}
        self.options: dict[str, Any] = {"num_warps": 4 if self.D <= 64 else 8, **OPTIONS}
        self.sizes = (self.G, self.H, self.Q, self.K, self.E)
        check_in_interpreter(
            "token_scores",
            (
                (None if q is None else query_offsets, query_rows, self.Q, self.Q, max_queries),
                (key_offsets, key_rows, self.E, self.K, max_keys),
                (entry_offsets, entries, self.E, self.E, self.E),
            ),
        )

    def blocks(self, of: int, size: int, heads: int) -> tuple[int, int, bool]:
        """Programs, blocks of each group, and whether a program has to search for its group.

        Args:
            of: 0 for blocks of queries, 1 for blocks of keys.
        """
        return programs_for(self.G, (self.Q, self.E)[of], self.most[of], size, heads)

    def empty(self, *shape: int) -> Tensor:
        return self.k.new_empty(*shape, dtype=torch.float32)
