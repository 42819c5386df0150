"""Accesses of the CUDA kernels: without bank conflicts, and in whole sectors of memory.

`python tests/predicted.py` computes lower limits of times from the same counts.
"""

import re

import counters
import emulated
import predicted
import pytest
import sass
import test_nvcc


def test_known_patterns():
    source = emulated.EMULATOR / "profile_patterns.cpp"
    known = {}
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if cost := re.search(r"// ([\d.]+) units, ([\d.]+) suffice", line):
            known[f"{source.name}:{number}"] = float(cost[1]), float(cost[2])
    (launch,) = counters.count("patterns", blocks=2, grid=8)
    assert (launch.kernel, launch.blocks, launch.ran) == ("patterns_kernel", 8, 2)
    counted = {
        place.where[-1]: (place.units / place.requests, place.ideal / place.requests)
        for place in launch.places
        if place.where[-1] in known
    }
    assert counted == known
    copies = {p.kind: p for p in launch.places if p.where[-1] not in known}
    assert sorted(copies) == ["global read", "shared write"]  # of cp.async
    assert copies["global read"].units == 2 * copies["global read"].ideal
    assert copies["shared write"].excess == 1
    # Every warp multiplies once while a copy is under way, and then once or twice more.
    assert sum(launch.mma.values()) == 2 * 5 and launch.copying == 2 * 2
    # Both blocks access the same sectors.
    assert launch.fetched == 2 * sum(read + written for _, read, written in launch.buffers.values())
    assert launch.balance == pytest.approx(2 * 3 / 5)
    assert launch.barriers == 2 * 2 * 2 and launch.multiplications == 8 * 5


# Attention in groups of 8, 69 and 197, and a loss, in a few seconds; the other cases are slow.
QUICK = (
    *("A1 SMAUG frames, mask 0.65", "A5 spatial, 8 frames", "A6 temporal, 8 frames"),
    "SMAUG, 4 frames, mask 0.65, loss",
)
CASES = [
    pytest.param(case, marks=[] if case.shape in QUICK else [pytest.mark.slow], id=name)
    for case in predicted.cases()
    for name in [f"{case.shape}-{case.phase}"]
]
# The page has three digits, and the counts of a few blocks stand for all.
WORSE = 1.02


@pytest.mark.parametrize("case", CASES)
def test_kernels_ask_for_no_more_than_they_may(case):
    launches = [launch for run in case.runs for launch in predicted.launches(run)]
    complaints = [text for launch in launches for text in counters.excesses(launch)]
    assert not complaints, "\n".join(complaints)
    page = predicted.committed()[case.shape, case.phase]
    torch = predicted.H200.limit(case.torch) if case.torch else 0.0
    resources = [predicted.resources(launch) for launch in launches]
    for name, times in zip(("memory", "shared", "mma"), zip(*resources, strict=True), strict=True):
        now = 1e6 * (sum(times) + torch * (name == "memory"))
        assert now <= WORSE * page[name] + 0.06, f"{name}: {REGENERATE}"


REGENERATE = "worse than docs/contributors/predicted.md; if that is meant, write it again"
needs_nvcc = pytest.mark.skipif(test_nvcc.nvcc() is None, reason="nvcc is not installed")


@pytest.mark.slow
@needs_nvcc
def test_bounds_are_not_worse_than_the_committed_ones():
    page = predicted.committed()
    worse = {}
    for case in predicted.cases():
        now = 1e6 * sum(part.time for part in predicted.bounds(case))
        before = page[case.shape, case.phase]["bound"]
        if now > WORSE * before + 0.06:
            worse[case.shape, case.phase] = f"{before} -> {now:.1f} us"
    assert not worse, REGENERATE


# A division for an element is about one for an mma: each has 128 elements, of which a lane has 4.
MOST_DIVISIONS = 0.1
DIVIDING = {
    # The loop runs once, or once for each group of the warp if one holds NaN.
    "packed_forward_kernel": "remainders of rows by the rows of a group",
    "packed_backward_kernel": "remainders of rows by the rows of a group",
}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kind", ["Plain", "Biased"])
def test_no_division_or_call_in_a_loop_with_mma(kind):
    kernels = sass.kernels("space_time_attention", kind).values()
    assert sum(bool(kernel.matmul_loops) for kernel in kernels) > 8
    slow = {kernel.name: kernel.slow() for kernel in kernels}
    wrong = {
        name: f"{most:.2f} for an mma"
        for name, most in slow.items()
        if most > MOST_DIVISIONS and name.split("<")[0] not in DIVIDING
    }
    assert not wrong


# The indices of four rows are loaded together.
MOST_WAITS = 1


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kind", ["Plain", "Biased"])
def test_no_longer_chain_of_loads_in_a_copy_loop(kind):
    kernels = sass.kernels("space_time_attention", kind).values()
    waits = {kernel.name: kernel.waits() for kernel in kernels}
    assert any(loads for _, loads in waits.values())
    assert not {name: x for name, x in waits.items() if x[0] > MOST_WAITS}
