"""One way to time every op: check the answers, let the candidates take turns, report the limit.

A description (`bench/<op>.py`) says what: `SHAPES`, `PARAMETERS`, `make`, `work`, `truth` and
`candidates`. The rest is alike for all:

1. `check`: result and gradients of every candidate are compared with those of the reference in
   float64. One that is wrong gets no time.
2. `hardware`: the device's copy and matmul rates, for the time below which nothing can go.
3. `timing`: the candidates take turns over input sets that exceed the last-level cache.
4. `report`: median and quantiles, TFLOP/s, GB/s, share of the limit, ratio to every peer.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from vidl.bench.measure import hardware, timing
from vidl.bench.measure.cases import Case, Plan, plan, short
from vidl.bench.measure.check import check
from vidl.bench.measure.record import Record, records, table, write

__all__ = ["dry_run", "plan", "progress", "run", "table", "write"]


def dry_run(plan: Plan, as_json: bool = False) -> Iterator[str]:
    """One line for each candidate of each case: whether it would be timed, or why not."""
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
    """Time everything planned; yields the records of one case, mode and number of threads.

    Args:
        budget: seconds after which no further case begins. The ops then take turns, shape by
            shape, so that each has the first of its shapes however little time there is.
    """
    started, before = time.monotonic(), torch.get_num_threads()
    cases = plan.cases if budget is None else in_turns(plan.cases)
    total, done = len(plan.threads) * sum(len(case.modes(plan.modes)) for case in cases), 0
    try:
        # Of the two settings the first is fair to convolutions, the second keeps float32 float32.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
        for number, case in enumerate(cases):
            if budget is not None and time.monotonic() - started > budget:
                left = ", ".join(f"{c.op} · {c.shape} · {short(c.dtype)}" for c in cases[number:])
                progress(f"[{done}/{total}] {budget:g} s are over; left out: {left}")
                break
            progress(f"[{done + 1}/{total}] {case.op} · {case.shape}: comparing the answers")
            if case.device == "cuda":  # or the limit of recompilations makes later shapes eager
                torch.compiler.reset()
            checked = check(case)
            for threads in plan.threads:
                torch.set_num_threads(threads)
                progress("measuring what the device can do")
                limits = hardware.limits(case.device, threads, case.dtype)
                for mode in case.modes(plan.modes):
                    done += 1
                    progress(
                        f"[{done}/{total}] {case.op} · {case.shape} · {short(case.dtype)}"
                        f" · {mode} · {threads} threads"
                    )
                    trials = [trial.in_mode(mode) for trial in checked]
                    timed = [trial.candidate for trial in trials if trial.status == "ok"]
                    times = timing.measure(timed, case, mode, plan.quick)
                    yield records(case, mode, threads, limits, trials, times, plan.quick)
    finally:
        torch.set_num_threads(before)
        progress("")


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """The first case of each op, then the second of each, and so on."""
    by_op: dict[str, list[Case]] = {}
    for case in cases:
        by_op.setdefault(case.op, []).append(case)
    rounds = itertools.zip_longest(*by_op.values())
    return [case for each in rounds for case in each if case is not None]


def progress(text: str) -> None:
    """A line on stderr that changes; where that is no terminal, the numbered ones stay."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text.startswith("["):
        print(text, file=sys.stderr, flush=True)
