"""Sharded checkpoints: every rank writes its part of weights and optimizer state.

torch.distributed.checkpoint writes them in safetensors format: reading one executes no code, where
its default format unpickles a file. Any number of ranks, or a single process, reads them.
"""

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

WEIGHTS, OPTIMIZER = "weights", "optimizer"
# One name for each tensor of the optimizer, with the name of its parameter.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer state; every rank must call this.

    Args:
        checkpoint: an empty folder that all ranks can write to.
        model, optimizer: of the run.

    Raises:
        OSError: a rank cannot write; raised on all ranks.
    """
    for name, state in _parts(model, optimizer).items():
        writer = HuggingFaceStorageWriter(str(checkpoint / name), save_distributed=True)
        with _explained(checkpoint / name, "written"):
            dcp.save(state, storage_writer=writer)


def files(checkpoint: Path, rank: int) -> list[Path]:
    """The files that a rank has written."""
    return sorted(checkpoint.glob(f"*/shard-{rank + 1:05}-*"))


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save` has written into a model and its optimizer, however they are sharded."""
    parts = _parts(model, optimizer)
    for name, state in parts.items():
        _read(checkpoint / name, state, alone=not dist.is_initialized())
    set_model_state_dict(model, parts[WEIGHTS])
    groups = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    whole: Any = {**groups, **parts[OPTIMIZER]}
    set_optimizer_state_dict(model, optimizer, whole, options=_FLAT)


def weights(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The whole weights, in this process alone."""
    folder = checkpoint / WEIGHTS
    with _explained(folder, "read"):
        known: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    empty = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype, device=device)
        for name, kind in known.items()
    }
    _read(folder, empty, alone=True)
    return empty


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The tensors by their names; other values, as learning rates, are the configuration's."""
    states: dict[str, Mapping[str, Any]] = {
        WEIGHTS: get_model_state_dict(model),
        OPTIMIZER: get_optimizer_state_dict(model, optimizer, options=_FLAT),
    }
    return {
        part: {name: x for name, x in state.items() if isinstance(x, Tensor)}
        for part, state in states.items()
    }


def _read(folder: Path, state: dict[str, Any], *, alone: bool) -> None:
    with _explained(folder, "read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .*single process")
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """A block in which an error of any rank is an OSError that names the folder."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # on several ranks it is no Exception
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        about = f"cannot be {what}: {' '.join(str(cause).split())[:300]}"
        raise OSError(errno.EIO, about, str(folder)) from error
