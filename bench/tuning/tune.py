"""Measures the backends of recorded calls and stores the fastest right one of each.

A backend is checked against the float64 reference, then timed as `vidl bench` does, forward and
backward together if a backward pass follows. It replaces the choice of the rule only if it is more
than 5 % faster.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree

from vidl.bench.tuning.calls import Recorded, recorded
from vidl.bench.tuning.process import Measured, Worker
from vidl.kernels import choices, library
from vidl.progress import Bar

MARGIN = 1.05  # a faster backend must be so many times as fast as that of the rule


@dataclass
class Outcome:
    """What became of a call.

    Attributes:
        call: the call.
        status: "tuned"; "kept", if it has entries; "failed"; or "left", if time was over.
        chosen: the backend of each policy.
        speedup: over the backend "torch".
        measured: times, reasons against backends, share of the hardware limit.
    """

    call: Recorded
    status: str
    chosen: dict[str, str] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)

    def as_json(self) -> dict[str, Any]:
        return {
            "key": choices.key_as_json(self.call.key),
            "label": self.call.label,
            "status": self.status,
            "chosen": self.chosen,
            "speedup": self.speedup,
            "seconds": self.measured.seconds,
            "share_of_limit": self.measured.share,
            "refused": self.measured.refused,
            "failed": self.measured.failed,
        }


def tune_calls(
    calls: Iterable[Recorded],
    *,
    again: bool = False,
    budget: float | None = None,
    timeout: float = 60.0,
    seconds: float = 0.3,
    modules: Sequence[str] = (),
) -> list[Outcome]:
    """Measure the backends of calls in another process, and choose.

    Args:
        again: measure also what has entries.
        budget: seconds after which no further call starts.
        timeout, seconds, modules: see `Worker`.

    Returns:
        The outcomes, in the order of the calls.
    """
    started, calls = time.monotonic(), list(calls)
    outcomes = []
    with Worker(timeout, seconds, modules) as worker, Bar(len(calls)) as bar:
        for number, call in enumerate(calls, 1):
            kept = entries(call)
            if kept and not again:
                outcomes.append(Outcome(call, "kept", kept))
                continue
            if budget is not None and time.monotonic() - started > budget:
                outcomes.append(Outcome(call, "left"))
                continue
            bar.begin(number, f"{call.key.op}: {call.key}")
            outcomes.append(_choose(call, worker.measure(call)))
    return outcomes


def entries(call: Recorded) -> dict[str, str]:
    """The backends that were chosen before, by policy; empty if one is missing."""
    tuned = choices.table(call.device).tuned
    keys = {policy: call.key._replace(policy=policy) for policy in policies(call.device)}
    if not all(key in tuned for key in keys.values()):
        return {}
    return {policy: tuned[key] for policy, key in keys.items()}


def dry_run(call: Recorded, as_json: bool = False) -> str:
    """A line on a call: what "auto" takes now, and what would be measured."""
    key = call.key
    now, source = library.automatic(key.op, call.device, call.dtype, key, **call.facts)
    measured = call.candidates()[0]
    if as_json:
        row = {"key": choices.key_as_json(key), "label": call.label, "auto": now, "source": source}
        return json.dumps(row | {"candidates": measured})
    about = f"{call.label + ': ' if call.label else ''}{key}"
    return f"{key.op:22}{now:10} ({source}); candidates {', '.join(measured)}; {about}"


def policies(device: str) -> list[str]:
    """The policies of a type of device: graphs are for CUDA."""
    return list(choices.POLICIES if device == "cuda" else choices.POLICIES[:1])


def _choose(call: Recorded, measured: Measured) -> Outcome:
    """Choose a backend for each policy, and store it."""
    outcome = Outcome(call, "tuned", measured=measured)
    usual = library.by_rule(call.key.op, call.device, call.dtype, **call.facts)
    baseline = call.candidates()[0][0]
    for policy in policies(call.device):
        times = {b: t[policy] for b, t in measured.seconds.items()}
        known = {backend: t for backend, t in times.items() if t is not None}
        if not known:
            continue
        backend = fastest(known, usual)
        outcome.chosen[policy] = backend
        if baseline in known:
            outcome.speedup[policy] = known[baseline] / known[backend]
        key = call.key._replace(policy=policy)
        try:
            choices.write(call.device, key, backend, seconds=known, refused=measured.refused)
        except (OSError, RuntimeError) as error:  # a full disk; a user without a home
            _say(f"cannot store a choice, which holds for this process only: {error}")
    if not outcome.chosen:
        outcome.status = "failed"
    return outcome


def fastest(seconds: dict[str, float], usual: str) -> str:
    """The fastest backend, or the usual one unless that is more than 5 % slower."""
    best = min(seconds, key=lambda backend: seconds[backend])
    if usual in seconds and seconds[usual] <= MARGIN * seconds[best]:
        return usual
    return best


def _say(text: str) -> None:
    print(f"vidl: {text}", file=sys.stderr)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text for a terminal."""
    head = f"{'op':22}{'choice':12}{'policy':8}{'speedup':>9}{'of limit':>10}  call"
    lines = [head]
    for outcome in outcomes:
        call, measured = outcome.call, outcome.measured
        about = f"{call.label + ': ' if call.label else ''}{call.key}"
        if not outcome.chosen:
            why = measured.failed or "time is over" * (outcome.status == "left")
            why = why or "no backend is right"
            lines.append(f"{call.key.op:22}{'-':12}{outcome.status:8}{'':>19}  {about}: {why}")
        for policy, backend in outcome.chosen.items():
            speedup = f"{outcome.speedup[policy]:.2f} x" if policy in outcome.speedup else ""
            share = "" if measured.share is None else f"{measured.share:.0%}"
            kept = " (kept)" if outcome.status == "kept" else ""
            lines.append(
                f"{call.key.op:22}{backend:12}{policy:8}{speedup:>9}{share:>10}  {about}{kept}"
            )
        lines += [f"    {name}: {why}" for name, why in _surprises(outcome)]
    if any(outcome.speedup for outcome in outcomes):
        baselines = {outcome.call.candidates()[0][0] for outcome in outcomes}
        lines.append(f"speedup: over {' or '.join(sorted(baselines))}")
    if any("convolution" in dict(outcome.call.key.facts) for outcome in outcomes):
        lines.append("torch is PyTorch's convolution where the call names it (swapped models)")
    return "\n".join(lines)


def _surprises(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """The backends that should have run, and did not run right."""
    expected = outcome.call.candidates()[0]
    for name, why in outcome.measured.refused.items():
        if name in expected or name not in library.BACKENDS:
            yield name, why


@contextlib.contextmanager
def tuning(**options: Any) -> Iterator[list[Outcome]]:
    """Tune the calls that run inside the block, when it ends.

        with vidl.tuning():
            model(video).sum().backward()

    Every op that runs with backend "auto" is recorded with its sizes, dtype and options. At the end
    its backends are measured in another process, with random numbers in place of the inputs, and
    the fastest right one is chosen from now on, also in later processes. Calls that have entries
    are not measured again. A model under `torch.compile` or in a CUDA graph is tuned by running it
    without.

    Args:
        options: of `tune_calls`: `again`, `budget` in seconds, `timeout` in
            seconds for each backend.

    Yields:
        A list, which has an `Outcome` for each call after the block.

    Raises:
        RuntimeError: torch.distributed runs with several ranks, which must choose alike: tune in
            one process before.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"need one process for tuning, got {dist.get_world_size()} ranks: tune before the run"
        )
    outcomes: list[Outcome] = []
    calls: dict[choices.Key, Recorded] = {}
    with recorded(calls):
        yield outcomes
    outcomes += tune_calls(calls.values(), **options)


def tune(model: nn.Module, *inputs: Any, **options: Any) -> list[Outcome]:
    """Tune the calls of a model: forward and backward, and forward without gradients.

        vidl.swap(model)
        vidl.tune(model, video)

    The loss is the sum of all outputs. Gradients, buffers and random states are put back. The model
    stays in its mode, train or eval.

    Args:
        model: calls vidl's ops with backend "auto".
        inputs: arguments of the model, of the size of the batches to come.
        options: see `vidl.tuning`.

    Returns:
        An `Outcome` for each call; `vidl.bench.tuning.tune.table` prints them.

    Raises:
        RuntimeError: see `vidl.tuning`.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = list(range(torch.cuda.device_count()))
    try:
        with tuning(**options) as outcomes, torch.random.fork_rng(devices):
            out = model(*inputs)
            trained = [
                x for x in _pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad
            ]
            if trained:
                torch.stack([x.float().sum() for x in trained]).sum().backward()
            with torch.no_grad():
                model(*inputs)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return outcomes
