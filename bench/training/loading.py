"""Throughput of the data loader on real clips: an upper bound for training with it."""

import os
import time
from typing import Any

from vidl.bench.measure.cases import BENCH
from vidl.bench.report.records import Record

CLIPS = BENCH.parent / "examples" / "clips.json"


def clips_per_second(recipe: Any, name: str, preset: str, batch: int, batches: int = 4) -> Record:
    """Read the clips of `examples/` with one worker per core, while nothing else runs.

    Returns:
        "clips_per_s", "workers", and "reason": why nothing was measured, or None.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    measured: Record = {"clips_per_s": None, "workers": workers, "reason": None}
    if not CLIPS.is_file():
        return measured | {
            "reason": f"{CLIPS} does not exist: only a clone of the repository has clips"
        }
    try:
        from vidl.training import Config, sources
    except ModuleNotFoundError as error:
        return measured | {"reason": f"{error.name} is not installed"}
    fields = {"frames": recipe.frames, "image_size": recipe.image_size}
    values = {"model.name": name, "model.preset": preset, "data.files": [str(CLIPS)]}
    values |= {f"model.{field}": value for field, value in fields.items()}
    config = Config.of(values | {"data.batch_size": batch, "data.workers": workers})
    try:
        tokenizer = sources.open_tokenizer(config, None)
        loader = iter(sources.open_loader(config, recipe, tokenizer, 0, 1))
        next(loader)  # starts the workers
        begin = time.perf_counter()
        for _ in range(batches):
            next(loader)
        return measured | {"clips_per_s": batches * batch / (time.perf_counter() - begin)}
    except (ModuleNotFoundError, OSError, ValueError) as error:
        return measured | {"reason": str(error)}
