"""The report: one static HTML page, its plots, Markdown of every shape, and README's section."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from vidl.bench.report import markdown
from vidl.bench.report.digest import MODES, Device, against, times
from vidl.bench.training import scaling, summary

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
td, th { padding: .15em .8em; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #888 } tr { border-bottom: 1px solid #eee }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left } .slower { background: #fbe3d6 }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }
.note { color: #555 }
"""


def write(
    devices: Sequence[Device], folder: Path, pictures: Iterable[tuple[Device, str, str]]
) -> Path:
    """Write the page, beside the pictures that `plots.draw` made."""
    pictures = list(pictures)
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>vidl: results</title>"]
    parts += [f"<style>{STYLE}</style><h1>Results</h1><p>{html.escape(markdown.WHAT)} "]
    parts += ["Of ours it is the fastest backend; of peers the fastest in the same run.</p>"]
    if not any(device.kind == "cuda" for device in devices):
        parts += ["<p><b>No GPU was measured.</b> What follows is of CPUs alone.</p>"]
    for device in devices:
        parts += [f"<h2>{html.escape(device.title)}</h2>"]
        commits = sorted({str(r["commit"]) for r in device.every})
        parts += [f"<p class='note'>torch {device.versions('torch')}; commits "]
        parts += [f"{html.escape(', '.join(commits))}</p>"]
        for _, title, name in (picture for picture in pictures if picture[0] is device):
            parts += [f"<h3>{html.escape(title)}</h3><a href='{name}.svg'>"]
            parts += [f"<img src='{name}.png' alt='{html.escape(title)}'></a>"]
        parts += _steps(device) + _operations(device)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    file.write_text("\n".join(parts) + "\n")
    return file


def _steps(device: Device) -> list[str]:
    texts = []
    for shape in dict.fromkeys(r["shape"] for r in device.savings):
        texts += [summary.table([r for r in device.savings if r["shape"] == shape])]
    for name in dict.fromkeys((r["recipe"], r["preset"]) for r in device.scaling):
        own = [r for r in device.scaling if (r["recipe"], r["preset"]) == name]
        texts += [scaling.table(own)]
    if device.quality:
        # It trains: its module needs what reads clips, so it is imported where there is a result.
        from vidl.bench.training import quality

        for shape in dict.fromkeys(r["shape"] for r in device.quality):
            texts += [quality.table([r for r in device.quality if r["shape"] == shape])]
    return [f"<pre>{html.escape(text.strip())}</pre>" for text in texts]


def _operations(device: Device) -> list[str]:
    rows = against(device, most_threads=False)
    if not rows:
        return []
    names = ("operation", "shape", "dtype, mode", "threads", "vidl, ms", "20 - 80 %", "limit, ms",
             "of limit", "best peer takes", "best peer")  # fmt: skip
    lines = ["<h3>Every shape</h3><p class='note'>Limit: the time in which the device, at its "
             "measured rates of copies and products, could move and compute what is needed. "
             "Marked: a peer is faster.</p>"]  # fmt: skip
    lines += ["<table><tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for a in rows:
        r = a.best
        ratio, peer = "" if a.ratio is None else times(a.ratio), r.get("strongest_peer") or ""
        cells = (a.op, a.shape, f"{a.dtype}, {MODES[a.mode]}", a.threads or "",
                 f"{r['median_ms']:.3f}", f"{r['p20_ms']:.3f} - {r['p80_ms']:.3f}",
                 f"{r['limit_ms']:.3f}", f"{r['share_of_limit']:.0%}", ratio, peer)  # fmt: skip
        mark = " class='slower'" if a.ratio is not None and a.ratio < 1 else ""
        lines += [
            f"<tr{mark}>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>"
        ]
    return [*lines, "</table>"]
