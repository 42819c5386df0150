"""The mean of each loss over the steps of a record."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidl.training.parallel import Ranks


class Losses:
    """Sums of the losses of the steps since the last record, so that a record has their mean.

    They stay on the device: reading them in every step would synchronise with it.

    Args:
        state: of a checkpoint, from `state`.
    """

    def __init__(self, state: Mapping[str, tuple[float, int]] | None = None) -> None:
        self._sums: dict[str, Any] = {name: total for name, (total, _) in (state or {}).items()}
        self._steps = {name: steps for name, (_, steps) in (state or {}).items()}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a step."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.float()
            self._steps[name] = self._steps.get(name, 0) + 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """The mean of each loss over its steps and all ranks."""
        return {name: total / steps for name, (total, steps) in self.state(ranks).items()}

    def state(self, ranks: Ranks) -> dict[str, tuple[float, int]]:
        """The sums, as means over all ranks, and their numbers of steps; for a checkpoint."""
        if not self._sums:
            return {}
        sums = [torch.as_tensor(x, device=ranks.device) for x in self._sums.values()]
        totals = ranks.mean(torch.stack(sums)).tolist()
        return {n: (x, self._steps[n]) for n, x in zip(self._sums, totals, strict=True)}
