"""The predicted bounds of the CUDA kernels, from docs/contributors/predicted.md."""

import html
import re
from pathlib import Path

PAGE = Path("docs/contributors/predicted.md")
TITLE = "Bounds, not measured"


def table(page: Path) -> list[list[str]]:
    """The cells of the table of bounds, the head first; empty without the page.

    Raises:
        ValueError: the page has no such table.
    """
    if not page.is_file():
        return []
    section = page.read_text().partition(f"\n## {TITLE}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not re.fullmatch(r"[-:]+", row[0])]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"need a table under '## {TITLE}' in {page}")
    return rows


def as_html(page: Path) -> list[str]:
    """The same as a section of the report, which says that nothing was measured."""
    rows = table(page)
    if not rows:
        return []
    lines = [
        f"<h2>CUDA kernels on an H200: {TITLE.lower()}</h2><p class='note'>No GPU was used: "
        "accesses counted in an emulator and instructions of the compiled kernels, with the rates "
        f"of an H200. In microseconds; the model is in <code>{PAGE}</code>.</p>"
    ]
    lines += ["<details><summary>Bounds of every kernel and shape, not measured</summary>"]
    lines += ["<div class='box'><table>"]
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        lines += ["<tr>" + "".join(f"<{cell}>{html.escape(x)}</{cell}>" for x in row) + "</tr>"]
    return [*lines, "</table></div></details>"]
