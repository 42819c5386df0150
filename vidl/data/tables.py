"""Clips in tables that Hugging Face datasets reads as a stream: Parquet, Arrow, JSON lines, CSV."""

import functools
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vidl.data.annotations import check_media
from vidl.data.dataset import Clips, Sample
from vidl.data.folders import matching
from vidl.data.formats import NAMES, common_row, kind_of
from vidl.data.sampler import Key
from vidl.data.stream import Stream
from vidl.data.video import BrokenClip

# What datasets calls the format of a suffix.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json",
            ".csv": "csv"}  # fmt: skip
MEDIA = ("video", "image", *NAMES)
# Rows that are read at a time.
ROWS = 16


class TableStream(Stream):
    """Endless shuffled batches from tables; needs the package `datasets`.

    A row has a column `video`, `image`, `file_name` or `path`, and a column `caption` or `text`;
    `id`, `start` and `end` are optional. A clip is a file name, the bytes of a file, or a value of
    the features `Video` and `Image`. Files are split over the workers of all ranks if their number
    is a multiple of the number of workers; otherwise every worker reads all rows and decodes its
    share.

    Args:
        tables: files or globs of files, all of one format.
        media: folder of the clips that a table names; None: that of the first table.
        outside: whether media may lie outside this folder (absolute paths and `..`).
        clips, batch_size, options: see `Stream`, which also says how a run resumes.

    Raises:
        ValueError: no file, files of several formats or of another one, or a column is missing.
    """

    NOUN = "tables"

    def __init__(
        self,
        tables: Sequence[str],
        clips: Clips,
        batch_size: int,
        *,
        media: str | Path | None = None,
        outside: bool = False,
        **options: Any,
    ):
        names = [name for table in map(str, tables) for name in matching(table)]
        missing = [name for name in names if not Path(name).is_file()]
        if missing or not names:
            given = ", ".join(missing) or "none"
            raise ValueError(f"need tables (data.files) as local files, got {given}")
        suffixes = {Path(name).suffix for name in names}
        if len(suffixes) > 1 or not suffixes <= BUILDERS.keys():
            raise ValueError(
                f"need tables (data.files) of one format among {', '.join(BUILDERS)}, got "
                f"{', '.join(sorted(suffixes)) or 'none'}"
            )
        self.media, self.outside = Path(media or Path(min(names)).parent), outside
        self.builder = BUILDERS[suffixes.pop()]
        super().__init__(names, clips, batch_size, **options)
        row = next(self._rows(self._table), {})
        columns = [name for name in MEDIA if name in row]
        if not columns or not {"caption", "text"} & row.keys():
            raise ValueError(
                f"need columns {' or '.join(MEDIA)}, and caption or text, in {self.files[0]}, got "
                f"{', '.join(row) or 'no row'}"
            )
        self.kind = columns[0] if columns[0] not in NAMES else kind_of(str(row[columns[0]]))

    @functools.cached_property
    def _table(self) -> Any:
        import datasets

        try:
            table = datasets.load_dataset(
                self.builder, data_files=self.files, split="train", streaming=True
            )
            for name, feature in (table.features or {}).items():
                if isinstance(feature, (datasets.Video, datasets.Image)):
                    # vidl decodes: only the frames that it needs, and with its checks
                    table = table.cast_column(name, type(feature)(decode=False))
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read {self.files[0]}: {error}") from error
        return table

    def _rows(self, table: Any) -> Iterator[dict[str, Any]]:
        # `iter` does not distribute the rows over the workers of torch's loader, `__iter__` does
        try:
            for columns in table.iter(batch_size=ROWS):
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
        except (ValueError, OSError) as error:  # of Arrow, for a damaged file
            raise ValueError(f"cannot read the tables at {self.files[0]}: {error}") from error

    def _epoch(
        self, epoch: int, worker: int, broken: list[tuple[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """The rows of one worker in one epoch."""
        from datasets.distributed import split_dataset_by_node

        rng = random.Random(f"{self.clips.seed} {epoch} tables")
        table = self._table.shuffle(seed=rng.getrandbits(32), buffer_size=self.buffer)
        number = self.rank * self._workers + worker
        return self._rows(split_dataset_by_node(table, number, self._workers * self.world_size))

    def _sample(self, raw: dict[str, Any], epoch: int) -> Sample:
        entry = {name: value for name, value in raw.items() if value is not None}
        column = next((name for name in MEDIA if name in entry), None)
        if column is None:
            raise BrokenClip(f"a row of {self.files[0]}", f"need one of {', '.join(MEDIA)}")
        name, content = _media(entry.pop(column))
        kind = kind_of(name) if column in NAMES else column
        if kind != self.kind:
            raise BrokenClip(name, f"need a {self.kind}, as in the first row, got a {kind}")
        if content is None:
            check_media(name, self.outside)
        media = name if content is not None else str(self.media / name)
        if "second" in entry:
            raise ValueError(
                f"need rows of one clip in tables, got one with second: {name}; pairs of clips are "
                "read from annotation files (data.source=clips)"
            )
        try:
            row = common_row(entry | {kind: media})
        except (KeyError, ValueError) as error:
            raise BrokenClip(name, f"no clip with a caption: {error}") from None
        seed = zlib.crc32(f"{name} {row.start} {row.captions}".encode())
        return self.clips.prepare(row, Key(epoch, seed), content)


def _media(value: Any) -> tuple[str, bytes | None]:
    """The name of a clip, and the bytes of its file if the table has them."""
    if isinstance(value, dict):
        name, content = value.get("path"), value.get("bytes")
    else:
        name, content = (None, value) if isinstance(value, bytes) else (value, None)
    if content is not None and not name:
        name = f"clip-{zlib.crc32(content):08x}"
    return str(name or value), content
