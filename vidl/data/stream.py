"""Endless batches from files that are read sequentially, with exact resumption."""

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vidl.data.dataset import IN_A_ROW, Batch, Clips, Sample, TooManyBroken, batch_of
from vidl.data.video import BrokenClip


@dataclass(frozen=True)
class Read:
    """A sample that was read and is not decoded.

    Attributes:
        raw: the sample.
        number: samples that its worker read before it in the epoch.
        mark: where a resumed run begins to read, as JSON; None: at the begin of the epoch.
    """

    raw: Any
    number: int
    mark: Any = None


class Stream(IterableDataset[Batch], ABC):
    """Endless shuffled batches of files that are read sequentially.

    Each worker starts its next epoch independently. Broken samples are skipped. A resumed run gets
    the same batches in the same order if the files and the number of ranks and workers are the
    same. It reads the files again, by default from the beginning of the epoch, without decoding
    the samples that were used.

    Args:
        files: the files.
        clips: the sample options: frames, size, crops, tokens; its rows are not used.
        batch_size: clips of a batch on one rank.
        buffer: size of the shuffle buffer, in samples that are not decoded.
        rank: rank of this process.
        world_size: number of ranks.
    """

    # What the files are called in errors.
    NOUN = "files"

    def __init__(
        self,
        files: Sequence[str],
        clips: Clips,
        batch_size: int,
        *,
        buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.files, self.clips, self.batch_size = sorted(files), clips, batch_size
        self.buffer, self.rank, self.world_size = buffer, rank, world_size
        # Of each worker: epoch, samples read in it, mark.
        self._places: dict[int, tuple[int, int, Any]] = {}
        self._resumed: int | None = None  # number of workers of the resumed run
        self.version = ""  # of the files, if their names do not tell
        self.begin(0, 1)

    @abstractmethod
    def _epoch(
        self, epoch: int, worker: int, broken: list[tuple[str, str]], mark: Any
    ) -> Iterator[Read]:
        """The samples of one worker in one epoch, from a mark; lists what is lost in `broken`."""

    @abstractmethod
    def _sample(self, raw: Any, epoch: int) -> Sample:
        """Decode a sample; raises BrokenClip if it cannot be read."""

    def begin(self, step: int, workers: int) -> None:
        """Start after `step` batches, which the workers returned in turns."""
        if self._resumed not in (None, workers):
            raise ValueError(f"need {self._resumed} workers, as before, got {workers}")
        self._step, self._workers = step, workers

    def returned(self, batch: Batch) -> None:
        """Record the position of a batch's worker; the loader calls this."""
        if batch.place is not None:
            worker, *place = batch.place
            self._places[worker] = tuple(place)

    def state_dict(self) -> dict[str, Any]:
        """The position of each worker: [worker, epoch, samples read in it, mark]."""
        places = [[worker, *place] for worker, place in sorted(self._places.items())]
        state = {"ranks": self.world_size, "workers": self._workers, "places": places}
        return state | {"shards": list(self._contents), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`.

        Raises:
            ValueError: the number of ranks or the files differ.
        """
        count, digest = self._contents
        if state.get("shards", [count, digest]) != [count, digest]:
            raise ValueError(
                f"need the {state['shards'][0]} {self.NOUN} of the interrupted run, with the same "
                f"names and sizes, got {count} {self.NOUN}: begin a new run"
            )
        if state["ranks"] != self.world_size:
            raise ValueError(f"need {state['ranks']} ranks, as before, got {self.world_size}")
        self._places = {worker: (*place, None)[:3] for worker, *place in state["places"]}
        self._resumed = state["workers"]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        # workers take turns; the loader asks its first worker for the batch of this step
        worker = ((info.id if info else 0) + self._step) % self._workers
        epoch, drawn, mark = self._places.get(worker, (0, 0, None))
        samples: list[Sample] = []
        broken: list[tuple[str, str]] = []
        while True:
            read: Read | None = None
            for read in self._epoch(epoch, worker, broken, mark):
                if read.number < drawn:
                    continue
                try:
                    samples.append(self._sample(read.raw, epoch))
                except BrokenClip as error:
                    broken.append((error.name, error.reason))
                    if len(broken) > IN_A_ROW + len(samples):
                        raise TooManyBroken(
                            f"{len(broken)} clips cannot be read; {error}"
                        ) from None
                if len(samples) == self.batch_size:
                    place = (worker, epoch, read.number + 1, read.mark)
                    words, tokenizer = self.clips.words, self.clips.tokenizer
                    yield batch_of(samples, list(broken), tokenizer, words, place)
                    samples.clear()
                    broken.clear()
            if read is None:
                raise TooManyBroken(f"worker {worker} got no sample from its {self.NOUN}: {broken}")
            epoch, drawn, mark = epoch + 1, 0, None

    @functools.cached_property
    def _contents(self) -> tuple[int, str]:
        """Number of files, and a digest of their names and sizes; the folder may change."""
        folder = os.path.commonprefix(self.files).rpartition("/")[0]
        sizes = [os.path.getsize(name) if os.path.isfile(name) else None for name in self.files]
        names = [name.removeprefix(folder) for name in self.files]
        content = json.dumps(list(zip(names, sizes, strict=True))) + self.version
        return len(names), hashlib.sha256(content.encode()).hexdigest()[:16]
