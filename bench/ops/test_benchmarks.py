"""`pytest bench --benchmark-only`: the op benchmarks on the CPU with pytest-benchmark.

The cases, checks and limits are those of `vidl bench`, which also measures GPUs. A table after
those of pytest-benchmark shows the share of the limit, which is also in `extra_info`.
"""

import functools

import pytest
import torch

from vidl.bench.measure import hardware
from vidl.bench.measure.cases import MODES, plan
from vidl.bench.measure.check import check
from vidl.bench.measure.record import limit_seconds
from vidl.bench.measure.timing import caller

PLAN = plan(device="cpu", dtypes=["float32"])
BENCHMARKS = [
    pytest.param(case, mode, candidate.name, id=f"{case.op}-{case.shape}-{mode}-{candidate.name}")
    for case in PLAN.cases
    for mode in MODES
    for candidate in case.candidates()
]


class Summary:
    """A pytest plugin that prints the share of the limit at the end of the run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.lines:
            place = f"{hardware.device_name('cpu')}, {torch.get_num_threads()} threads"
            terminalreporter.write_sep("-", f"share of the limit on {place}")
            terminalreporter.write_line("\n".join(self.lines))


@pytest.fixture(scope="session")
def summary(request) -> Summary:
    plugin = Summary()
    request.config.pluginmanager.register(plugin)
    return plugin


@functools.lru_cache(maxsize=1)  # the tests of a case are adjacent
def checked(case_index: int) -> dict:
    return {trial.candidate.name: trial for trial in check(PLAN.cases[case_index])}


@pytest.mark.parametrize("case, mode, name", BENCHMARKS)
@pytest.mark.benchmark(min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=1)
def test_benchmark(case, mode, name, benchmark, summary):
    trial = checked(PLAN.cases.index(case))[name].in_mode(mode)
    if trial.status == "cannot run":
        pytest.skip(trial.reason)
    assert trial.status == "ok", trial.reason

    benchmark.group = f"{case.op} · {case.shape} · {mode}"
    benchmark(caller(trial.candidate, case, case.make(), mode))
    if benchmark.stats is None:  # --benchmark-disable
        return
    limits = hardware.limits("cpu", torch.get_num_threads(), case.dtype)
    work = case.work(mode)
    median = benchmark.stats.stats.median
    share = limit_seconds(limits, work) / median
    benchmark.extra_info |= {
        "kind": trial.candidate.kind,
        "device": hardware.device_name("cpu"),
        "share_of_limit": share,
        "tflop_per_s": sum(phase.flops for phase in work) / median / 1e12,
        "gb_per_s": sum(phase.size for phase in work) / median / 1e9,
    }
    summary.lines.append(
        f"{case.shape:32}{mode:9}{name:36}{median * 1e3:10.3f} ms{share:7.0%} of the limit"
    )
