"""Time and memory of the vision encoder against visible tokens: do half the tokens halve the time?

Measures forward and backward of a recipe's encoder, in eager PyTorch and in vidl, along four axes:
mask ratio, frames, resolution and batch size. A line is fitted to the time against the number of
visible tokens; its R^2 says how linear the growth is.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidl.bench.measure import hardware
from vidl.bench.measure.cases import short
from vidl.bench.measure.record import circumstances
from vidl.bench.report.records import Record
from vidl.bench.training.baseline import baseline_of
from vidl.bench.training.savings import Plan, peak, seconds
from vidl.bench.training.steps import Cell, agreement_of, batch_of
from vidl.models import MODELS, name_of
from vidl.progress import Bar

MASKS = (0.0, 0.25, 0.5, 0.65, 0.75, 0.9, 0.95)
FRAMES = (1, 2, 4, 8, 16, 32)
RESOLUTIONS = (0.5, 0.75, 1.0, 1.5, 2.0)  # relative to the image size of the recipe
BATCHES = (0.5, 1.0, 2.0, 4.0)  # relative to the batch of the plan


@dataclasses.dataclass(frozen=True)
class Point:
    """A value on one of the four axes."""

    axis: str
    value: float
    recipe: Any
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.recipe.visible


def points(plan: Plan) -> Iterator[Point]:
    """All points of all axes."""
    recipe, batch = plan.recipe, plan.batch

    def changed(**fields: Any) -> Any:
        if "frames" in fields and hasattr(recipe, "frames_kept"):
            slices = fields["frames"] // recipe.tubelet_size
            fields["frames_kept"] = min(recipe.frames_kept, slices)
        return dataclasses.replace(recipe, **fields)

    for mask in MASKS:
        yield Point("mask", mask, changed(mask_ratio=mask), batch)
    for frames in (n for n in FRAMES if n % recipe.tubelet_size == 0):
        yield Point("frames", frames, changed(frames=frames), batch)
    side = recipe.grid[1]
    for size in dict.fromkeys(
        max(1, round(side * share)) * recipe.patch_size for share in RESOLUTIONS
    ):
        yield Point("resolution", size, changed(image_size=size), batch)
    for share in BATCHES:
        yield Point("batch", max(1, round(batch * share)), recipe, max(1, round(batch * share)))


def run(plan: Plan, write: Callable[[list[Record]], object] = lambda records: None) -> list[Record]:
    """Measure every point; `write` is called with the records of each one once it is measured."""
    measured: list[Record] = []
    planned = list(points(plan))
    with Bar(len(planned)) as bar:
        for number, point in enumerate(planned, 1):
            bar.begin(number, f"{plan.name} {plan.preset}: {point.axis} {point.value:g}")
            records = _measure(plan, point)
            bar.clear()
            write(records)
            measured += records
    return measured


class Encoder(nn.Module):
    """A vision encoder with a loss: the mean square of a random projection of its tokens.

    The mean square of the tokens themselves would be constant, because of the last LayerNorm.
    """

    direction: Tensor

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision = vision
        self.register_buffer("direction", torch.randn(vision.embed_dim))

    def forward(self, video: Tensor, ids_keep: Tensor | None) -> dict[str, Tensor]:
        out = self.vision(video, ids_keep)
        tokens: Tensor = getattr(out, "tokens", out)
        high = torch.promote_types(tokens.dtype, torch.float32)
        return {"loss": (tokens.to(high) @ self.direction.to(high)).square().mean()}


def encoders(point: Point, device: str) -> list[Cell]:
    """The encoder in eager PyTorch and in vidl."""
    torch.manual_seed(0)
    recipe = point.recipe
    ours = Encoder(MODELS[name_of(recipe)].model(recipe).vision).to(device).train()
    inputs = batch_of(recipe, point.batch, device)
    mask = recipe.visual_mask(inputs["samples"], 0)
    visible = {"video": inputs["video"], "ids_keep": None if mask is None else mask.ids_keep}
    dtype = torch.bfloat16 if device == "cuda" else None
    unused = torch.optim.SGD(ours.parameters())  # a Cell needs one; no step is taken
    baseline = baseline_of(ours)
    return [
        Cell(point.axis, "pytorch", baseline, baseline, unused, visible, dtype, "baseline"),
        Cell(point.axis, "vidl", ours, ours, unused, visible, dtype, "ours"),
    ]


def _measure(plan: Plan, point: Point) -> list[Record]:
    cells = encoders(point, plan.device)
    times: dict[str, list[float]] = {cell.column: [] for cell in cells}
    memory: dict[str, int | None] = {}
    status, reason = "ok", None
    try:
        agreement = agreement_of(cells[0])(cells[1])
        if agreement.ok:
            for cell in cells:
                _step(cell)
                memory[cell.column] = peak(functools.partial(_step, cell), plan.device)
            for step in range(plan.steps):
                for cell in cells if step % 2 else cells[::-1]:
                    call = functools.partial(_step, cell)
                    times[cell.column] += [seconds(call, plan.device)]
        else:
            status, reason = "wrong", f"errors of {agreement}"
    except RuntimeError as error:  # out of memory
        status, reason = "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        times = {cell.column: [] for cell in cells}
    return [
        _record(plan, point, cell, times[cell.column], memory, status, reason) for cell in cells
    ]


def _step(cell: Cell) -> None:
    cell.forward()["loss"].backward()
    cell.model.zero_grad()


def _record(
    plan: Plan, point: Point, cell: Cell, times: list[float], memory: Any, status: str, reason: Any
) -> Record:
    record: Record = {
        "op": "scaling",
        "shape": f"{plan.name} {plan.preset}, {point.axis} {point.value:g}",
        "sizes": {"batch": point.batch, "visible": point.recipe.visible}
        | {name: str(value) for name, value in plan.overrides.items()},
        "dtype": short(cell.dtype or torch.float32),
        "mode": "encoder",
        **circumstances(plan.device, torch.get_num_threads()),
        "quick": plan.steps < 5,
        "candidate": cell.column,
        "kind": cell.kind,
        "recipe": plan.name,
        "preset": plan.preset,
        "axis": point.axis,
        "value": point.value,
        "tokens": point.tokens,
        "status": status,
        "reason": reason,
        "peak_bytes": memory.get(cell.column),
    }
    if times:
        median, low, high = hardware.quantiles(times)
        record |= {"median_ms": median * 1e3, "p20_ms": low * 1e3, "p80_ms": high * 1e3}
        record |= {"repetitions": len(times)}
    return record


@dataclasses.dataclass(frozen=True)
class Line:
    """A least-squares line: milliseconds = `fixed + slope * tokens`."""

    fixed: float
    slope: float
    r2: float


def fit(records: Sequence[Record]) -> Line | None:
    """Fit a line to the timed records; None if they have fewer than three numbers of tokens."""
    timed = [(r["tokens"], r["median_ms"]) for r in records if "median_ms" in r]
    if len({tokens for tokens, _ in timed}) < 3:
        return None
    x, y = [float(t) for t, _ in timed], [ms for _, ms in timed]
    slope, fixed = statistics.linear_regression(x, y)
    left = sum((b - fixed - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((b - statistics.mean(y)) ** 2 for b in y)
    return Line(fixed, slope, 1 - left / spread if spread else 1.0)


def table(records: Sequence[Record]) -> str:
    """The points and the fitted line of each axis, for a terminal."""
    first = records[0]
    lines = [f"\n{first['recipe']} {first['preset']}: forward and backward of the vision encoder · "
             f"{first['device_type'].upper()}: {first['device']}, {first['dtype']}"]  # fmt: skip
    for axis in dict.fromkeys(r["axis"] for r in records):
        chosen = [r for r in records if r["axis"] == axis]
        lines += ["", f"{axis:12}{'tokens':>9}{'pytorch ms':>12}{'vidl ms':>10}{'speedup':>10}"
                  f"{'pytorch MiB':>13}{'vidl MiB':>10}"]  # fmt: skip
        for value in dict.fromkeys(r["value"] for r in chosen):
            pair = {r["candidate"]: r for r in chosen if r["value"] == value}
            lines += [_row(value, pair)]
        for column in ("pytorch", "vidl"):
            line = fit([r for r in chosen if r["candidate"] == column])
            if line is not None:
                lines += [f"  {column}: {line.fixed:.3g} ms + {1e3 * line.slope:.3g} ms per 1000 "
                          f"tokens, R^2 {line.r2:.4f}"]  # fmt: skip
    return "\n".join(lines)


def _row(value: float, pair: dict[str, Record]) -> str:
    baseline, ours = pair["pytorch"], pair["vidl"]
    if "median_ms" not in baseline or "median_ms" not in ours:
        return f"{value:<12g}{ours['tokens']:9}  {ours['status']}: {ours['reason']}"
    text = f"{value:<12g}{ours['tokens']:9}{baseline['median_ms']:12.1f}{ours['median_ms']:10.1f}"
    text += f"{baseline['median_ms'] / ours['median_ms']:8.2f} x"
    for record, width in ((baseline, 13), (ours, 10)):
        size = record["peak_bytes"]
        text += " " * width if size is None else f"{size / 2**20:{width}.1f}"
    return text
