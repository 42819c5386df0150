"""Registers, shared memory and occupancy of every CUDA kernel: `python tests/occupancy.py`.

Prints docs/occupancy.md. Registers and static shared memory are ptxas's; the size of a block and its
dynamic shared memory are those of the launches that the emulator notes as the ops run on examples;
occupancy follows from the limits of a multiprocessor. Needs nvcc and g++, and no GPU.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import emulated
import test_nvcc
import torch

from vidl.ops import Groups, masked_patch_embed, space_time_attention


@dataclass(frozen=True)
class Multiprocessor:
    """What its blocks share; a warp's registers come in units of 256, a block's bytes of 128."""

    shared: int  # bytes, of which a block takes 1024 for the system
    blocks: int = 32
    threads: int = 2048
    registers: int = 65536

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks of a kernel it has at once."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // 4 // per_warp * 4 // warps  # a quarter has whole warps
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.blocks, self.threads // (warps * 32), by_registers, by_shared)


MULTIPROCESSORS = {"sm_80": Multiprocessor(164 * 1024), "sm_90": Multiprocessor(228 * 1024)}


def attention(size: int, shared: bool = False) -> None:
    """Forward and backward in groups of `size` rows, of heads of 64, with scores."""
    groups = Groups.equal(2, size)
    groups = groups.with_global() if shared else groups
    q, k, v = torch.randn(3, groups.num_keys, 1, 64, dtype=torch.bfloat16).requires_grad_()
    out, scores = space_time_attention(
        q, k, v, groups, return_scores="mean", backend="emulated"
    )
    (out.float().sum() + scores.square().sum()).backward()


def patches() -> None:
    """Forward and backward from a clip of float16, whose pixels have gradients too."""
    video = torch.randn(1, 3, 2, 32, 32, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(64, 3, 1, 16, 16, dtype=torch.float16, requires_grad=True)
    position = torch.randn(8, 64, dtype=torch.float16, requires_grad=True)
    ids_keep = torch.tensor([[0, 3, 6]])
    masked_patch_embed(
        video, weight, ids_keep, position=position, backend="emulated"
    ).float().sum().backward()


EXAMPLES: dict[str, Callable[[], None]] = {
    "groups of 8, D = 64": lambda: attention(8),
    "groups of 50": lambda: attention(50),
    "groups of 69": lambda: attention(69),
    "groups of 128": lambda: attention(128),
    "groups of 197": lambda: attention(197),
    "groups of 273": lambda: attention(273),
    "groups of 69 and a global key": lambda: attention(69, shared=True),
    "patches of 16 x 16": patches,
}
