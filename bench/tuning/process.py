"""Starts the worker, and starts it again if a backend ends it or does not return."""

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
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Worker":
        self.folder = tempfile.TemporaryDirectory(prefix="vidl-tune-")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()
        self.folder.cleanup()

    def measure(self, call: Recorded) -> Measured:
        """Check and time the backends of a call."""
        measured = Measured()
        file = Path(self.folder.name) / "call.pt"
        torch.save(call.as_values(), file)
        while True:
            current = self._attempt(file, measured)
            if current is None:
                return measured
            reason = self._end()
            if current in ("start", "reference", "timing"):
                measured.failed = f"{current}: {reason}"
                return measured
            measured.refused.setdefault(current, reason)

    def _attempt(self, file: Path, measured: Measured) -> str | None:
        """Ask for a call; returns what the process did when it ended or hung, or None."""
        if self.process is None:
            self._start()
            if self._next(START) is None:
                return "start"
        request = {"file": str(file), "without": list(measured.refused), "seconds": self.seconds}
        assert self.process is not None and self.process.stdin is not None
        current = "start"
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            return current
        while (event := self._next(self.timeout)) is not None:
            if "begin" in event:
                current = event["begin"]
            elif "refused" in event:
                measured.refused[event["refused"]] = event["reason"]
            else:
                measured.seconds, measured.share = event["seconds"], event["share"]
                return None
        return current

    def _start(self) -> None:
        command = [sys.executable, "-m", "vidl.bench.tuning.worker"]
        command += ["--threads", str(torch.get_num_threads())]
        command += [word for module in self.modules for word in ("--import", module)]
        # The same vidl as here, wherever it was imported from.
        paths = [str(Path(vidl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.errors = open(Path(self.folder.name) / "errors", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(
            target=_forward, args=(self.process.stdout, self.events), daemon=True
        ).start()

    def _next(self, timeout: float) -> dict[str, Any] | None:
        """The next event; None if the process ended or none comes in time."""
        try:
            line = self.events.get(timeout=timeout)
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def _end(self) -> str:
        """Stop a process that ended or hung; returns what happened."""
        assert self.process is not None
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._stop()
            return f"no answer within {self.timeout:g} s"
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        self._stop()
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its process ended with {name}" + (f": {said[-1][:200]}" if said else "")

    def _stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # a request that was never read
        self.process = None


def _forward(stream: Any, events: "queue.SimpleQueue[str]") -> None:
    """Pass on lines; an empty one at the end."""
    try:
        for line in stream:
            events.put(line)
    except ValueError:
        pass  # closed by _stop
    events.put("")
