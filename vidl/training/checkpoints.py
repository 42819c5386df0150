"""Atomic checkpoints: weights in safetensors, the other state without pickled code."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

NAME = re.compile(r"step-(\d{8})")
WEIGHTS, STATE = "model.safetensors", "state.pt"


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder."""
    paths = (path for path in (folder / "checkpoints").glob("step-*"))
    return max((path for path in paths if NAME.fullmatch(path.name)), default=None)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
    write: bool = True,
) -> None:
    """Write a checkpoint, then remove the oldest ones.

    A checkpoint has the full weights and optimizer state under the parameter names of the model,
    however the model is sharded. Every rank must call this; one rank writes, and holds a copy of
    both in memory.

    Args:
        folder: folder of the run.
        step: number of completed steps.
        model, optimizer: of the run.
        state: other state; types that `torch.load(weights_only=True)` accepts.
        keep: number of checkpoints to keep.
        write: whether this rank writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(model, options=options)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    if not write:
        return
    from safetensors.torch import save as to_bytes

    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoints / f".step-{step:08}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    with open(unfinished / WEIGHTS, "wb") as file:
        file.write(to_bytes({name: x.contiguous() for name, x in weights.items()}))
        _to_disk(file)
    with open(unfinished / STATE, "wb") as file:
        torch.save({**state, "step": step, "optimizer": optimizer_state}, file)
        _to_disk(file)
    _folder_to_disk(unfinished)
    final = checkpoints / f"step-{step:08}"
    if final.exists():  # the same run at the same step: identical
        shutil.rmtree(final)
    unfinished.rename(final)
    _folder_to_disk(checkpoints)
    _remove_old(checkpoints, keep)


def load(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Load weights and optimizer state, however the saved model was sharded.

    Returns:
        The other state.
    """
    options = StateDictOptions(full_state_dict=True)
    weights: Any = weights_of(checkpoint, device)
    set_model_state_dict(model, weights, options=options)
    state = torch.load(checkpoint / STATE, map_location=device, weights_only=True)
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=options)
    return state


def weights_of(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of a run, a checkpoint or a file.

    Args:
        path: folder of a run (its newest checkpoint counts), folder of a checkpoint, or a file in
            safetensors or `torch.save` format.
        device: device of the weights.

    Raises:
        ValueError: no such file.
    """
    path = Path(path)
    checkpoint = newest(path) or path
    file = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        raise ValueError(f"need a run, a checkpoint or a file of weights, got {path}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file, device=str(device))
    state = torch.load(file, map_location=device, weights_only=True)
    for nested in ("model", "state_dict"):
        if isinstance(state.get(nested), dict):
            state = state[nested]
    return state


def _remove_old(checkpoints: Path, keep: int) -> None:
    for path in sorted(checkpoints.glob("step-*"))[:-keep]:
        # rename first: a partly removed folder must not look like a checkpoint
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path)  # left by a run that was killed while saving


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
