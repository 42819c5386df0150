"""Progress of a run: the terminal, log.jsonl, and trackers."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vidl.files import named, replaced
from vidl.progress import Bar
from vidl.training.trackers import Trackers


class Progress:
    """Shows and logs the progress of a run; used on rank 0 only.

    A terminal shows one line that is updated; other outputs get one line per record.

    Args:
        folder: folder of the run; records are appended to its log.jsonl.
        step: first step; records of later steps were written by a run that was killed, and are
            removed.
        steps: last step.
        trackers: names of trackers, see `vidl.training.trackers.Trackers`.
        values: the configuration, for the trackers.
        out: output stream; default: stderr.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        *,
        trackers: Sequence[str] = (),
        values: Mapping[str, Any] | None = None,
        out: TextIO | None = None,
    ):
        self.file = folder / "log.jsonl"
        _cut(self.file, step)
        self.bar = Bar(steps, done=step, out=out or sys.stderr)
        self.trackers = Trackers(trackers, folder, values or {}, self.say)

    def step(self, step: int) -> None:
        """Note that a step is done."""
        self.bar.update(step)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Log and show the values of a step."""
        self._write(step, values)
        self.bar.update(step, text := _text(values))
        if not self.bar.on_terminal:
            self.say(f"ETA {self.bar.left}  {self.bar.count}  {text}")

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """Log and show the metrics of an evaluation."""
        self._write(step, {f"evaluation/{name}": value for name, value in values.items()})
        shown = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in values.items())
        self.say(f"step {step}: {', '.join(shown)}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.bar.say(text)

    def close(self) -> None:
        """Remove the bar and close the files."""
        self.bar.clear()
        self.trackers.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with named(self.file), open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
        self.trackers.log(step, numbers)


def _text(values: Mapping[str, Any]) -> str:
    """Loss, speed, share of time spent waiting for data, and the parts of the loss.

    What matters least comes last: a narrow terminal leaves it out.
    """
    parts = [f"loss {values['loss']:.3f}", f"{values['clips_per_second']:.1f} clips/s"]
    parts += [f"data wait {values['data_wait']:.0%}"]
    parts += [f"{_short(values['tokens_per_second'])} tokens/s"]
    losses = [f"{n} {values[n]:.3f}" for n in values.get("losses", []) if n in values]
    return "  ".join([*parts, *([f"({', '.join(losses)})"] if losses else [])])


def _cut(file: Path, step: int) -> None:
    """Remove the records after a step, and a last line that was not written completely."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    with replaced(file) as unfinished:
        unfinished.write_text("".join(kept))


def _short(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}"
    return f"{number:.0f}"
