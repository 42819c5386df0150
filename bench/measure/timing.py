"""Times candidates in random order, on sets of inputs that together exceed the cache."""

import ctypes
import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidl.bench.measure import hardware
from vidl.bench.measure.cases import Candidate, Case, Inputs, leaves, map_tensors

Call = Callable[[], object]
Sampler = Callable[[], float]


@dataclasses.dataclass
class Times:
    """Seconds per call; `cold` calls use other inputs than the call before."""

    cold: list[float] = dataclasses.field(default_factory=list)
    warm: list[float] = dataclasses.field(
        default_factory=list
    )  # CUDA: the same inputs in every call
    eager: list[float] = dataclasses.field(default_factory=list)  # CUDA: without a graph
    memory: int | None = None  # peak bytes above the inputs; on a CPU, of the process
    note: str | None = None


def measure(
    candidates: Sequence[Candidate], case: Case, mode: str, quick: bool = False
) -> dict[str, Times]:
    """Time each candidate for about a second (CUDA: a third), or a tenth of that if `quick`."""
    inputs = [case.make()]
    sets = rotation(case.work("forward")[0].size, case.device)
    inputs += [map_tensors(Tensor.clone, inputs[0]) for _ in range(sets - 1)]
    calls = {c.name: [caller(c, case, x, mode) for x in inputs] for c in candidates}
    times = interleave(calls, case.device, quick)
    if case.device == "cpu":
        for name in times:
            times[name].memory = peak_of_process(calls[name][0])
    return times


def interleave(
    calls: dict[str, list[Call]], device: str, quick: bool = False, seconds: float = 1.0
) -> dict[str, Times]:
    """Time the named calls interleaved, so that drift of the machine affects all alike.

    Args:
        calls: by name, calls of the same work on several sets of inputs.
        device: "cpu" or "cuda".
        seconds: for each name, of which CUDA uses a third; `quick` uses a tenth of a second.
    """
    prepare = _prepare_cuda if device == "cuda" else _prepare_cpu
    budget, fewest, most = (0.1, 2, 10) if quick else (seconds, 5, 100)
    if device == "cuda":  # a sample is many calls
        budget /= 3
    times = {name: Times() for name in calls}
    samplers = {name: prepare(calls[name], times[name]) for name in calls}
    rounds = {}
    for name, kinds in samplers.items():
        first = sum(sample() for sample in kinds.values())  # also the warm-up
        rounds[name] = max(fewest, min(most, int(budget / max(first, 1e-9))))
    total = max(rounds.values(), default=0)
    for index in range(total):
        # In random order, because a candidate finds the caches as the one before left them.
        for name, count in random.Random(index).sample(sorted(rounds.items()), len(rounds)):
            if (index + 1) * count // total > index * count // total:  # spread over the run
                for kind, sample in samplers[name].items():
                    getattr(times[name], kind).append(sample())
    return times


def caller(candidate: Candidate, case: Case, inputs: Inputs, mode: str) -> Call:
    """The timed call: the candidate on these inputs, forward or forward and backward."""
    inputs = candidate.prepare(inputs)
    if mode == "forward":
        return functools.partial(torch.no_grad()(candidate.run), inputs)
    names = case.gradients(candidate)
    inputs = leaves(inputs, names)
    parameters = [getattr(inputs, name) for name in names]
    return lambda: torch.autograd.grad(candidate.run(inputs), parameters, inputs.grad)


def rotation(size: int, device: str) -> int:
    """The number of input sets that exceed twice the last-level cache, at most 16."""
    return min(16, math.ceil(2 * hardware.last_level_cache(device) / max(size, 1)))


def _prepare_cpu(calls: list[Call], times: Times) -> dict[str, Sampler]:
    _keep_freed_memory()
    repeated = itertools.cycle(calls)

    def sample() -> float:
        call = next(repeated)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return {"cold": sample}


@functools.cache
def _keep_freed_memory() -> None:
    """Make glibc reuse freed memory, as in the steady state of a training run.

    Otherwise glibc returns some freed tensors to the system, depending on their size and on earlier
    calls; the page faults of the next allocation then cost several times as much as a copy.
    """
    trim_threshold, mmap_max = -1, -4  # constants of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (AttributeError, OSError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def peak_of_process(call: Call) -> int | None:
    """The rise of resident memory during a call, in bytes; None except on Linux with glibc.

    Memory that a kernel keeps from earlier calls, such as scratch of its threads, is not counted.
    """
    status, watermark = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise memory freed before is reused
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
        watermark.write_text("5")  # resets the peak
        call()
        return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) * 1024
    except (AttributeError, IndexError, OSError):
        return None


def _prepare_cuda(calls: list[Call], times: Times) -> dict[str, Sampler]:
    """Samplers of graph replay, cold and warm, and of eager calls; none synchronises inside."""
    calls[0]()  # allocates what it keeps between calls
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls[0]()
    times.memory = torch.cuda.max_memory_allocated() - before
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and tunes before the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    many = calls * math.ceil(10 / len(calls))
    samplers = {"eager": _between_events(lambda: [call() for call in many], len(many))}
    try:
        samplers["cold"] = _between_events(_capture(many).replay, len(many))
        samplers["warm"] = _between_events(_capture(calls[:1] * 10).replay, 10)
    except RuntimeError as error:  # a candidate that synchronises with the host
        times.note = f"eager: no CUDA graph ({str(error).splitlines()[0]})"
        torch.cuda.synchronize()
        samplers = {"cold": samplers["eager"]}
    return samplers


def _capture(calls: list[Call]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _between_events(replay: Call, count: int) -> Sampler:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        replay()  # keeps the device busy while the host queues the timed replay
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return sample
