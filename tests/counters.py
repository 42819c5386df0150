"""What the CUDA kernels ask of the memory and of the tensor cores, counted in the emulator.

A profile build (cuda_on_cpu/profile.h) runs a few blocks of a launch at the sizes of a model. All
numbers are counts of the CUDA C++ source; nothing is timed.
"""

import functools
import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import emulated
import test_nvcc

SECTOR = 32  # bytes of global memory that are read or written together
EMULATED = ("cuda/primitives.h", "cuda/wgmma.h", "cuda_on_cpu", "warpgroups.h")


def in_kernel(where: Sequence[str]) -> tuple[str, ...]:
    """The lines of a place without those of primitives and of the emulator."""
    return tuple(x for x in where if not x.startswith(EMULATED))


@dataclass(frozen=True)
class Place:
    """The accesses of warps at one place of the source.

    A unit is a sector of global memory or a wavefront of shared memory; `ideal` is the number that
    the distinct bytes of every access need at least.
    """

    kind: str  # global or shared, read or write
    where: tuple[str, ...]  # "file:line" from the access outwards, through inlined functions
    requests: int
    lanes: int
    width: int  # bytes of a lane
    units: int
    ideal: int

    @property
    def excess(self) -> float:
        """Units in relation to the ideal."""
        return self.units / self.ideal

    @property
    def line(self) -> str:
        """The innermost "file:line" of a kernel."""
        return next(iter(in_kernel(self.where)), self.where[0])

    @property
    def text(self) -> str:
        """This line of the source."""
        file, _, number = self.line.partition(":")
        lines = (emulated.ROOT / "csrc" / file).read_text().splitlines()
        return lines[int(number) - 1].strip()


@dataclass(frozen=True)
class Launch:
    """The counts of a launch of which `ran` of `blocks` blocks ran."""

    kernel: str
    blocks: int
    ran: int
    threads: int
    shared: int  # bytes, dynamic
    static_shared: int
    places: tuple[Place, ...]
    mma: dict[tuple[str, ...], int]  # m16n8k16 of warps, by place
    wgmma: dict[tuple[str, ...], int]  # instructions of warps, by place
    squares: int  # m16n8k16 that a warp's share of all wgmma is worth
    copying: int  # mma, and squares, while the warp has cp.async copies under way
    fetched: int  # sectors, distinct in every block
    slowest: int  # the most mma and squares of a warp of every block, times the warps of a block
    collectives: dict[str, int]  # of warps, by name
    buffers: dict[str, tuple[int, int, int]]  # bytes, and distinct sectors read and written

    @property
    def scale(self) -> float:
        """From the blocks that ran to all."""
        return self.blocks / self.ran

    @property
    def warps(self) -> int:
        """Of a block."""
        return -(-self.threads // 32)

    def units(self, kind: str) -> float:
        """Sectors ("global") or wavefronts ("shared") of all blocks."""
        return self.scale * sum(p.units for p in self.places if p.kind.startswith(kind))

    def excess(self, kind: str) -> float:
        """The same in relation to the ideal; 1 without such accesses."""
        places = [p for p in self.places if p.kind.startswith(kind)]
        return sum(p.units for p in places) / max(sum(p.ideal for p in places), 1) if places else 1

    @property
    def multiplications(self) -> float:
        return self.scale * self.multiplied

    @property
    def multiplied(self) -> int:
        """mma and squares of the blocks that ran."""
        return sum(self.mma.values()) + self.squares

    @property
    def bytes(self) -> float:
        """Distinct bytes: every sector is read from memory once, and no buffer more than once."""
        return sum(
            min(self.scale * sectors * SECTOR, size)
            for size, *both in self.buffers.values()
            for sectors in both
        )

    @property
    def from_l2(self) -> float:
        """Bytes: a block reads a sector once, and then has it in the L1 cache."""
        return self.scale * self.fetched * SECTOR

    @property
    def barriers(self) -> int:
        """Of warps at barriers of their block, in the blocks that ran."""
        names = ("__syncthreads", "named_barrier")
        return sum(n for name, n in self.collectives.items() if name.startswith(names))

    @property
    def balance(self) -> float:
        """The mma of the busiest warp of a block in relation to the mean; 1 without any."""
        return self.slowest / self.multiplied if self.multiplied else 1.0


@dataclass(frozen=True)
class Accepted:
    """A place whose accesses may take more units than the ideal, and why."""

    text: str  # a part of the line of the source
    kind: str
    most: float
    reason: str


MOST = {"global": 1.1, "shared": 1.05}  # units in relation to the ideal, without an exception
LITTLE = 0.01  # of all units of a launch: fewer too many do not matter
_LSE = "a number of 4 bytes per row: in gathered groups neighbours lie in other sectors"
_CODES = "neighbouring keys read the table in lines of a frame; the L1 cache keeps it"
_PAIRS = "8 bytes of 4 queries, the same for all rows of the warp: counted for both halves of it"
_DIGITS = "digits of keys are random: some of a warp meet in a bank"
_CHANNELS = "16 bytes that all lanes read, once: a quarter of the warp at a time"
_ODD = "samples of an odd number of tokens begin within a sector of 8 numbers"
_TABLE = "neighbouring keys have neighbouring rows, but lines of a frame meet in a bank"
_FOURS = "16 bytes, the same for the eight lanes of a column: four wavefronts fill the registers"
ACCEPTED: tuple[Accepted, ...] = (
    Accepted("softmax.lse[i];", "global write", 8, _LSE),
    Accepted("= row.lse[i];", "global write", 8, _LSE),
    Accepted("b.lse[group.h", "global read", 8, _LSE),
    Accepted("cp_async_4(&lse[parity][i]", "global read", 4, _LSE),
    Accepted("cp_async_4(&delta[parity][i]", "global read", 4, _LSE),
    Accepted(": within(rows[first + i], total", "global read", 1.5, _LSE),
    Accepted("(grad_out + lane / 2 * kStride<D>", "shared read", 2, "two lanes share a row; once"),
    Accepted("known = group.known[column];", "shared read", 2, _PAIRS),
    Accepted("known[j] = *reinterpret_cast<const float4*>(stage", "shared read", 4, _FOURS),
    Accepted("place = group.places[column];", "shared read", 2, _PAIRS),
    Accepted(
        "(to + d + column_of_lane(i / 2)) = packed[i];",
        "global write",
        2,
        "the gradients of queries leave from the registers of mma: half sectors",
    ),
    Accepted(
        "cp_async_16(to, static_cast<const Pixel*>(clip.data) + from);",
        "global read",
        2,
        "16 bytes of a line of a patch, in a planar clip of bytes: half sectors",
    ),
    Accepted("numbers = *reinterpret_cast<", "global read", 3.5, "patches of 14 bytes a line"),
    Accepted("later == 0 ? heads[id]", "shared read", 3.5, "patches in the order of the ids"),
    Accepted("heads[id] = static_cast", "shared write", 3.5, "patches in the order of the ids"),
    Accepted("inverse.next[own] >", "global read", 7, "one number of a row in each sample"),
    Accepted("*>(row + c * pixels + p) = result;", "global write", 1.6, "patches of 196 numbers"),
    Accepted("weight[n * weights.token]", "global read", 3.5, "weights of every 32nd token; in L1"),
    Accepted("atomicAdd(&bins[key >> shift", "shared write", 1.6, _DIGITS),
    Accepted("channel[j] = channels[c + j];", "shared read", 4, _CHANNELS),
    Accepted("return to_float(pixels[task", "shared read", 3, "one pixel of a channel, once"),
    Accepted("to[j] = x;", "global write", 1.4, _ODD),
    Accepted("weights[j] * (grads[j] - delta)", "global read", 1.4, _ODD),
    Accepted("f.by_head[h * s.groups.E + keys.first + j]", "global read", 1.25, _ODD),
    Accepted("f.norms[keys.row(j)]", "global read", 1.25, _ODD),
    Accepted("b.weights[h * s.groups.E + keys.first + j]", "global read", 1.25, _ODD),
    Accepted("b.norms[keys.row(j)];", "global read", 1.25, _ODD),
    Accepted("fabsf(grads[keys.first + j])", "global read", 1.25, _ODD),
    Accepted("cp_async_4(numbers + (2 * n + parity)", "global read", 1.25, _ODD),
    Accepted("[unit * 8 + i] = grad_q[i];", "shared write", 2, "once for a block"),
    Accepted("grad_q[i] += sums[w][unit * 8 + i];", "shared read", 2, "once for a block"),
    Accepted("mine[e] = sum[e];", "shared write", 2, "once for a block"),
    Accepted("__ldg(rows + within(wrapping_sum(code", "global read", 4, _CODES),
    Accepted("__ldg(table.rows + within(row", "global read", 4, _CODES),
    Accepted("codes = *reinterpret_cast<const int2*>", "shared read", 2, _PAIRS),
    Accepted("cp_async_4(&to.lse[slot % 2][i]", "global read", 4, _LSE),
    Accepted("cp_async_4(&to.delta[slot % 2][i]", "global read", 4, _LSE),
    Accepted("cp_async_4(&to.query_codes[slot][i]", "global read", 4, _LSE),
    Accepted("cp_async_4(&to.key_codes[slot][i]", "global read", 4, _LSE),
    Accepted("table[row[n]] += own[n];", "shared read", 2.6, _TABLE),
    Accepted("table[row[n]] += own[n];", "shared write", 2.6, _TABLE),
    Accepted("+= by_part[part * numbers", "global read", 1.2, "tables of any number of rows"),
)


def excesses(launch: Launch) -> list[str]:
    """The places that take more units than they may."""
    complaints = []
    for place in launch.places:
        most = MOST[place.kind.split()[0]]
        for accepted in ACCEPTED:
            if accepted.kind == place.kind and accepted.text in place.text:
                most = accepted.most
        space = place.kind.split()[0]
        total = sum(p.units for p in launch.places if p.kind.startswith(space))
        if place.excess > most and place.units - place.ideal > LITTLE * total:
            complaints.append(
                f"{launch.kernel}: {place.kind} at {place.line} takes {place.excess:.2f} times the "
                f"ideal, at most {most}: {place.text}"
            )
    return complaints


def count(op: str, kind: str = "Plain", *, blocks: int, **sizes: int) -> list[Launch]:
    """The launches of cuda_on_cpu/profile_<op>.cpp, of which about `blocks` blocks run.

    Later calls read the counts from build/emulated/, as long as no source changes.
    """
    program = emulated.profiler(op, kind)
    command = [str(program), *(f"{name}={size}" for name, size in sizes.items())]
    options = {"CUDA_ON_CPU_SEED": "0", "CUDA_ON_CPU_BLOCKS": str(blocks)}
    options["CUDA_ON_CPU_MULTIPROCESSORS"] = "132"  # of an H200
    key = hashlib.sha256(repr([command[1:], options]).encode()).hexdigest()[:16]
    file = program.with_name(f"{program.name}-{key}.json")
    if not file.exists():
        run = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        unfinished = file.with_name(f"{os.getpid()}-{file.name}")
        unfinished.write_text(run.stdout)
        unfinished.replace(file)
    return [_launch(program, json.loads(line)) for line in file.read_text().splitlines()]


def _launch(program: Path, given: dict) -> Launch:
    addresses = {place[1] for place in given["places"]}
    addresses |= {site for kind in ("mma", "wgmma") for site, _ in given[kind]}
    where = _lines(program, sorted(addresses))
    places: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for kind, address, requests, lanes, width, units, ideal in given["places"]:
        sums = places.setdefault((kind, where[address]), [0, 0, 0, 0, 0])
        for i, n in enumerate((requests, lanes, units, ideal)):
            sums[i] += n
        sums[4] = max(sums[4], width)
    products: dict[str, Counter[tuple[str, ...]]] = {"mma": Counter(), "wgmma": Counter()}
    for kind, counts in products.items():
        for address, n in given[kind]:
            counts[where[address]] += n
    return Launch(
        kernel=_symbols(program)[given["kernel"]],
        places=tuple(
            Place(kind, lines, requests, lanes, width, units, ideal)
            for (kind, lines), (requests, lanes, units, ideal, width) in places.items()
        ),
        **{kind: dict(counts) for kind, counts in products.items()},
        buffers={name: (size, read, written) for name, size, read, written in given["buffers"]},
        **{
            name: given[name]
            for name in (
                *("blocks", "ran", "threads", "shared", "static_shared"),
                *("squares", "copying", "fetched", "slowest", "collectives"),
            )
        },
    )


def _lines(program: Path, addresses: list[int]) -> dict[int, tuple[str, ...]]:
    """The lines of addresses in the program, from the innermost inlined function outwards."""
    command = ["addr2line", "-a", "-i", "-e", str(program), *map(hex, addresses)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines: dict[int, list[str]] = {}
    address = 0
    for text in listing.splitlines():
        if text.startswith("0x"):
            address = int(text, 16)
            lines[address] = []
        else:
            lines[address].append(short(text.split(" (")[0]))
    return {address: tuple(x) for address, x in lines.items()}


def short(line: str) -> str:
    """A "file:line" from csrc/ on; of other files the name alone."""
    _, folder, rest = line.rpartition("/csrc/")
    return rest if folder else line.rpartition("/")[2]


@functools.cache
def _symbols(program: Path) -> dict[int, str]:
    listing = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    words = [line.split() for line in listing.splitlines()]
    return {int(x[0], 16): test_nvcc.demangled(x[2]) for x in words if _is_kernel(x)}


def _is_kernel(words: list[str]) -> bool:
    return len(words) == 3 and words[1] in "tTwW" and "_kernel" in words[2]
