"""What the launches of space_time_attention's Triton kernels have in common, on the host."""

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from vidl.kernels.groups.triton_rows import check_in_interpreter, programs_for, readable, strides_of
from vidl.kernels.triton_launch import OPTIONS


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time, of groups in one of the three size classes."""

    kind: str  # packed, whole or blocked
    M: int  # queries
    N: int  # keys
    warps: int
    stages: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.M, "BLOCK_N": self.N}

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages} | OPTIONS


class Call:
    """The arguments that all kernels of a call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
    ) -> None:
        self.inputs = [readable(x) for x in (q, k, v)]
        self.strides = strides_of(*self.inputs)
        self.index = (query_offsets, key_offsets, query_rows, key_rows)
        self.entry_offsets, self.entries = entry_offsets, entries
        self.most = (max_queries, max_keys)
        self.scale, self.scores = scale, scores
        self.G = query_offsets.shape[0] - 1
        self.Q, self.H, self.D = q.shape
        self.K = k.shape[0]
        self.E = self.K if key_rows is None else key_rows.shape[0]
        self.sizes = (self.G, self.H, self.Q, self.E, self.K)
        self.channels = {"D": self.D, "BLOCK_D": triton.next_power_of_2(self.D)}

    def blocks(self, of: int, size: int) -> tuple[int, int, bool]:
        """Programs, blocks of each group, and whether a program has to search for its group.

        Args:
            of: 0 for blocks of queries, 1 for blocks of keys.
        """
        return programs_for(self.G, (self.Q, self.E)[of], self.most[of], size, self.H)

    def check(self) -> None:
        query_offsets, key_offsets, query_rows, key_rows = self.index
        check_in_interpreter(
            "space_time_attention",
            (
                (query_offsets, query_rows, self.Q, self.Q, self.most[0]),
                (key_offsets, key_rows, self.E, self.K, self.most[1]),
                (self.entry_offsets, self.entries, self.E, self.E, self.E),
            ),
        )
