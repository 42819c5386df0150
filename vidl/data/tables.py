"""Clips that Hugging Face datasets streams: from tables, folders, or repositories of the Hub."""

import inspect
import itertools
import json
import logging
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vidl.data.annotations import check_media
from vidl.data.dataset import Clips, Sample
from vidl.data.formats import FIELDS, IMAGES, NAMES, VIDEOS, common_row, kind_of
from vidl.data.repositories import open_streaming, unreadable
from vidl.data.sampler import Key
from vidl.data.shards import captions_of
from vidl.data.stream import Read, Stream
from vidl.data.video import BrokenClip

MEDIA = ("video", "image", *NAMES)
# Rows that are read at a time.
ROWS = 16


class TableStream(Stream):
    """Endless shuffled batches from what `datasets` streams; needs this package.

    A row has a column `video`, `image`, `file_name` or `path`, and a column `caption` or `text`;
    `id`, `start` and `end` are optional. A clip is a file name, the bytes of a file, or a value of
    the features `Video` and `Image`. A sample of a tar file in webdataset's format has what
    `ShardStream` reads.

    Files are split over the workers of all ranks if their number is a multiple of the number of
    workers; otherwise every worker reads all rows and decodes its share. In each epoch the files
    are in another random order, and then the rows within each block of `buffer` rows. A resumed run
    reads its block again, from the position that datasets gave; if the rows there are others, it
    reads the epoch from its beginning.

    Args:
        tables: files, one folder or one repository, see `open_streaming`.
        media: folder of the clips that a table names; None: that of the first table, the given
            folder, or the repository.
        outside: whether media may lie outside this folder (absolute paths and `..`).
        columns: the column of a field, such as {"caption": "description"}; others keep their names.
        subset, split: of a folder or repository.
        clips, batch_size, options: see `Stream`, which also says how a run resumes.

    Raises:
        ValueError: what `tables` names cannot be read, or a column is missing.
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
        columns: Mapping[str, str] | None = None,
        subset: str | None = None,
        split: str | None = None,
        **options: Any,
    ):
        unknown = [field for field in columns or () if field not in FIELDS]
        if unknown:
            raise ValueError(
                f"need fields among {', '.join(FIELDS)} in data.columns, got {', '.join(unknown)}"
            )
        self.media, self.outside, self.columns = media, outside, dict(columns or {})
        self._where: dict[str, Any] = dict(names=list(map(str, tables)), subset=subset, split=split)
        self._opened = open_streaming(**self._where)
        super().__init__(self._opened.files, clips, batch_size, **options)
        self.version = self._opened.commit
        _, rows = next(self._reads(self._opened.table, None), (None, []))
        self.kind = self._kind(rows[0] if rows else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`, with the commit of the repository that it names.

        Raises:
            ValueError: the number of ranks or the files differ, or the state is that of an earlier
                version of vidl, which shuffled in another way.
        """
        if any(len(place) < 4 for place in state["places"]):
            raise ValueError(
                "need a run of this version of vidl to resume data.source=datasets, got one of an "
                "earlier version, which shuffled in another way: begin a new run"
            )
        commit = state.get("version") or ""
        if self.version and commit not in ("", self.version):
            self._opened = open_streaming(**self._where, commit=commit)
            self.files, self.version = sorted(self._opened.files), commit
            self.__dict__.pop("_contents", None)
        super().load_state_dict(state)

    def _kind(self, raw: dict[str, Any]) -> str:
        """Whether the first row has a video or an image."""
        try:
            entry = self._entry(raw)
        except BrokenClip:  # a sample of a tar file without a caption
            entry = raw
        column = next((name for name in MEDIA if name in entry), None)
        if column is None or not {"caption", "text"} & entry.keys():
            raise ValueError(
                f"need columns {' or '.join(MEDIA)}, and caption or text, in {self.files[0]}, got "
                f"{', '.join(raw) or 'no row'}; data.columns names other columns"
            )
        return column if column not in NAMES else kind_of(str(entry[column]))

    def _epoch(
        self, epoch: int, worker: int, broken: list[tuple[str, str]], mark: Any
    ) -> Iterator[Read]:
        """The rows of one worker in one epoch."""
        rng = random.Random(f"{self.clips.seed} {epoch} tables")
        of_files, of_blocks = rng.getrandbits(32), rng.getrandbits(32)
        begin, digest, position = mark or (0, None, None)
        reads = self._shuffled(self._share(of_files, worker), begin, position, of_blocks)
        first = next(reads, None)
        if mark is not None and _digest_of(first) != digest:
            # Another release of datasets may count differently: read from the begin of the epoch.
            reads = self._shuffled(self._share(of_files, worker), 0, None, of_blocks)
            first = next((read for read in reads if read.number == begin), None)
            if _digest_of(first) != digest:
                raise ValueError(
                    f"need the rows of the interrupted run from {self.files[0]}, in the same "
                    "order, got others: use the same release of datasets, or begin a new run"
                )
        if first is not None:
            yield first
        yield from reads

    def _share(self, seed: int, worker: int) -> Any:
        """The rows of one worker, from files in random order."""
        from datasets.distributed import split_dataset_by_node

        table = self._opened.table
        # Rows are not shuffled here: datasets does not store its buffer of rows.
        options: dict[str, Any] = {"seed": seed, "buffer_size": 1}
        if "max_buffer_input_shards" in inspect.signature(table.shuffle).parameters:
            options["max_buffer_input_shards"] = 1  # of datasets 5: rows of several files in turns
        number = self.rank * self._workers + worker
        return split_dataset_by_node(
            table.shuffle(**options), number, self._workers * self.world_size
        )

    def _shuffled(self, table: Any, begin: int, position: Any, seed: int) -> Iterator[Read]:
        """Rows in random order within blocks; the next block is read while one is returned.

        Args:
            table: the rows of one worker.
            begin: number of rows before the first block.
            position: of the first block, from `_reads`.
            seed: of the orders.
        """
        rows = max(1, min(ROWS, self.buffer))
        whole = max(1, self.buffer // rows)
        reads = self._reads(table, position, rows)
        # The first block has another size in each epoch, so that blocks have other rows.
        size = random.Random(seed).randint((whole + 1) // 2, whole) if begin == 0 else whole
        following = list(itertools.islice(reads, size))
        while following:
            block = [row for _, part in following for row in part]
            mark = (begin, self._digest(block[0]), following[0][0])
            random.Random(f"{seed} {begin}").shuffle(block)
            following = []
            for number in range(begin, begin + len(block)):
                if (number - begin) % rows == 0:
                    following += itertools.islice(reads, 1)
                yield Read(block.pop(), number, mark)
            begin = number + 1
            following += itertools.islice(reads, whole - len(following))

    def _reads(
        self, table: Any, position: Any, rows: int = 1
    ) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Rows, and the position before them: the `state_dict` of datasets, None at the begin."""
        if position is not None:
            table.load_state_dict(position)
        # `iter` does not distribute the rows over the workers of torch's loader, `__iter__` does
        batches = table.iter(batch_size=rows)
        log = logging.getLogger("datasets.iterable_dataset")
        while True:
            # It warns that it has not stored its buffer of rows, which is empty here.
            log.disabled, before = True, log.disabled
            try:
                columns = next(batches, None)
            except Exception as error:  # of Arrow, tar files, the network: nothing more is read
                raise unreadable(self.files[0], error) from error
            finally:
                log.disabled = before
            if columns is None:
                return
            names = list(columns)
            values = zip(*columns.values(), strict=True)
            yield position, [dict(zip(names, row, strict=True)) for row in values]
            position = table.state_dict()

    def _digest(self, raw: dict[str, Any]) -> int:
        """A number that tells rows apart, on any machine."""
        try:
            entry = self._entry(raw)
        except BrokenClip:
            entry = raw
        name, _ = _media(next((entry[name] for name in MEDIA if name in entry), None))
        texts = [str(entry.get(field)) for field in ("caption", "text", "start", "__key__")]
        return zlib.crc32(json.dumps([PurePosixPath(name).name, *texts]).encode())

    def _entry(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A row by the names of fields; a sample of a tar file gets them here."""
        entry = {name: value for name, value in raw.items() if value is not None}
        if "__key__" in entry:
            name = f"{entry.get('__url__', '')}/{entry['__key__']}"
            suffix = next((name for name in (*VIDEOS, *IMAGES) if name in entry), None)
            if suffix is not None:
                _, content = _media(entry.pop(suffix))
                kind = "image" if suffix in IMAGES else "video"
                entry[kind] = {"path": f"{name}.{suffix}", "bytes": content}
            entry.setdefault("id", PurePosixPath(entry["__key__"]).name)
            facts, text = entry.get("json"), entry.get("txt")
            own = {} if facts is None else {"json": json.dumps(facts).encode()}
            own |= {} if text is None else {"txt": str(text).encode()}
            if "caption" not in self.columns:
                entry["caption"] = captions_of(own, name)
        return {
            field: entry[column]
            for field, column in ({name: name for name in entry} | self.columns).items()
            if column in entry
        }

    def _sample(self, raw: dict[str, Any], epoch: int) -> Sample:
        entry = self._entry(raw)
        column = next((name for name in MEDIA if name in entry), None)
        if column is None:
            raise BrokenClip(f"a row of {self.files[0]}", f"need one of {', '.join(MEDIA)}")
        name, content = _media(entry.pop(column))
        kind = kind_of(name) if column in NAMES else column
        if kind != self.kind:
            raise BrokenClip(name, f"need a {self.kind}, as in the first row, got a {kind}")
        if "second" in entry:
            raise ValueError(
                f"need rows of one clip in tables, got one with second: {name}; pairs of clips are "
                "read from annotation files (data.source=clips)"
            )
        name = name.removeprefix(f"{self._opened.folder}/")
        media = name
        if content is None:
            check_media(name, self.outside)
            if self.media is None and self._opened.commit:
                content = self._opened.content(name)
            else:
                media = str(Path(self.media or self._opened.folder) / name)
        try:
            row = common_row(entry | {kind: media})
        except (KeyError, ValueError) as error:
            raise BrokenClip(name, f"no clip with a caption: {error}") from None
        seed = zlib.crc32(f"{entry.get('__key__', name)} {row.start} {row.captions}".encode())
        try:
            return self.clips.prepare(row, Key(epoch, seed), content)
        except BrokenClip as error:
            raise BrokenClip(media, error.reason) from None


def _media(value: Any) -> tuple[str, bytes | None]:
    """The name of a clip, and the bytes of its file if the table has them."""
    if isinstance(value, dict):
        name, content = value.get("path"), value.get("bytes")
    else:
        name, content = (None, value) if isinstance(value, bytes) else (value, None)
    if content is not None and not name:
        name = f"clip-{zlib.crc32(content):08x}"
    return str(name or value), content


def _digest_of(read: Read | None) -> Any:
    return None if read is None else read.mark[1]
