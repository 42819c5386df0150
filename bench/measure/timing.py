"""Then time: the candidates take turns, over sets of inputs that no cache holds all at once."""

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
    """Seconds a call, over and over, with inputs that were not used just before."""

    cold: list[float] = dataclasses.field(default_factory=list)
    warm: list[float] = dataclasses.field(default_factory=list)  # CUDA: the same inputs each time
    eager: list[float] = dataclasses.field(default_factory=list)  # CUDA: without a graph
    memory: int | None = None  # bytes at the peak, above the inputs; CPU: of the whole process
    note: str | None = None


def measure(
    candidates: Sequence[Candidate], case: Case, mode: str, quick: bool = False
) -> dict[str, Times]:
    """Time the candidates: each for about a second, a third of one on CUDA; a tenth if `quick`."""
    inputs = [case.make()]
    inputs += [map_tensors(Tensor.clone, inputs[0]) for _ in range(_rotation(case) - 1)]
    calls = {c.name: [caller(c, case, each, mode) for each in inputs] for c in candidates}
    times = take_turns(calls, case.device, quick)
    if case.device == "cpu":
        for name, each in times.items():
            each.memory = peak_of_process(calls[name][0])
    return times


def take_turns(calls: dict[str, list[Call]], device: str, quick: bool = False) -> dict[str, Times]:
    """Time each of the named calls; a slow drift of the machine hits all of them alike.

    Args:
        calls: the same work on several sets of inputs, for each name.
        device: "cpu" or "cuda".
    """
    prepare = _prepare_cuda if device == "cuda" else _prepare_cpu
    budget, fewest, most = (0.1, 2, 10) if quick else (1.0, 5, 100)
    if device == "cuda":  # each sample is many calls already
        budget /= 3
    times = {name: Times() for name in calls}
    samplers = {name: prepare(calls[name], times[name]) for name in calls}
    rounds = {}
    for name, kinds in samplers.items():
        first = sum(sample() for sample in kinds.values())  # this one also warms up
        rounds[name] = max(fewest, min(most, int(budget / max(first, 1e-9))))
    total = max(rounds.values(), default=0)
    for turn in range(total):
        # In another order each turn: what follows a slow one finds the caches as that left them.
        for name, count in random.Random(turn).sample(sorted(rounds.items()), len(rounds)):
            if (turn + 1) * count // total > turn * count // total:  # spread over the whole run
                for kind, sample in samplers[name].items():
                    getattr(times[name], kind).append(sample())
    return times


def caller(candidate: Candidate, case: Case, inputs: Inputs, mode: str) -> Call:
    """What is timed: the candidate on these inputs, forward or with its gradients."""
    inputs = candidate.prepare(inputs)
    if mode == "forward":
        return functools.partial(torch.no_grad()(candidate.run), inputs)
    names = case.gradients(candidate)
    inputs = leaves(inputs, names)
    parameters = [getattr(inputs, name) for name in names]
    return lambda: torch.autograd.grad(candidate.run(inputs), parameters, inputs.grad)


def _rotation(case: Case) -> int:
    """How many sets of inputs exceed the last-level cache twice over; 16 at most."""
    one = case.work("forward")[0].size
    return min(16, math.ceil(2 * hardware.last_level_cache(case.device) / one))


def _prepare_cpu(calls: list[Call], times: Times) -> dict[str, Sampler]:
    _keep_freed_memory()
    turns = itertools.cycle(calls)

    def sample() -> float:
        call = next(turns)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return {"cold": sample}


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc hand out again what was freed, as in the steady state of a training run.

    Else a freed tensor goes back to the system at some sizes and not at others, as the calls before
    happen to have left the heap; the page faults of the next one then cost several times the copy.
    """
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (AttributeError, OSError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def peak_of_process(call: Call) -> int | None:
    """How far the resident memory rises during a call; Linux with glibc, else None.

    What a kernel keeps from earlier calls, such as scratch of its threads, is not seen.
    """
    status, watermark = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed before would be used again
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
        watermark.write_text("5")  # the highest value seen starts again from here
        call()
        return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) * 1024
    except (AttributeError, IndexError, OSError):
        return None


def _prepare_cuda(calls: list[Call], times: Times) -> dict[str, Sampler]:
    """Graph replay, cold and warm, and eager calls; nothing synchronises between two events."""
    calls[0]()  # whatever it allocates once and keeps
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls[0]()
    times.memory = torch.cuda.max_memory_allocated() - before
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture must find everything compiled and tuned
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    many = calls * math.ceil(10 / len(calls))
    samplers = {"eager": _between_events(lambda: [call() for call in many], len(many))}
    try:
        samplers["cold"] = _between_events(_capture(many).replay, len(many))
        samplers["warm"] = _between_events(_capture(calls[:1] * 10).replay, 10)
    except RuntimeError as error:  # a candidate that synchronises or allocates on the host
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
        replay()  # keeps the device busy while the host queues what is timed
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return sample
