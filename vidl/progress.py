"""Progress of counted work: one bar for training, data and benchmarks."""

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

PAUSE = 0.2  # seconds between two drawings of the bar
BLOCKS = 10  # width of the bar


class Bar:
    """Time left, share of the work that is done, and a text; on one line of a terminal.

    Other outputs get no bar, only what `say` prints, and the numbered lines of `begin`. So does a
    terminal without the package rich, as on a machine that has only what benchmarks need.

    Args:
        total: number of items; 0 if it is unknown.
        done: how many were done before.
        what: what the items are; in front of the count.
        out: output stream; default: stderr.
    """

    def __init__(
        self, total: int, *, done: int = 0, what: str = "", out: TextIO | None = None
    ) -> None:
        self.total, self.first, self.done = total, done, done
        self.what, self.out = what, out or sys.stderr
        self.start, self._drawn = time.monotonic(), 0.0
        self._lines = _lines(self.out) if self.out.isatty() else None
        self._task: Any = None
        self._text = ""
        if self._lines is not None:
            self._task = self._lines.add_task(
                "", total=total or None, completed=done, left="", text=""
            )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.clear()

    @property
    def on_terminal(self) -> bool:
        """Whether there is a bar."""
        return self._lines is not None

    @property
    def left(self) -> str:
        """The estimated time left, as hours:minutes:seconds."""
        steps = self.done - self.first
        if steps < 1 or not self.total:
            return "-:--:--"
        seconds = (time.monotonic() - self.start) / steps * (self.total - self.done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    @property
    def count(self) -> str:
        """What is counted, and how many of how many are done."""
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        return f"{self.what} {count}" if self.what else count

    def update(self, done: int, text: str | None = None) -> None:
        """Draw the bar on a terminal; at most five times a second, unless the text is new.

        Args:
            done: number of items that are done.
            text: what follows the count; None: as before.
        """
        self.done = done
        now = time.monotonic()
        if self._lines is None or (
            text is None and now - self._drawn < PAUSE and done != self.total
        ):
            return
        self._drawn = now
        self._text = self._text if text is None else text
        left, count = f"ETA {self.left}", self.count
        # a space follows each of the first three columns
        room = self._lines.console.width - len(left) - BLOCKS - len(count) - 3
        shown = _shortened(self._text, room)
        self._lines.update(self._task, completed=done, left=left, description=count, text=shown)
        if not self._lines.live.is_started:
            self._lines.start()
            self._lines.console.show_cursor(True)  # a process that is killed leaves it visible
        self._lines.refresh()

    def begin(self, number: int, text: str) -> None:
        """Show that an item begins: on the bar, or as a line `[number/total] text`."""
        self.update(number - 1, text)
        if self._lines is None:
            self.say(f"[{number}/{self.total}] {text}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, file=self.out, flush=True)

    def clear(self) -> None:
        """Remove the bar, until the next update."""
        if self._lines is not None:
            self._lines.stop()


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over items with a bar on a terminal."""
    if total is None:
        total = len(items) if isinstance(items, Sequence) else 0
    with Bar(total, what=what) as bar:
        for number, item in enumerate(items, 1):
            yield item
            bar.update(number)


def _shortened(text: str, room: int) -> str:
    """The parts of a text, divided by two spaces or a comma, that fit; "…" stands for the rest."""
    if len(text) <= room:
        return text
    ends = [part.start() for part in re.finditer("  |, ", text) if part.start() < room]
    return f"{text[: ends[-1]]}…" if ends else text


def _lines(out: TextIO) -> Any:
    """The bar of rich; None if it is not installed.

    It draws when it is updated only: its thread could hold a lock while a loader process forks.
    """
    try:
        from rich import progress
        from rich.console import Console
        from rich.table import Column
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.fields[left]}", markup=False),
        progress.BarColumn(bar_width=BLOCKS),
        progress.TextColumn("{task.description}", markup=False),
        progress.TextColumn(
            "{task.fields[text]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=Console(file=out, force_terminal=True),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
        expand=True,
    )
