"""The public API: a change of a name or a signature is meant, and in the changelog."""

import difflib
from pathlib import Path

import api
import pytest


def test_the_public_api_is_that_of_the_snapshot():
    for library in ("lightning", "pyarrow", "tokenizers", "transformers", "webdataset"):
        pytest.importorskip(library)  # modules of the reference import them
    file = Path(__file__).with_name("api.txt")
    kept, now = file.read_text().splitlines(), list(api.lines())
    marks = ("---", "+++", "@@")
    diff = difflib.unified_diff(kept, now, lineterm="", n=0)
    changes = [line for line in diff if not line.startswith(marks)]
    assert not changes, "\n".join(["if meant: make api, and a line in CHANGELOG.md", *changes])
    assert any(line.startswith("vidl.swap(") for line in now) and len(now) > 300
