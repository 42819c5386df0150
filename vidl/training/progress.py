"""Progress of a run: terminal, JSON lines, and TensorBoard if installed."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from vidl.files import named, replaced


class Progress:
    """Shows and logs the progress of a run; used on rank 0 only.

    A terminal shows one line that is updated; other outputs get one line per record.

    Args:
        folder: folder of the run; records are appended to its log.jsonl.
        step: first step; records of later steps were written by a run that was killed, and are
            removed.
        steps: last step.
        tensorboard: also write TensorBoard files, if it is installed.
        out: output stream; default: stderr.
    """

    def __init__(
        self, folder: Path, step: int, steps: int, *, tensorboard: bool, out: TextIO | None = None
    ):
        self.file, self.steps = folder / "log.jsonl", steps
        self.out = out or sys.stderr
        self.line = self.out.isatty()
        _cut(self.file, step)
        self.begin, self.first = time.monotonic(), step
        self.board = _tensorboard(folder) if tensorboard else None

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Log and show the values of a step."""
        self._write(step, values)
        self.show(step, values)

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """Log and show the metrics of an evaluation."""
        self._write(step, {f"evaluation/{name}": value for name, value in values.items()})
        shown = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in values.items())
        self.say(f"step {step}: {', '.join(shown)}")

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with named(self.file), open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board is not None and isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Show one line: loss, speed, share of time spent waiting for data, time left."""
        left = (time.monotonic() - self.begin) / max(step - self.first, 1) * (self.steps - step)
        text = f"{step}/{self.steps}"
        if self.line:
            done = 20 * step // self.steps
            text += f" [{'=' * done}{' ' * (20 - done)}]"
        losses = [f"{n} {values[n]:.3f}" for n in values.get("losses", []) if n in values]
        text += f"  loss {values['loss']:.3f}" + (f" ({', '.join(losses)})" if losses else "")
        text += f"  {values['clips_per_second']:.1f} clips/s"
        text += f"  {_short(values['tokens_per_second'])} tokens/s"
        text += f"  data wait {values['data_wait']:.0%}  ETA {_clock(left)}"
        if self.line:
            width = shutil.get_terminal_size().columns
            text = "\r" + text[: width - 1].ljust(width - 1)
        print(text, end="" if self.line else "\n", file=self.out, flush=True)

    def say(self, text: str) -> None:
        """Print a line that is not overwritten."""
        print(("\n" if self.line else "") + text, file=self.out, flush=True)

    def close(self) -> None:
        """End the line and close the files."""
        if self.line:
            print(file=self.out)
        if self.board is not None:
            self.board.close()


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


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _short(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
