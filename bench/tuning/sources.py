"""The calls to tune: of a recipe, of a configuration, or of the shapes of the benchmarks."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from vidl import models
from vidl.bench.measure import cases
from vidl.bench.training import savings, steps
from vidl.bench.tuning.calls import Recorded, recorded
from vidl.kernels import choices
from vidl.training import Config

Calls = dict[choices.Key, Recorded]


def of_recipe(
    name: str,
    preset: str = "base",
    overrides: dict[str, Any] | None = None,
    *,
    batch: int | None = None,
    device: str,
    dtype: torch.dtype | None = None,
) -> Calls:
    """The calls of a training step of a recipe.

    Args:
        batch: clips of a step; default: that of `vidl savings`.
        dtype: of autocast; default: bfloat16 on CUDA, none on a CPU.

    Raises:
        ValueError: an unknown name or field.
    """
    recipe: Any = models.recipe(name, preset, **(overrides or {}))
    inputs = steps.batch_of(recipe, batch or savings.BATCH[device], device)
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return _of_step(name, recipe, inputs, device, dtype)


def of_config(config: Config, *, device: str, dtype: torch.dtype | None = None) -> Calls:
    """The calls of a training step of a run."""
    recipe: Any = config.recipe()
    inputs = recipe.example(max(2, config.data.batch_size), config.data.words, device)
    if dtype is None:
        low = config.run.precision == "bfloat16" or (
            config.run.precision == "auto" and device == "cuda"
        )
        dtype = torch.bfloat16 if low else torch.float32
    return _of_step(config.model.name, recipe, inputs, device, dtype)


def _of_step(
    name: str, recipe: Any, inputs: dict[str, Any], device: str, dtype: torch.dtype
) -> Calls:
    model: Any = models.MODELS[name].model(recipe).to(device).train()
    autocast: Any = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device, dtype)
    calls: Calls = {}
    with recorded(calls, name), autocast:
        loss = model(**inputs)["loss"]
    with recorded(calls, name):
        loss.backward()  # records what activation checkpoints compute again
    return calls


def of_benchmarks(
    names: Sequence[str] = (),
    *,
    device: str,
    dtypes: Sequence[str] | None = None,
    shapes: str | None = None,
    quick: bool = False,
) -> Calls:
    """The calls of the shapes that `vidl bench` times; training and inference.

    Args:
        names: ops; default: all.
        dtypes, shapes, quick: see `cases.plan`.

    Raises:
        ValueError: an unknown op or dtype, or no shape matches.
    """
    known = [name for name in cases.operations() if name not in cases.COMBINED]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"need ops among {', '.join(known)}; got {', '.join(unknown)}")
    plan = cases.plan(names or known, shapes=shapes, device=device, dtypes=dtypes, quick=quick)
    calls: Calls = {}
    for case in plan.cases:
        for mode in case.modes(plan.modes):
            of_case: Calls = {}
            with recorded(of_case, case.shape):
                _call(case, mode)
            work = [(phase.size, phase.flops) for phase in case.work(mode)]
            for key, call in of_case.items():
                calls.setdefault(key, dataclasses.replace(call, work=work))
    return calls


def _call(case: cases.Case, mode: str) -> None:
    """One forward of vidl with "auto", which is recorded."""
    candidate = next(c for c in case.candidates() if c.kind == "ours")
    run: Any = candidate.run
    names = case.gradients(candidate) if mode == "full" else ()
    with torch.set_grad_enabled(bool(names)):
        run(cases.leaves(case.make(), names), backend="auto")
