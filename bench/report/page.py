"""The report as one static HTML page: a verdict in words, the plots, and tables of every shape."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from vidl.bench.report import bounds, markdown
from vidl.bench.report.digest import MODES, Device, comparisons, times
from vidl.bench.report.verdict import in_words
from vidl.bench.training import scaling, summary

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 72em; margin: 1.5em auto }
body { padding: 0 1em; color: #222 }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2em }
.box { overflow-x: auto; margin: 1em 0 } figure { margin: 1em 0 2em; max-width: 60em }
.note { color: #555 }
figure .box img { width: 100%; min-width: 42em; display: block }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2em .8em; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #888 } tr { border-bottom: 1px solid #eee }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left } .slower { background: #fbe3d6 }
pre { background: #f6f6f6; padding: 1em; margin: 0; font-size: 12px; width: max-content }
.verdict { border-left: 4px solid #0072B2; padding-left: 1em }
"""
HEAD = """<!doctype html>
<html lang='en'><meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>vidl: results</title>"""


def write(
    devices: Sequence[Device],
    folder: Path,
    pictures: Iterable[tuple[Device, str, str]],
    predicted: Path,
) -> Path:
    """Write the page next to the pictures of `plots.draw`.

    Args:
        predicted: the page with the bounds of the CUDA kernels, if it exists.
    """
    pictures = list(pictures)
    parts = [HEAD, f"<style>{STYLE}</style><h1>Results</h1><p>{_text(markdown.WHAT)}</p>"]
    if not any(device.kind == "cuda" for device in devices):
        parts += [f"<p><b>GPU:</b> {_text(markdown.NO_GPU)}</p>"]
    for device in devices:
        commits = ", ".join(sorted({str(r["commit"]) for r in device.records}))
        note = "" if device.kind == "cuda" else "CPU results; they do not predict GPU performance. "
        parts += [f"<h2>{html.escape(device.title)}</h2><div class='verdict'>"]
        parts += [f"<p>{_text(sentence)}</p>" for sentence in in_words(device)]
        parts += [f"<p class='note'>{note}torch {device.versions('torch')}.</p></div>"]
        for _, title, name in (picture for picture in pictures if picture[0] is device):
            title = html.escape(title)
            parts += [f"<figure><h3>{title}</h3><div class='box'><a href='{name}.svg'>"]
            parts += [f"<img src='{name}.png' alt='{title}'></a></div></figure>"]
        parts += _operations(device) + _steps(device)
        parts += [f"<details><summary>Commits</summary>{html.escape(commits)}</details>"]
    parts += bounds.as_html(predicted)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    file.write_text("\n".join(parts) + "\n")
    return file


def _text(markdown_text: str) -> str:
    """Escaped text, with `code` of Markdown as HTML."""
    pieces = html.escape(markdown_text, quote=False).split("`")
    return "".join(f"<code>{x}</code>" if i % 2 else x for i, x in enumerate(pieces))


def _steps(device: Device) -> list[str]:
    texts = []
    for shape in dict.fromkeys(r["shape"] for r in device.savings):
        texts += [summary.table([r for r in device.savings if r["shape"] == shape])]
    for name in dict.fromkeys((r["recipe"], r["preset"]) for r in device.scaling):
        own = [r for r in device.scaling if (r["recipe"], r["preset"]) == name]
        texts += [scaling.table(own)]
    if device.quality:
        # Its module imports the data loader, which not every installation has.
        from vidl.bench.training import quality

        for shape in dict.fromkeys(r["shape"] for r in device.quality):
            texts += [quality.table([r for r in device.quality if r["shape"] == shape])]
    heading = ["<h3>Appendix: training steps, encoder and accuracy</h3>"] * bool(texts)
    return heading + [
        f"<div class='box'><pre>{html.escape(text.strip())}</pre></div>" for text in texts
    ]


def _operations(device: Device) -> list[str]:
    rows = comparisons(device, most_threads=False)
    if not rows:
        return []
    names = ("operation", "shape", "dtype, mode", "threads", "speedup", "vidl, ms", "20 - 80 %",
             "limit, ms", "of limit", "fastest baseline")  # fmt: skip
    lines = ["<h3>Appendix: operations at every shape</h3><p class='note'>Limit: the lower bound "
             "of the time, from the copy and matmul rates measured on the device. Speedup: over "
             "the fastest baseline. Marked rows: a baseline is faster.</p>"]  # fmt: skip
    lines += ["<div class='box'><table><tr>" + "".join(f"<th>{n}</th>" for n in names) + "</tr>"]
    for c in rows:
        r, speedup = c.best, "" if c.speedup is None else times(c.speedup)
        cells = (c.op, c.shape, f"{c.dtype}, {MODES[c.mode]}", c.threads or "", speedup,
                 f"{r['median_ms']:.3f}", f"{r['p20_ms']:.3f} - {r['p80_ms']:.3f}",
                 f"{r['limit_ms']:.3f}", f"{r['share_of_limit']:.0%}",
                 r.get("strongest_baseline") or "")  # fmt: skip
        mark = " class='slower'" if c.speedup is not None and c.speedup < 1 else ""
        row = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines += [f"<tr{mark}>{row}</tr>"]
    return [*lines, "</table></div>"]
