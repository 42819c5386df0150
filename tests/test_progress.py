"""The progress bar on a terminal of 80 columns and elsewhere; trackers and their failures."""

import io
import json
import re

import pytest

from vidl.progress import Bar
from vidl.training import trackers
from vidl.training.progress import Progress
from vidl.training.trackers import Trackers

VALUES = {
    "loss": 12.3456, "vtc": 4.5, "mlm": 7.8456, "losses": ["vtc", "mlm"],
    "clips_per_second": 1234.5, "tokens_per_second": 5.6e6, "data_wait": 0.031,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def drawn(self):
        """What was drawn, one text for each drawing, without control codes."""
        parts = re.split(r"\r|\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()))
        return [part.rstrip() for part in parts if part.strip()]


@pytest.fixture
def terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_a_run_fits_a_terminal_of_80_columns(terminal, tmp_path):
    progress = Progress(tmp_path, 20, 100_000, out=terminal)
    progress.step(21)
    progress.record(120, VALUES)
    progress.say("saved [it] " + "x" * 100)
    progress.record(130, VALUES)
    progress.close()
    lines = terminal.drawn()
    said = [line for line in lines if line.startswith("saved")]
    assert said == ["saved [it] " + "x" * 100], "whole, and no markup"
    bars = [line for line in lines if line not in said]
    assert all(line.startswith("ETA ") and len(line) <= 80 for line in bars), bars
    assert re.match(r"ETA \d+:\d\d:\d\d \S+ +130/100000 +loss 12.346  1234.5 clips/s", bars[-1])
    assert bars[-1].endswith("data wait 3%…"), "whole parts, and it shows that there are more"
    assert re.findall(r"\x1b\[\?25[hl]", terminal.getvalue())[-1].endswith("h"), "no hidden cursor"
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [120, 130]


@pytest.mark.parametrize("columns, end", [
    (43, "loss 12.346…"), (60, "clips/s…"), (80, "data wait 3%…"), (90, "tokens/s…"),
    (102, "(vtc 4.500…"), (120, "(vtc 4.500, mlm 7.846)"),
])  # fmt: skip
def test_a_narrow_terminal_gets_whole_parts(terminal, tmp_path, monkeypatch, columns, end):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(tmp_path, 0, 99, out=terminal)
    progress.record(9, VALUES)
    progress.step(99)  # the text stays
    progress.close()
    for line in terminal.drawn():
        assert len(line) <= columns and line.endswith(end)


def test_other_outputs_get_lines(tmp_path):
    out = io.StringIO()
    progress = Progress(tmp_path, 0, 10, out=out)
    progress.step(1)
    progress.record(5, VALUES)
    with Bar(3, out=out) as bar:
        bar.update(1)
        bar.begin(2, "an op")
    shown = out.getvalue().splitlines()
    assert re.match(r"ETA 0:00:\d\d  5/10  loss 12.346  1234.5 clips/s  data wait 3%", shown[0])
    assert "(vtc 4.500, mlm 7.846)" in shown[0] and shown[1:] == ["[2/3] an op"]


def test_a_terminal_without_rich_gets_lines(terminal, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    with Bar(3, out=terminal) as bar:
        bar.begin(1, "an op")
    assert terminal.getvalue() == "[1/3] an op\n"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_writes_below_the_run(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    stores = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE")
    for variable in ("WANDB_MODE", *stores):
        monkeypatch.setenv(variable, "")  # so that it is as before afterwards
        monkeypatch.delenv(variable)
    warnings = []
    values = {"optimizer.lr": 1e-4, "data.files": ["a.json"], "data.media": None}
    opened = Trackers([name, name], tmp_path, values, warnings.append)
    opened.log(1, {"loss": 2.5, "evaluation/t2v R@1": 3.0})
    opened.log(2, {"loss": 1.5})
    opened.close()
    assert warnings == []
    files = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert files and {file.parent for file in tmp_path.iterdir()} == {tmp_path}
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert [(x.step, x.value) for x in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    elif name == "mlflow":
        (metrics,) = [file for file in files if file.name == "loss"]
        rows = [line.split()[1:] for line in metrics.read_text().splitlines()]
        assert [(float(value), int(step)) for value, step in rows] == [(2.5, 1), (1.5, 2)]


def test_a_tracker_that_fails_is_one_warning(tmp_path, monkeypatch):
    closed = []

    def full(step, values):
        raise OSError(28, "No space left on device")

    openers = {"wandb": lambda *given: (full, closed.append), "mlflow": None}
    monkeypatch.setattr(trackers, "OPENERS", openers)
    warnings = []
    opened = Trackers(["wandb", "mlflow"], tmp_path, {}, warnings.append)
    for step in range(3):
        opened.log(step, {"loss": 1.0})
    opened.close()
    assert len(warnings) == 2 and not closed
    assert "mlflow cannot write, and training goes on without it: TypeError" in warnings[0]
    assert warnings[1].endswith("without it: OSError: [Errno 28] No space left on device")
