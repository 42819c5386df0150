"""`vidl bench compare` reports a planted slowdown, but not noise and not other sizes."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from vidl.bench.measure import hardware, timing
from vidl.bench.measure.cases import Candidate
from vidl.bench.ops import masked_patch_loss as description
from vidl.bench.report import records
from vidl.bench.report.compare import compare
from vidl.cli import main


def record(median, spread=0.01, **other):
    values = {
        "op": "masked_patch_embed", "shape": "tiny", "sizes": {"B": 2}, "dtype": "float32",
        "mode": "full", "threads": 2, "device": "Some CPU", "candidate": "vidl native",
        "kind": "ours", "quick": False, "status": "ok", "reason": None, "commit": "abc",
        "timestamp": "2026-11-22T10:00:00+00:00",
    }  # fmt: skip
    if median is not None:
        values |= {"median_ms": median, "p20_ms": median - spread, "p80_ms": median + spread}
    return values | other


def lines(file, *records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(file)


@pytest.mark.parametrize(
    "new, spread, verdict, status",
    [
        (1.5, 0.01, "slower", 1),
        (0.5, 0.01, "faster", 0),
        (1.5, 0.6, "same", 0),
        (1.02, 0.011, "same", 0),
    ],
)
def test_changes_beyond_noise_are_reported(tmp_path, capsys, new, spread, verdict, status):
    old = lines(tmp_path / "old.jsonl", record(1.0, spread))
    new = lines(tmp_path / "new.jsonl", record(new, spread))
    assert main(["bench", "compare", old, new]) == status
    assert f"1 {verdict}" in capsys.readouterr().out
    assert main(["bench", "compare", old, new, "--json"]) == status
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["verdict"] == verdict and row["old_median_ms"] == 1.0
    assert row["ratio"] == pytest.approx(1.0 / row["new_median_ms"])


def test_a_slowdown_is_shown_with_its_times(tmp_path, capsys):
    old, new = (lines(tmp_path / f"{ms}.jsonl", record(ms)) for ms in (1.0, 2.0))
    main(["bench", "compare", old, new])
    text = capsys.readouterr().out
    assert "slower   0.50 x  masked_patch_embed · tiny" in text
    assert "1.000 (0.990-1.010) -> 2.000 (1.990-2.010) ms" in text


def test_a_slower_baseline_is_shown_and_is_no_failure(tmp_path, capsys):
    old, new = (
        lines(tmp_path / f"{ms}.jsonl", record(ms, kind="baseline", candidate="conv"))
        for ms in (1, 2)
    )
    assert main(["bench", "compare", old, new]) == 0
    assert "slower   0.50 x" in capsys.readouterr().out


def test_a_result_that_became_wrong_is_a_failure(tmp_path, capsys):
    old = lines(tmp_path / "old.jsonl", record(1.0))
    new = lines(tmp_path / "new.jsonl", record(None, status="wrong", reason="result is off by 1"))
    assert main(["bench", "compare", old, new]) == 1
    assert "wrong: result is off by 1" in capsys.readouterr().out


@pytest.mark.parametrize("differs", [{"sizes": {"B": 4}}, {"quick": True}])
def test_other_sizes_and_quick_runs_are_not_compared(differs):
    (change,) = compare([record(1.0)], [record(9.0, **differs)])
    assert change.verdict == "other" and change.ratio is None and "and" in change.reason


def test_measurements_differ_in_every_field_of_the_key():
    for name, value in {
        "op": "x", "shape": "x", "dtype": "x", "mode": "x", "threads": 1, "candidate": "x",
        "device": "x",
    }.items():  # fmt: skip
        assert compare([record(1.0)], [record(2.0, **{name: value})]) == []


def test_the_newest_record_counts(tmp_path):
    rows = [
        record(1.0, timestamp="2026-11-22T11:00:00+00:00"),
        record(5.0, timestamp="2026-11-22T10:00:00+00:00"),
        record(2.0, timestamp="2026-11-22T11:00:00+00:00"),
    ]
    lines(tmp_path / "a.jsonl", *rows)
    (newest,) = records.newest(records.load(tmp_path)).values()
    assert newest["median_ms"] == 2.0


def test_the_records_of_a_commit_are_read(tmp_path, monkeypatch):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True)

    folder = tmp_path / records.RESULTS / "some-cpu"
    folder.mkdir(parents=True)
    git("init", "-q")
    lines(folder / "op.jsonl", record(1.0))
    git("add", ".")
    git("commit", "-qm", "one")
    lines(folder / "op.jsonl", record(2.0))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert [r["median_ms"] for r in records.load("HEAD")] == [1.0]


@pytest.mark.parametrize(
    "content, message",
    [("{\n", "line 1: need JSON"), ("[1]\n", "need a record"), (None, "a folder or a commit")],
)
def test_an_unreadable_source_is_named_in_the_error(tmp_path, capsys, content, message):
    old, new = lines(tmp_path / "old.jsonl", record(1.0)), tmp_path / "new.jsonl"
    if content is not None:
        new.write_text(content)
    with pytest.raises(SystemExit):
        main(["bench", "compare", old, str(new)])
    assert message in capsys.readouterr().err


def test_nothing_in_common_is_an_error(tmp_path, capsys):
    old = lines(tmp_path / "old.jsonl", record(1.0))
    new = lines(tmp_path / "new.jsonl", record(1.0, op="other"))
    with pytest.raises(SystemExit):
        main(["bench", "compare", old, new])
    assert "no measurement in common" in capsys.readouterr().err


def test_a_planted_slowdown_is_reported_end_to_end(tmp_path, monkeypatch, capsys):
    shape = dict(B={"cpu": 1}, T=1, image_size=16, tubelet_size=1, patch_size=8, masked=1)
    limits = hardware.Limits(copy=1e9, matmul=1e9, matmul_dtype=torch.float32)
    monkeypatch.setattr(description, "SHAPES", {"tiny": shape | {"target": "mae"}})
    monkeypatch.setattr(hardware, "limits", lambda *args: limits)
    clock = SimpleNamespace(now=0.0)  # the test advances the clock itself, without waiting
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def measured(seconds):
        def run(inputs):
            clock.now += seconds
            return description.loss(inputs, backend="reference")

        planted = [Candidate("vidl planted", "ours", run)]
        monkeypatch.setattr(description, "candidates", lambda *args: planted)
        out = tmp_path / str(seconds)
        command = ["bench", "masked_patch_loss", "--modes", "forward", "--quick", "--write"]
        assert main([*command, str(out)]) == 0
        return str(out)

    before, after = measured(0.001), measured(0.002)
    capsys.readouterr()
    assert main(["bench", "compare", before, after]) == 1
    assert "slower   0.50 x  masked_patch_loss · tiny" in capsys.readouterr().out
    assert main(["bench", "compare", after, before]) == 0
