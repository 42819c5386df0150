"""Committed measurements: records from a file, a folder or a commit; the newest of each key."""

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vidl.bench.measure.cases import BENCH

Record = dict[str, Any]
Key = tuple[Any, ...]
ROOT = BENCH.parent
RESULTS = "bench/results"

# Records are never edited: words that were used until November 2026, and those of today.
KINDS = {"peer": "baseline"}
NAMES = {"vidl compiled": "vidl native", "stock, compiled": "torch.compile", "stock": "pytorch"}
FIELDS = {"strongest_peer": "strongest_baseline"}
CLIPS = {"SIDE": "image_size", "t": "tubelet_size", "p": "patch_size"}
SIZES = {
    "frame_difference": CLIPS,
    "masked_patch_embed": CLIPS | {"D": "C", "K": "kept"},
    "masked_patch_loss": CLIPS | {"M": "masked"},
}


def key(record: Record) -> Key:
    """What identifies a measurement: two records with the same key measured the same thing."""
    names = ("device", "op", "shape", "dtype", "mode", "threads", "candidate")
    return tuple(record.get(name) for name in names)


def load(source: str | Path) -> list[Record]:
    """Read records from JSON lines, in file order.

    Args:
        source: a file, a folder (all `*.jsonl` in it), or a commit, from which `bench/results` is
            read.

    Raises:
        ValueError: there is no such file, folder or commit, or a line is not a record.
    """
    path = Path(source)
    if path.is_file():
        files = [(str(path), path.read_text())]
    elif path.is_dir():
        files = [(str(file), file.read_text()) for file in sorted(path.rglob("*.jsonl"))]
    else:
        files = list(_committed(str(source)))
    return [record for name, text in files for record in _parse(name, text)]


def newest(records: Iterable[Record]) -> dict[Key, Record]:
    """The newest record of each key; the last one if several have the same time."""
    latest: dict[Key, Record] = {}
    for record in records:
        before = latest.get(key(record))
        if before is None or record.get("timestamp", "") >= before.get("timestamp", ""):
            latest[key(record)] = record
    return latest


def translate(record: Record) -> Record:
    """A record with the words of today."""
    record = {FIELDS.get(field, field): value for field, value in record.items()}
    sizes = SIZES.get(record["op"], {})
    for field, value in record.items():
        if field in ("candidate", "column", "strongest_baseline") and value is not None:
            record[field] = _name(value)
        elif field == "kind":
            record[field] = KINDS.get(value, value)
        elif field == "ratio_to":
            record[field] = {_name(other): ratio for other, ratio in value.items()}
        elif field == "sizes":
            record[field] = {sizes.get(name, name): size for name, size in value.items()}
    return record


def _name(text: str) -> str:
    for old, new in NAMES.items():
        text = text.replace(old, new)
    return text


def _parse(name: str, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: need JSON, got {line[:40]!r}") from error
        if not isinstance(record, dict) or "op" not in record:
            raise ValueError(f"{name}, line {number}: need a record of `vidl bench`, with its op")
        yield translate(record)


def _committed(commit: str) -> Iterator[tuple[str, str]]:
    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        names = git("ls-tree", "-r", "--name-only", commit, "--", RESULTS).splitlines()
        for name in (name for name in names if name.endswith(".jsonl")):
            yield name, git("show", f"{commit}:{name}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"need a file, a folder or a commit, got {commit!r}") from error
