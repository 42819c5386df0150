"""A line on a terminal that counts items."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over items; print the count and the estimated time left on a terminal."""
    if total is None:
        total = len(items) if isinstance(items, Sequence) else 0
    shown = begin = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if sys.stderr.isatty() and (now - shown > 0.2 or number == total):
            shown, left = now, (now - begin) / number * (total - number)
            end = "\n" if number == total else ""
            line = f"\r{what}: {number}/{total}, {left:.0f} s left "
            print(line, end=end, file=sys.stderr, flush=True)
