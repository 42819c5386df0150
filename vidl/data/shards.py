"""Clips in webdataset shards: tar files of (clip, caption), read sequentially, for large data."""

import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vidl.data.dataset import Clips, Sample
from vidl.data.folders import matching
from vidl.data.formats import IMAGES, VIDEOS, Row
from vidl.data.parsing import without_surrogates
from vidl.data.sampler import Key
from vidl.data.stream import Read, Stream
from vidl.data.video import BrokenClip

# webdataset puts a URL into a shell command: only characters that end no quote.
PROTOCOL, URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|-$"), re.compile(r"https?://[^\s'\"`\\]+")


class ShardStream(Stream):
    """Endless shuffled batches from tar shards; needs the package `webdataset`.

    A sample is a clip (mp4, webm, ...) or image (jpg, ...) with its caption: a text or a list of
    texts in `json` under "caption", or else `txt`. A sample without a caption is broken. In every
    epoch the shards are distributed anew over the workers of all ranks. A damaged shard is read up
    to the damage, and its samples that are lost are listed as broken.

    Args:
        shards: files, globs of files or http(s) URLs of the shards.
        kind: content of the shards: "video" or "image".
        clips, batch_size, options: see `Stream`, which also says how a run resumes.

    Raises:
        ValueError: there are fewer shards than workers of all ranks, no file matches a glob, or a
            shard is neither a file nor an http(s) URL, such as "pipe:command".
    """

    NOUN = "shards"

    def __init__(
        self,
        shards: Sequence[str],
        clips: Clips,
        batch_size: int,
        *,
        kind: str = "video",
        **options: Any,
    ):
        names: list[str] = []
        for shard in map(str, shards):
            remote = PROTOCOL.match(shard)
            if remote and not URL.fullmatch(shard):
                raise ValueError(f"need shards as files or http(s) URLs, got {shard!r}")
            names += [shard] if remote else matching(shard)
        self.kind = kind
        super().__init__(names, clips, batch_size, **options)

    def begin(self, step: int, workers: int) -> None:
        """Start after `step` batches, which the workers returned in turns."""
        super().begin(step, workers)
        needed = workers * self.world_size
        if len(self.files) < needed:
            raise ValueError(
                f"need at least {needed} shards, one per worker and rank, got {len(self.files)}"
            )

    def _epoch(
        self, epoch: int, worker: int, broken: list[tuple[str, str]], mark: Any
    ) -> Iterator[Read]:
        """The compressed samples of one worker in one epoch."""
        import webdataset

        rng = random.Random(f"{self.clips.seed} {epoch} shards")
        shards = rng.sample(self.files, len(self.files))
        mine = shards[self.rank * self._workers + worker :: self.world_size * self._workers]

        samples = webdataset.DataPipeline(
            lambda: (sample for shard in mine for sample in _samples(shard, broken)),
            webdataset.shuffle(self.buffer, initial=self.buffer, rng=rng),
        )
        return (Read(sample, number) for number, sample in enumerate(samples))

    def _sample(self, raw: dict[str, Any], epoch: int) -> Sample:
        name = f"{raw['__url__']}/{raw['__key__']}"
        suffixes = VIDEOS if self.kind == "video" else IMAGES
        media = next((raw[suffix] for suffix in suffixes if suffix in raw), None)
        if media is None:
            given = ", ".join(suffix for suffix in raw if not suffix.startswith("__"))
            raise BrokenClip(name, f"need one of {', '.join(suffixes)}, got {given or 'nothing'}")
        captions = captions_of(raw, name)
        row = Row(name, kind=self.kind, id=PurePosixPath(raw["__key__"]).name, captions=captions)
        try:
            return self.clips.prepare(row, Key(epoch, zlib.crc32(raw["__key__"].encode())), media)
        except BrokenClip as error:
            raise BrokenClip(name, error.reason) from None


def captions_of(raw: dict[str, Any], name: str) -> list[str]:
    """The captions of a sample: "caption" of its `json` if it is usable, else its `txt`.

    Args:
        raw: content of each suffix of the sample.
        name: the sample, for the error.

    Raises:
        BrokenClip: there is neither a non-blank text nor a non-empty list of non-blank texts, or
            the text is about two clips.
    """
    reasons = []
    try:
        entry = json.loads(raw["json"]) if "json" in raw else {}
        entry = entry if isinstance(entry, dict) else {}
        if "label" in entry and _is_text(entry.get("second")):
            raise BrokenClip(name, "need a sample of one clip, got json with second")
        captions = entry.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if isinstance(captions, list) and captions and all(map(_is_text, captions)):
            return [without_surrogates(text) for text in captions]
        if "json" in raw:
            reasons.append(f"json has {captions!r:.40}")
    except (ValueError, RecursionError) as error:
        reasons.append(f"json: {error}")
    try:
        text = raw["txt"].decode("utf-8-sig") if "txt" in raw else ""
        if _is_text(text):
            return [text]
        reasons += ["txt is blank"] if "txt" in raw else []
    except ValueError as error:
        reasons.append(f"txt: {error}")
    raise BrokenClip(name, f"no caption: {'; '.join(reasons) or 'neither json nor txt'}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _samples(shard: str, broken: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The samples of a shard; lists what cannot be read in `broken`."""
    import webdataset

    problems: list[str] = []

    def note(error: Exception) -> bool:
        problems.append(str(error.args[0]) if error.args else type(error).__name__)
        return True  # continue behind the damage, or with the next shard

    keys = set()
    for sample in webdataset.tarfile_to_samples(handler=note)(iter([{"url": shard}])):
        keys.add(sample["__key__"])
        yield sample
    if not problems and _cut(Path(shard)):
        problems.append("no end marker: samples at its end may be lost")
    if problems:
        broken.append((shard, problems[0]))
        lost = [key for key in _keys(Path(shard)) if key not in keys]
        broken.extend((f"{shard}/{key}", "lost in a damaged shard") for key in lost)


def _cut(shard: Path) -> bool:
    """Whether an uncompressed tar file ends without the block of zeros that marks its end."""
    if shard.suffix != ".tar" or not shard.is_file():
        return False
    with open(shard, "rb") as file:
        file.seek(-min(512, shard.stat().st_size), os.SEEK_END)
        return any(file.read())


def _keys(shard: Path) -> list[str]:
    """The keys of the samples whose headers can be read, in file order."""
    from webdataset.tariterators import base_plus_ext

    keys = {}
    try:
        with tarfile.open(shard) as tar:
            for entry in tar:
                if entry.isreg() and (key := base_plus_ext(entry.name)[0]) is not None:
                    keys[key] = True
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        pass  # up to the damage
    return list(keys)
