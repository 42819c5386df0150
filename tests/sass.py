"""The machine code of the CUDA kernels: opcodes, widths, loops, and how often instructions run.

nvcc compiles for sm_90a, and Triton brings nvdisasm. How often a basic block runs follows from the
counts of the emulator (counters.py): an mma, wgmma, ldmatrix or copy of the source that became S
instructions and ran D times ran D / S times in each. Blocks without any take the mean of their
neighbours. It is a rough estimate of the issued instructions, not a count.
"""

import contextlib
import hashlib
import os
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import counters
import emulated
import test_nvcc

ARCHITECTURE = "sm_90a"
SYSTEM_SHARED = 1024  # bytes of a block that cuobjdump counts too
MATMULS = ("HMMA", "HGMMA")  # mma and wgmma
STORES = ("STG", "STS", "LDGSTS")
DIVISION = ("FCHK", "CALL", "I2F", "F2I")
# Of instructions that the compiler neither repeats nor removes; of others.
SURE = (*MATMULS, "LDSM", "LDGSTS", "STG")
OTHERS = ("LDG", "LDS", "STS")


@dataclass(frozen=True)
class Instruction:
    text: str  # with its predicate
    where: tuple[str, ...]  # "file:line" from the innermost inlined function outwards

    @cached_property
    def opcode(self) -> str:
        """With its modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].rstrip(";")

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def target(self) -> str | None:
        """The label of a branch."""
        match = re.search(r"\((\.L_\w+)\)", self.text) if self.name in ("BRA", "BSSY") else None
        return match[1] if match else None

    @property
    def ends_block(self) -> bool:
        return self.name in ("BRA", "EXIT", "RET", "BRX", "CALL")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared: int  # bytes, static
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # to the index of an instruction

    def names(self, start: int = 0, end: int | None = None) -> Counter[str]:
        return Counter(x.name for x in self.instructions[start:end])

    def widths(self, name: str) -> Counter[int]:
        """The number of loads or stores, by their bytes of a lane."""
        sizes = Counter[int]()
        for x in self.instructions:
            if x.name == name:
                bits = next((int(b) for b in re.findall(r"\.U?S?(\d+)", x.opcode)), 32)
                sizes[bits // 8] += 1
        return sizes

    @cached_property
    def end(self) -> int:
        """The last exit that is always taken. Behind it are slow paths, which jump back."""
        exits = [i for i, x in enumerate(self.instructions) if x.text.startswith("EXIT")]
        return max(exits, default=len(self.instructions))

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop: of branches to an earlier label."""
        loops: dict[int, int] = {}
        for i, x in enumerate(self.instructions[: self.end]):
            if x.name == "BRA" and x.target in self.labels and self.labels[x.target] <= i:
                loops[self.labels[x.target]] = i
        return sorted(loops.items())

    @cached_property
    def matmul_loops(self) -> list[tuple[int, int]]:
        return [(a, b) for a, b in self.loops if self.matmuls(a, b + 1)]

    def matmuls(self, start: int, end: int) -> int:
        return sum(self.names(start, end)[name] for name in MATMULS)

    def waits(self) -> tuple[int, int]:
        """The copy loop with the most loads in a chain: how often it waits for one, its loads.

        It waits where an instruction reads the result of a load. Loads before it that nobody read
        yet have arrived then, too: independent loads are waited for once.
        """
        most = (0, 0)
        for a, b in self.loops:
            body = self.instructions[a : b + 1]
            names = self.names(a, b + 1)
            if not names["LDGSTS"] or self.matmuls(a, b + 1):
                continue
            pending: set[str] = set()
            waits = 0
            for x in body:
                operands = x.text.split(None, 2 if x.text.startswith("@") else 1)[-1]
                result, _, sources = operands.partition(",")
                read = set(re.findall(r"\bU?R\d+\b", operands if x.name in STORES else sources))
                if read & pending:
                    waits += 1
                    pending.clear()
                if x.name == "LDG":
                    pending |= set(re.findall(r"\bR\d+\b", result))
            most = max(most, (waits, names["LDG"]))
        return most

    def slow(self) -> float:
        """Instructions of divisions, and calls, for an mma: the most of any innermost loop."""
        most = 0.0
        for a, b in self.matmul_loops:
            if any((a, b) != (c, d) and a <= c and d <= b for c, d in self.matmul_loops):
                continue
            names = self.names(a, b + 1)
            most = max(most, sum(names[x] for x in DIVISION) / self.matmuls(a, b + 1))
        return most

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Begin and end of every basic block."""
        begins = {0, *self.labels.values()}
        begins |= {i + 1 for i, x in enumerate(self.instructions) if x.ends_block}
        ordered = sorted(i for i in begins if i < len(self.instructions))
        yield from zip(ordered, [*ordered[1:], len(self.instructions)], strict=True)

    def issued(self, launch: counters.Launch) -> float:
        """About how many instructions the warps of all blocks of a launch issue."""
        counted = _by_name(launch)
        static: dict[tuple[str, tuple[str, ...]], int] = Counter()
        keys: list[tuple[str, tuple[str, ...]] | None] = []
        for x in self.instructions:
            key = _key(x, counted)
            keys.append(key)
            if key:
                static[key] += 1
        runs: list[float | None] = []
        bounds = list(self.blocks())
        for a, b in bounds:
            rates: dict[bool, list[float]] = {True: [], False: []}
            for key in keys[a:b]:
                if key:
                    rates[key[0] in SURE].append(counted[key[0]][key[1]] / static[key])
            known = rates[True] or rates[False]
            # Accesses that the emulator never saw, and without a condition: the block does not run.
            absent = any(
                x.name in counted and not x.text.startswith("@") for x in self.instructions[a:b]
            )
            runs.append(statistics.median(known) if known else 0.0 if absent else None)
        total = 0.0
        for n, (a, b) in enumerate(bounds):
            rate = runs[n]
            if rate is None:
                rate = 0.0 if a > self.end else self._neighbour(n, bounds, runs)
            total += rate * (b - a)
        return total * launch.scale

    def _neighbour(self, n: int, bounds: list[tuple[int, int]], runs: list[float | None]) -> float:
        """The mean of the next blocks on both sides, in the same innermost loop if it has any."""
        a, b = bounds[n]
        around = [(c, d) for c, d in self.loops if c <= a and b - 1 <= d]
        around.append((0, len(self.instructions)))
        for first, last in sorted(around, key=lambda loop: loop[1] - loop[0]):
            inside = {
                m: rate
                for m, ((c, d), rate) in enumerate(zip(bounds, runs, strict=True))
                if rate is not None and first <= c and d - 1 <= last
            }
            before, after = (m for m in inside if m < n), (m for m in inside if m > n)
            sides = [max(before, default=None), min(after, default=None)]
            if inside:
                return statistics.mean(inside[m] for m in sides if m is not None)
        return 0.0


def _by_name(launch: counters.Launch) -> dict[str, dict[tuple[str, ...], int]]:
    """How often warps ran what becomes an instruction, by its name and place."""
    counted: dict[str, dict[tuple[str, ...], int]] = {name: {} for name in (*SURE, *OTHERS)}
    written = {counters.in_kernel(p.where) for p in launch.places if p.kind == "shared write"}

    def add(name: str, where: tuple[str, ...], n: int) -> None:
        place = counters.in_kernel(where)
        counted[name][place] = counted[name].get(place, 0) + n

    for name, products in zip(MATMULS, (launch.mma, launch.wgmma), strict=True):
        for where, n in products.items():
            add(name, where, n)
    for p in launch.places:
        if p.where in launch.wgmma:  # operands
            continue
        inside = p.where[0].startswith("cuda/primitives.h")
        if p.kind == "shared write":
            add("LDGSTS" if inside else "STS", p.where, p.requests)
        elif p.kind == "shared read":
            add("LDSM" if inside else "LDS", p.where, p.requests)
        elif p.kind == "global write":
            add("STG", p.where, p.requests)
        elif not (inside and counters.in_kernel(p.where) in written):  # else of a copy
            add("LDG", p.where, p.requests)
    return counted


def _key(
    x: Instruction, counted: dict[str, dict[tuple[str, ...], int]]
) -> tuple[str, tuple[str, ...]] | None:
    """What the emulator counted for an instruction. It does not inline lambdas."""
    if x.name not in counted:
        return None
    where = counters.in_kernel(x.where)
    for end in range(len(where), 0, -1):
        for start in range(end):
            if where[start:end] in counted[x.name]:
                return x.name, where[start:end]
    return None


def kernels(op: str, kind: str = "Plain") -> dict[str, Kernel]:
    """The kernels of an op by name: of attention in bfloat16, and with a head size of 64."""
    source = emulated.ROOT / f"csrc/{op}/cuda.cu"
    if op == "space_time_attention":
        source = emulated.unit_of_attention("bf16", 64, kind)
    cubin = _compiled(source, [emulated.ONE_HEAD_SIZE] if op == "token_scores" else [])
    listing = _run("nvdisasm", "-gi", "-c", cubin)
    usage = _run("cuobjdump", "-res-usage", cubin)
    used = {
        symbol: (int(registers), int(shared) - SYSTEM_SHARED)
        for symbol, registers, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", usage
        )
    }
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    result = {}
    for symbol, text in zip(parts[1::2], parts[2::2], strict=True):
        kernel = _parsed(test_nvcc.demangled(symbol), *used[symbol], text)
        result[kernel.name] = kernel
    return result


def _parsed(name: str, registers: int, shared: int, text: str) -> Kernel:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    where: list[str] = []
    fresh = True
    for line in text.splitlines():
        if line.strip().startswith("//##"):
            if fresh:
                where, fresh = [], False
            where += _places(line)
        elif match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            fresh = True
            instructions.append(Instruction(match[1], tuple(dict.fromkeys(where))))
    return Kernel(name, registers, shared, tuple(instructions), labels)


def _places(comment: str) -> list[str]:
    return [
        counters.short(f"{file}:{line}")
        for file, line in re.findall(r'"(.+?)", line (\d+)', comment)
    ]


def _compiled(source: Path, macros: Sequence[str] = ()) -> Path:
    compiler = test_nvcc.nvcc()
    assert compiler is not None
    flags = ["-std=c++17", "-O3", f"-arch={ARCHITECTURE}", "-lineinfo", "-cubin", *macros]
    flags += ["-DVIDL_SM_90A"]
    flags += [f"-I{emulated.ROOT / 'csrc'}", f"-I{emulated.EMULATOR}"]
    contents = [file.read_bytes() for file in sorted(emulated.with_headers(source))]
    key = hashlib.sha256(b"".join([repr([flags, test_nvcc.version()]).encode(), *contents]))
    cubin = emulated.BUILD / f"{source.parent.name}-{source.stem}-{key.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        # Another process may compile it too, with other names of symbols: the first file stays.
        unfinished = cubin.with_name(f"{os.getpid()}-{cubin.name}")
        subprocess.run([compiler, *flags, source, "-o", unfinished], check=True)
        with contextlib.suppress(FileExistsError):
            cubin.hardlink_to(unfinished)
        unfinished.unlink()
    return cubin


def _run(tool: str, *arguments: str | Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    command: Sequence[str | Path] = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
