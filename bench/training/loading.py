"""How fast the loader reads real clips: what a step must not be faster than."""

import os
import time
from typing import Any

from vidl.bench.measure.cases import BENCH
from vidl.bench.report.records import Record

CLIPS = BENCH.parent / "examples" / "clips.json"


def clips_per_second(recipe: Any, name: str, preset: str, batch: int, batches: int = 4) -> Record:
    """Read the clips of `examples/`, with a worker for each core, while nothing else runs.

    Returns:
        "clips_per_s", "workers" and "reason": why it was not measured, else None.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found: Record = {"clips_per_s": None, "workers": workers, "reason": None}
    if not CLIPS.is_file():
        return found | {"reason": f"{CLIPS} is not here: clips come with a clone only"}
    try:
        from vidl.training import Config, sources
    except ModuleNotFoundError as error:
        return found | {"reason": f"needs {error.name}"}
    fields = {"frames": recipe.frames, "image_size": recipe.image_size}
    values = {"model.name": name, "model.preset": preset, "data.files": [str(CLIPS)]}
    values |= {f"model.{field}": value for field, value in fields.items()}
    config = Config.of(values | {"data.batch_size": batch, "data.workers": workers})
    try:
        tokenizer = sources.open_tokenizer(config, None)
        loader = iter(sources.open_loader(config, recipe, tokenizer, 0, 1))
        next(loader)  # workers start
        begin = time.perf_counter()
        for _ in range(batches):
            next(loader)
        return found | {"clips_per_s": batches * batch / (time.perf_counter() - begin)}
    except (ModuleNotFoundError, OSError, ValueError) as error:
        return found | {"reason": str(error)}
