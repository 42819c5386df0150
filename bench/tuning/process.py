"""Starts the worker, and goes on with another fork if a backend ends it or does not return."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vidl
from vidl.bench.tuning.calls import Recorded

START = 120.0  # seconds to import everything, on a busy machine


@dataclass
class Measured:
    """What a worker measured of a call.

    Attributes:
        seconds: by backend and policy, of the backends that are right.
        refused: the reasons against the others.
        share: the limit of the hardware divided by the time of the fastest, if it is known.
        failed: why nothing was measured.
    """

    seconds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    share: float | None = None
    failed: str | None = None


class _Ended(Exception):
    """The worker ended or hung; says why."""


class Worker:
    """One process for many calls; a context manager.

    Args:
        timeout: seconds that a backend may take for the check, and all for the timing.
        seconds: of timing for each backend.
        modules: imported by the process first; tests plant backends with them.
    """

    def __init__(
        self, timeout: float = 60.0, seconds: float = 0.3, modules: Sequence[str] = ()
    ) -> None:
        self.timeout, self.seconds, self.modules = timeout, seconds, modules
        self.process: Any = None  # a Popen
        self.fork: int | None = None  # the process that serves requests
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> "Worker":
        self.folder = tempfile.TemporaryDirectory(prefix="vidl-tune-")
        self.errors = Path(self.folder.name) / "errors.txt"
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()
        self.folder.cleanup()

    def measure(self, call: Recorded) -> Measured:
        """Check and time the backends of a call."""
        measured = Measured()
        file = Path(self.folder.name) / "call.pt"
        torch.save(call.as_values(), file)
        while True:
            stopped = self._attempt(file, measured)
            if stopped is None:
                return measured
            current, reason = stopped
            if current in ("start", "reference", "timing"):
                measured.failed = f"{current}: {reason}"
                return measured
            measured.refused.setdefault(current, reason)

    def _attempt(self, file: Path, measured: Measured) -> tuple[str, str] | None:
        """Ask for a call. Returns what the worker did when it ended or hung, and why; or None."""
        current = "start"
        request = {"file": str(file), "without": list(measured.refused), "seconds": self.seconds}
        try:
            self._ready()
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while True:
                # A backend is timed from its first event on, not the start of its process.
                event = self._next(START if current == "start" else self.timeout)
                if "begin" in event:
                    current = event["begin"]
                elif "refused" in event:
                    measured.refused[event["refused"]] = event["reason"]
                elif "ended" in event:
                    self.fork = None
                    raise _Ended(self._described(event["ended"]))
                else:
                    measured.seconds, measured.share = event["seconds"], event["share"]
                    return None
        except _Ended as ended:
            return current, str(ended)
        except BrokenPipeError:
            self._close()
            return current, "its process ended"

    def _ready(self) -> None:
        """Wait for a process that serves requests."""
        if self.process is None:
            self._start()
        while self.fork is None:
            self.fork = self._next(START).get("ready")
        self.said = self.errors.stat().st_size

    def _start(self) -> None:
        command = [sys.executable, "-m", "vidl.bench.tuning.worker"]
        command += ["--threads", str(torch.get_num_threads())]
        command += [word for module in self.modules for word in ("--import", module)]
        # The same vidl as here, wherever it was imported from.
        paths = [str(Path(vidl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipe, self.said = subprocess.PIPE, 0
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
            )
        self.events = queue.SimpleQueue()
        arguments = (self.process.stdout, self.events)
        threading.Thread(target=_forward, args=arguments, daemon=True).start()

    def _next(self, timeout: float) -> dict[str, Any]:
        """The next event.

        Raises:
            _Ended: none comes in time, or the process ended.
        """
        try:
            line = self.events.get(timeout=timeout)
        except queue.Empty:
            if self.fork is None:
                self._close()
            else:
                os.kill(self.fork, signal.SIGKILL)  # another one follows
                self.fork = None
            raise _Ended(f"no answer within {timeout:g} s") from None
        if line:
            event: dict[str, Any] = json.loads(line)
            return event
        status = self.process.wait()
        self._close()
        raise _Ended(self._described(status))

    def _described(self, status: int) -> str:
        """How a process ended, and its last words."""
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        words = self.errors.read_text()[self.said :].strip().splitlines()
        return f"its process ended with {name}" + (f": {words[-1][:200]}" if words else "")

    def _close(self) -> None:
        """End all processes."""
        if self.process is None:
            return
        self.process.kill()
        if self.fork is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.fork, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that was never read
            self.process.stdin.close()
        self.process = self.fork = None


def _forward(stream: Any, events: "queue.SimpleQueue[str]") -> None:
    """Pass on lines, and an empty one at the end."""
    with stream:
        for line in stream:
            events.put(line)
    events.put("")
