"""What all launches of space_time_attention's Triton kernels share, on the host."""

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from vidl.kernels.groups import Arguments, Bias
from vidl.kernels.groups.triton_call import Call, readable
from vidl.kernels.triton_launch import OPTIONS, strides_of


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time, for groups of one of the three size classes."""

    kind: str  # packed, whole or blocked
    queries: int
    keys: int
    warps: int
    stages: int = 1
    registers: int | None = None  # of a thread, at most; None: as the compiler chooses

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_QUERIES": self.queries, "BLOCK_KEYS": self.keys}

    @property
    def options(self) -> dict[str, Any]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit | OPTIONS


class AttentionCall(Call):
    """One call of space_time_attention, forward or backward."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Arguments,
        bias: Bias,
        scale: float,
        scores: str,
    ) -> None:
        super().__init__("space_time_attention", q, k, groups, bias)
        if v.shape != k.shape:
            raise RuntimeError(
                f"space_time_attention: need v as wide as k, {list(k.shape)}, got {list(v.shape)}"
            )
        self.inputs = (self.q, self.k, readable(v))
        self.strides = [stride for x in self.inputs for stride in strides_of(x)[:2]]
        self.scale, self.scores = scale, scores
        self.head = {"D": self.D, "BLOCK_D": triton.next_power_of_2(self.D)}
