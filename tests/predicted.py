"""Bounds of the CUDA kernels on an H200, without a GPU: `python tests/predicted.py`.

Prints docs/contributors/predicted.md. The emulator counts accesses, mma and barriers of the CUDA
C++ source (counters.py), nvcc gives registers and instructions (sass.py), and a model with the
rates of the card turns them into times. Needs nvcc, g++ and Triton's nvdisasm, but no GPU: nothing
is timed.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import counters
import emulated
import sass
import test_nvcc
import torch
from occupancy import MULTIPROCESSORS

from vidl.bench.measure.cases import OVERHEAD, Work
from vidl.bench.ops import (
    masked_patch_embed,
    masked_patch_loss,
    relative_positions,
    select_tokens,
    token_scores,
)
from vidl.bench.ops import space_time_attention as attention
from vidl.bench.ops.clips import Clips
from vidl.kernels.select_tokens.op import kept_count

PAGE = emulated.ROOT / "docs/contributors/predicted.md"


@dataclass(frozen=True)
class Card:
    """Rates of a GPU, in bytes, operations or events per second."""

    multiprocessors: int
    clock: float  # Hz
    copy: float  # read plus written, of a large copy
    matmul: float  # FLOPs of a large matmul in bfloat16
    l2: float  # bytes from L2
    mma: float  # the part of the tensor cores' rate that mma.sync reaches
    wgmma: float  # the same for wgmma

    def limit(self, work: Work) -> float:
        return max(work.size / self.copy, work.flops / self.matmul)


# A large matmul uses wgmma: it reaches 83 % of 2048 multiply-adds in a cycle.
H200 = Card(132, 1.755e9, 4.3e12, 790e12, 5120 * 1.755e9, 0.6, 0.83)
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction per cycle
MULTIPROCESSOR = MULTIPROCESSORS["sm_90a"]


@dataclass(frozen=True)
class Run:
    """Launches of kernels: a run of cuda_on_cpu/profile_<op>.cpp."""

    op: str
    blocks: int  # that run in the emulator, about
    sizes: Mapping[str, int]
    kind: str = "Plain"


@dataclass(frozen=True)
class Case:
    """A phase of an op at a shape."""

    shape: str
    phase: str
    work: Work  # the least that any implementation does
    runs: Sequence[Run]
    torch: Work | None = None  # of torch, beside the kernels: a matmul, or zeros


@dataclass(frozen=True)
class Bound:
    """Seconds that a launch needs for each resource alone, and at least in all."""

    memory: float
    shared: float
    mma: float
    issue: float
    best: float  # all of them overlap
    time: float  # they overlap as far as the blocks of a multiprocessor let them
    launch: counters.Launch | None = field(default=None, compare=False)
    kernel: sass.Kernel | None = field(default=None, compare=False)
    resident: int = 0


def tail(launch: counters.Launch, card: Card) -> float:
    """The busiest multiprocessor has up to a block more than the others."""
    most = math.ceil(launch.blocks / card.multiprocessors)
    return most * card.multiprocessors / launch.blocks


def resources(launch: counters.Launch, card: Card = H200) -> tuple[float, float, float]:
    """Seconds of a launch for memory, shared memory and mma."""
    cycles = card.multiprocessors * card.clock
    memory = max(launch.bytes / card.copy, launch.from_l2 / card.l2)
    shared = launch.units("shared") / cycles * tail(launch, card)
    mma = sum(launch.mma.values()) / card.mma + launch.squares / card.wgmma
    mma *= launch.scale / cycles * tail(launch, card)
    return memory, shared, mma


def bound(launch: counters.Launch, kernel: sass.Kernel, card: Card = H200) -> Bound:
    """The model; the page explains it."""
    memory, shared, mma = resources(launch, card)
    cycles = card.multiprocessors * card.clock
    issue = kernel.issued(launch) / (cycles * SCHEDULERS) * tail(launch, card)
    pipes = (shared, mma, issue)

    resident = MULTIPROCESSOR.resident(
        launch.threads, kernel.registers, kernel.shared + launch.shared
    )
    per_multiprocessor = math.ceil(launch.blocks / card.multiprocessors)
    resident = min(resident, per_multiprocessor)
    warps = resident * launch.warps / SCHEDULERS
    # Shared memory serves all warps; an idle scheduler cannot help the one of the busiest warp.
    uneven = 1 + (launch.balance - 1) / resident
    needs = (shared, mma * uneven, issue * uneven)
    compute = max(needs) + (sum(needs) - max(needs)) / max(warps, 1)
    # Without barriers of the block, every warp waits for its own copies only.
    parts = resident if launch.barriers else resident * launch.warps
    hidden = launch.copying / launch.multiplied if launch.multiplied else 0.0
    time = max(memory, compute) + (1 - hidden) * min(memory, compute) / parts
    return Bound(memory, *pipes, max(memory, *pipes), time, launch, kernel, resident)


@functools.cache
def _kernels(op: str, kind: str) -> dict[str, sass.Kernel]:
    return sass.kernels(op, kind)


@functools.cache
def _launches(op: str, kind: str, blocks: int, sizes: tuple[tuple[str, int], ...]) -> Any:
    return counters.count(op, kind, blocks=blocks, **dict(sizes))


def launches(run: Run) -> list[counters.Launch]:
    return _launches(run.op, run.kind, run.blocks, tuple(sorted(run.sizes.items())))


def bounds(case: Case, card: Card = H200) -> list[Bound]:
    """Those of the launches of a case, and of what torch does beside them."""
    every = [
        bound(launch, _kernels(run.op, run.kind)[launch.kernel], card)
        for run in case.runs
        for launch in launches(run)
    ]
    if case.torch is not None:
        time = card.limit(case.torch)
        every.append(Bound(time, 0.0, 0.0, 0.0, time, time))
    return every


def _windows(grid: Sequence[int], window: Sequence[int]) -> dict[str, int]:
    names = ("T", "Y", "X", "window_t", "window_h", "window_w")
    return dict(zip(names, (*grid, *window), strict=True))


def _attention(
    B: int, grid: tuple[int, ...], window: tuple[int, ...], H: int, scores: bool = False
) -> tuple[Run, Run]:
    rows = math.prod(window)
    G = B * math.prod(grid) // rows
    split = next((i for i, n in enumerate(window) if n > 1), 2)
    sizes = dict(G=G, rows=rows, H=H, gathered=window[split + 1 :] != grid[split + 1 :])
    sizes |= _windows(grid, window)
    sizes |= dict(scores=scores, height=0, width=0, prefix=0, patches=0)
    # Blocks of long groups differ: all those of a head of a group.
    blocks = min(math.ceil(rows / 64), 7) if rows > 256 else 2
    # A block of the backward with wgmma computes its share of all heads.
    blocks_backward = 1 if 128 < rows <= 256 and not scores else blocks
    given = {k: int(v) for k, v in sizes.items()}
    forward = Run("space_time_attention", blocks, given | dict(backward=0))
    return forward, Run("space_time_attention", blocks_backward, given | dict(backward=1))


def attention_cases() -> Iterator[Case]:
    for name, sizes in attention.SHAPES.items():
        if sizes["form"] != "windows" or not name.startswith("A"):
            continue
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = attention.work(**sizes, dtype=torch.bfloat16)
        shape = tuple(sizes[x] for x in ("B", "grid", "window", "H"))
        scored = name.split()[0] in ("A1", "A5", "A6")
        for scores in (False, True) if scored else (False,):
            for phase, run in zip(("forward", "backward"), _attention(*shape, scores), strict=True):
                yield Case(name + ", with scores" * scores, phase, work[phase], [run])


def bias_cases() -> Iterator[Case]:
    for name, sizes in relative_positions.SHAPES.items():
        if not name.startswith(("R1", "R2", "R3", "R4")):
            continue
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = relative_positions.work(**sizes, dtype=torch.bfloat16)
        grid, window, kept = (sizes[x] for x in ("grid", "window", "kept"))
        prefix = int(window is None)
        patches = math.prod(window or grid)
        rows = prefix + (kept or patches)
        _, height, width = window or grid
        shared = dict(
            *[dict(G=sizes["B"] * math.prod(grid) // patches, rows=rows, H=sizes["H"])],
            gathered=int(window is not None),
            **_windows(grid, window or grid),
            **dict(scores=0, height=height, width=width, prefix=prefix, patches=patches),
        )
        for phase in ("forward", "backward"):
            run = shared | dict(backward=int(phase == "backward"))
            blocks = math.ceil(rows / 64) if rows > 256 else 2
            if phase == "backward" and 80 < rows <= 256:
                blocks = 9  # of all tiles of the gradient of the table
            runs = [Run("space_time_attention", blocks, run, "Biased")]
            yield Case(name, phase, work[phase], runs)


def _clips(clips: Clips, kept: int) -> dict[str, int]:
    """The arguments of cuda_on_cpu/profile_clips.h."""
    sizes = dict(B=clips.B, T=clips.T, tubelet=clips.tubelet_size, side=clips.patch_size)
    return sizes | dict(kept=kept)


def embed_cases() -> Iterator[Case]:
    op = "masked_patch_embed"
    dense = masked_patch_embed.sizes(64, 8, T=8) | dict(C=768, kept=None)
    shapes = {
        name: sizes
        for name, sizes in masked_patch_embed.SHAPES.items()
        if name in ("G1 SMAUG ViT-B/16, mask 0.65", "G2 VideoMAE-B, mask 0.9")
        or name.startswith("G4")
    }
    shapes["G3 dense, 8 frames"] = dense
    for name, sizes in sorted(shapes.items()):
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = masked_patch_embed.work(**sizes, dtype=torch.bfloat16)
        clips = Clips(**{x: sizes[x] for x in Clips.__dataclass_fields__})
        kept, C = sizes["kept"] or clips.P, sizes["C"]
        given = _clips(clips, kept) | dict(C=C)
        rows = clips.B * clips.slices * kept
        weight, patches, tokens = C * clips.pixels * 2, rows * clips.pixels * 2, rows * C * 2
        flops = 2 * rows * clips.pixels * C
        steps = {
            "forward": ((0, 1), Work(weight + patches + 2 * tokens, flops)),
            "backward": ((2, 3), Work(weight + patches + tokens, flops)),
        }
        lists = [Run(op, 3, given | dict(kernel=5))] if kept < clips.P else []
        for phase, (wanted, matmul) in steps.items():
            runs = [Run(op, 8 if k < 3 else 3, given | dict(kernel=k)) for k in wanted]
            runs += lists if phase == "backward" else []
            yield Case(name, phase, work[phase], runs, matmul)
        if name.startswith("G1"):
            size = 2 * (patches // 2 + clips.B * clips.T * 3 * clips.image_size**2)
            runs = [Run(op, 64, given | dict(kernel=4)), *lists]
            yield Case(name, "gradient of pixels", Work(size, 0), runs)


def loss_cases() -> Iterator[Case]:
    for name, sizes in masked_patch_loss.SHAPES.items():
        if name == OVERHEAD:
            continue
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = masked_patch_loss.work(**sizes, dtype=torch.bfloat16)
        clips = Clips(**{x: sizes[x] for x in Clips.__dataclass_fields__})
        statistics = {"mae": 1, "videomae": 2}[sizes["target"]]
        given = _clips(clips, sizes["masked"]) | dict(statistics=statistics)
        for phase in ("forward", "backward"):
            run = given | dict(backward=int(phase == "backward"))
            yield Case(f"{name}, loss", phase, work[phase], [Run("masked_patch_loss", 8, run)])


def score_cases() -> Iterator[Case]:
    for name, sizes in token_scores.SHAPES.items():
        if name.startswith(OVERHEAD):
            continue
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = token_scores.work(**sizes, dtype=torch.bfloat16)
        kind = ("cls", "mean", "value").index(sizes["kind"])
        given = {x: sizes[x] for x in ("B", "N", "H")} | dict(score=kind)
        # Blocks of "mean" differ: all those of a head of a sample.
        blocks = math.ceil(sizes["N"] / 64) if kind == 1 else 24
        # Gradients that no kernel writes: of q but for the first query, and of v.
        zeros = (2, 1, 1)[kind] * sizes["B"] * sizes["N"] * sizes["H"] * sizes["D"] * 2
        for phase, torch_work in (("forward", None), ("backward", Work(zeros, 0))):
            run = given | dict(backward=int(phase == "backward"))
            runs = [Run("token_scores", blocks, run)]
            yield Case(f"{name} scores", phase, work[phase], runs, torch_work)


def select_cases() -> Iterator[Case]:
    for name, sizes in select_tokens.SHAPES.items():
        if not name.startswith("P"):
            continue
        sizes = sizes | {"B": sizes["B"]["cuda"]}
        work = select_tokens.work(**sizes, dtype=torch.bfloat16)
        N = sizes["N"] - 1
        given = dict(B=sizes["B"], N=N, K=kept_count(N, sizes["rate"]), C=sizes["C"])
        given |= dict(fuse=int(sizes["fuse"]))
        for phase in ("forward", "backward"):
            run = given | dict(backward=int(phase == "backward"))
            yield Case(name, phase, work[phase], [Run("select_tokens", 64, run)])


def cases() -> Iterator[Case]:
    yield from attention_cases()
    yield from bias_cases()
    yield from embed_cases()
    yield from select_cases()
    yield from loss_cases()
    yield from score_cases()


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 99.5e-6 else f"{seconds * 1e6:.1f}"


BOUNDS = (
    "| shape | phase | limit | memory | shared | mma | issue | perfect overlap | bound | "
    "of the limit |"
)


def rows_of_bounds() -> Iterator[str]:
    for case in cases():
        parts = bounds(case)
        limit = H200.limit(case.work)
        sums = [
            sum(getattr(part, name) for part in parts)
            for name in ("memory", "shared", "mma", "issue", "best", "time")
        ]
        share = f"{limit / sums[-1]:.0%}"
        cells = [case.shape, case.phase, *map(microseconds, (limit, *sums)), share]
        yield f"| {' | '.join(cells)} |"


def committed() -> dict[tuple[str, str], dict[str, float]]:
    """The microseconds of the page, by shape and phase, and by column."""
    names = [cell.strip() for cell in BOUNDS.strip("|").split("|")][2:-1]
    table: dict[tuple[str, str], dict[str, float]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(names) + 3 and re.fullmatch(r"[\d.]+", cells[2]):
            table[cells[0], cells[1]] = dict(zip(names, map(float, cells[2:-1]), strict=True))
    return table


KERNELS = (
    "| kernel | example | registers | blocks a multiprocessor | sectors | wavefronts | L2 reads | "
    "mma | shuffles | barriers | instructions | issued | loads, stores (bytes) | loops with mma | "
    "waits in a copy loop |"
)


def rows_of_kernels() -> Iterator[str]:
    seen = set()
    for case in cases():
        for part in bounds(case):
            launch, kernel = part.launch, part.kernel
            if launch is None or kernel is None:
                continue
            key = (kernel.name, launch.threads, launch.shared)
            if key in seen:
                continue
            seen.add(key)
            warps = launch.ran * launch.warps
            shuffles = sum(n for x, n in launch.collectives.items() if "shfl" in x) / warps
            mma = launch.multiplications / launch.blocks / launch.warps
            issued = kernel.issued(launch) / launch.blocks / launch.warps
            again = launch.from_l2 / launch.bytes if launch.bytes else 1
            widths = ", ".join(
                f"{name} {'/'.join(map(str, sorted(sizes)))}"
                for name in ("LDG", "STG", "LDGSTS", "LDS", "STS")
                if (sizes := kernel.widths(name))
            )
            loops = "/".join(str(b - a + 1) for a, b in kernel.matmul_loops) or "-"
            cells = [f"`{kernel.name.replace('__nv_bfloat16', 'bf16')}`", case.shape]
            cells += [str(kernel.registers), str(part.resident)]
            cells += [f"{launch.excess('global'):.2f}", f"{launch.excess('shared'):.2f}"]
            cells += [f"{again:.1f}", f"{mma:.0f}", f"{shuffles:.0f}"]
            cells += [f"{launch.barriers / warps:.0f}", str(len(kernel.instructions))]
            waits = "{} of {}".format(*kernel.waits()) if kernel.waits()[1] else "-"
            cells += [f"{issued:.0f}", widths, loops, waits]
            yield f"| {' | '.join(cells)} |"


def rows_of_exceptions() -> Iterator[str]:
    for exception in counters.ACCEPTED:
        yield f"| `{exception.text}` | {exception.kind} | {exception.most:g} | {exception.reason} |"


HEAD = """# CUDA kernels: predicted limits

**Bounds, not measured.** No GPU was used. The emulator counts what the kernels ask of the memory
and of the tensor cores, nvcc compiles them for sm_90a, and a model with the rates of an H200 turns
the counts into times. If the rates are right, a kernel is not faster than the longest of memory,
shared and mma; "bound" adds instructions, of which the number is an estimate, and the overlap that
blocks allow. `vidl bench` on a GPU replaces this page. `auto` does not use it.

`python tests/predicted.py > docs/contributors/predicted.md` writes this page
({compiler}).

## The model

Assumed rates: 132 multiprocessors at 1.755 GHz; a copy at 4.3 TB/s; a large matmul at 790 TFLOP/s;
5120 bytes a cycle from L2; for each multiprocessor one wavefront of shared memory and four
instructions in a cycle; mma.sync at 60 % of the rate of the tensor cores, wgmma at 83 %, the rate
of the large matmul. Launches cost nothing.

- **limit**: the least bytes of any implementation at the rate of a copy, or the useful FLOPs at the
  rate of a matmul, whichever takes longer (`work()` of `bench/ops/`).
- **memory**: the distinct 32-byte sectors of every buffer at the rate of a copy, or those of every
  block, summed, at the rate of L2. **shared**: wavefronts, with bank conflicts, and operands that
  wgmma reads. **mma**: m16n8k16, or what a wgmma is worth in them.
- **issue**: instructions. The basic blocks of the machine code are weighted with how often the
  emulator ran their loads, stores and mma; a rough estimate: other ways to weight the blocks
  without any differ by a third.
- The last three are scaled by the tail: the busiest multiprocessor has up to one block more.
- **perfect overlap**: the longest of the four.
- **bound**: mma and issue are multiplied by the share of the busiest warp of a block, less so with
  several blocks. Computing takes the longest of them and of shared, plus the other two divided by
  the warps of a scheduler. Computing and memory overlap except for one of the blocks that run at
  once on a multiprocessor, or one of their warps if the kernel has no barrier: the shorter of the
  two is divided by that number and added to the longer. What is multiplied while copies are under
  way is overlapped and not added.

Counts of attention are those of two blocks, of the blocks of one head of a group, or with wgmma of
a block that computes many heads; those of other kernels, of up to 64 blocks of a launch. All times
are in microseconds, in bfloat16 with a head size of 64. A phase with several kernels is their sum;
embeddings include torch's matmul at its limit, gradients of scores the zeros that torch writes.

## Bounds, not measured

{bounds}

## Counts of the kernels

For each kernel the first shape that launches it. **sectors**, **wavefronts**: in relation to what
the distinct bytes of a request need (1.00: coalesced, without bank conflicts). **L2 reads**: the
distinct bytes of every block, summed, in relation to those of the launch. mma, shuffles, barriers
and issued instructions are those of a warp; **instructions** are those of the machine code. **loops
with mma**: their instructions. **waits in a copy loop**: how often it waits for one of its loads,
as far as the order of instructions tells: 4 of 4 is a chain in which each load waits for the last.

{kernels}

## Accepted exceptions

`tests/test_counters.py` fails for other places with more than 1.1 times the ideal sectors or 1.05
times the ideal wavefronts, and for these above the number given here.

{exceptions}"""


def main() -> None:
    """Print the page."""
    parts = {
        "bounds": [BOUNDS, "|---|---|" + "---:|" * 8, *rows_of_bounds()],
        "kernels": [KERNELS, "|---|---|" + "---:|" * 10 + "---|" * 3, *rows_of_kernels()],
        "exceptions": [
            "| source | access | at most | reason |",
            "|---|---|---:|---|",
            *rows_of_exceptions(),
        ],
    }
    texts = {name: "\n".join(lines) for name, lines in parts.items()}
    print(HEAD.format(compiler=test_nvcc.version(), **texts))


if __name__ == "__main__":
    main()
