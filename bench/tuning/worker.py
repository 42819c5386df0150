"""The process that checks and times backends: a wrong kernel may abort it, hang it or poison it.

It imports everything, and forks: the fork serves requests, and another one follows if it ends. So a
new start takes no time; a fork may use CUDA, since its parent never does. Requests are JSON lines
on stdin, and events JSON lines on stdout: {"ready": pid} from each fork; for each request {"begin":
backend} before a backend runs first, {"refused": backend, "reason": ...} if it fails or is wrong,
and at last {"seconds": {backend: {"eager": ..., "graph": ...}}}. {"ended": status} says that a fork
ended, as `os.waitstatus_to_exitcode` has it.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from vidl import ops  # noqa: F401  declares the ops
from vidl.bench.measure import check, hardware, timing
from vidl.bench.tuning.calls import Recorded, differentiable, outputs, results
from vidl.kernels import library


def main() -> None:
    """Fork until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    args = parser.parse_args()
    # Whatever else prints goes to stderr.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in args.modules:
        importlib.import_module(name)
    status = 1
    while status != 0:
        if (process := os.fork()) == 0:
            torch.set_num_threads(args.threads)
            _serve(events)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        _send(events, ended=status)


def _serve(events: TextIO) -> None:
    """Serve requests until stdin ends."""
    _send(events, ready=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        call = Recorded.from_values(torch.load(request["file"], weights_only=True))
        _answer(events, call, request["without"], request["seconds"])


def _send(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")


def _answer(events: TextIO, call: Recorded, without: Sequence[str], seconds: float) -> None:
    names, reasons = call.candidates()
    for backend, reason in reasons.items():
        _send(events, refused=backend, reason=reason)
    names = [name for name in names if name not in without]
    # Memory that a kernel does not write is NaN during the check.
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    _send(events, begin="reference")
    arguments = call.draw()
    plain = _run(call, "reference", arguments)
    true = _truth(call, arguments)
    correct: list[str] = []
    for backend in names:
        _send(events, begin=backend)
        fault = _fault(call, backend, arguments, true, plain)
        if fault is None:
            correct.append(backend)
        else:
            _send(events, refused=backend, reason=fault)
            if call.device == "cuda":
                torch.ones(1, device="cuda").item()  # ends a process with a broken context
    del true, plain
    torch.use_deterministic_algorithms(False)
    _send(events, begin="timing")
    times = _time(call, correct, seconds)
    share = _share(call, times)
    _send(events, seconds=times, share=share)


def _run(call: Recorded, backend: str, arguments: Sequence[Any]) -> dict[str, Tensor]:
    """Results and gradients; the gradients of the results are the same for every backend."""
    generator = torch.Generator().manual_seed(1)

    def draw(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator)
        # Rounded as in the call, also for the float64 reference.
        return drawn.to(call.dtype).to(x.device, x.dtype)

    values = results(call, backend, arguments, draw)
    if call.device == "cuda":
        torch.cuda.synchronize()  # an error of a kernel surfaces here
    return values


def _truth(call: Recorded, arguments: Sequence[Any]) -> dict[str, Tensor]:
    """The reference in float64; on the CPU if the GPU's memory does not suffice."""

    def precise(x: Any, device: str) -> Any:
        if not isinstance(x, Tensor):
            return x
        dtype = torch.float64 if x.is_floating_point() else x.dtype
        return x.detach().to(device, dtype).requires_grad_(x.requires_grad)

    try:
        return _run(call, "reference", [precise(x, call.device) for x in arguments])
    except torch.OutOfMemoryError:
        values = _run(call, "reference", [precise(x, "cpu") for x in arguments])
        return {name: x.to(call.device) for name, x in values.items()}


def _fault(
    call: Recorded,
    backend: str,
    arguments: Sequence[Any],
    true: dict[str, Tensor],
    plain: dict[str, Tensor],
) -> str | None:
    """Why a backend cannot be chosen: it fails, or a result is wrong."""
    try:
        values = _run(call, backend, arguments)
    except Exception as error:
        text = (str(error) or "no message").splitlines()[0]
        return f"fails: {type(error).__name__}: {text[:200]}"
    # As in the benchmarks: attention of PyTorch has a larger error than its matmuls.
    slack = check.SLACK["baseline" if backend == "torch" else "ours"]
    faults = []
    for name, x in values.items():
        if x.shape != true[name].shape:
            faults.append(f"{name} is {list(x.shape)}, not {list(true[name].shape)}")
        elif not x.is_floating_point():
            faults += [] if torch.equal(x, plain[name]) else [f"{name} differs"]
        elif x.numel():
            fault = check.compare(name, x, true[name], plain[name], slack)[2]
            faults += [] if fault is None else [fault]
    return f"wrong: {'; '.join(faults)}" if faults else None


def _time(call: Recorded, backends: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Median seconds of each backend by policy; on a CPU there are no graphs."""
    size = sum(x.nbytes for x in call.draw() if isinstance(x, Tensor))
    sets = [call.draw(seed) for seed in range(timing.rotation(size, call.device))]
    calls = {
        backend: [_timed(call, backend, arguments) for arguments in sets] for backend in backends
    }
    times = timing.interleave(calls, call.device, seconds=seconds)
    values: dict[str, dict[str, Any]] = {}
    for backend, measured in times.items():
        if call.device == "cpu":
            values[backend] = {"eager": statistics.median(measured.cold)}
        else:
            eager = statistics.median(measured.eager or measured.cold)
            graph = None if measured.note else statistics.median(measured.cold)
            values[backend] = {"eager": eager, "graph": graph}
    return values


def _timed(call: Recorded, backend: str, arguments: Sequence[Any]) -> timing.Call:
    """The timed call: forward, or forward and backward."""
    run = functools.partial(library.run, call.key.op, backend, *arguments, **call.hints)
    if not call.key.gradient:
        return torch.no_grad()(run)
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    places = differentiable(call, outputs(run()))
    gradients = [torch.randn_like(outputs(run())[place]) for place in places]

    def forward_and_backward() -> object:
        outs = outputs(run())
        return torch.autograd.grad(
            [outs[place] for place in places], inputs, gradients, allow_unused=True
        )

    return forward_and_backward


def _share(call: Recorded, times: dict[str, dict[str, Any]]) -> float | None:
    """The limit of the hardware divided by the time of the fastest, where the work is known."""
    if not call.work or not times:
        return None
    limits = hardware.limits(call.device, torch.get_num_threads(), call.dtype)
    least = sum(limits.seconds(size, flops) for size, flops in call.work)
    return least / min(
        t["graph"] or t["eager"] if "graph" in t else t["eager"] for t in times.values()
    )


if __name__ == "__main__":
    main()
