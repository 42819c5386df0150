"""What the launches of space_time_attention's Triton kernels have in common, on the host."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# debug keeps the assertions about indices; it would also check every addition for overflow.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}


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
        self.inputs = [x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)]
        # A stride that means nothing is 0 here, which leaves the addresses aligned.
        self.strides = [x.stride(d) if x.shape[d] > 1 else 0 for x in self.inputs for d in (0, 1)]
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
        count = max(1, triton.cdiv(self.most[of], size))
        total = (self.Q, self.E)[of] // size + self.G  # of find_work(), with SEARCH
        search = self.G * count > 2 * total
        return self.H * (total if search else self.G * count), count, search

    def device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be that of the tensors."""
        q = self.inputs[0]
        return torch.cuda.device(q.device) if q.is_cuda else nullcontext()

    def check(self) -> None:
        """What the kernels assert on CUDA: Triton's interpreter leaves assertions out."""
        query_offsets, key_offsets, query_rows, key_rows = self.index
        for offsets, rows, members, count, most in (
            (query_offsets, query_rows, self.Q, self.Q, self.most[0]),
            (key_offsets, key_rows, self.E, self.K, self.most[1]),
            (self.entry_offsets, self.entries, self.E, self.E, self.E),
        ):
            if offsets is None:
                continue
            steps = offsets.tolist()
            if steps[0] != 0 or steps[-1] != members or steps != sorted(steps):
                raise RuntimeError(
                    f"space_time_attention: offsets must ascend from 0 to {members}, got {steps}"
                )
            longest = int(offsets.diff().max()) if len(steps) > 1 else 0
            if longest > most:
                raise RuntimeError(
                    f"space_time_attention: need groups of at most {most} rows, got {longest}"
                )
            if rows is not None and not ((rows >= 0) & (rows < count)).all():
                raise RuntimeError(f"space_time_attention: rows must lie in [0, {count})")
