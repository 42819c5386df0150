"""Registers, shared memory and occupancy of every CUDA kernel: `python tests/occupancy.py`.

Prints docs/contributors/occupancy.md. ptxas reports registers and static shared memory. The
emulator records the block size and dynamic shared memory of each launch while the ops run on
examples. Occupancy follows from the limits of a multiprocessor. Needs nvcc and g++, but no GPU.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import emulated
import test_nvcc
import torch

from vidl.ops import (
    Groups,
    Positions,
    cls_attention_scores,
    key_similarity_scores,
    masked_patch_embed,
    masked_patch_loss,
    mean_attention_scores,
    select_tokens,
    space_time_attention,
    value_weighted_scores,
)


@dataclass(frozen=True)
class Multiprocessor:
    """Resources of its blocks; allocated in units of 256 registers a warp and 128 bytes a block."""

    shared: int  # bytes; every block takes 1024 more for the system
    blocks: int = 32
    threads: int = 2048
    registers: int = 65536

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """The number of blocks of a kernel that run at once."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // 4 // per_warp * 4 // warps  # in four partitions
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.blocks, self.threads // (warps * 32), by_registers, by_shared)


MULTIPROCESSORS = {"sm_80": Multiprocessor(164 * 1024), "sm_90a": Multiprocessor(228 * 1024)}


def attention(
    size: int, shared: bool = False, causal: bool = False, reach: int = 0, scored: bool = True
) -> None:
    """Forward and backward in groups of `size` rows, of one head of 64.

    Args:
        shared: with a global key.
        causal: a row sees those before it.
        reach: greatest distance of rows in a table of relative positions; 0 for none.
        scored: with scores.
    """
    groups = Groups.equal(2, size)
    groups = groups.with_global() if shared else groups.causal() if causal else groups
    q, k, v = torch.randn(groups.num_keys, 3, 1, 64).bfloat16().requires_grad_().unbind(1)
    bias = positions = None
    if reach:
        positions = Positions.sequence(groups.query_offsets, groups.num_queries, reach)
        bias = torch.zeros(positions.rows, 1, requires_grad=True)
    options = {"bias": bias, "positions": positions, "backend": "emulated"}
    if not scored:
        space_time_attention(q, k, v, groups, **options).float().sum().backward()
        return
    out, scores = space_time_attention(q, k, v, groups, return_scores="mean", **options)
    (out.float().sum() + scores.square().sum()).backward()


def patches(dtype: torch.dtype, side: int = 16) -> None:
    """Forward and backward from a clip, with gradients of the pixels unless they are uint8."""
    size = (1, 3, 2, 2 * side, 2 * side)
    video = torch.zeros(size, dtype=dtype, requires_grad=dtype.is_floating_point)
    weight = torch.randn(64, 3, 1, side, side).bfloat16().requires_grad_()
    position = torch.randn(8, 64).bfloat16().requires_grad_()
    affine = {} if dtype.is_floating_point else {"mean": [0.5] * 3, "std": [0.2] * 3}
    ids_keep = torch.tensor([[0, 3, 6]])
    out = masked_patch_embed(video, weight, None, position, ids_keep, **affine, backend="emulated")
    out.float().sum().backward()


def loss(dtype: torch.dtype, target: str) -> None:
    """Forward and backward of three channels' masked pixels."""
    video = torch.zeros(1, 3, 2, 32, 32, dtype=dtype)
    prediction = torch.randn(1, 3, 768).bfloat16().requires_grad_()
    ids_mask = torch.tensor([[0, 3, 6]])
    masked_patch_loss(
        prediction, video, ids_mask, patch_size=16, target=target, backend="emulated"
    ).backward()


def selection(fuse: str | None) -> None:
    """Forward and backward of 196 tokens of 768 channels, keeping 0.7 of them."""
    x = torch.randn(1, 197, 768).bfloat16().requires_grad_()
    selected = select_tokens(x, torch.rand(1, 196), 0.7, fuse=fuse, prefix=1, backend="emulated")
    selected.tokens.float().sum().backward()


def scores(kind: str, size: int, shared: bool = False, reach: int = 0) -> None:
    """Forward and backward of a kind of scores in groups of `size` rows, of one head of 64.

    Args:
        shared, reach: as for `attention`.
    """
    groups = Groups.equal(2, size)
    groups = groups.with_global() if shared else groups
    q, k, v = torch.randn(groups.num_keys, 3, 1, 64).bfloat16().requires_grad_().unbind(1)
    if kind == "similarity":
        key_similarity_scores(k, groups, backend="emulated")
        return
    bias = positions = None
    if reach:
        positions = Positions.sequence(groups.query_offsets, groups.num_queries, reach)
        bias = torch.zeros(positions.rows, 1, requires_grad=True)
    options = {"bias": bias, "positions": positions, "backend": "emulated"}
    if kind == "value":
        out = value_weighted_scores(q, k, v, groups, **options)
    else:
        score = cls_attention_scores if kind == "cls" else mean_attention_scores
        out = score(q, k, groups, **options)
    out.square().sum().backward()


EXAMPLES: dict[str, Callable[[], None]] = {
    "groups of 8": lambda: attention(8),
    "groups of 50": lambda: attention(50),
    "groups of 69": lambda: attention(69),
    "groups of 128": lambda: attention(128),
    "groups of 197": lambda: attention(197),
    "groups of 197, without scores": lambda: attention(197, scored=False),
    "groups of 256": lambda: attention(256),
    "groups of 273": lambda: attention(273),
    "groups of 69 and a global key": lambda: attention(69, shared=True),
    "causal groups of 8": lambda: attention(8, causal=True),
    "causal groups of 50": lambda: attention(50, causal=True),
    "causal groups of 128": lambda: attention(128, causal=True),
    "causal groups of 197": lambda: attention(197, causal=True),
    "causal groups of 273": lambda: attention(273, causal=True),
    "groups of 8, a table of 31 rows": lambda: attention(8, reach=15),
    "groups of 49, a table of 169 rows": lambda: attention(49, reach=84),
    "groups of 98, a table of 507 rows": lambda: attention(98, reach=253),
    "groups of 197, a table of 731 rows": lambda: attention(197, reach=365),
    "groups of 392, a table of 2535 rows": lambda: attention(392, reach=1267),
    "16 x 16 patches, uint8": lambda: patches(torch.uint8),
    "16 x 16 patches, bfloat16": lambda: patches(torch.bfloat16),
    "128 x 128 patches, bfloat16": lambda: patches(torch.bfloat16, 128),
    "loss of 16 x 16 patches, uint8": lambda: loss(torch.uint8, "mae"),
    "loss of 16 x 16 patches, bfloat16": lambda: loss(torch.bfloat16, "videomae"),
    "138 of 196 tokens": lambda: selection(None),
    "138 of 196 tokens, fused": lambda: selection("sum"),
    "cls in groups of 50": lambda: scores("cls", 50),
    "cls in groups of 273": lambda: scores("cls", 273),
    "cls in groups of 273 and a global key": lambda: scores("cls", 273, shared=True),
    "cls in groups of 273, a table of 545 rows": lambda: scores("cls", 273, reach=272),
    "value in groups of 273": lambda: scores("value", 273),
    "mean in groups of 273": lambda: scores("mean", 273),
    "mean in groups of 273 and a global key": lambda: scores("mean", 273, shared=True),
    "mean in groups of 273, a table of 545 rows": lambda: scores("mean", 273, reach=272),
    "similarity in groups of 273": lambda: scores("similarity", 273),
}


@dataclass(frozen=True)
class Launch:
    kernel: str
    threads: int
    shared: int  # dynamic, bytes


def launches(example: Callable[[], None]) -> list[Launch]:
    """The launches of an example, in order."""
    symbols = {}
    listing = subprocess.run(["nm", emulated.build()], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        if len(words := line.split()) == 3:
            symbols[int(words[0], 16)] = words[2]
    with tempfile.NamedTemporaryFile("r") as notes:
        os.environ["CUDA_ON_CPU_LAUNCHES"] = notes.name
        example()
        del os.environ["CUDA_ON_CPU_LAUNCHES"]
        lines = [line.split() for line in notes]
    return [
        Launch(test_nvcc.demangled(symbols[int(address, 16)]), int(threads), int(shared))
        for address, threads, shared in lines
    ]


def compiled(architecture: str) -> dict[str, test_nvcc.Kernel]:
    """All kernels by name; of attention those with a head size of 64."""
    return {
        kernel.name: kernel
        for source in test_nvcc.SOURCES
        for kernel in test_nvcc.kernels(source, architecture, "-DVIDL_HEAD_SIZES=64")
    }


def rows() -> Iterator[str]:
    """The rows of the table. Fails if no example launches a kernel."""
    kernels = {architecture: compiled(architecture) for architecture in MULTIPROCESSORS}
    seen: set[Launch] = set()
    for name, example in EXAMPLES.items():
        for launch in dict.fromkeys(launches(example)):
            if launch in seen:
                continue
            seen.add(launch)
            cells = [f"`{launch.kernel.replace('__nv_bfloat16', 'bf16')}`", name]
            cells += [str(launch.threads)]
            for architecture, multiprocessor in MULTIPROCESSORS.items():
                kernel = kernels[architecture].get(launch.kernel)
                if kernel is None:
                    cells += ["-"] * 4
                    continue
                shared = kernel.shared + launch.shared
                blocks = multiprocessor.resident(launch.threads, kernel.registers, shared)
                warps = blocks * -(-launch.threads // 32)
                cells += [str(kernel.registers), str(shared), str(blocks), f"{warps / 64:.0%}"]
            yield " | ".join(cells)
    families = {name.split("<")[0] for name in kernels["sm_90a"]}
    missing = families - {launch.kernel.split("<")[0] for launch in seen}
    assert not missing, f"no example launches {sorted(missing)}"


HEAD = """# CUDA kernels: registers, shared memory and occupancy

Compiled, not measured: the registers that ptxas reports, the shared memory of a launch, and the
number of blocks that then run at once on a multiprocessor; occupancy is their warps out of 64. No
kernel spills. Attention is shown for a head size of 64 in bfloat16 with scores unless it says
otherwise, other kernels for one of their dtypes. sm_90a is sm_90 with wgmma, which one kernel uses.

`python tests/occupancy.py > docs/contributors/occupancy.md` writes this page ({compiler}).
"""


def main() -> None:
    """Print the page."""
    emulated.load()
    torch.manual_seed(0)
    columns = ["kernel", "example", "threads"]
    for architecture in MULTIPROCESSORS:
        columns += [f"{architecture}: registers", "bytes shared", "blocks", "occupancy"]
    print(HEAD.format(compiler=test_nvcc.version()))
    print(f"| {' | '.join(columns)} |")
    print("|---|---|" + "---:|" * (len(columns) - 2))
    for row in rows():
        print(f"| {row} |")


if __name__ == "__main__":
    main()
