"""SIGTERM and Ctrl-C during training."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals(speak: bool) -> Iterator[Callable[[], int]]:
    """The number of SIGTERM or Ctrl-C if it was received, else 0; the second ends the process.

    Args:
        speak: say at once that the run stops after this step, which may take long.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if speak:
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            text = f"\n{name}: finishing this step, then saving; a second one stops at once\n"
            os.write(2, text.encode())  # a handler must not use sys.stderr: it may be in use
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
