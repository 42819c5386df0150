"""Plots of results as PNG and SVG: peers, roofline, whole steps, what is learned, scaling."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vidl.bench.measure.hardware import slug
from vidl.bench.report.digest import MODES, Device, against
from vidl.bench.report.records import Record
from vidl.bench.training.scaling import fit

# Told apart by people who see few colours, too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OURS, STOCK = COLOURS[0], COLOURS[4]


def draw(devices: Sequence[Device], folder: Path) -> list[tuple[Device, str, str]]:
    """Write all plots that there are results for.

    Returns:
        Device, title and name of each, without its ending; `.png` and `.svg` are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for device in devices:
        for title, kind, figure in _figures(device):
            name = f"{slug(device.name)}-{kind}"
            figure.savefig(folder / f"{name}.png", dpi=110)
            # The same results give the same file: without a date, and with no random names.
            with matplotlib.rc_context({"svg.hashsalt": "vidl"}):
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            made.append((device, title, name))
    return made


def _figures(device: Device) -> Iterator[tuple[str, str, Figure]]:
    if rows := [a for a in against(device) if a.ratio is not None]:
        yield "Ours against the best peer", "peers", _peers(device, rows)
    for dtype in dict.fromkeys(r["dtype"] for r in device.ops):
        points = [a.best for a in against(device) if a.dtype == dtype and a.best["tflop_per_s"] > 0]
        most = max((r["threads"] or 0 for r in points), default=0)  # which has a roof of its own
        if points := [r for r in points if (r["threads"] or 0) == most]:
            title = f"What the device allows, {dtype}"
            yield title, f"roofline-{dtype}", _roofline(device, dtype, points)
    if timed := [r for r in device.savings if "median_ms" in r]:
        yield "Whole steps of pre-training", "savings", _savings(device, timed)
    if device.quality:
        yield "What is learned in the same time", "quality", _quality(device)
    if timed := [r for r in device.scaling if "median_ms" in r]:
        yield "The encoder's time against what it sees", "scaling", _scaling(device, timed)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _peers(device: Device, rows: Sequence[Any]) -> Figure:
    """A bar for each shape with the backward, a dot for the forward alone; by dtype."""
    dtypes = list(dict.fromkeys(a.dtype for a in rows))
    names = list(dict.fromkeys((a.op, a.shape) for a in rows))
    ops = list(dict.fromkeys(op for op, _ in names))
    figure = Figure(figsize=(4.2 + 4.2 * len(dtypes), 1.6 + 0.21 * len(names)))
    figure.set_layout_engine("constrained")
    every = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(every, dtypes, strict=True):
        for a in (a for a in rows if a.dtype == dtype):
            place = len(names) - names.index((a.op, a.shape))
            colour = COLOURS[ops.index(a.op) % len(COLOURS)]
            if a.mode == "full":
                axes.barh(place, a.ratio - 1, left=1, height=0.7, color=colour, alpha=0.75)
            else:
                axes.plot(a.ratio, place, "o", color=colour, markersize=4, markeredgecolor="white",
                          markeredgewidth=0.5)  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = [0.5, 1, 2, 5, 10, 20]
        axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("the best peer's time over ours")
        axes.set_title(dtype)
        _tidy(axes)
    labels = [f"{op} · {shape}" for op, shape in names]
    every[0].set_yticks(range(len(names), 0, -1), labels, fontsize=7)
    every[0].set_ylim(0.2, len(names) + 0.8)
    figure.suptitle(
        f"{device.title}: right of 1 × vidl is faster (bar: with backward, dot: forward)"
    )
    return figure


def _roofline(device: Device, dtype: str, points: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(9, 5.5))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    copy = max(r["copy_gb_per_s"] for r in points)
    matmul = max(r["matmul_tflop_per_s"] for r in points)
    found = [(1e3 * r["tflop_per_s"] / r["gb_per_s"], r["tflop_per_s"]) for r in points]
    low, high = min(x for x, _ in found) / 2, max(2 * x for x, _ in found)
    low, high = min(low, 500 * matmul / copy), max(high, 4e3 * matmul / copy)
    corner = 1e3 * matmul / copy
    axes.plot([low, corner, high], [low * copy / 1e3, matmul, matmul], color="black", linewidth=1.5)
    axes.text(high, matmul * 1.08, f"{matmul:.3g} TFLOP/s of products", ha="right", fontsize=8)
    axes.annotate(f"{copy:.3g} GB/s of a copy", (low, low * copy / 1e3), (0, 14),
                  textcoords="offset points", ha="left", fontsize=8)  # fmt: skip
    ops = list(dict.fromkeys(r["op"] for r in points))
    for op in ops:
        colour = COLOURS[ops.index(op) % len(COLOURS)]
        for mode, marker in (("forward", "o"), ("full", "^")):
            own = [
                p for p, r in zip(found, points, strict=True) if (r["op"], r["mode"]) == (op, mode)
            ]
            if own:
                axes.plot(*zip(*own, strict=True), marker, color=colour, markersize=5, alpha=0.8,
                          label=f"{op}, {MODES[mode]}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must be moved",
             ylabel="useful TFLOP/s", title=f"{device.title}: ours, {dtype}")  # fmt: skip
    axes.legend(fontsize=7, loc="lower right")
    _tidy(axes)
    return figure


def _savings(device: Device, timed: Sequence[Record]) -> Figure:
    shapes = list(dict.fromkeys(r["shape"] for r in timed))
    figure = Figure(figsize=(min(12, 1.5 + 4.5 * len(shapes)), 4.5))
    figure.set_layout_engine("constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        own = [r for r in timed if r["shape"] == shape]
        for place, r in enumerate(own):
            ms = r["median_ms"]
            spread = [[max(0, ms - r["p20_ms"])], [max(0, r["p80_ms"] - ms)]]
            colour = OURS if r["kind"] == "ours" else STOCK
            axes.bar(place, ms, color=colour, yerr=spread, capsize=3, width=0.7)
            speed = r.get("speed_up")
            label = f"{ms:,.0f} ms" + ("" if speed is None else f"\n{speed:.2f} ×")
            axes.annotate(label, (place, r["p80_ms"]), (0, 4), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
        names = [r["candidate"].replace(", ", "\n") for r in own]
        axes.set_xticks(range(len(own)), names, fontsize=8)
        axes.set_ylim(0, 1.2 * max(max(r["median_ms"], r["p80_ms"]) for r in own))
        axes.set(title=shape, ylabel="ms a step")
        _tidy(axes)
        axes.grid(False, axis="x")
    figure.suptitle(
        f"{device.title}: median of a step, 20 to 80 %; × over dense, stock", fontsize=10
    )
    return figure


def _quality(device: Device) -> Figure:
    """A bar for the mean of the seeds, a dot for each."""
    shapes = list(dict.fromkeys(r["shape"] for r in device.quality))
    figure = Figure(figsize=(min(12, 1.5 + 4.5 * len(shapes)), 4))
    figure.set_layout_engine("constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        own = [r for r in device.quality if r["shape"] == shape]
        names = list(own[0]["r1"])
        for number, r in enumerate(own):
            colour = OURS if r["row"] == "sparse" else STOCK
            places = [i + 0.4 * (number - (len(own) - 1) / 2) for i in range(len(names))]
            label = f"{r['row']}, {r['runs'][0]['steps']} steps"
            means = [r["r1"][name]["mean"] for name in names]
            axes.bar(places, means, 0.36, color=colour, alpha=0.75, label=label)
            for place, name in zip(places, names, strict=True):
                each = [run["r1"][name] for run in r["runs"]]
                axes.plot([place] * len(each), each, "o", color="black", markersize=4)
        axes.axhline(100 / own[0]["pairs"], color="black", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, 105)
        axes.set(title=shape, ylabel="%")
        axes.legend(fontsize=8, loc="lower right", framealpha=1)
        _tidy(axes)
        axes.grid(False, axis="x")
    figure.suptitle(
        f"{device.title}: recall after the same time, with vidl (dot: a seed, dotted: chance)",
        fontsize=10,
    )
    return figure


def _scaling(device: Device, timed: Sequence[Record]) -> Figure:
    names = list(dict.fromkeys((r["recipe"], r["preset"]) for r in timed))
    axes_names = list(dict.fromkeys(r["axis"] for r in timed))
    figure = Figure(figsize=(3.3 * len(axes_names), 0.5 + 3 * len(names)))
    figure.set_layout_engine("constrained")
    every = figure.subplots(len(names), len(axes_names), squeeze=False)
    for number, name in enumerate(names):
        for axes, axis in zip(every[number], axes_names, strict=True):
            for column, colour in (("stock", STOCK), ("vidl", OURS)):
                own = sorted((r for r in timed if (r["recipe"], r["preset"]) == name
                              and (r["axis"], r["candidate"]) == (axis, column)),
                             key=lambda r: r["tokens"])  # fmt: skip
                x, y = [r["tokens"] for r in own], [r["median_ms"] for r in own]
                line = fit(own)
                label = column if line is None else f"{column}, R² {line.r2:.3f}"
                axes.plot(x, y, "o", color=colour, markersize=5, label=label)
                if line is not None:
                    ends = [0, max(x)]
                    axes.plot(ends, [line.fixed + line.slope * n for n in ends], color=colour)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set(title=f"{' '.join(name)}: {axis}", xlabel="visible tokens of a batch")
            axes.legend(fontsize=7)
            _tidy(axes)
        every[number][0].set_ylabel("ms, forward and backward")
    figure.suptitle(f"{device.title}: the vision encoder", color="black", fontsize=10)
    return figure
