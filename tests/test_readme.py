"""Every Python block of README.md runs as it stands, in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_first_import_comes_early():
    first = next(
        i for i, line in enumerate(README.splitlines(), 1) if re.match(r"(from|import) ", line)
    )
    assert first <= 15


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, tmp_path):
    for library in re.findall(r"\b(timm|transformers)\b", BLOCKS[number]):
        pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # also where vidl is not installed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{BLOCKS[number]}\n{done.stderr}"


def test_every_make_target_that_it_names_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?<![a-z])make ([a-z-]+)", README)) <= set(targets)
