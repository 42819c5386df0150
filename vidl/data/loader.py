"""Batches from worker processes, with exact resumption and a report of broken clips."""

import atexit
import functools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vidl.data.dataset import Batch, ClipSet, TooManyBroken
from vidl.data.sampler import EpochSampler, InOrder
from vidl.data.stream import Stream

# The share of broken clips is relative to at least so many: the first clip may be broken.
GRACE = 100


class Loader:
    """Batches of a data set, prefetched by worker processes.

    With an `EpochSampler` or a `Stream` the loader never ends. `state_dict` is the position
    after the last batch that was returned, not after the batches that workers have prefetched.

    Args:
        dataset: a `ClipSet` or a `Stream`.
        sampler: the rows of each batch; None for a `Stream`.
        workers: worker processes; 0: read in the calling process.
        prefetch: batches that each worker reads ahead.
        pin: whether batches are in pinned memory; default: if CUDA is available.
        limit: largest share of broken clips; `TooManyBroken` is raised beyond it.
        context: start method of workers: "fork", "spawn" or "forkserver"; default: Python's.

    Raises:
        ValueError: a `ClipSet` without a sampler, or a `Stream` with one.
    """

    def __init__(
        self,
        dataset: ClipSet | Stream,
        sampler: EpochSampler | InOrder | None = None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool | None = None,
        limit: float = 0.1,
        context: str | None = None,
    ):
        streams = isinstance(dataset, Stream)
        if streams == (sampler is not None):
            raise ValueError("need a sampler with a ClipSet, and no sampler with a Stream")
        self.dataset, self.sampler, self.limit = dataset, sampler, limit
        self.step = 0  # batches returned
        self.seen = 0  # clips, including broken ones
        self.broken: dict[str, str] = {}  # name: reason
        self.broken_count = 0
        self.wait_seconds = 0.0  # time spent waiting for batches
        self._workers = max(1, workers)
        options: dict[str, Any] = {"batch_size": None} if streams else {"batch_sampler": sampler}
        if workers:
            # Set before multiprocessing ends the workers by a signal, when this process exits.
            ending = multiprocessing.get_context(context).Event()
            atexit.register(ending.set)
            options |= {"prefetch_factor": prefetch, "persistent_workers": not streams}
            options |= {"worker_init_fn": functools.partial(_begin_worker, ending)}
        self._loader: DataLoader[Any] = DataLoader(
            _Stream(dataset) if isinstance(dataset, Stream) else _Rows(dataset),
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available() if pin is None else pin,
            generator=torch.Generator(),  # otherwise each epoch draws from the global generator
            multiprocessing_context=context if workers else None,
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.dataset, Stream):
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
            if isinstance(batch, _Failed):
                raise batch.error from batch.cause
            self._count(batch)
            self.step += 1
            if isinstance(self.dataset, Stream):
                self.dataset.returned(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self.seen += len(batch) + len(batch.broken)
        self.broken_count += len(batch.broken)
        self.broken |= batch.broken
        if self.broken_count > self.limit * max(self.seen, GRACE):
            share = f"{self.broken_count} of {self.seen} clips, more than {self.limit:.0%}"
            raise TooManyBroken(f"{share}, cannot be read\n{self.report()}")

    def report(self) -> str:
        """The broken clips, one per line, for the end of a run; empty if there are none."""
        if not self.broken:
            return ""
        times = f"{self.broken_count} of {self.seen} times a clip could not be read:"
        return "\n".join([times, *(f"  {name}: {why}" for name, why in self.broken.items())])

    def state_dict(self) -> dict[str, Any]:
        """The position for a checkpoint: plain numbers and strings."""
        state: dict[str, Any] = {"step": self.step, "seen": self.seen}
        state |= {"broken": dict(self.broken), "broken_count": self.broken_count}
        if isinstance(self.dataset, Stream):
            state["stream"] = self.dataset.state_dict()
        elif isinstance(self.sampler, EpochSampler):
            state["sampler"] = self.sampler.state_dict(self.step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was called, at the next `iter`.

        Raises:
            ValueError: the data, the seed or the global batch size differ.
        """
        if isinstance(self.dataset, Stream):
            self.dataset.load_state_dict(state["stream"])
        elif isinstance(self.sampler, EpochSampler):
            self.sampler.load_state_dict(state["sampler"])
        self.step, self.seen = state["step"], state["seen"]
        self.broken, self.broken_count = dict(state["broken"]), state["broken_count"]


class _Traceback(Exception):
    """The traceback of an error in a worker."""


class _Failed:
    """An error in place of a batch: DataLoader would replace its message by a traceback."""

    def __init__(self, error: Exception):
        self.error, self.cause = error, None
        if get_worker_info() is not None:
            lines = "".join(traceback.format_exception(error))
            self.cause = _Traceback(f"in a worker\n{lines}")
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # it cannot be sent
                self.error = RuntimeError(f"{type(error).__name__}: {error}")


class _Rows(Dataset[Any]):
    """The batches of a `ClipSet`, or the error of a batch."""

    def __init__(self, dataset: ClipSet):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Any) -> Any:
        try:
            return self.dataset.__getitems__(keys)
        except Exception as error:
            return _Failed(error)


class _Stream(IterableDataset[Any]):
    """The batches of a `Stream`, ended by its error if there is one."""

    def __init__(self, dataset: Stream):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _Failed(error)


def _identity(batch: Any) -> Any:
    return batch


def _end(ending: Any, number: int, frame: Any) -> None:
    """Ignore a signal, unless the training process ends; the second one ends this process."""
    if ending.is_set():
        os._exit(0)
    signal.signal(number, signal.SIG_DFL)


def _begin_worker(ending: Any, worker: int) -> None:
    """One thread per worker, and no end by a signal that is for the training process.

    Several threads in each worker would compete for the cores. Ctrl-C and schedulers signal all
    processes; the training process finishes its step with the batches of the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, functools.partial(_end, ending))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
