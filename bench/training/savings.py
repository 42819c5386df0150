"""Whole training steps: {dense, sparse} x {PyTorch, vidl} x {eager, torch.compile}.

*Dense* processes all patches and tokens; *sparse* is the recipe with its masks and pruning. Eager
PyTorch is `bench/training/baseline.py`. The table separates token-reduction gains (dense to sparse)
from kernel gains (PyTorch to vidl). Losses and gradients are compared before anything is timed;
a cell that disagrees with the baseline of its row gets no time.
"""

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vidl import models
from vidl.bench.measure import energy, hardware, timing
from vidl.bench.measure.cases import short
from vidl.bench.measure.record import circumstances
from vidl.bench.report.records import Record
from vidl.bench.training import loading
from vidl.bench.training.breakdown import breakdown
from vidl.bench.training.steps import COMPILED, Agreement, Cell, agreement_of, cells, flops, loss_of
from vidl.progress import Bar

# GPU-hours are projected for the schedule of Singularity, on which SMAUG builds; the SMAUG and MAC
# papers do not report theirs. CC3M and WebVid-2M have 5.4 million samples.
EPOCHS, CLIPS = 10, 5_440_000
BATCH = {"cuda": 64, "cpu": 4}
MODE = "step"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The measurement that `vidl savings` runs."""

    name: str
    preset: str
    overrides: dict[str, Any]
    recipe: Any
    batch: int
    steps: int
    device: str
    compiled: bool
    epochs: float
    clips: int
    budget: float | None  # seconds; no further round starts after them

    @property
    def shape(self) -> str:
        changes = "".join(f", {name} {value}" for name, value in self.overrides.items())
        return f"{self.name} {self.preset}, {self.batch} clips{changes}"


def plan(
    name: str,
    preset: str = "base",
    overrides: dict[str, Any] | None = None,
    *,
    batch: int | None = None,
    steps: int = 20,
    device: str | None = None,
    compiled: bool = False,
    epochs: float = EPOCHS,
    clips: int = CLIPS,
    budget: float | None = None,
    need_savings: bool = True,
) -> Plan:
    """Plan a measurement.

    Args:
        need_savings: refuse a recipe that neither masks nor prunes.

    Raises:
        ValueError: the model, preset, field or device does not exist, or a number is out of range.
    """
    recipe: Any = models.recipe(name, preset, **(overrides or {}))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("need a CUDA device for device 'cuda', but torch sees none")
    batch = BATCH[device] if batch is None else batch
    if batch < 2 or steps < 1 or epochs <= 0 or clips < 1:
        raise ValueError(
            f"need batch >= 2, steps >= 1, epochs > 0 and clips >= 1, got {batch}, {steps}, "
            f"{epochs} and {clips}"
        )
    if need_savings and recipe.variants()["dense"] == list(recipe.variants().values())[-1]:
        raise ValueError(f"{name} with these fields neither masks nor prunes: nothing to save")
    return Plan(
        name, preset, overrides or {}, recipe, batch, steps, device, compiled, epochs, clips, budget
    )


def dry_run(plan: Plan) -> Iterator[str]:
    """The lines that `--dry-run` prints."""
    columns = [c for pair in COMPILED.items() for c in pair[: 1 + plan.compiled]]
    yield f"{plan.shape} · {plan.device} · {plan.steps} steps of each, interleaved"
    variants = list(plan.recipe.variants().values())
    for row, variant in (("dense", variants[0]), ("sparse", variants[-1])):
        tokens = ", ".join(f"{name} {n}" for name, n in variant.tokens().items())
        yield from (f"  {row}, {column}: tokens per clip: {tokens}" for column in columns)
    yield "  order: losses and gradients against float64, FLOPs, memory, then times and parts"


@dataclasses.dataclass
class Measured:
    """A cell and its measurements so far."""

    cell: Cell
    status: str = "ok"
    reason: str | None = None
    agreement: Agreement | None = None
    loss: float | None = None
    flops: int | None = None
    memory: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    joules: float | None = None


def run(plan: Plan, write: Callable[[list[Record]], object] = lambda records: None) -> list[Record]:
    """Measure all cells.

    Args:
        write: called with the records once every cell has a first time, and again at the end, so
            that a run that is interrupted leaves results; the newest record of a key counts.

    Returns:
        One record per cell.
    """
    started = time.monotonic()
    bar = Bar(plan.steps + 4)
    bar.begin(1, f"{plan.shape}: building the models")
    measured = [Measured(c) for c in cells(plan.recipe, plan.batch, plan.device, plan.compiled)]
    bar.begin(2, f"{plan.shape}: comparing losses and gradients")
    _compare(measured)
    bar.begin(3, f"{plan.shape}: warming up, measuring memory")
    for m in _fit(measured):
        _attempt(m, _weigh)
    rate = hardware.matmul_rate(plan.device, torch.get_num_threads(), _dtype(measured[0].cell))
    for step in range(plan.steps):
        spent = time.monotonic() - started
        if plan.budget is not None and step >= 3 and spent > plan.budget:
            break
        bar.begin(step + 4, f"{plan.shape}: timing, step {step + 1} of {plan.steps}")
        _time_step(measured, step)
        if step == 0:
            write(records(plan, measured, rate))
    for m in _fit(measured):
        _attempt(m, _look_inside)
    bar.begin(bar.total, f"{plan.shape}: reading clips")
    speed = loading.clips_per_second(plan.recipe, plan.name, plan.preset, plan.batch)
    bar.clear()
    done = [record | {"loading": speed} for record in records(plan, measured, rate)]
    write(done)
    return done


def _fit(measured: Sequence[Measured]) -> list[Measured]:
    return [m for m in measured if m.status == "ok"]


def _attempt(m: Measured, act: Callable[[Measured], None]) -> None:
    """Call `act` with a cell; an error marks that cell as failed and leaves the others."""
    try:
        act(m)
    except RuntimeError as error:  # out of memory, a compiler
        m.status, m.reason = "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        m.cell.optimizer.zero_grad()


def _compare(measured: list[Measured]) -> None:
    for row in ("dense", "sparse"):
        members = [m for m in measured if m.cell.row == row]
        agreement = agreement_of(members[0].cell)

        def compare(m: Measured, agreement: Any = agreement) -> None:
            m.agreement = agreement(m.cell)
            if not m.agreement.ok:
                m.status, m.reason = "wrong", f"errors of {m.agreement}"
            m.loss = loss_of(m.cell)

        for m in members:
            _attempt(m, compare)
            if not m.cell.compiled:  # compiled code is not counted
                _attempt(m, _count)
        check_counts({m.cell.column: m.flops for m in members if m.flops})


def check_counts(flops: dict[str, int]) -> None:
    """Check that PyTorch counted the baseline completely: it computes at least what vidl does.

    Raises:
        RuntimeError: the baseline has fewer FLOPs than vidl.
    """
    if flops.get("pytorch", math.inf) < 0.99 * flops.get("vidl", 0):
        raise RuntimeError(f"need at least as many FLOPs in pytorch as in vidl, got {flops}")


def _count(m: Measured) -> None:
    m.flops = flops(m.cell)


def _weigh(m: Measured) -> None:
    m.cell.step()
    m.cell.step()
    m.memory = peak(m.cell.step, m.cell.device)


def peak(call: Callable[[], object], device: str) -> int | None:
    """Peak memory of a step above weights and optimizer, in bytes; on a CPU, of the process."""
    if device == "cpu":
        return timing.peak_of_process(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _time_step(measured: list[Measured], step: int) -> None:
    """Time a step of each cell, in random order, so that drift of the machine affects all alike."""
    members = _fit(measured)
    for m in random.Random(step).sample(members, len(members)):
        _attempt(m, lambda m: m.times.append(seconds(m.cell.step, m.cell.device)))


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _look_inside(m: Measured) -> None:
    if not m.cell.compiled:  # a compiled model has no modules to mark
        m.parts = breakdown(m.cell)
    m.joules = energy.joules(m.cell.step, m.cell.device)


def _dtype(cell: Cell) -> torch.dtype:
    return cell.dtype or torch.float32


def records(plan: Plan, measured: Sequence[Measured], rate: float) -> list[Record]:
    """One record per cell.

    Args:
        rate: the matmul rate of the device, FLOP/s.
    """
    medians = {
        m.cell.name: statistics.median(m.times) for m in measured if m.times and m.status == "ok"
    }
    useful = {m.cell.row: m.flops for m in measured if m.cell.column == "vidl" and m.flops}
    rows = []
    for m in measured:
        record: Record = {
            "op": "savings",
            "shape": plan.shape,
            "sizes": {"batch": plan.batch, "recipe": plan.name, "preset": plan.preset}
            | {name: str(value) for name, value in plan.overrides.items()},
            "dtype": short(_dtype(m.cell)),
            "mode": MODE,
            **circumstances(plan.device, torch.get_num_threads()),
            "quick": plan.steps < 5,
            "candidate": m.cell.name,
            "kind": m.cell.kind,
            "row": m.cell.row,
            "column": m.cell.column,
            "status": m.status,
            "reason": m.reason,
            "loss": m.loss,
            "tokens": m.cell.model.recipe.tokens(),
            "flops": m.flops,
            "useful_flops": useful.get(m.cell.row),
            "matmul_tflop_per_s": rate / 1e12,
            "peak_bytes": m.memory,
            "breakdown_ms": {part: t * 1e3 for part, t in m.parts.items()},
            "breakdown_by": "hooks on modules that mark forward and backward, 3 steps apart",
            "joules_per_step": m.joules,
        }
        if m.agreement is not None:
            record["errors"] = m.agreement.ours
            record["torch_errors"] = m.agreement.baseline
            record["allowed_error"] = m.agreement.allowed
        if m.cell.name in medians:
            record |= _speed(plan, m, medians, useful, rate)
        rows.append(record)
    return rows


def _speed(
    plan: Plan, m: Measured, medians: dict[str, float], useful: dict[str, Any], rate: float
) -> Record:
    median, low, high = hardware.quantiles(m.times)
    clips = plan.batch / median
    record: Record = {
        "median_ms": median * 1e3,
        "p20_ms": low * 1e3,
        "p80_ms": high * 1e3,
        "min_ms": min(m.times) * 1e3,
        "repetitions": len(m.times),
        "clips_per_s": clips,
        "tokens_per_s": clips * m.cell.model.recipe.visible,
        "ratio_to": {other: medians[other] / median for other in medians if other != m.cell.name},
        "hours": plan.epochs * plan.clips / clips / 3600,
        "hours_formula": f"{plan.epochs:g} epochs x {plan.clips:,} clips / {clips:.4g} clips/s "
        "/ 3600",
        "hours_status": "projected",
    }
    if m.cell.row in useful:
        record["mfu"] = useful[m.cell.row] / median / rate
    dense = medians.get("dense, pytorch")
    if dense and {"dense", "sparse"} <= set(useful):
        expected = useful["dense"] / useful["sparse"] if m.cell.row == "sparse" else 1.0
        record["speed_up"] = dense / median
        record["realised_saving"] = dense / median / expected
    return record
