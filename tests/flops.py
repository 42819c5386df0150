"""FLOPs of a training step of every system, stored for `vidl systems`.

PYTHONPATH=. python tests/flops.py > vidl/models/flops.json
"""

import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from vidl import models
from vidl.models.summary import count


def counted(name: str) -> dict[str, float]:
    """GFLOP of a step per clip; see `vidl.models.cards.COUNTED`."""
    entry = models.MODELS[name]
    base = entry.presets["base"]
    recipes = {"dense": base.variants()["dense"], "sparse": entry.presets.get("sparse", base)}
    numbers = {}
    for kind, recipe in recipes.items():
        torch.manual_seed(0)  # of the words that are masked
        cost = count(entry.model(recipe))
        numbers[kind] = round((cost.forward_flops + cost.backward_flops) / 1e9, 1)
    return numbers


def counted_apart(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The numbers of some systems, each from a process of its own, which needs up to 8 GB."""
    numbers = {}
    for name in names:
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        numbers[name] = json.loads(done.stdout)
    return numbers


if __name__ == "__main__":
    wanted = sys.argv[1:]
    numbers = counted(wanted[0]) if wanted else counted_apart(list(models.MODELS))
    json.dump(numbers, sys.stdout, indent=None if wanted else 2)
    print()
