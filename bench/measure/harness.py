"""The benchmark of ops: checks every candidate, times them interleaved, and records the limit.

A description (`bench/ops/<op>.py`) defines `SHAPES`, `PARAMETERS`, `make`, `work`, `truth` and
`candidates`. All ops then run through the same steps:

1. `check`: the result and gradients of every candidate are compared with the float64 reference.
   A wrong candidate gets no time.
2. `hardware`: the copy and matmul rates of the device give a lower limit of the time.
3. `timing`: the candidates are timed in random order, on sets of inputs larger than the cache.
4. `record`: median and quantiles, TFLOP/s, GB/s, share of the limit, ratio to every baseline.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence

import torch

from vidl.bench.measure import hardware, timing
from vidl.bench.measure.cases import Case, Plan, plan, short
from vidl.bench.measure.check import check
from vidl.bench.measure.record import Record, records, table, write
from vidl.progress import Bar

__all__ = ["dry_run", "plan", "run", "table", "write"]


def dry_run(plan: Plan, as_json: bool = False) -> Iterator[str]:
    """One line per case and candidate: whether it would be timed, or why it cannot run."""
    for case in plan.cases:
        if not as_json:
            yield f"{case.op} · {case.shape} · {short(case.dtype)} · {case.device}"
        for c in case.candidates():
            if as_json:
                row = {"op": case.op, "shape": case.shape, "dtype": short(case.dtype)}
                row |= {"device_type": case.device, "candidate": c.name, "kind": c.kind}
                yield json.dumps(row | {"reason": c.reason})
            else:
                yield f"  {c.name:40} {c.kind:6} {c.reason or 'would be timed'}"


def run(plan: Plan, budget: float | None = None) -> Iterator[list[Record]]:
    """Run a plan; yields the records of one case, mode and number of threads at a time.

    Args:
        budget: seconds after which no further case starts. With a budget the cases are interleaved:
            the first shape of every op, then the second of every op, and so on.
    """
    started, before = time.monotonic(), torch.get_num_threads()
    cases = plan.cases if budget is None else interleaved(plan.cases)
    total, done = len(plan.threads) * sum(len(case.modes(plan.modes)) for case in cases), 0
    bar = Bar(total)
    try:
        # Convolutions choose their fastest algorithm, and do not round float32 to TF32.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
        for number, case in enumerate(cases):
            if budget is not None and time.monotonic() - started > budget:
                left = ", ".join(f"{c.op} · {c.shape} · {short(c.dtype)}" for c in cases[number:])
                bar.say(f"[{done}/{total}] {budget:g} s are over; not measured: {left}")
                break
            bar.begin(done + 1, f"{case.op} · {case.shape}: comparing the results")
            if case.device == "cuda":  # otherwise later shapes hit the recompilation limit
                torch.compiler.reset()
            checked = check(case)
            for threads in plan.threads:
                torch.set_num_threads(threads)
                limits = hardware.limits(case.device, threads, case.dtype)
                for mode in case.modes(plan.modes):
                    done += 1
                    bar.begin(
                        done,
                        f"{case.op} · {case.shape} · {short(case.dtype)} · {mode} · "
                        f"{threads} threads",
                    )
                    trials = [trial.in_mode(mode) for trial in checked]
                    timed = [trial.candidate for trial in trials if trial.status == "ok"]
                    times = timing.measure(timed, case, mode, plan.quick)
                    bar.clear()
                    yield records(case, mode, threads, limits, trials, times, plan.quick)
    finally:
        torch.set_num_threads(before)
        bar.clear()


def interleaved(cases: Sequence[Case]) -> list[Case]:
    """The first case of every op, then the second of every op, and so on."""
    by_op: dict[str, list[Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    rounds = itertools.zip_longest(*by_op.values())
    return [case for cases in rounds for case in cases if case is not None]
