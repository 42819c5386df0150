"""What all launches of space_time_attention's Triton kernels share, on the host."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vidl.kernels.groups import Arguments, Bias, is_given
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
        super().__init__("space_time_attention", q, k, groups)
        self.bias = bias
        table, query_codes, key_codes, shift, key_bias = self.bias
        self.biased = is_given(self.bias)
        self._check_bias()
        self.index = (*self.index, table, query_codes, key_codes, key_bias)
        # Without a table, kernels are compiled without these numbers.
        last = (None, None) if table is None else (shift, table.shape[1] - 1)
        self.sizes: tuple[Any, ...] = (*self.sizes, *last)
        self.inputs = (self.q, self.k, readable(v))
        self.strides = [stride for x in self.inputs for stride in strides_of(x)[:2]]
        self.scale, self.scores = scale, scores
        self.head = {"D": self.D, "BLOCK_D": triton.next_power_of_2(self.D)}

    def _check_bias(self) -> None:
        """Shapes and dtypes; kernels limit the codes."""
        table, query_codes, key_codes, shift, key_bias = self.bias
        if table is not None:
            rows = table.shape[-1]
            fits = table.dtype == torch.float32 and table.shape == (self.H, rows) and rows > 0
            if not fits or not table.is_contiguous():
                raise RuntimeError(
                    f"space_time_attention: need bias [{self.H}, rows] in float32, contiguous, got "
                    f"{list(table.shape)} in {table.dtype}"
                )
            if query_codes is None or key_codes is None:
                raise RuntimeError(
                    "space_time_attention: need query_codes and key_codes with a bias"
                )
            if not 0 <= shift < rows:
                raise RuntimeError(f"space_time_attention: need 0 <= shift < {rows}, got {shift}")
        for name, x, size, dtype in (
            ("query_codes", query_codes, self.num_queries, torch.int32),
            ("key_codes", key_codes, self.num_keys, torch.int32),
            ("key_bias", key_bias, self.num_keys, torch.float32),
        ):
            if x is None:
                continue
            if x.shape != (size,) or x.dtype != dtype or not x.is_contiguous():
                raise RuntimeError(
                    f"space_time_attention: need {name} [{size}] in "
                    f"{str(dtype).removeprefix('torch.')}, contiguous, got {list(x.shape)} in "
                    f"{x.dtype}"
                )
