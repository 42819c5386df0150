"""Batches from workers, the same after a resume; what was broken is counted and named."""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from vidl.data.dataset import Batch, ClipSet, TooManyBroken
from vidl.data.sampler import EpochSampler, InOrder
from vidl.data.shards import ShardStream

# The share of broken clips is taken of at least so many: the first clip may well be broken.
GRACE = 100


class Loader:
    """Batches of a data set, read ahead by workers.

    With an `EpochSampler`, or of a `ShardStream`, batches come without an end. `state_dict` tells
    where the next one is, and what it says depends on the batches that were handed out, not on
    those that workers have read ahead.

    Args:
        dataset: a `ClipSet`, or a `ShardStream`.
        sampler: which rows are wanted; a `ShardStream` knows itself.
        workers: processes that read; 0: this one.
        prefetch: batches that each worker reads ahead.
        pin: whether batches come in pinned memory; default: if there is a CUDA device.
        limit: the largest share of the clips seen that may be broken. One beyond it stops the run.
        context: how workers start: "fork", "spawn" or "forkserver"; default: Python's.

    Raises:
        ValueError: a `ClipSet` without a sampler, or a `ShardStream` with one.
    """

    def __init__(
        self,
        dataset: ClipSet | ShardStream,
        sampler: EpochSampler | InOrder | None = None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool | None = None,
        limit: float = 0.1,
        context: str | None = None,
    ):
        streams = isinstance(dataset, ShardStream)
        if streams == (sampler is not None):
            raise ValueError("need a sampler with a ClipSet, and none with a ShardStream")
        self.dataset, self.sampler, self.limit = dataset, sampler, limit
        self.step = 0  # batches handed out
        self.seen = 0  # clips, broken or not
        self.broken: dict[str, str] = {}  # name: reason
        self.broken_count = 0
        self.wait_seconds = 0.0  # how long the run waited for batches
        self._workers = max(1, workers)
        how: dict[str, Any] = {"batch_size": None} if streams else {"batch_sampler": sampler}
        if workers:
            how |= {"prefetch_factor": prefetch, "persistent_workers": not streams}
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            pin_memory=torch.cuda.is_available() if pin is None else pin,
            generator=torch.Generator(),  # else each epoch takes a number of the model's
            multiprocessing_context=context if workers else None,
            **how,
        )

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.dataset, ShardStream):
            self.dataset.begin(self.step, self._workers)
        elif isinstance(self.sampler, EpochSampler):
            self.sampler.step = self.step
        batches = iter(self._loader)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - begin
            if batch is None:
                return
            self._count(batch)
            self.step += 1
            if isinstance(self.dataset, ShardStream):
                self.dataset.handed_out(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self.seen += len(batch) + len(batch.broken)
        self.broken_count += len(batch.broken)
        self.broken |= batch.broken
        if self.broken_count > self.limit * max(self.seen, GRACE):
            share = f"{self.broken_count} of {self.seen} clips, more than {self.limit:.0%}"
            raise TooManyBroken(f"{share}, cannot be read\n{self.report()}")

    def report(self) -> str:
        """What was broken, a line each, for the end of a run; empty if nothing was."""
        if not self.broken:
            return ""
        times = f"{self.broken_count} of {self.seen} times a clip could not be read:"
        return "\n".join([times, *(f"  {name}: {why}" for name, why in self.broken.items())])

    def state_dict(self) -> dict[str, Any]:
        """Where this is: plain numbers and strings, for a checkpoint."""
        state: dict[str, Any] = {"step": self.step, "seen": self.seen}
        state |= {"broken": dict(self.broken), "broken_count": self.broken_count}
        if isinstance(self.dataset, ShardStream):
            state["stream"] = self.dataset.state_dict()
        elif isinstance(self.sampler, EpochSampler):
            state["sampler"] = self.sampler.state_dict(self.step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, at the next `iter`.

        Raises:
            ValueError: the data, the seed or the batches are not the same.
        """
        if isinstance(self.dataset, ShardStream):
            self.dataset.load_state_dict(state["stream"])
        elif isinstance(self.sampler, EpochSampler):
            self.sampler.load_state_dict(state["sampler"])
        self.step, self.seen = state["step"], state["seen"]
        self.broken, self.broken_count = dict(state["broken"]), state["broken_count"]


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    """One thread a worker: more of them, in every worker, would wait for one another."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
