"""Clips in webdataset shards: tar files of (clip, caption), read sequentially, for large data."""

import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vidl.data.dataset import IN_A_ROW, Batch, Clips, Sample, TooManyBroken, batch_of
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.video import BrokenClip

VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
IMAGES = ("jpg", "jpeg", "png", "webp")
# webdataset puts a URL into a shell command: only characters that end no quote.
PROTOCOL, URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|-$"), re.compile(r"https?://[^\s'\"`\\]+")


class ShardStream(IterableDataset[Batch]):
    """Endless shuffled batches from tar shards; needs the package `webdataset`.

    A sample is a clip (mp4, webm, ...) or image (jpg, ...) with its caption in `txt`, or in `json`
    under "caption". In every epoch the shards are distributed anew over the workers of all ranks;
    each worker starts its next epoch independently. Broken samples are skipped.

    A resumed run gets the same batches in the same order if the number of ranks and workers is the
    same. It reads the shards again from the beginning of the epoch, without decoding the samples
    that were used.

    Args:
        shards: files or http(s) URLs of the shards.
        clips: the sample options: frames, size, crops, tokens; its rows are not used.
        batch_size: clips of a batch on one rank.
        kind: content of the shards: "video" or "image".
        buffer: size of the shuffle buffer, in compressed samples.
        rank: rank of this process.
        world_size: number of ranks.

    Raises:
        ValueError: there are fewer shards than workers of all ranks, or a shard is neither a file
            nor an http(s) URL, such as "pipe:command".
    """

    def __init__(
        self,
        shards: Sequence[str],
        clips: Clips,
        batch_size: int,
        *,
        kind: str = "video",
        buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards, self.clips, self.batch_size = sorted(map(str, shards)), clips, batch_size
        for shard in self.shards:
            if PROTOCOL.match(shard) and not URL.fullmatch(shard):
                raise ValueError(f"need shards as files or http(s) URLs, got {shard!r}")
        self.kind, self.buffer = kind, buffer
        self.rank, self.world_size = rank, world_size
        self._places: dict[int, tuple[int, int]] = {}  # of each worker: epoch, samples read in it
        self._resumed: int | None = None  # number of workers of the resumed run
        self.begin(0, 1)

    def begin(self, step: int, workers: int) -> None:
        """Start after `step` batches, which the workers returned in turns."""
        if self._resumed not in (None, workers):
            raise ValueError(f"need {self._resumed} workers, as before, got {workers}")
        self._step, self._workers = step, workers
        needed = workers * self.world_size
        if len(self.shards) < needed:
            raise ValueError(
                f"need at least {needed} shards, one per worker and rank, got {len(self.shards)}"
            )

    def returned(self, batch: Batch) -> None:
        """Record the position of a batch's worker; the loader calls this."""
        if batch.place is not None:
            worker, epoch, drawn = batch.place
            self._places[worker] = (epoch, drawn)

    def state_dict(self) -> dict[str, Any]:
        """The position of each worker: [worker, epoch, samples read in it]."""
        places = [[worker, *place] for worker, place in sorted(self._places.items())]
        return {"ranks": self.world_size, "workers": self._workers, "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`.

        Raises:
            ValueError: the number of ranks differs.
        """
        if state["ranks"] != self.world_size:
            raise ValueError(f"need {state['ranks']} ranks, as before, got {self.world_size}")
        self._places = {worker: (epoch, drawn) for worker, epoch, drawn in state["places"]}
        self._resumed = state["workers"]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        # workers take turns; the loader asks its first worker for the batch of this step
        worker = ((info.id if info else 0) + self._step) % self._workers
        epoch, drawn = self._places.get(worker, (0, 0))
        samples: list[Sample] = []
        broken: list[tuple[str, str]] = []
        while True:
            number = -1
            for number, raw in enumerate(self._epoch(epoch, worker, broken)):
                if number < drawn:
                    continue
                try:
                    samples.append(self._sample(raw, epoch))
                except BrokenClip as error:
                    broken.append((error.name, error.reason))
                    if len(broken) > IN_A_ROW + len(samples):
                        raise TooManyBroken(
                            f"{len(broken)} clips cannot be read; {error}"
                        ) from None
                if len(samples) == self.batch_size:
                    place = (worker, epoch, number + 1)
                    words, tokenizer = self.clips.words, self.clips.tokenizer
                    yield batch_of(samples, list(broken), tokenizer, words, place)
                    samples.clear()
                    broken.clear()
            if number < 0:
                raise TooManyBroken(f"worker {worker} got no sample from its shards: {broken}")
            epoch, drawn = epoch + 1, 0

    def _epoch(
        self, epoch: int, worker: int, broken: list[tuple[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """The compressed samples of one worker in one epoch."""
        import webdataset

        rng = random.Random(f"{self.clips.seed} {epoch} shards")
        shards = rng.sample(self.shards, len(self.shards))
        mine = shards[self.rank * self._workers + worker :: self.world_size * self._workers]

        def note(error: Exception) -> bool:
            broken.append((str(error.args[-1]), str(error.args[0])))
            return True  # continue with the next shard

        return iter(
            webdataset.DataPipeline(
                webdataset.SimpleShardList(mine),
                webdataset.tarfile_to_samples(handler=note),
                webdataset.shuffle(self.buffer, initial=self.buffer, rng=rng),
            )
        )

    def _sample(self, raw: dict[str, Any], epoch: int) -> Sample:
        name = f"{raw['__url__']}/{raw['__key__']}"
        suffixes = VIDEOS if self.kind == "video" else IMAGES
        media = next((raw[suffix] for suffix in suffixes if suffix in raw), None)
        if media is None:
            given = ", ".join(suffix for suffix in raw if not suffix.startswith("__"))
            raise BrokenClip(name, f"need one of {', '.join(suffixes)}, got {given or 'nothing'}")
        try:
            caption = json.loads(raw["json"])["caption"] if "json" in raw else raw["txt"].decode()
        except (KeyError, ValueError) as error:
            raise BrokenClip(name, f"no caption in txt or json: {error}") from None
        captions = [caption] if isinstance(caption, str) else caption
        row = Row(name, kind=self.kind, id=PurePosixPath(raw["__key__"]).name, captions=captions)
        try:
            return self.clips.prepare(row, Key(epoch, zlib.crc32(raw["__key__"].encode())), media)
        except BrokenClip as error:
            raise BrokenClip(name, error.reason) from None
