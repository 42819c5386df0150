"""What committed results say, in the few numbers that README, the page and its plots show."""

import dataclasses
import importlib
import statistics
from collections.abc import Iterable, Sequence

from vidl.bench.measure.cases import operations
from vidl.bench.report.records import Record, newest

MODES = {"forward": "forward", "full": "with backward"}


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and everything that was measured on it.

    Attributes:
        name, kind: "AMD EPYC, 2 cores", and "cpu" or "cuda".
        ops: the newest records of ops, of shapes that there still are.
        savings, scaling, quality: those of whole steps.
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
    def every(self) -> list[Record]:
        return [*self.ops, *self.savings, *self.scaling, *self.quality]

    def versions(self, name: str) -> str:
        """The versions of a package with which it was measured."""
        found = {str(r["versions"].get(name)) for r in self.every}
        return " and ".join(sorted(found))


@dataclasses.dataclass(frozen=True)
class Against:
    """The fastest of ours at one shape: what the strongest peer of the same run takes of its time.

    Attributes:
        ratio: above 1 ours is faster; None: no peer could run.
        best: the record of ours.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    threads: int | None
    ratio: float | None
    best: Record


def devices(records: Iterable[Record]) -> list[Device]:
    """The newest records by device, CPUs first; without quick looks and what is no longer there."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in newest(r for r in records if not r.get("quick")).values():
        kind = r.get("device_type") or ("cuda" if r.get("gpu") else "cpu")
        found.setdefault((kind, r["device"]), []).append(r)
    shapes = {op: importlib.import_module(f"vidl.bench.ops.{op}").SHAPES for op in operations()}
    made = []
    for (kind, name), rows in sorted(found.items()):
        parts = {op: [r for r in rows if r["op"] == op] for op in ("savings", "scaling", "quality")}
        ops = [r for r in rows if r["shape"] in shapes.get(r["op"], ())]
        made.append(Device(name, kind, ops, **parts))
    return made


def against(device: Device, most_threads: bool = True) -> list[Against]:
    """Ours against the strongest peers: ops and shapes in the order of their descriptions.

    Args:
        most_threads: of measurements with several numbers of threads only those with the most.
    """
    groups: dict[tuple, list[Record]] = {}
    for r in device.ops:
        if r["kind"] == "ours" and "median_ms" in r:
            key = (r["op"], r["shape"], r["dtype"], r["mode"], r["threads"])
            groups.setdefault(key, []).append(r)
    made = []
    for key, rows in groups.items():
        best = min(rows, key=lambda r: r["median_ms"])
        made.append(Against(*key, best.get("ratio_to_strongest"), best))
    if most_threads:
        most: dict[tuple, int] = {}
        for a in made:
            place = (a.op, a.shape, a.dtype, a.mode)
            most[place] = max(most.get(place, 0), a.threads or 0)
        made = [a for a in made if (a.threads or 0) == most[a.op, a.shape, a.dtype, a.mode]]
    order = {(op, shape): number for number, (op, shape) in enumerate(_places())}
    dtypes, modes = ("float32", "bfloat16", "float16"), list(MODES)
    return sorted(made, key=lambda a: (order[a.op, a.shape], dtypes.index(a.dtype),
                                       modes.index(a.mode), a.threads or 0))  # fmt: skip


def _places() -> list[tuple[str, str]]:
    return [
        (op, shape)
        for op in operations()
        for shape in importlib.import_module(f"vidl.bench.ops.{op}").SHAPES
    ]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of several ratios the median, the lowest and the highest."""

    median: float
    lowest: float
    highest: float
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return f"{times(self.median)}"
        return f"{times(self.median)} ({digits(self.lowest)} to {digits(self.highest)})"


def spread(rows: Sequence[Against]) -> Spread | None:
    """None if nothing was compared."""
    ratios = [a.ratio for a in rows if a.ratio is not None]
    if not ratios:
        return None
    return Spread(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def times(ratio: float) -> str:
    """A ratio for a reader: 0.94 ×, 12.3 ×."""
    return f"{digits(ratio)} ×"


def digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.3g}"
