"""Results as Markdown: a summary for README, every shape for bench/results/README.md."""

import re
from collections.abc import Sequence
from pathlib import Path

from vidl.bench.measure.cases import operations
from vidl.bench.report.digest import MODES, Device, against, spread, times
from vidl.bench.report.records import Record
from vidl.bench.training.scaling import fit
from vidl.bench.training.summary import flop_ratio

MARKERS = "<!-- results -->", "<!-- /results -->"
WHAT = (
    "How long the best of PyTorch's ways takes in place of vidl: above 1 × vidl is faster, below "
    "slower."
)

NO_GPU = (
    'Not measured yet: `backend="auto"` stays with plain PyTorch there, and hands attention in '
    "equal groups to PyTorch's own."
)


def replace_section(text: str, section: str) -> str:
    """A text with another section between its markers.

    Raises:
        ValueError: it does not have both markers once.
    """
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"need {begin} and {end} once each in the text")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def section_of(text: str) -> str:
    """What stands between the markers."""
    found = re.search(f"{MARKERS[0]}\n(.*)\n{MARKERS[1]}", text, re.DOTALL)
    return found[1] if found else ""


def summary(devices: Sequence[Device]) -> str:
    """The section of README: a line for each operation and each whole step, by device."""
    lines = [f"{WHAT} Median of all shapes, then the lowest and the highest; every shape is in "
             "[`bench/results/`](bench/results/README.md)."]  # fmt: skip
    for device in devices:
        lines += ["", f"### {device.title}", "", _circumstances(device), ""]
        lines += _operations(device) + _steps(device) + _learned(device) + _growth(device)
    if not any(device.kind == "cuda" for device in devices):
        lines += ["", "### GPU", "", NO_GPU]
    return "\n".join(lines)


def _circumstances(device: Device) -> str:
    threads = sorted({r["threads"] for r in device.every if r["threads"]})
    text = f"torch {device.versions('torch')}"
    text += f", {' or '.join(map(str, threads))} threads" if threads else ""
    if device.kind == "cpu":
        text += "; a CPU, of which nothing follows for a GPU. In bfloat16 peers may also go by way "
        text += "of float32"
    return text + "."


def _operations(device: Device) -> list[str]:
    rows = against(device)
    if not rows:
        return []
    columns = [(d, m) for d in ("float32", "bfloat16", "float16") for m in MODES
               if any((a.dtype, a.mode) == (d, m) for a in rows)]  # fmt: skip
    lines = ["| operation | shapes | " + " | ".join(f"{d}, {MODES[m]}" for d, m in columns) + " |"]
    lines += ["|---|---|" + "---|" * len(columns)]
    for op in operations():
        own = [a for a in rows if a.op == op]
        if own:
            cells = [spread([a for a in own if (a.dtype, a.mode) == c]) for c in columns]
            texts = ["" if cell is None else str(cell) for cell in cells]
            count = len({a.shape for a in own})
            lines += [f"| `{op}` | {count} | {' | '.join(texts)} |"]
    return lines


def _steps(device: Device) -> list[str]:
    """Whole steps: the time of dense stock, and how many times as fast the other cells are."""
    shapes = list(dict.fromkeys(r["shape"] for r in device.savings if "median_ms" in r))
    if not shapes:
        return []
    columns = ("model", "dense, stock", "dense, vidl", "sparse, stock", "sparse, vidl",
               "saving realised")  # fmt: skip
    lines = ["", "A whole step of pre-training: forward, backward, AdamW; *stock* is the same "
             "model in PyTorch as a careful user writes it.", ""]  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for shape in shapes:
        cells = {r["candidate"]: r for r in device.savings
                 if r["shape"] == shape and "median_ms" in r}  # fmt: skip
        texts = [
            _speed(cells.get(name)) for name in ("dense, vidl", "sparse, stock", "sparse, vidl")
        ]
        base = cells.get("dense, stock")
        first = "" if base is None else f"{base['median_ms']:,.0f} ms"
        ratio = flop_ratio(cells.values())
        realised = cells.get("sparse, vidl", {}).get("realised_saving")
        share = "" if realised is None or ratio is None else f"{realised:.0%} of {times(ratio)}"
        lines += [f"| {shape} | {first} | {' | '.join(texts)} | {share} |"]
    return lines


def _speed(record: Record | None) -> str:
    speed = None if record is None else record.get("speed_up")
    return "" if speed is None else times(speed)


def _learned(device: Device) -> list[str]:
    shapes = list(dict.fromkeys(r["shape"] for r in device.quality))
    if not shapes:
        return []
    lines = ["", "What is learned in the same time, with vidl: R@1 of captions that look for their "
             "clip, mean and range of the seeds.", "",
             "| model, time | dense | sparse | chance |", "|---|---|---|---|"]  # fmt: skip
    for shape in shapes:
        rows = {r["row"]: r for r in device.quality if r["shape"] == shape}
        texts = [_recall(rows.get(row)) for row in ("dense", "sparse")]
        chance = 100 / next(iter(rows.values()))["pairs"]
        lines += [f"| {shape} | {' | '.join(texts)} | {chance:.1f} % |"]
    return lines


def _recall(record: Record | None) -> str:
    if record is None:
        return ""
    name = next((n for n in ("t2v re-ranked R@1", "t2v R@1") if n in record["r1"]), None)
    if name is None:
        return ""
    found = record["r1"][name]
    steps = record["runs"][0]["steps"]
    return f"{found['mean']:.1f} % ({found['lowest']:.1f} to {found['highest']:.1f}), {steps} steps"


def _growth(device: Device) -> list[str]:
    chosen = [r for r in device.scaling if r["axis"] == "mask"]
    found = []
    for name in dict.fromkeys((r["recipe"], r["preset"]) for r in chosen):
        own = [r for r in chosen if (r["recipe"], r["preset"]) == name and r["candidate"] == "vidl"]
        line = fit(own)
        if line is not None:
            whole = max(r["tokens"] for r in own)
            fixed = max(line.fixed, 0.0) / (line.fixed + line.slope * whole)
            found += [f"{' '.join(name)}: R² {line.r2:.3f}, {fixed:.0%} of the unmasked time fixed"]
    if not found:
        return []
    return ["", "A line through the encoder's time against visible tokens, masks from 0 to 0.95: "
            + "; ".join(found) + "."]  # fmt: skip


def details(devices: Sequence[Device]) -> str:
    """Every shape, for bench/results/README.md."""
    lines = [
        "# Results",
        "",
        "Made by `vidl bench report` from the JSON lines in this folder.",
        WHAT,
    ]
    for device in devices:
        lines += ["", f"## {device.title}", "", _circumstances(device)]
        rows = against(device, most_threads=False)
        for op in dict.fromkeys(a.op for a in rows):
            columns = ("shape", "dtype", "mode", "threads", "vidl, ms", "best peer takes",
                       "best peer", "share of the limit")  # fmt: skip
            lines += ["", f"### {op}", "", f"| {' | '.join(columns)} |"]
            lines += ["|---" * len(columns) + "|"]
            for a in rows:
                if a.op == op:
                    ratio = "" if a.ratio is None else times(a.ratio)
                    best, peer = a.best, a.best.get("strongest_peer") or ""
                    lines += [f"| {a.shape} | {a.dtype} | {MODES[a.mode]} | {a.threads or ''} | "
                              f"{best['median_ms']:.3f} | {ratio} | {peer} | "
                              f"{best['share_of_limit']:.0%} |"]  # fmt: skip
    return "\n".join(lines) + "\n"


def rewrite(readme: Path, devices: Sequence[Device]) -> bool:
    """Put the summary into README; whether that changed it."""
    before = readme.read_text()
    after = replace_section(before, summary(devices))
    readme.write_text(after)
    return after != before
