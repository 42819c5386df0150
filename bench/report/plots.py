"""Plots of results, PNG and SVG: ops, training steps, accuracy over time, scaling, roofline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vidl.bench.measure.cases import operations
from vidl.bench.measure.hardware import slug
from vidl.bench.report import digest
from vidl.bench.report.digest import COLUMNS, MODES, Comparison, Device, Step
from vidl.bench.report.records import Record
from vidl.bench.report.verdict import recall
from vidl.bench.training.scaling import fit

# Distinguishable with colour vision deficiency (Okabe and Ito).
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
    "#882255",
)  # fmt: skip
COLUMN_COLORS = {
    "pytorch": COLORS[4],
    "torch.compile": COLORS[3],
    "vidl": COLORS[0],
    "vidl, torch.compile": COLORS[5],
}
ROW_COLORS = {"dense": COLORS[1], "sparse": COLORS[2]}
MODE_STYLES = {"forward": ("o", COLORS[0], -0.17), "full": ("s", COLORS[1], 0.17)}


def draw(devices: Sequence[Device], folder: Path) -> list[tuple[Device, str, str]]:
    """Write all plots for which there are results, and delete those that no longer exist.

    Returns:
        For each plot its device, its title, and its file name without `.png` or `.svg`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for device in devices:
        for title, kind, figure in _figures(device):
            name = f"{slug(device.name)}-{kind}"
            figure.savefig(folder / f"{name}.png", dpi=110)
            # Without a date and random names, so that the same results give the same file.
            with matplotlib.rc_context({"svg.hashsalt": "vidl"}):
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plots.append((device, title, name))
        names = {name for _, _, name in plots}
        for file in folder.glob(f"{slug(device.name)}-*.[ps][nv]g"):
            if file.stem not in names:
                file.unlink()
    return plots


def _figures(device: Device) -> Iterator[tuple[str, str, Figure]]:
    rows = digest.comparisons(device)
    if compared := [c for c in rows if c.speedup is not None]:
        yield "Operations", "ops", _ops(device, compared)
    if timed := digest.steps(device):
        yield "Training steps", "steps", _steps(device, timed)
    if device.quality:
        yield "Accuracy at equal training time", "learning", _learning(device)
    if points := [r for r in device.scaling if "median_ms" in r]:
        yield "Encoder time against visible tokens", "scaling", _scaling(device, points)
    for dtype in dict.fromkeys(c.dtype for c in rows):
        best = [c.best for c in rows if c.dtype == dtype and c.best["tflop_per_s"] > 0]
        most = max((r["threads"] or 0 for r in best), default=0)  # the roof depends on the threads
        if best := [r for r in best if (r["threads"] or 0) == most]:
            yield f"Roofline, {dtype}", f"roofline-{dtype}", _roofline(device, dtype, best)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def _tidy(axes: Any, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis=grid)
    axes.set_axisbelow(True)


def _ops(device: Device, rows: Sequence[Comparison]) -> Figure:
    """A dot per op and mode, the median of its shapes; a line from the lowest to the highest."""
    dtypes = list(dict.fromkeys(c.dtype for c in rows))
    ops = [op for op in operations() if any(c.op == op for c in rows)]
    figure = _figure(3.2 + 3.4 * len(dtypes), 1.6 + 0.42 * len(ops),
                     f"{device.title}: speedup over the fastest PyTorch baseline")  # fmt: skip
    panels = figure.subplots(1, len(dtypes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        for place, op in enumerate(ops):
            for mode, (marker, color, offset) in MODE_STYLES.items():
                chosen = [c.speedup for c in rows if (c.op, c.dtype, c.mode) == (op, dtype, mode)]
                if s := digest.spread(chosen):
                    axes.plot([s.lowest, s.highest], [place + offset] * 2, color=color, alpha=0.6)
                    axes.plot(s.median, place + offset, marker, color=color, markersize=6)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = [0.5, 1, 2, 4, 8, 16]
        axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
        axes.minorticks_off()
        speedups = [c.speedup for c in rows if c.speedup is not None]
        axes.set_xlim(0.9 * min(0.8, *speedups), 1.1 * max(2, *speedups))
        axes.set(title=dtype, xlabel="← slower     vidl faster →")
        _tidy(axes)
    panels[0].set_yticks(range(len(ops)), ops)
    panels[0].set_ylim(len(ops) - 0.5, -0.5)
    handles = [Line2D([], [], marker=marker, color=color, label=MODES[mode])
               for mode, (marker, color, _) in MODE_STYLES.items()]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False,
                  title="median of the shapes; line: lowest to highest",
                  title_fontsize=9)  # fmt: skip
    return figure


def _steps(device: Device, timed: Sequence[Step]) -> Figure:
    """A panel per model with a horizontal bar per row and column."""
    shapes = list(dict.fromkeys(step.shape for step in timed))
    most = max(sum(len(s.cells) for s in timed if s.shape == shape) for shape in shapes)
    figure = _figure(9, 1.0 + len(shapes) * (0.7 + 0.22 * most),
                     f"{device.title}: time of a training step")  # fmt: skip
    used = [column for column in COLUMNS if any(column in step.cells for step in timed)]
    for axes, shape in zip(figure.subplots(len(shapes), squeeze=False)[:, 0], shapes, strict=True):
        place, ticks = 0.0, {}
        own = [step for step in timed if step.shape == shape]
        widest = max(r["p80_ms"] for step in own for r in step.cells.values())
        for step in own:
            ticks[place + (len(step.cells) - 1) / 2] = step.row
            for column, r in step.cells.items():
                ms, low, high = r["median_ms"], r["p20_ms"], r["p80_ms"]
                errors = [[max(0, ms - low)], [max(0, high - ms)]]
                axes.barh(place, ms, 0.8, color=COLUMN_COLORS[column], xerr=errors,
                          error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
                axes.text(0.01 * widest, place, f"{ms:,.0f} ms", va="center", fontsize=9,
                          color="white" if column == "vidl" else "black")  # fmt: skip
                place += 1
            place += 0.6
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_xlim(0, 1.03 * widest)
        axes.invert_yaxis()
        axes.set_title(shape, fontsize=10, loc="left")
        _tidy(axes, "x")
    axes.set_xlabel("ms per step, median; line: 20 to 80 % quantiles")
    handles = [Patch(color=COLUMN_COLORS[column], label=COLUMNS[column]) for column in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _learning(device: Device) -> Figure:
    """R@1 against the seconds of training; the records hold the end of each run, not its course."""
    shapes = list(dict.fromkeys(r["shape"] for r in device.quality))
    figure = _figure(1 + 4 * len(shapes), 4.2,
                     f"{device.title}: text-to-video R@1 after equal training time")  # fmt: skip
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        own = [r for r in device.quality if r["shape"] == shape]
        for r in own:
            color, r1 = ROW_COLORS[r["row"]], recall(r)
            name = next(n for n, value in r["r1"].items() if value is r1)
            seconds = [run["seconds"] for run in r["runs"]]
            x, y = mean(seconds), r1["mean"]
            axes.errorbar(x, y, [[y - r1["lowest"]], [r1["highest"] - y]],
                          [[x - min(seconds)], [max(seconds) - x]], fmt="s", color=color,
                          capsize=4, 
                          label=f"{r['row']}, {r['runs'][0]['steps']} steps")  # fmt: skip
            axes.plot(seconds, [run["r1"][name] for run in r["runs"]], "o", color=color,
                      markersize=5, alpha=0.45)  # fmt: skip
        axes.plot([], [], " ", label=f"chance: {100 / own[0]['pairs']:.0f} %")
        axes.set(title=shape, xlabel="seconds of training")
        axes.title.set_fontsize(10)
        axes.set_xlim(0, 1.15 * max(run["seconds"] for r in own for run in r["runs"]))
        axes.legend(fontsize=9, loc="lower left")
        _tidy(axes)
    lowest = min(run["r1"][name] for r in device.quality for run in r["runs"] for name in run["r1"])
    panels[0].set_ylim(max(0, 10 * (lowest // 10 - 1)), 101)
    panels[0].set_ylabel("R@1, %")
    figure.supxlabel("end of each run (the records hold no curve); square: mean of the seeds with "
                     "its range, dot: a seed", fontsize=9)  # fmt: skip
    return figure


def _scaling(device: Device, timed: Sequence[Record]) -> Figure:
    names = list(dict.fromkeys((r["recipe"], r["preset"]) for r in timed))
    axis_names = list(dict.fromkeys(r["axis"] for r in timed))
    figure = _figure(2.9 * len(axis_names), 1 + 2.6 * len(names),
                     f"{device.title}: encoder time against visible tokens")  # fmt: skip
    panels = figure.subplots(len(names), len(axis_names), squeeze=False)
    used = list(dict.fromkeys(r["candidate"] for r in timed))
    for row, name in zip(panels, names, strict=True):
        for axes, axis in zip(row, axis_names, strict=True):
            fits = []
            for column in used:
                own = [r for r in timed if (r["recipe"], r["preset"], r["axis"], r["candidate"])
                       == (*name, axis, column)]  # fmt: skip
                color, x = COLUMN_COLORS[column], [r["tokens"] for r in own]
                axes.plot(x, [r["median_ms"] for r in own], "o", color=color, markersize=4)
                if line := fit(own):
                    ends = [0, max(x)]
                    axes.plot(ends, [line.fixed + line.slope * n for n in ends], color=color)
                    fits += [f"R² {line.r2:.3f} {COLUMNS[column]}"]
            axes.text(0.04, 0.97, "\n".join(fits), transform=axes.transAxes, va="top", fontsize=8)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{' '.join(name)}: {axis}", fontsize=10)
            _tidy(axes)
        row[0].set_ylabel("ms, forward/backward")
    for axes in panels[-1]:
        axes.set_xlabel("visible tokens of a batch")
    handles = [Line2D([], [], marker="o", color=COLUMN_COLORS[column], label=COLUMNS[column])
               for column in used]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _roofline(device: Device, dtype: str, points: Sequence[Record]) -> Figure:
    figure = _figure(9.5, 5, f"{device.title}: roofline of vidl, {dtype}")
    axes = figure.subplots()
    copy = max(r["copy_gb_per_s"] for r in points)
    matmul = max(r["matmul_tflop_per_s"] for r in points)
    corner = 1e3 * matmul / copy
    places = [(1e3 * r["tflop_per_s"] / r["gb_per_s"], r["tflop_per_s"]) for r in points]
    low = min(corner / 2, min(x for x, _ in places) / 2)
    high = max(4 * corner, max(2 * x for x, _ in places))
    axes.plot([low, corner, high], [low * copy / 1e3, matmul, matmul], color="black", linewidth=1.5)
    axes.text(high, matmul * 1.1, f"matmul, {matmul:.3g} TFLOP/s", ha="right", fontsize=9)
    middle = (low * corner) ** 0.5
    axes.annotate(f"copy, {copy:.3g} GB/s", (middle, middle * copy / 1e3), (-8, 2), fontsize=9,
                  textcoords="offset points", ha="right")  # fmt: skip
    colors = dict(zip(operations(), COLORS, strict=True))
    for place, r in zip(places, points, strict=True):
        axes.plot(*place, MODE_STYLES[r["mode"]][0], color=colors[r["op"]],
                  markersize=6, alpha=0.75, markeredgewidth=0)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved",
             ylabel="useful TFLOP/s")  # fmt: skip
    axes.set_ylim(top=2 * matmul)
    handles: list[Any]
    handles = [Patch(color=color, label=op) for op, color in colors.items()
               if any(r["op"] == op for r in points)]  # fmt: skip
    handles += [Line2D([], [], marker=marker, color="black", linestyle="", label=MODES[mode])
                for mode, (marker, _, _) in MODE_STYLES.items()]  # fmt: skip
    figure.legend(handles=handles, fontsize=9, loc="outside right center", frameon=False)
    _tidy(axes)
    return figure
