"""Compares the results and gradients of every candidate before it is timed."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Case, Inputs, leaves, map_tensors

# Allowed error, as a multiple of the error of the reference in the same dtype. Baselines get more:
# PyTorch's float32 convolution has 5 times the error of its linear, and is not wrong.
SLACK = {"ours": 2, "baseline": 16, "given": 16}


@dataclasses.dataclass
class Trial:
    """A compared candidate; its status is "ok", "wrong", "failed" or "cannot run"."""

    candidate: Candidate
    status: str
    reason: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # relative to max |truth|
    torch_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def in_mode(self, mode: str) -> "Trial":
        """The trial, or a "cannot run" one if the candidate has no backward for `mode`."""
        only = self.candidate.forward_only
        if mode == "forward" or only is None or self.status != "ok":
            return self
        return Trial(self.candidate, "cannot run", only)


def check(case: Case, candidates: Sequence[Candidate] | None = None) -> list[Trial]:
    """Compare the result and gradients of every candidate with the reference in float64.

    The inputs of the float64 reference are already rounded to `case.dtype`. The allowed error is
    `SLACK` times the error of the reference in `case.dtype`, plus one rounding of the largest
    element. That rounding is in the dtype of the result, which is float32 for scores; for baselines
    it is in `case.dtype`, because theirs have bfloat16 gradients of scores.
    """
    description, parameters = case.description, case.description.PARAMETERS
    inputs = case.make()
    true = answers(description.truth, cast(inputs, torch.float64), parameters)
    plain = answers(description.truth, inputs, parameters)
    trials = []
    for candidate in case.candidates() if candidates is None else candidates:
        if candidate.reason is not None:
            trials.append(Trial(candidate, "cannot run", candidate.reason))
        elif candidate.kind == "floor":  # computes a part of the op only
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
        results = answers(candidate.run, candidate.prepare(inputs), names)
    except Exception as error:  # out of memory, a result of another shape, what libraries raise
        text = (str(error) or "no message").splitlines()[0]
        return Trial(candidate, "failed", f"{type(error).__name__}: {text}")
    trial = Trial(candidate, "ok")
    wrong = []
    for name, result in results.items():
        off, own, fault = compare(
            name, result, true[name], plain[name], SLACK[candidate.kind], coarsest
        )
        if math.isfinite(off):  # JSON has no NaN and no infinity
            trial.errors[name] = off
        trial.torch_errors[name] = own
        wrong += [] if fault is None else [fault]
    if wrong:
        trial.status, trial.reason = "wrong", "; ".join(wrong)
    return trial


def compare(
    name: str,
    result: Tensor,
    true: Tensor,
    plain: Tensor,
    slack: float = SLACK["ours"],
    coarsest: torch.dtype | None = None,
) -> tuple[float, float, str | None]:
    """Compare a result with the float64 one, by the error of the reference in the same dtype.

    Args:
        name: of the result, for the message.
        plain: the result of the reference.
        slack: the allowed multiple of its error.
        coarsest: the dtype of the allowed rounding; default: that of `plain`.

    Returns:
        The errors of both, relative to the largest element, and the fault, or None.
    """
    largest = max(float(true[true.isfinite()].abs().max()), torch.finfo(torch.float32).tiny)
    # Equal infinities, as in the log-sum-exp of an empty group, have a difference of NaN.
    off, own = (
        float(torch.where(x == true, 0.0, x - true).abs().max())
        for x in (result.to(true.dtype), plain.to(true.dtype))
    )
    rounding = torch.finfo(coarsest or plain.dtype).eps * largest
    allowed, fault = slack * own + rounding, None
    if not off <= allowed:  # rather than `>`: NaN is wrong
        fault = f"{name} is off by {off:.2g}; PyTorch by {own:.2g}, allowed {allowed:.2g}"
    return off / largest, own / largest, fault


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with every floating-point tensor in another dtype."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def answers(
    call: Callable[[Inputs], Tensor], inputs: Inputs, parameters: Sequence[str]
) -> dict[str, Tensor]:
    """The result of a call and its gradients with respect to the named inputs."""
    inputs = leaves(inputs, parameters)
    with torch.set_grad_enabled(bool(parameters)):  # as in the timed call: compiles once
        out = call(inputs)
    if not parameters:
        return {"result": out}
    gradients = torch.autograd.grad(
        out, [getattr(inputs, name) for name in parameters], inputs.grad
    )
    return {"result": out.detach(), **dict(zip(parameters, gradients, strict=True))}
