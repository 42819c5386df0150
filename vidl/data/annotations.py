"""Rows of annotations in a memory-mapped Arrow table that all workers share.

A Python list of dicts is copied into every worker: VindLU reports 200 GB. A table only costs the
pages that are read, once per machine. `vidl data convert` writes it, or vidl does on first use.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.compute as pc

from vidl.data.folders import annotations_of, captioned, contents, matching
from vidl.data.formats import FORMATS, Row
from vidl.files import cache_folder, replaced

SCHEMA = pa.schema(
    [
        ("media", pa.string()),
        ("kind", pa.string()),
        ("id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("options", pa.list_(pa.string())),
        ("correct", pa.int32()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("second", pa.string()),
        ("label", pa.bool_()),
        ("answers", pa.list_(pa.string())),
    ]
)
ROWS_AT_A_TIME = 100_000
# Increased when the same file gives other rows, so that cached tables are not used any more.
READER = 4
# Files that FFmpeg would take for a URL or a protocol, and files outside the folder of the media.
URL = r"^([A-Za-z][A-Za-z0-9+.-]+:|subfile,)"
OUTSIDE = r"^[/~]|^\.\.$|^\.\./|/\.\./|/\.\.$"
REFUSED = (
    (URL, "vidl opens no URLs: download the files first"),
    (OUTSIDE, "if you trust this file, set data.outside=true or --outside"),
)


class Annotations(Sequence[Row]):
    """The rows of one or several annotation files.

    Args:
        parts: pairs of an Arrow file written by `convert` and the folder of its media.
        outside: whether media may lie outside this folder (absolute paths and `..`).

    Raises:
        ValueError: a file is not such a table, or names a URL or media outside the folder.
    """

    def __init__(self, parts: Iterable[tuple[str | Path, str | Path]], *, outside: bool = False):
        self.parts = [(Path(file), Path(media)) for file, media in parts]
        self._tables = [_open(file) for file, _ in self.parts]
        for (file, _), table in zip(self.parts, self._tables, strict=True):
            _only_files(file, table, outside)
        self.outside = outside
        self._ends = list(itertools.accumulate(table.num_rows for table in self._tables))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """The row at an index; its media path includes the folder."""
        if not isinstance(index, int):
            raise TypeError(f"need an int, got {type(index).__name__}")
        if not 0 <= index < len(self):
            raise IndexError(f"need a row below {len(self)}, got {index}")
        part = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[part - 1] if part else 0)
        (values,) = self._tables[part].slice(row, 1).to_pylist()
        for name in ("media", "second"):
            if values[name] is not None:
                values[name] = str(self.parts[part][1] / values[name])
        return Row(**values)

    def kinds(self) -> numpy.ndarray:
        """True for images, false for videos: bool [rows]."""
        columns = [pc.equal(table.column("kind"), "image").to_numpy() for table in self._tables]
        return numpy.concatenate([numpy.zeros(0, bool), *columns])

    def pairs(self) -> numpy.ndarray:
        """True for rows of two clips: bool [rows]."""
        columns = [pc.is_valid(table.column("second")).to_numpy() for table in self._tables]
        return numpy.concatenate([numpy.zeros(0, bool), *columns])

    # Pickle the paths, not the tables: workers map the same pages.
    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "outside": self.outside}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["parts"], outside=state["outside"])  # type: ignore[misc]


def _open(file: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowException as error:
        raise ValueError(f"{file}: need an Arrow file written by vidl; {error}") from None
    if table.schema != SCHEMA:
        raise ValueError(f"{file}: need the columns {SCHEMA.names}, got {table.schema.names}")
    return table


def _only_files(file: Path, table: pa.Table, outside: bool) -> None:
    """Refuse a table of a stranger that reaches the network or other files of this machine.

    Raises:
        ValueError: names the first such row.
    """
    for name, (pattern, remedy) in itertools.product(("media", "second"), REFUSED):
        if outside and pattern == OUTSIDE:
            continue
        media = table.column(name)
        row = pc.index(pc.match_substring_regex(media, pattern), True).as_py()
        if row >= 0:
            raise ValueError(
                f"{file}: need files below the folder of the media, got {media[row].as_py()!r} in "
                f"row {row}; {remedy}"
            )


def check_media(name: str, outside: bool) -> None:
    """Refuse a file name that reaches the network or, unless allowed, other files of this machine.

    Raises:
        ValueError: names the file.
    """
    for pattern, remedy in REFUSED:
        if re.search(pattern, name) and not (outside and pattern == OUTSIDE):
            raise ValueError(f"need a file below the folder of the media, got {name!r}; {remedy}")


def convert(
    file: str | Path,
    to: str | Path,
    *,
    format: str | None = None,
    media: str | Path | None = None,
    **options: Any,
) -> int:
    """Convert an annotation file to an Arrow table, atomically.

    Args:
        file: the annotations, or a glob of files in one folder.
        to: the Arrow file.
        format: a key of `formats.FORMATS`; default: the format that `load` takes the file for.
        media: folder of the media. If given, file names get the suffixes of its files: clips of
            DiDeMo and ActivityNet have the suffix they were downloaded with.
        options: options of the format's reader.

    Returns:
        The number of rows.

    Raises:
        ValueError: unknown format, the file is invalid (`formats.BadAnnotation`), or the files of a
            glob are in several folders.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"need a format among {', '.join(FORMATS)}, got {format!r}")
    files = [Path(name) for name in matching(file)]
    if len(files) > 1 and (len({f.parent for f in files}) > 1 or any(f.is_dir() for f in files)):
        raise ValueError(f"need files of one folder, got {', '.join(map(str, files))}")
    read = _rows if format is None else FORMATS[format]
    rows: Iterator[Row] = (row for part in files for row in read(part, **options))
    if media is not None:
        if not Path(media).is_dir():
            raise ValueError(f"need the folder of the media, got {media}")
        rows = _named_as_in(Path(media), rows)
    return write(_some(rows, file), to)


def write(rows: Iterable[Row], to: str | Path) -> int:
    """Write rows as an Arrow table, atomically; returns the number of rows.

    Raises:
        OSError: the table cannot be written, as on a full disk; names it.
        ValueError: there are no rows.
    """
    to, rows, count = Path(to), iter(rows), 0
    to.parent.mkdir(parents=True, exist_ok=True)
    with replaced(to) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            while batch := list(itertools.islice(rows, ROWS_AT_A_TIME)):
                columns = {name: [getattr(row, name) for row in batch] for name in SCHEMA.names}
                writer.write(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
                count += len(batch)
        if not count:
            raise ValueError(f"{to}: there are no rows to write")
    return count


def _some(rows: Iterable[Row], file: str | Path) -> Iterator[Row]:
    """The rows of a file that must have some."""
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise ValueError(f"{file}: need annotations, got no rows")


def load(
    *corpora: str | Path | tuple[str | Path, str | Path | None], outside: bool = False
) -> Annotations:
    """Open annotation files; all but Arrow files are converted to an Arrow table on first use.

    The table is stored in $VIDL_CACHE (default: ~/.cache/vidl). Its name depends on the path, size
    and time of the files, so an edited file is converted again.

    Args:
        corpora: annotations, or pairs of annotations and the folder of their media. Annotations are
            an Arrow file, common JSON or JSON lines, a CSV or TSV file with the columns of
            `formats.columns`, a folder with metadata.csv or metadata.jsonl or with a text beside
            each clip, or a glob of any of these. Default folder of the media: the first of these
            that has a file of the first rows: for mine.json the folder `mine` beside it, the folder
            `clips` beside it, the folder of the file. If none has, the first that exists.
        outside: see `Annotations`.

    Returns:
        The rows of all files, in order.

    Raises:
        ValueError: a file does not have the format that its suffix says, or see `Annotations`.
    """
    parts = []
    for corpus in corpora:
        names, media = corpus if isinstance(corpus, tuple) else (corpus, None)
        for file in map(Path, matching(names)):
            table = _converted(file)
            parts.append((table, _folder_beside(file, table) if media is None else media))
    return Annotations(parts, outside=outside)


def _folder_beside(file: Path, table: Path) -> Path:
    if file.is_dir():
        return file
    beside = [file.with_suffix(""), file.parent / "clips", file.parent]
    folders = [folder for folder in beside if folder.is_dir()]
    names = _open(table).slice(0, 10).column("media").to_pylist()
    held = (folder for folder in folders if any((folder / name).is_file() for name in names))
    return next(held, folders[0])


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a file or folder whose format its name says."""
    file = annotations_of(file) if file.is_dir() else file
    if file.is_dir():
        return captioned(file)
    if file.suffix in (".csv", ".tsv"):
        return FORMATS["csv"](file)
    if file.suffix in (".json", ".jsonl"):
        return FORMATS["common"](file)
    raise ValueError(
        f"{file}: need .arrow, .json, .jsonl, .csv, .tsv or a folder; else `vidl data convert`"
    )


def _converted(file: Path) -> Path:
    if file.suffix == ".arrow" and not file.is_dir():
        return file
    read = annotations_of(file) if file.is_dir() else file
    facts = [(str(f), f.stat()) for f in (contents(read) if read.is_dir() else [read])]
    versions = [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]
    key = f"{read.resolve()} {versions} {READER} {SCHEMA}"
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]
    table = cache_folder() / f"{file.stem}-{digest}.arrow"
    if not table.exists():
        write(_some(_rows(file), file), table)
    return table


def _named_as_in(folder: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """Correct the suffix of media that the folder has under another suffix."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    by_stem: dict[Path, str] = {}
    for file in files:
        by_stem.setdefault(file.with_suffix(""), str(file))
    for row in rows:
        changed: dict[str, Any] = {}
        for name in ("media", "second"):
            if getattr(row, name) is None:
                continue
            path = Path(getattr(row, name))
            # a converted file may have both suffixes: a.avi.mp4
            stem = next((s for s in (path.with_suffix(""), path) if s in by_stem), None)
            if stem is not None and not (folder / path).is_file():
                changed[name] = by_stem[stem]
        yield replace(row, **changed)
