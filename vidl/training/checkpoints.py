"""Atomic checkpoints: weights in safetensors, the other state without pickled code.

The weights are one file, or one of each rank if the model is sharded; see `vidl.training.sharded`.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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

from vidl.files import named
from vidl.training import sharded
from vidl.training.parallel import Ranks, is_sharded

NAME = re.compile(r"step-(\d{8,})")
# What a run that was killed may leave: a checkpoint that it was writing or removing.
REST = re.compile(r"\.step-\d{8,}(\.old)?")
WEIGHTS, STATE, CHECKSUMS = "model.safetensors", "state.pt", "checksums.json"


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their step, ascending; other names are not ours."""
    names = ((NAME.fullmatch(path.name), path) for path in (folder / "checkpoints").glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder."""
    return max(steps(folder).items(), default=(0, None))[1]


def chosen(folder: Path, step: int | None = None) -> Path | None:
    """The intact checkpoint from which a run resumes.

    Args:
        folder: folder of the run.
        step: its step; None: the newest.

    Returns:
        The checkpoint; None: the run has none.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; offers the one before it.
    """
    known = steps(folder)
    if step is not None and step not in known:
        given = ", ".join(map(str, known)) or "none"
        raise ValueError(f"need run.resume as the step of a checkpoint of {folder}: {given}")
    if not known:
        return None
    step = max(known) if step is None else step
    if (problem := damage(known[step])) is None:
        return known[step]
    before = (s for s in reversed(known) if s < step and damage(known[s]) is None)
    offer = next((f"run.resume={s} resumes the one before" for s in before), "none before is whole")
    raise ValueError(f"the checkpoint {known[step]} is damaged ({problem}); {offer}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        for name in _names(checkpoint):
            _check(checkpoint, name)
        if not (checkpoint / CHECKSUMS).is_file():  # written by an older version
            for name in (WEIGHTS, STATE):
                _read(checkpoint / name, "cpu")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _names(checkpoint: Path) -> list[str]:
    """The files that a checkpoint must have."""
    if not (checkpoint / sharded.WEIGHTS).is_dir():
        return [WEIGHTS, STATE]
    if not (checkpoint / CHECKSUMS).is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    return list(json.loads((checkpoint / CHECKSUMS).read_text()))


def abandon(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, so that a run continues from it; returns the new names.

    They are not removed, neither now nor by retention.
    """
    renamed = []
    for path in [path for later, path in steps(folder).items() if later > step]:
        numbers = (path.with_name(f"{path.name}-abandoned{n or ''}") for n in range(1000))
        renamed.append(path.rename(next(name for name in numbers if not name.exists())))
    return renamed


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
    ranks: Ranks,
) -> None:
    """Write a checkpoint, then remove the oldest ones.

    Weights and optimizer state have the parameter names of the model. If FSDP2 shards the model,
    each rank writes its own part; otherwise the first rank writes all of them. Every rank must call
    this, and all of them must see the same folder.

    Args:
        folder: folder of the run.
        step: number of completed steps.
        model, optimizer: of the run.
        state: other state; types that `torch.load(weights_only=True)` accepts.
        keep: number of checkpoints to keep.
        ranks: this rank.

    Raises:
        OSError: a file cannot be written, as on a full disk; names it, and leaves nothing behind.
    """
    checkpoints = folder / "checkpoints"
    unfinished = checkpoints / f".step-{step:08}"
    whole = {**state, "step": step}
    try:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        ranks.wait()
        if is_sharded(model):
            sharded.save(unfinished, model, optimizer)
            own = sharded.files(unfinished, ranks.rank)
            sums = {str(path.relative_to(unfinished)): _checksum(path) for path in own}
            sums = dict(item for part in ranks.gathered(sums) for item in part.items())
        elif ranks.first:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
            sums = _write_weights(unfinished, get_model_state_dict(model, options=options))
        if not ranks.first:
            return
        _write(unfinished / STATE, lambda file: torch.save(whole, file))
        sums[STATE] = _checksum(unfinished / STATE)
        _write(unfinished / CHECKSUMS, lambda file: file.write(json.dumps(sums).encode()))
        for path in (*unfinished.glob("*/"), unfinished):
            _folder_to_disk(path)
        final = checkpoints / f"step-{step:08}"
        if final.exists():  # the same run at the same step: identical
            shutil.rmtree(final)
        unfinished.rename(final)
    except BaseException:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _folder_to_disk(checkpoints)
    _remove_old(folder, keep)


def _write_weights(checkpoint: Path, weights: Any) -> dict[str, str]:
    """Write the whole weights to one file; returns its checksum by its name."""
    from safetensors.torch import save as to_bytes

    content = to_bytes({name: x.contiguous() for name, x in weights.items()})
    _write(checkpoint / WEIGHTS, lambda file: file.write(content))
    return {WEIGHTS: _checksum(checkpoint / WEIGHTS)}


def load(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Load weights and optimizer state, however the saved model was sharded.

    Returns:
        The other state.
    """
    state = torch.load(checkpoint / STATE, map_location=device, weights_only=True)
    if (checkpoint / sharded.WEIGHTS).is_dir():
        sharded.load(checkpoint, model, optimizer)
        return state
    options = StateDictOptions(full_state_dict=True)
    weights: Any = weights_of(checkpoint, device)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=options)
    return state


def weights_of(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of a run, a checkpoint or a file.

    Args:
        path: folder of a run (its newest checkpoint counts), folder of a checkpoint, or a file in
            safetensors or `torch.save` format.
        device: device of the weights.

    Raises:
        ValueError: no such file, or it is damaged.
    """
    path = Path(path)
    checkpoint = newest(path) or path
    if (checkpoint / sharded.WEIGHTS).is_dir():
        if (problem := damage(checkpoint)) is not None:
            raise ValueError(f"the checkpoint {checkpoint} is damaged ({problem})")
        return sharded.weights(checkpoint, device)
    file = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        without = f" without {file}" if checkpoint.is_dir() else ""
        raise ValueError(f"need a run, a checkpoint or a file of weights, got {path}{without}")
    _check(file.parent, file.name)
    state = _read(file, device)
    for nested in ("model", "state_dict"):
        if isinstance(state.get(nested), dict):
            state = state[nested]
    return state


def _read(file: Path, device: torch.device | str) -> dict[str, Any]:
    """The content of a file in safetensors or `torch.save` format.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file, device=str(device))
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # the libraries raise many classes
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())[:300]}") from error


def _check(checkpoint: Path, name: str) -> None:
    """Compare a file of a checkpoint with its checksum, if it has one.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = checkpoint / name
    if not file.is_file():
        raise ValueError(f"{name} is missing")
    sums = checkpoint / CHECKSUMS
    if sums.is_file():
        known = json.loads(sums.read_text())
        if known.get(name, digest := _checksum(file)) != digest:
            raise ValueError(f"{file} is not as it was written: its checksum differs")


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _remove_old(folder: Path, keep: int) -> None:
    for path in list(steps(folder).values())[:-keep]:
        # rename first: a partly removed folder must not look like a checkpoint
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)
    for path in (folder / "checkpoints").glob(".step-*"):
        if REST.fullmatch(path.name):
            shutil.rmtree(path)


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with named(path), open(path, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save hides the OSError of its file
            raise OSError(errno.EIO, f"cannot be written: {error}") from error
        file.flush()
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
