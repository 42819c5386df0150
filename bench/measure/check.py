"""Correct first: what a candidate answers is compared before it is timed."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Case, Inputs, leaves, map_tensors

# How many times the error of the reference in the same dtype a candidate may have. Peers get more:
# PyTorch's own float32 convolution has 5 times the error of its linear, and is not wrong.
SLACK = {"ours": 2, "peer": 16, "given": 16}


@dataclasses.dataclass
class Trial:
    """A candidate after its answers were compared: "ok", "wrong", "failed" or "cannot run"."""

    candidate: Candidate
    status: str
    reason: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # relative to the largest
    torch_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def in_mode(self, mode: str) -> "Trial":
        """The same, or why it has nothing to time in `mode`."""
        only = self.candidate.forward_only
        if mode == "forward" or only is None or self.status != "ok":
            return self
        return Trial(self.candidate, "cannot run", only)


def check(case: Case, candidates: Sequence[Candidate] | None = None) -> list[Trial]:
    """Compare result and gradients of every candidate with a more precise reference.

    The truth is the reference in float64, on inputs that already have the rounding of `case.dtype`;
    for the shorter dtypes too, as scores are float32 among them. Allowed is `SLACK` times the error
    of the reference in `case.dtype`, plus one rounding of the largest element; for peers one of
    `case.dtype`, as the reference has gradients of scores in float32 where they have bfloat16.
    """
    description, parameters = case.description, case.description.PARAMETERS
    inputs = case.make()
    true = answers(description.truth, cast(inputs, torch.float64), parameters)
    plain = answers(description.truth, inputs, parameters)
    trials = []
    for candidate in case.candidates() if candidates is None else candidates:
        if candidate.reason is not None:
            trials.append(Trial(candidate, "cannot run", candidate.reason))
        elif candidate.kind == "floor":  # computes something else: there is nothing to compare
            trials.append(Trial(candidate, "ok"))
        else:
            coarsest = None if candidate.kind == "ours" else case.dtype
            names = case.gradients(candidate)
            trials.append(_compare(candidate, inputs, names, true, plain, coarsest))
    return trials


def _compare(
    candidate: Candidate,
    inputs: Inputs,
    names: Sequence[str],
    true: dict[str, Tensor],
    plain: dict[str, Tensor],
    coarsest: torch.dtype | None,
) -> Trial:
    try:
        found = answers(candidate.run, candidate.prepare(inputs), names)
    except RuntimeError as error:  # out of memory, an op that is missing, a result of another shape
        return Trial(candidate, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    trial = Trial(candidate, "ok")
    wrong = []
    for name in found:
        largest = max(float(true[name].abs().max()), torch.finfo(torch.float32).tiny)
        off, own = (
            float((each[name].to(true[name].dtype) - true[name]).abs().max())
            for each in (found, plain)
        )
        if math.isfinite(off):  # JSON has no other numbers
            trial.errors[name] = off / largest
        trial.torch_errors[name] = own / largest
        rounding = torch.finfo(coarsest or plain[name].dtype).eps * largest
        allowed = SLACK[candidate.kind] * own + rounding
        if not off <= allowed:  # rather than `>`: what is no number is wrong too
            wrong.append(f"{name} is off by {off:.2g}; PyTorch by {own:.2g}, allowed {allowed:.2g}")
    if wrong:
        trial.status, trial.reason = "wrong", "; ".join(wrong)
    return trial


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with every floating-point tensor in another dtype."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def answers(
    call: Callable[[Inputs], Tensor], inputs: Inputs, parameters: Sequence[str]
) -> dict[str, Tensor]:
    """The result of a call and its gradients by the named inputs."""
    inputs = leaves(inputs, parameters)
    with torch.set_grad_enabled(bool(parameters)):  # as it will be timed: compiled once
        out = call(inputs)
    if not parameters:
        return {"result": out}
    found = torch.autograd.grad(out, [getattr(inputs, name) for name in parameters], inputs.grad)
    return {"result": out.detach(), **dict(zip(parameters, found, strict=True))}
