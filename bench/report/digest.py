"""Digest of committed results: the numbers that README, the page and the plots show."""

import dataclasses
import importlib
import statistics
from collections.abc import Iterable, Sequence

from vidl.bench.measure.cases import operations
from vidl.bench.report.records import Record, newest

MODES = {"forward": "forward", "full": "forward/backward"}
COLUMNS = {
    "pytorch": "eager PyTorch",
    "torch.compile": "torch.compile",
    "vidl": "vidl",
    "vidl, torch.compile": "vidl, torch.compile",
}
OURS = ("vidl", "vidl, torch.compile")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and its newest records.

    Attributes:
        name, kind: such as "AMD EPYC, AVX2, 2 cores" and "cpu", or "cuda".
        ops: records of ops, at shapes that still exist.
        savings, scaling, quality: records of whole steps, of the encoder and of training runs.
    """

    name: str
    kind: str
    ops: list[Record]
    savings: list[Record]
    scaling: list[Record]
    quality: list[Record]

    @property
    def title(self) -> str:
        return f"{'GPU' if self.kind == 'cuda' else 'CPU'}: {self.name}"

    @property
    def dtype(self) -> str:
        """The dtype in which models train on such a device."""
        return "bfloat16" if self.kind == "cuda" else "float32"

    @property
    def records(self) -> list[Record]:
        return [*self.ops, *self.savings, *self.scaling, *self.quality]

    def versions(self, name: str) -> str:
        """The versions of a package in the records."""
        return " and ".join(sorted({str(r["versions"].get(name)) for r in self.records}))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """vidl's fastest backend at one shape against the fastest baseline of the same run.

    Attributes:
        speedup: the time of the baseline divided by that of vidl; None if no baseline can run.
        best: the record of vidl.
        eager_ms, compiled_ms: the times of the fastest baseline in eager PyTorch and with
            torch.compile; None if there is none.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    threads: int | None
    speedup: float | None
    best: Record
    eager_ms: float | None
    compiled_ms: float | None


@dataclasses.dataclass(frozen=True)
class Step:
    """A dense or sparse training step; the cells of one run by column, "vidl" among them."""

    shape: str
    row: str
    cells: dict[str, Record]

    @property
    def best(self) -> Record:
        """The fastest of vidl: eager, or with torch.compile."""
        return min(self._of(ours=True), key=lambda r: r["median_ms"])

    @property
    def speedup(self) -> float | None:
        """vidl over the fastest baseline; None if no baseline was timed."""
        others = [r["median_ms"] for r in self._of(ours=False)]
        return min(others) / self.best["median_ms"] if others else None

    @property
    def clear(self) -> bool:
        """Whether vidl is faster than every baseline beyond noise."""
        others = [r["p20_ms"] for r in self._of(ours=False)]
        return self.best["p80_ms"] < min(others, default=0.0)

    def _of(self, ours: bool) -> list[Record]:
        return [r for column, r in self.cells.items() if (column in OURS) == ours]


def devices(records: Iterable[Record]) -> list[Device]:
    """The devices of some records, CPUs first, without --quick and without shapes that are gone."""
    by_device: dict[tuple[str, str], list[Record]] = {}
    for r in newest(r for r in records if not r.get("quick")).values():
        kind = r.get("device_type") or ("cuda" if r.get("gpu") else "cpu")
        by_device.setdefault((kind, r["device"]), []).append(r)
    shapes = set(_shapes())
    result = []
    for (kind, name), rows in sorted(by_device.items()):
        parts = {op: [r for r in rows if r["op"] == op] for op in ("savings", "scaling", "quality")}
        ops = [r for r in rows if (r["op"], r["shape"]) in shapes]
        result.append(Device(name, kind, ops, **parts))
    return result


def coverage(device: Device) -> int:
    """The number of shapes of operations and of training steps that were measured on a device."""
    return len({(r["op"], r["shape"]) for r in [*device.ops, *device.savings]})


def comparisons(device: Device, most_threads: bool = True) -> list[Comparison]:
    """The comparisons of a device, in the order of the descriptions.

    Args:
        most_threads: keep only those with the most threads of each shape, dtype and mode.
    """
    groups: dict[tuple, list[Record]] = {}
    for r in device.ops:
        if "median_ms" in r:
            place = (r["op"], r["shape"], r["dtype"], r["mode"], r["threads"])
            groups.setdefault(place, []).append(r)
    result = []
    for place, rows in groups.items():
        names = {r["candidate"] for r in rows if r["kind"] == "baseline"}
        if ours := [r for r in rows if r["kind"] == "ours"]:
            best = min(ours, key=lambda r: r["median_ms"])
            times: dict[bool, list[float]] = {False: [], True: []}
            for name in names & set(best.get("ratio_to", ())):
                times[_compiled(name)].append(best["ratio_to"][name] * best["median_ms"])
            fastest = (min(times[kind], default=None) for kind in (False, True))
            result.append(Comparison(*place, best.get("ratio_to_strongest"), best, *fastest))
    if most_threads:
        most: dict[tuple, int] = {}
        for c in result:
            name = (c.op, c.shape, c.dtype, c.mode)
            most[name] = max(most.get(name, 0), c.threads or 0)
        result = [c for c in result if (c.threads or 0) == most[c.op, c.shape, c.dtype, c.mode]]
    order = {place: number for number, place in enumerate(_shapes())}
    dtypes, modes = ("float32", "bfloat16", "float16"), list(MODES)
    return sorted(result, key=lambda c: (order[c.op, c.shape], dtypes.index(c.dtype),
                                         modes.index(c.mode), c.threads or 0))  # fmt: skip


def main_comparisons(device: Device) -> list[Comparison]:
    """Those in the training dtype, forward/backward where the op has a backward."""
    rows = comparisons(device)
    rows = [c for c in rows if c.dtype == device.dtype] or rows
    backward = {c.op for c in rows if c.mode == "full"}
    return [c for c in rows if c.mode == ("full" if c.op in backward else "forward")]


def steps(device: Device) -> list[Step]:
    """The timed training steps, model by model; dense, then sparse."""
    timed = {(r["shape"], r["candidate"]): r for r in device.savings if "median_ms" in r}
    result = []
    for shape in dict.fromkeys(shape for shape, _ in timed):
        for row in ("dense", "sparse"):
            if ours := timed.get((shape, f"{row}, vidl")):
                names = [n for n in ours["ratio_to"] if n.startswith(row) and (shape, n) in timed]
                records = [timed[shape, name] for name in names] + [ours]
                by_column = {r["column"]: r for r in records}
                cells = {column: by_column[column] for column in COLUMNS if column in by_column}
                result.append(Step(shape, row, cells))
    return result


def _compiled(name: str) -> bool:
    return "torch.compile" in name or "FlexAttention" in name


def _shapes() -> list[tuple[str, str]]:
    return [
        (op, shape)
        for op in operations()
        for shape in importlib.import_module(f"vidl.bench.ops.{op}").SHAPES
    ]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several values."""

    median: float
    lowest: float
    highest: float
    count: int

    @property
    def range(self) -> str:
        if self.lowest == self.highest:
            return times(self.median)
        return f"{digits(self.lowest)} to {times(self.highest)}"

    def __str__(self) -> str:
        if self.count == 1:
            return times(self.median)
        return f"{times(self.median)} ({digits(self.lowest)} to {digits(self.highest)})"


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are known; None if there are none."""
    known: Sequence[float] = [x for x in values if x is not None]
    if not known:
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


def times(ratio: float) -> str:
    """A ratio for a reader: 0.94 ×, 12.3 ×."""
    return f"{digits(ratio)} ×"


def digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.3g}"
