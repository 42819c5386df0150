"""What was measured before: records from a file, a folder or a commit, the newest of each key."""

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


def key(record: Record) -> Key:
    """What tells measurements of one op apart; two of the same key are the same measurement."""
    names = ("device", "op", "shape", "dtype", "mode", "threads", "candidate")
    return tuple(record.get(name) for name in names)


def load(source: str | Path) -> list[Record]:
    """The records of JSON lines, in their order.

    Args:
        source: a file, a folder (all `*.jsonl` in it), or a commit, of which `bench/results` is
            read.

    Raises:
        ValueError: there is no such file, folder or commit, or a line of it is no record.
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
    """The newest record of each key; of equally old ones the last."""
    found: dict[Key, Record] = {}
    for record in records:
        before = found.get(key(record))
        if before is None or record.get("timestamp", "") >= before.get("timestamp", ""):
            found[key(record)] = record
    return found


def _parse(name: str, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: need JSON, got {line[:40]!r}") from error
        if not isinstance(record, dict) or "op" not in record:
            raise ValueError(f"{name}, line {number}: need a record of `vidl bench`, with its op")
        if record.get("candidate") == "vidl compiled":  # the name until November 2026
            record["candidate"] = "vidl native"
        yield record


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
