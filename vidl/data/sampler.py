"""The rows of each step: a pure function of a few numbers, so a run can resume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Key:
    """A request of a sampler: a row in an epoch."""

    epoch: int
    index: int


class EpochSampler(Sampler[list[Key]]):
    """Endless shuffled batches of one rank.

    A batch has rows of one kind, such as videos or images, and all ranks have the same kind at the
    same step: otherwise they would deadlock in different collectives. An epoch has the full batches
    of each kind in random order; the remaining rows are left out, different ones in each epoch.

    The rows of step s depend on (seed, s) and the global batch size only, so a run can resume in
    the middle of an epoch, with another number of workers, and with another number of ranks if the
    global batch size is the same.

    Args:
        kinds: kind of each row, integers [rows], see `ClipSet.kinds`.
        batch_size: rows of a batch on one rank.
        seed: seed of the run.
        rank: rank of this process.
        world_size: number of ranks.

    Raises:
        ValueError: a kind has too few rows for one global batch.
    """

    def __init__(
        self,
        kinds: Sequence[int] | numpy.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            given = f"batch_size={batch_size}, rank={rank}, world_size={world_size}"
            raise ValueError(f"need a batch of 1 or more and a rank below world_size, got {given}")
        kinds = numpy.asarray(kinds, int)
        self._rows = [numpy.flatnonzero(kinds == kind) for kind in numpy.unique(kinds)]
        self._global_batch = batch_size * world_size
        fewest = min(map(len, self._rows), default=0)
        if 0 < fewest < self._global_batch:
            given = f"{batch_size} on each of {world_size} ranks"
            raise ValueError(f"need {given} for one batch, got {fewest} rows of one kind")
        if not self._rows:
            raise ValueError("need at least one row, got none")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._steps_of_kind = [len(rows) // self._global_batch for rows in self._rows]
        self.steps_per_epoch = sum(self._steps_of_kind)
        self.step = 0  # the next step

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.step
        while True:
            epoch, begin = divmod(step, self.steps_per_epoch)
            for rows in self._epoch(epoch, begin):
                yield [Key(epoch, row) for row in rows]
            step = (epoch + 1) * self.steps_per_epoch

    def _epoch(self, epoch: int, begin: int) -> Iterator[list[int]]:
        """The rows of this rank at each step of an epoch, starting at its step `begin`."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        kinds = torch.repeat_interleave(torch.tensor(self._steps_of_kind))
        kinds = kinds[torch.randperm(len(kinds), generator=generator)]
        orders = [torch.randperm(len(rows), generator=generator) for rows in self._rows]
        nths = torch.empty_like(kinds)  # index of each step among the steps of its kind
        for kind, steps in enumerate(self._steps_of_kind):
            nths[kinds == kind] = torch.arange(steps)
        for kind, nth in zip(kinds[begin:].tolist(), nths[begin:].tolist(), strict=True):
            block = orders[kind][nth * self._global_batch : (nth + 1) * self._global_batch]
            yield self._rows[kind][block[self.rank :: self.world_size].numpy()].tolist()

    def state_dict(self, step: int) -> dict[str, int]:
        """The state after `step` batches were used (prefetched batches do not count)."""
        rows = sum(map(len, self._rows))
        return {"step": step, "seed": self.seed, "rows": rows, "global_batch": self._global_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`.

        Raises:
            ValueError: the data, seed or global batch size differ.
        """
        own = self.state_dict(state["step"])
        if own != state:
            raise ValueError(f"need the same data, seed and global batch {state}, got {own}")
        self.step = state["step"]


class InOrder(Sampler[list[Key]]):
    """Every row once, in order, for evaluation: rank r has rows r, r + world_size, ...

    Args:
        images: true for images, false for videos, [rows]; a batch has either videos or images.
        batch_size: rows of a batch on one rank; the last batch may have fewer.
        rank: rank of this process.
        world_size: number of ranks.
    """

    def __init__(
        self,
        images: Sequence[bool] | numpy.ndarray,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ):
        of_images = numpy.asarray(images, bool)
        self._batches: list[list[Key]] = []
        for kind in (~of_images, of_images):
            rows = numpy.flatnonzero(kind)[rank::world_size].tolist()
            self._batches += [
                [Key(0, row) for row in rows[at : at + batch_size]]
                for at in range(0, len(rows), batch_size)
            ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)
