"""What all launches of token_scores' Triton kernels share, on the host."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vidl.kernels.groups import Bias
from vidl.kernels.groups.triton_call import Call
from vidl.kernels.triton_launch import OPTIONS, strides_of

# Numbers of k that a program of "cls" holds at a time.
TILE = 8192


class ScoresCall(Call):
    """One call of token_scores, forward or backward."""

    def __init__(self, q: Tensor | None, k: Tensor, groups: Sequence[Any], bias: Bias) -> None:
        super().__init__("token_scores", q, k, groups, bias)
        self.members = self.index[:4]  # the lists of the groups
        self.key_index = self.members[1::2]
        self.strides = [stride for x in (self.q, self.k) for stride in strides_of(x)[:2]]
        self.head = {"D": self.D, "BLOCK_D": max(16, triton.next_power_of_2(self.D))}
        # The keys of a program of "cls"; the side of the blocks of "mean", limited by registers.
        self.keys = {"BLOCK_KEYS": max(16, TILE // self.head["BLOCK_D"])}
        self.side = 16 if k.dtype == torch.float32 else 64 if self.D <= 64 else 32
        self.tile = {"BLOCK_QUERIES": self.side, "BLOCK_KEYS": self.side}
        self.options: dict[str, Any] = {"num_warps": 4 if self.D <= 64 else 8, **OPTIONS}
        spills = self.D <= 64 if k.dtype == torch.float32 else self.D > 64
        if (self.biased or self.limited) and spills:
            # Left to itself, the compiler spills: on sm_90 in order not to use more than 128
            # registers, on sm_89 in float32 in order not to use more than 56.
            self.options["maxnreg"] = 168

    def empty(self, *shape: int) -> Tensor:
        return self.k.new_empty(*shape, dtype=torch.float32)
