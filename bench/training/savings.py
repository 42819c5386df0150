"""What sparsity and our kernels save of whole pre-training steps: {dense, sparse} x {stock, vidl}.

*Dense* sees all patches and keeps all tokens; *sparse* is the recipe. *Stock* is
`bench/training/baseline.py`.
So what fewer tokens save (the algorithm) and what our kernels save (the same tokens, faster) are
told apart. Before anything is timed, losses and gradients of both are compared; cells of a row
that do not agree get no time.
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
from vidl.bench.measure.harness import progress
from vidl.bench.measure.record import circumstances
from vidl.bench.report.records import Record
from vidl.bench.training import loading
from vidl.bench.training.breakdown import breakdown
from vidl.bench.training.steps import Agreement, Cell, agreement_of, cells, flops, loss_of

# The schedule for which GPU-hours are projected: that of Singularity, on which SMAUG builds; those
# of SMAUG and MAC were not found. CC3M and WebVid-2M have 5.4 million samples.
EPOCHS, CLIPS = 10, 5_440_000
BATCH = {"cuda": 64, "cpu": 4}
MODE = "step"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `vidl savings` measures."""

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
    budget: float | None  # seconds after which no further turn begins

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
) -> Plan:
    """Choose what to measure.

    Raises:
        ValueError: there is no such model, preset, field or device, or a number is out of range.
    """
    recipe: Any = models.recipe(name, preset, **(overrides or {}))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("need a CUDA device for device 'cuda', found none")
    batch = BATCH[device] if batch is None else batch
    if batch < 2 or steps < 1 or epochs <= 0 or clips < 1:
        raise ValueError(
            f"need batch >= 2, steps >= 1, epochs > 0 and clips >= 1, got {batch}, {steps}, "
            f"{epochs} and {clips}"
        )
    if recipe.variants()["dense"] == list(recipe.variants().values())[-1]:
        raise ValueError(f"{name} with these fields masks and prunes nothing: nothing is saved")
    return Plan(
        name, preset, overrides or {}, recipe, batch, steps, device, compiled, epochs, clips, budget
    )


def dry_run(plan: Plan) -> Iterator[str]:
    """What would be measured."""
    columns = ["stock", *(["stock, compiled"] if plan.compiled else []), "vidl"]
    yield f"{plan.shape} · {plan.device} · {plan.steps} steps of each, in turns"
    ways = list(plan.recipe.variants().values())
    for row, way in (("dense", ways[0]), ("sparse", ways[-1])):
        tokens = ", ".join(f"{name} {n}" for name, n in way.tokens().items())
        yield from (f"  {row}, {column}: tokens of a clip: {tokens}" for column in columns)
    yield "  first: losses and gradients of each against float64, FLOPs, memory; then times, parts"


@dataclasses.dataclass
class Measured:
    """A cell and what was found about it, so far."""

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
        write: gets the records as soon as every cell has a first time, and again at the end (they
            have the same keys, and the newest counts): what breaks off later loses no more.

    Returns:
        One record for each cell.
    """
    started = time.monotonic()
    progress(f"[1/4] {plan.shape}: building the models")
    found = [Measured(c) for c in cells(plan.recipe, plan.batch, plan.device, plan.compiled)]
    progress(f"[2/4] {plan.shape}: comparing losses and gradients")
    _compare(found)
    progress(f"[3/4] {plan.shape}: warming up, measuring memory")
    for each in _fit(found):
        _attempt(each, _weigh)
    # What is shared by all, and takes a while.
    rate = hardware.matmul_rate(plan.device, torch.get_num_threads(), _dtype(found[0].cell))
    for turn in range(plan.steps):
        spent = time.monotonic() - started
        if plan.budget is not None and turn >= 3 and spent > plan.budget:
            break
        progress(f"[4/4] {plan.shape}: timing, turn {turn + 1} of {plan.steps}")
        _turn(found, turn)
        if turn == 0:
            write(records(plan, found, rate))
    for each in _fit(found):
        _attempt(each, _look_inside)
    progress(f"[4/4] {plan.shape}: reading clips")
    speed = loading.clips_per_second(plan.recipe, plan.name, plan.preset, plan.batch)
    progress("")
    done = [record | {"loading": speed} for record in records(plan, found, rate)]
    write(done)
    return done


def _fit(found: Sequence[Measured]) -> list[Measured]:
    return [each for each in found if each.status == "ok"]


def _attempt(each: Measured, act: Callable[[Measured], None]) -> None:
    """Do something with a cell; if it fails, it is that cell's failure alone."""
    try:
        act(each)
    except RuntimeError as error:  # out of memory, a compiler
        each.status, each.reason = "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        each.cell.optimizer.zero_grad()


def _compare(found: list[Measured]) -> None:
    for row in ("dense", "sparse"):
        members = [each for each in found if each.cell.row == row]
        known = agreement_of(members[0].cell)

        def compare(each: Measured, known: Any = known) -> None:
            each.agreement = known(each.cell)
            if not each.agreement.ok:
                each.status, each.reason = "wrong", f"errors of {each.agreement}"
            each.loss = loss_of(each.cell)

        for each in members:
            _attempt(each, compare)
            if each.cell.column != "stock, compiled":  # what is compiled is not counted
                _attempt(each, _count)
        check_counts({each.cell.column: each.flops for each in members if each.flops})


def check_counts(flops: dict[str, int]) -> None:
    """Stock computes all that ours does; a lower count would mean that some of it is not counted.

    Raises:
        RuntimeError: it is lower.
    """
    if flops.get("stock", math.inf) < 0.99 * flops.get("vidl", 0):
        raise RuntimeError(f"need FLOPs in stock as in vidl or more, counted {flops}")


def _count(each: Measured) -> None:
    each.flops = flops(each.cell)


def _weigh(each: Measured) -> None:
    each.cell.step()
    each.cell.step()
    each.memory = peak(each.cell.step, each.cell.device)


def peak(call: Callable[[], object], device: str) -> int | None:
    """The memory of a step above that of weights and optimizer; on a CPU of the process."""
    if device == "cpu":
        return timing.peak_of_process(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _turn(found: list[Measured], turn: int) -> None:
    """A step of each cell, in another order each time: a drift of the machine hits all alike."""
    members = _fit(found)
    for each in random.Random(turn).sample(members, len(members)):
        _attempt(each, lambda each: each.times.append(seconds(each.cell.step, each.cell.device)))


def seconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, until the device is done with it."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _look_inside(each: Measured) -> None:
    if each.cell.column != "stock, compiled":  # a compiled model has no modules to mark
        each.parts = breakdown(each.cell)
    each.joules = energy.joules(each.cell.step, each.cell.device)


def _dtype(cell: Cell) -> torch.dtype:
    return cell.dtype or torch.float32


def records(plan: Plan, found: Sequence[Measured], rate: float) -> list[Record]:
    """One for each cell, with its place in the table.

    Args:
        rate: of the device's matrix products, FLOP/s.
    """
    medians = {
        m.cell.name: statistics.median(m.times) for m in found if m.times and m.status == "ok"
    }
    useful = {m.cell.row: m.flops for m in found if m.cell.column == "vidl" and m.flops}
    made = []
    for m in found:
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
            record["torch_errors"] = m.agreement.stock
            record["allowed_error"] = m.agreement.allowed
        if m.cell.name in medians:
            record |= _speed(plan, m, medians, useful, rate)
        made.append(record)
    return made


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
    dense = medians.get("dense, stock")
    if dense and {"dense", "sparse"} <= set(useful):
        expected = useful["dense"] / useful["sparse"] if m.cell.row == "sparse" else 1.0
        record["speed_up"] = dense / median
        record["realised_saving"] = dense / median / expected
    return record
