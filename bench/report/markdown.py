"""Results as Markdown: the section of README, and all tables for bench/results/README.md."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vidl.bench.measure.cases import operations
from vidl.bench.report import digest
from vidl.bench.report.digest import MODES, Device, Spread, Step, times
from vidl.bench.report.records import Record
from vidl.bench.report.verdict import in_words, recall
from vidl.bench.training.scaling import fit
from vidl.bench.training.summary import flop_ratio

MARKERS = "<!-- results -->", "<!-- /results -->"
SPEEDUP = "Speedup over the fastest PyTorch baseline"
WHAT = (
    f"{SPEEDUP}: the time of the fastest implementation in eager PyTorch or with `torch.compile`, "
    "divided by that of vidl in the same run. Above 1 × vidl is faster."
)
NO_GPU = (
    'Not measured yet. `backend="auto"` runs PyTorch\'s own operations on a GPU until '
    '`vidl tune` has measured the kernels there; `backend="native"` (CUDA) and '
    '`backend="triton"` select them.'
)
STEP_COLUMNS = ("eager PyTorch", "`torch.compile`", "vidl")
LABELS = {"pruning": "a layer that prunes", "swapped": "timm and transformers models, swapped"}


def replace_section(text: str, section: str) -> str:
    """Replace the section between the markers of a text.

    Raises:
        ValueError: the text does not have both markers exactly once.
    """
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"need {begin} and {end} once each in the text")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def section_of(text: str) -> str:
    """The section between the markers of a text, or an empty string."""
    match = re.search(f"{MARKERS[0]}\n(.*)\n{MARKERS[1]}", text, re.DOTALL)
    return match[1] if match else ""


def summary(devices: Sequence[Device]) -> str:
    """The section of README: tables of the CPU and GPU with the most results, others in words."""
    shown = [max((d for d in devices if d.kind == kind), key=digest.coverage)
             for kind in dict.fromkeys(d.kind for d in devices)]  # fmt: skip
    lines = []
    for device in shown:
        lines += [f"### {device.title}", "", *(f"- {text}" for text in in_words(device)),
                  "", _circumstances(device)]  # fmt: skip
        lines += _short_steps(device) + _short_operations(device) + [""]
        others = [d for d in devices if d.kind == device.kind and d is not device]
        if others:
            lines += [f"### Other {'GPUs' if device.kind == 'cuda' else 'CPUs'}", ""]
            lines += [f"- {d.name}. {' '.join(in_words(d))}" for d in others] + [""]
    if not any(device.kind == "cuda" for device in devices):
        lines += ["### GPU", "", NO_GPU, ""]
    return "\n".join([*lines, "All shapes, dtypes, ranges and details: [`bench/results/`]"
                      "(bench/results/README.md)."])  # fmt: skip


def _short_steps(device: Device) -> list[str]:
    by_shape: dict[str, dict[str, Step]] = {}
    for step in digest.steps(device):
        by_shape.setdefault(step.shape, {})[step.row] = step
    table = []
    for shape, rows in by_shape.items():
        if "sparse" in rows:
            sparse = rows["sparse"]
            dense = rows["dense"].cells.get("pytorch") if "dense" in rows else None
            cells = [dense, sparse.cells.get("pytorch"), sparse.cells.get("torch.compile"),
                     sparse.best]  # fmt: skip
            table += [[shape, *(_time(cell, quantiles=False) for cell in cells),
                       _ratio(sparse.best.get("speed_up")), _ratio(sparse.speedup)]]  # fmt: skip
    if not table:
        return []
    names = ("training step", "dense, eager PyTorch", *(f"sparse, {c}" for c in STEP_COLUMNS),
             "speedup over dense", "speedup over sparse")  # fmt: skip
    return ["", "A training step is forward, backward and AdamW; times are medians. *Speedup over "
            "dense* is relative to dense eager PyTorch, *speedup over sparse* to the faster of the "
            "two sparse baselines.", "", *_table(names, table)]  # fmt: skip


def _short_operations(device: Device) -> list[str]:
    table = _op_cells(device)
    if not table:
        return []
    return ["", f"An operation is forward/backward in {device.dtype}: median of its shapes (lowest "
            f"to highest). The baselines compute the same.", "",
            *_table(("operation", *STEP_COLUMNS, SPEEDUP), table)]  # fmt: skip


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = f"| {' | '.join(names)} |"
    rule = "|" + "---|" * (head.count("|") - 1)
    return [head, rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _circumstances(device: Device) -> str:
    threads = sorted({r["threads"] for r in device.records if r["threads"]})
    text = f"torch {device.versions('torch')}"
    text += f", {' or '.join(map(str, threads))} threads" if threads else ""
    return text + (
        ". CPU results; they do not predict GPU performance." if device.kind == "cpu" else "."
    )


def _step_cells(step: Step) -> list[str]:
    cells = [_time(step.cells.get(column)) for column in ("pytorch", "torch.compile")]
    ours = _time(step.best) + ", with `torch.compile`" * ("compile" in step.best["column"])
    return [f"{step.row} step, {step.shape}", *cells, ours, _ratio(step.speedup)]


def _time(record: Record | None, quantiles: bool = True) -> str:
    if record is None:
        return "not measured"
    low, high = record["p20_ms"], record["p80_ms"]
    return f"{_ms(record['median_ms'])} ms" + f" ({_ms(low)} to {_ms(high)})" * quantiles


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else times(ratio)


def _op_cells(device: Device) -> list[list[str]]:
    rows = digest.main_comparisons(device)
    table = []
    for op in operations():
        if own := [c for c in rows if c.op == op]:
            mode = "" if own[0].mode == "full" else ", forward only"
            name = f"{LABELS.get(op, f'`{op}`')}{mode}, {len(own)} shapes"
            columns: list[list[float | None]]
            columns = [[c.eager_ms for c in own], [c.compiled_ms for c in own],
                       [c.best["median_ms"] for c in own]]  # fmt: skip
            texts = [_times(digest.spread(values)) for values in columns]
            table += [[name, *texts, str(digest.spread(c.speedup for c in own) or "")]]
    return table


def _times(ms: Spread | None) -> str:
    if ms is None:
        return "not measured"
    return f"{_ms(ms.median)} ms ({_ms(ms.lowest)} to {_ms(ms.highest)})"


def _operations(device: Device) -> list[str]:
    rows = digest.comparisons(device)
    columns = [(d, m) for d in ("float32", "bfloat16", "float16") for m in MODES
               if any((c.dtype, c.mode) == (d, m) for c in rows)]  # fmt: skip
    table = []
    for op in operations():
        if own := [c for c in rows if c.op == op]:
            cells = [digest.spread(c.speedup for c in own if (c.dtype, c.mode) == column)
                     for column in columns]  # fmt: skip
            table += [[f"`{op}`", len({c.shape for c in own}), *(cell or "" for cell in cells)]]
    if not table:
        return []
    note = "In bfloat16 a baseline on a CPU may also compute in float32." * (device.kind == "cpu")
    names = ("operation", "shapes", *(f"{d}, {MODES[m]}" for d, m in columns))
    return ["", "### Operations", "", f"{SPEEDUP}: median of the shapes (lowest to highest). {note}"
            .strip(), "", *_table(names, table)]  # fmt: skip


def _steps(device: Device) -> list[str]:
    table = []
    for step in digest.steps(device):
        ours = step.best
        ratio = flop_ratio(r for r in device.savings if r["shape"] == step.shape)
        realised = ours.get("realised_saving") if step.row == "sparse" else None
        share = "" if realised is None or ratio is None else f"{realised:.0%} of {times(ratio)}"
        table += [[*_step_cells(step), _ratio(ours.get("speed_up")), share]]
    if not table:
        return []
    names = ("training step", *STEP_COLUMNS, SPEEDUP, "Speedup over dense eager PyTorch",
             "Saving realised")  # fmt: skip
    return ["", "### Training steps", "", "Forward, backward and AdamW: median (20 to 80 % "
            "quantiles). *Saving realised* is the speedup over dense eager PyTorch, relative to "
            "how many times fewer FLOPs the sparse step needs; above 100 % the kernels also "
            "process the remaining tokens faster.", "", *_table(names, table)]  # fmt: skip


def _learned(device: Device) -> list[str]:
    table = []
    for shape in dict.fromkeys(r["shape"] for r in device.quality):
        rows = {r["row"]: r for r in device.quality if r["shape"] == shape}
        chance = 100 / next(iter(rows.values()))["pairs"]
        table += [[shape, *(_recall(rows.get(row)) for row in ("dense", "sparse")),
                   f"{chance:.1f} %"]]  # fmt: skip
    if not table:
        return []
    return ["", "### Accuracy at equal training time", "", "Text-to-video R@1 with vidl: mean of "
            "the seeds (lowest to highest). The number of steps is that of a speed test before; a "
            "busy machine takes longer for them.", "",
            *_table(("model, training time", "dense", "sparse", "chance"), table)]  # fmt: skip


def _recall(record: Record | None) -> str:
    if record is None:
        return ""
    r, steps = recall(record), record["runs"][0]["steps"]
    seconds = [run["seconds"] for run in record["runs"]]
    return (
        f"{r['mean']:.1f} % ({r['lowest']:.1f} to {r['highest']:.1f}), {steps} steps in "
        f"{min(seconds):.0f} to {max(seconds):.0f} s"
    )


def _growth(device: Device) -> list[str]:
    chosen = [r for r in device.scaling if r["axis"] == "mask" and r["candidate"] == "vidl"]
    table = []
    for name in dict.fromkeys((r["recipe"], r["preset"]) for r in chosen):
        own = [r for r in chosen if (r["recipe"], r["preset"]) == name]
        if line := fit(own):
            whole = max(r["tokens"] for r in own)
            fixed = max(line.fixed, 0.0) / (line.fixed + line.slope * whole)
            table += [[" ".join(name), f"{line.r2:.3f}", f"{fixed:.0%}"]]
    if not table:
        return []
    return ["", "### Encoder time against visible tokens", "", "A line fitted to the forward and "
            "backward time of the encoder at mask ratios from 0 to 0.95.", "",
            *_table(("encoder", "R²", "fixed share of the unmasked time"), table)]  # fmt: skip


def details(devices: Sequence[Device]) -> str:
    """All tables, for bench/results/README.md."""
    lines = [
        "# Results",
        "",
        "Generated by `vidl bench report` from the JSON lines of this folder.",
    ]
    lines += [WHAT]
    for device in devices:
        lines += ["", f"## {device.title}", "", _circumstances(device)]
        lines += _operations(device) + _steps(device) + _learned(device) + _growth(device)
        rows = digest.comparisons(device, most_threads=False)
        names = ("shape", "dtype", "mode", "threads", "vidl, ms", "speedup", "fastest baseline",
                 "share of the limit")  # fmt: skip
        for op in dict.fromkeys(c.op for c in rows):
            table = [
                [c.shape, c.dtype, MODES[c.mode], c.threads or "", f"{c.best['median_ms']:.3f}",
                 _ratio(c.speedup), c.best.get("strongest_baseline") or "",
                 f"{c.best['share_of_limit']:.0%}"] for c in rows if c.op == op
            ]  # fmt: skip
            lines += ["", f"### {op}", "", *_table(names, table)]
    return "\n".join(lines) + "\n"


def rewrite(readme: Path, devices: Sequence[Device]) -> None:
    """Replace the section of a README."""
    readme.write_text(replace_section(readme.read_text(), summary(devices)))
