"""What a run says while it runs: a line on the terminal, JSON lines, TensorBoard if installed."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Progress:
    """Shows and records where a run is; the ranks but the first make none.

    A terminal sees one line that changes, any other output a line for each record.

    Args:
        folder: of the run; records go to its log.jsonl.
        step: at which the run begins; later records are those of a run that was killed, and are
            removed.
        steps: at which it ends.
        tensorboard: whether to write TensorBoard's files, where it is installed.
        out: where to show it; default: stderr.
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
        """Write values that were measured at a step, and show them."""
        self._write(step, values)
        self.show(step, values)

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what an evaluation found at a step, and show it."""
        self._write(step, {f"evaluation/{name}": value for name, value in values.items()})
        shown = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in values.items())
        self.say(f"step {step}: {', '.join(shown)}")

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board is not None and isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def show(self, step: int, values: dict[str, Any]) -> None:
        """One line: loss, speed, the share of time spent waiting for data, and what is left."""
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
        """A line that stays."""
        print(("\n" if self.line else "") + text, file=self.out, flush=True)

    def close(self) -> None:
        """Finish the line and the files."""
        if self.line:
            print(file=self.out)
        if self.board is not None:
            self.board.close()


def _cut(file: Path, step: int) -> None:
    """Keep the records up to a step; a line that was being written is not one."""
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
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text("".join(kept))
    unfinished.replace(file)


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
