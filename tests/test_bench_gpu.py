"""`make gpu` without a GPU: its steps share the time, and its summary lists every problem."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from test_bench_report import OP, SHAPE, STEPS, record

from vidl.bench.measure import harness
from vidl.bench.measure.cases import Case
from vidl.bench.report import verdict
from vidl.cli import main

ROOT = Path(__file__).parents[1]


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def test_the_summary_names_what_is_slower_far_from_its_limit_and_wrong(tmp_path, capsys):
    good = record(1.0, 1.5)
    slow = record(1.0, 0.8, mode="forward")
    far = record(4.0, 1.5, dtype="bfloat16")
    wrong = record(dtype="float16", status="wrong", reason="off by 1")
    del wrong["median_ms"]
    baseline = wrong | {"kind": "baseline", "candidate": "gather"}
    folder = write(tmp_path, good, slow, far, wrong, baseline, *STEPS)
    assert main(["bench", "summary", folder]) == 1
    text = capsys.readouterr().out
    assert "3 measurements of vidl" in text
    assert (
        f"1 slower than a baseline\n    {OP} · {SHAPE} · float32 · forward: 0.80 × (gather)" in text
    )
    least = verdict.least_share(OP)
    assert "1 below the required share of the hardware limit" in text
    assert f"{OP} · {SHAPE} · bfloat16 · forward/backward: 25% of {least:.0%}" in text
    assert f"1 results of vidl wrong or failed\n  wrong   {OP} · {SHAPE} · float16 · full" in text
    assert f"1 results of baselines wrong or failed; {OP} float16 1" in text
    assert "a step of mac tiny, 4 clips: dense, pytorch 20.0 ms" in text
    assert "realised 100% of 2.50 × fewer FLOPs" in text


def test_the_summary_is_filtered_by_device_and_time(tmp_path, capsys):
    card = record(device="NVIDIA H200", device_type="cuda", timestamp="2026-11-24T10:00:00+00:00")
    folder = write(tmp_path, record(), card)
    assert main(["bench", "summary", folder, "--device", "cuda"]) == 0
    text = capsys.readouterr().out
    assert "GPU: NVIDIA H200" in text and "Some CPU" not in text
    assert main(["bench", "summary", folder, "--since", "2026-11-23T00:00"]) == 0
    assert "Some CPU" not in capsys.readouterr().out
    assert main(["bench", "summary", folder, "--since", "2027"]) == 1, "nothing was measured"


def case(op, shape):
    return Case(op, shape, {}, None, "cpu")


def test_with_a_budget_the_ops_are_interleaved():
    cases = [case("a", 1), case("a", 2), case("a", 3), case("b", 1), case("c", 1), case("c", 2)]
    order = [(c.op, c.shape) for c in harness.interleaved(cases)]
    assert order == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("c", 2), ("a", 3)]


def test_a_budget_ends_a_run_and_lists_what_was_not_measured(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 9.0])
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(harness, "check", lambda case: [])
    limits = harness.hardware.Limits(1.0, 1.0, None)
    monkeypatch.setattr(harness.hardware, "limits", lambda *args: limits)
    monkeypatch.setattr(harness.timing, "measure", lambda *args: {})
    monkeypatch.setattr(harness, "records", lambda case, *args: [case.op])
    plan = harness.plan(["masked_patch_loss"], device="cpu", modes=["forward"])
    assert len(plan.cases) > 1
    assert list(harness.run(plan, budget=5.0)) == [["masked_patch_loss"]]
    text = capsys.readouterr().err
    assert "5 s are over; not measured: masked_patch_loss · SMAUG" in text


FAKE = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  "-m pytest"*) exit $TESTS ;;
  *"vidl savings"*) exit 0 ;;
  *"bench summary"*) echo "the summary" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE)
    python.chmod(0o755)

    def run(tests=0, spent=0):
        began = int(time.time()) - spent
        log.write_text("")
        command = ["make", "-s", "gpu-steps", f"GPU_PYTHON={python}", f"GPU_BEGAN={began}"]
        environment = os.environ | {"LOG": str(log), "TESTS": str(tests)}
        command += [f"RESULTS={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    return run


def test_make_gpu_runs_every_step_and_sums_up(make, tmp_path):
    done, calls = make()
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["pytest -m gpu", "vidl bench --device cuda --budget", "vidl savings smaug",
             "vidl savings mac", "vidl bench summary"]  # fmt: skip
    assert [w in c for w, c in zip(words, calls, strict=True)] == [True] * 5, calls
    assert all(f"--write {tmp_path}" in call for call in calls[1:4])
    assert all("backend=native" in call for call in calls[2:4])
    assert "the summary" in done.stdout
    for name in ("GPU tests", "ops", "savings of SMAUG", "savings of MAC"):
        assert f"  {name}: passed" in done.stdout


def test_make_gpu_goes_on_after_a_failure_and_fails(make):
    done, calls = make(tests=1)
    assert done.returncode != 0 and len(calls) == 5
    assert "  GPU tests: failed" in done.stdout and "  ops: passed" in done.stdout


def test_make_gpu_skips_steps_without_time(make):
    done, calls = make(spent=470)
    assert done.returncode != 0
    assert "  GPU tests: no time left" in done.stdout and "  ops: no time left" in done.stdout
    assert [c for c in calls if "savings mac" in c] and "summary" in calls[-1]
