"""The CUDA emulator finds what it should, and finds nothing in our kernels under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

OPS = sorted(
    file.stem.removeprefix("test_")
    for file in emulated.EMULATOR.glob("test_*.cpp")
    if (emulated.ROOT / "csrc" / f"{file.stem.removeprefix('test_')}.cu").is_file()
)
RACES = ["syncthreads", "syncwarp", "two_blocks", "two_warps"]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Looking for leaks needs ptrace, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if (
        "unexpected memory mapping" in done.stderr
    ):  # old ThreadSanitizers, much randomised addresses
        setarch = shutil.which("setarch")
        if setarch is None:
            pytest.skip("ThreadSanitizer needs addresses that are not randomised")
        command = [setarch, "--addr-no-randomize", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "Operation not permitted" in done.stderr:
            pytest.skip("ThreadSanitizer needs addresses that are not randomised")
    return done


def assert_passes(program: Path, *arguments: str) -> None:
    done = run(program, *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize(
    "kind", ["plain", "ucontext", pytest.param("address", marks=pytest.mark.slow)]
)
def test_emulator(kind):
    assert_passes(emulated.program("emulator", kind))


@pytest.mark.parametrize("kind", ["plain", pytest.param("address", marks=pytest.mark.slow)])
def test_planted_bugs_are_found(kind):
    assert_passes(emulated.program("bugs", kind))


@pytest.mark.slow
def test_a_read_past_a_shared_array_ends_the_program():
    done = run(emulated.program("bugs", "address"), "overrun")
    assert done.returncode != 0
    assert "out of bounds" in done.stderr or "AddressSanitizer" in done.stderr


def test_no_false_race():
    assert_passes(emulated.program("races", "thread"), "clean")


@pytest.mark.parametrize("bug", RACES)
def test_a_race_is_found(bug):
    done = run(emulated.program("races", "thread"), bug)
    assert done.returncode == 66 and "data race" in done.stderr, done.stderr[-4000:]


def test_every_kernel_has_a_sanitizer_test():
    assert sorted(file.stem for file in emulated.ROOT.glob("csrc/*.cu")) == OPS


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_under_sanitizers(op, kind):
    assert_passes(emulated.program(op, kind))
