"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, over the fuzz.

It was seen red with a planted read of one pixel past the end of a clip, and with a planted signed
overflow, in frame_difference.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
CXX = os.environ.get("CXX", "g++")

# Without the oracles, which test_fuzz.py runs.
FUZZ = """
from fuzz.sweep import OPS, case_of, dtypes_of
for op in OPS:
    for number in range(300):
        case_of(op, number, dtypes_of("native", op)).run("native")
    print(op)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("cmake", path=TOOLS) or not shutil.which(CXX),
    reason="needs cmake and a C++ compiler",
)
def test_the_fuzz_under_sanitizers(tmp_path):
    env = os.environ | {"PATH": TOOLS}
    build = tmp_path / "build"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_CXX_COMPILER={CXX}"]
    configure += ["-DVIDL_SANITIZE=address,undefined", f"-DPython3_EXECUTABLE={sys.executable}"]
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    for part in ("vidl", "kernels", "tests"):
        shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=skip)
    for command in (
        configure,
        ["cmake", "--build", build, "--parallel", "2"],
        ["cmake", "--install", build, "--prefix", tree / "vidl"],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    # Python itself has no sanitizer, so the libraries are loaded before it.
    preload = [
        subprocess.check_output([CXX, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    env |= {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks at its exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "VIDL_CPU_MKL": "0",  # our own matmuls
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", FUZZ], env=env, cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
