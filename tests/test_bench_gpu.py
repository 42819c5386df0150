"""`make gpu` without a GPU: its steps share the time, and its summary lists every problem."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_bench_report import OP, SHAPE, STEPS, record

from vidl.bench.measure import harness
from vidl.bench.measure.cases import Case
from vidl.bench.report import verdict
from vidl.cli import main

ROOT = Path(__file__).parents[1]
OPS = sorted(file.parent.name for file in ROOT.glob("kernels/*/op.py"))


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
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(clock)))
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


# Stands for Python with a GPU: notes its calls, fails in the tests if told to, and says its torch.
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  "-m pytest"*) exit $TESTS ;;
  *"bench summary"*) echo "the summary" ;;
  *"vidl tune"*) echo "the choices are in $VIDL_CACHE" ;;
  *torch.__version__*) echo "$TORCH" ;;
esac
"""
# Stands for CMake: installs two files.
CMAKE = """#!/bin/sh
echo "cmake $*" >> "$LOG"
case "$*" in *--install*) touch "$4/_C.so" "$4/_build.json" ;; esac
"""


@pytest.fixture
def make(tmp_path):
    """A function that runs a target of the Makefile and returns the process and its calls."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    log = tmp_path / "log"
    for name, text in {"python": PYTHON, "cmake": CMAKE}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "vidl").mkdir()

    def run(target, tests=0, spent=0, torch="2.11.0"):
        log.write_text("")
        facts = {"LOG": str(log), "TESTS": str(tests), "TORCH": torch}
        facts["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        python = tmp_path / "python"
        command = ["make", "-s", target, f"PYTHON={python}", f"GPU_PYTHON={python}"]
        command += [f"GPU_BEGAN={int(time.time()) - spent}", f"RESULTS={tmp_path}"]
        folders = {"GPU_PREBUILT": "gpu", "GPU_PREFIX": "vidl", "GPU_CMAKE": "cmake-gpu"}
        command += [f"{name}={tmp_path / folder}" for name, folder in folders.items()]
        # Not the variables of `make test ARGS=...`, which the make of this test would take over.
        inherited = {
            name: x
            for name, x in os.environ.items()
            if name != "ARGS" and not name.startswith("MAKE")
        }
        environment = inherited | facts
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        calls = [line for line in log.read_text().splitlines() if line.startswith(("-m", "cmake"))]
        return done, calls

    return run


STEPS_OF_MAKE = {
    "smoke tests": "pytest -r fEs -m gpu_smoke tests/",
    "tuning of SMAUG": "vidl tune smaug --device cuda --budget",
    "tuning of MAC": "vidl tune mac --device cuda --budget",
    "ops": "vidl bench --device cuda --budget",
    "savings of SMAUG": "vidl savings smaug backend=auto",
    "savings of MAC": "vidl savings mac backend=auto",
    "other GPU tests": "pytest -r fEs -m gpu and not gpu_smoke",
}


def test_make_gpu_runs_every_step_and_sums_up(make, tmp_path):
    done, calls = make("gpu-steps")
    assert done.returncode == 0, done.stdout + done.stderr
    words = [*STEPS_OF_MAKE.values(), "vidl bench summary"]
    assert [w in c for w, c in zip(words, calls, strict=True)] == [True] * 8, calls
    assert all(f"--write {tmp_path}" in call for call in calls[3:6])
    assert f"the choices are in {tmp_path}/cache" in done.stdout
    assert "the summary" in done.stdout
    assert all(f"  {name}: passed" in done.stdout for name in STEPS_OF_MAKE)


def test_make_gpu_goes_on_after_a_failure_and_fails(make):
    done, calls = make("gpu-steps", tests=1)
    assert done.returncode != 0 and len(calls) == 8
    assert "  smoke tests: failed" in done.stdout and "  ops: passed" in done.stdout
    assert "  other GPU tests: failed" in done.stdout


def test_make_gpu_skips_steps_without_time(make):
    done, calls = make("gpu-steps", spent=420)
    assert done.returncode != 0
    for name in ("smoke tests", "tuning of SMAUG", "tuning of MAC", "ops", "savings of SMAUG"):
        assert f"  {name}: no time left" in done.stdout
    assert "  other GPU tests: passed" in done.stdout
    assert [c for c in calls if "savings mac" in c] and "summary" in calls[-1]


def test_make_gpu_takes_a_library_that_was_built_elsewhere_if_it_fits(make, tmp_path):
    """The whole sequence: build for a GPU without one, then run with it, with fake commands."""
    done, calls = make("gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(calls) == 11 and "-DCMAKE_CUDA_ARCHITECTURES=90" in calls[0]
    assert calls[2] == f"cmake --install {tmp_path}/cmake-gpu --prefix {tmp_path}/vidl"

    done, calls = make("gpu-build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[2] == f"cmake --install {tmp_path}/cmake-gpu --prefix {tmp_path}/gpu"
    files = {"_C.so", "_build.json", "key", "triton"}
    assert {file.name for file in (tmp_path / "gpu").iterdir()} == files

    (tmp_path / "gpu/_C.so").write_text("from elsewhere")
    done, calls = make("gpu")
    assert done.returncode == 0 and len(calls) == 8 and "took the library of" in done.stdout
    assert (tmp_path / "vidl/_C.so").read_text() == "from elsewhere"

    done, calls = make("gpu", torch="2.12.0")
    assert done.returncode == 0 and len(calls) == 11 and "another torch" in done.stdout


def test_the_smoke_tests_are_one_of_each_kind():
    """Every op, backend and dtype; those without a kernel for the GPU are skipped there."""
    files = [f"tests/test_{op}.py" for op in OPS]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "--collect-only"]
    done = subprocess.run(
        [*command, "-m", "gpu_smoke", *files], cwd=ROOT, capture_output=True, text=True
    )
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    kinds = {(test.split("::")[0], *test.split("[")[1].split("-")[:3]) for test in tests}
    dtypes, backends = ("f32", "f16", "bf16"), ("native", "triton")
    assert kinds == {(f, d, b, "cuda") for f in files for d in dtypes for b in backends}
    assert 30 < len(tests) < 60


def test_tests_beyond_the_time_are_skipped(request, monkeypatch):
    plugins = request.config.pluginmanager.get_plugins()
    (conftest,) = (
        p for p in plugins if getattr(p, "__file__", "") == str(ROOT / "tests/conftest.py")
    )
    monkeypatch.setenv("VIDL_TEST_UNTIL", str(int(time.time()) + 1000))
    conftest.pytest_runtest_setup(request.node)
    monkeypatch.setenv("VIDL_TEST_UNTIL", str(int(time.time()) - 1))
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        conftest.pytest_runtest_setup(request.node)
