"""Compare a backend with the oracles over many random cases.

    PYTHONPATH=.:tests python tests/fuzz/sweep.py native select_tokens 17 18

runs case 17 of an op: the last number is left out. A failure names its case.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from compare import assert_as_accurate
from fuzz.cases import CASES, Case, case_of
from fuzz.oracles import truth
from torch import Tensor

from vidl.kernels import library
from vidl.kernels.space_time_attention.op import BIASED_HEAD_SIZES

OPS = tuple(CASES)


class Pool:
    """Errors of one result in one dtype over many cases, in their units.

    PyTorch may be exact in one case by luck: the rule of twice its error holds for all together.
    """

    def __init__(self) -> None:
        self.numbers: list[tuple[Tensor, Tensor, Tensor]] = []
        self.cases: list[Case] = []

    def add(self, case: Case, *numbers: Tensor) -> None:
        self.numbers.append(numbers)
        self.cases.append(case)

    def check(self, name: str, dtype: torch.dtype) -> None:
        ours, low, true = (torch.cat(x) for x in zip(*self.numbers, strict=True))
        try:
            assert_as_accurate(ours, low, true, dtype, order=1.0)
        except AssertionError as error:
            worst = max(
                zip(self.numbers, self.cases, strict=True),
                key=lambda x: float((x[0][0] - x[0][2]).abs().max()),
            )[1]
            raise AssertionError(f"{name} in {dtype}: {error}; the worst is {worst}") from error


def sweep(op: str, backend: str, numbers: Iterable[int]) -> None:
    """Run these cases of an op, and compare them with the oracle.

    "reference" runs in float64, and is held to the error of float32.
    """
    pools: dict[tuple[str, torch.dtype, torch.dtype], Pool] = defaultdict(Pool)
    dtypes = dtypes_of(backend, op)
    for number in numbers:
        case = case_of(op, number, dtypes)
        if not runs(case, backend):
            continue
        try:
            compare(case, backend, pools)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    for (name, _, dtype), pool in pools.items():
        pool.check(f"{op}: {name}", dtype)


def dtypes_of(backend: str, op: str) -> Sequence[torch.dtype]:
    if backend == "reference":
        return (torch.float32,)
    name = op if op in library.OPS else "token_scores"
    return [d for d in library.DTYPES if library.why_not(backend, name, "cpu", d) is None]


def runs(case: Case, backend: str) -> bool:
    """Whether the kernels take such a call: those in CUDA C++ take no bias of large heads."""
    if backend != "emulated" or case.op != "space_time_attention":
        return True
    biased = case.inputs.get("bias") is not None or case.inputs.get("key_bias") is not None
    return not biased or case.inputs["q"].shape[2] in BIASED_HEAD_SIZES


def compare(case: Case, backend: str, pools: dict) -> None:
    ours = (case.double() if backend == "reference" else case).run(backend)
    low, true = case.run("reference"), truth(case)
    assert ours.keys() == low.keys() == true.keys(), f"{ours.keys()} is not {true.keys()}"
    for name, (value, unit) in true.items():
        our, theirs = ours[name], low[name]
        assert our.shape == theirs.shape == value.shape, f"{name}: {our.shape}, not {value.shape}"
        if backend != "reference":
            assert our.dtype == theirs.dtype, f"{name}: {our.dtype}, not {theirs.dtype}"
        bound = ~unit.isnan()
        our, theirs, value, unit = (x[bound].double() for x in (our, theirs, value, unit))
        exact = (unit == 0) | ~value.isfinite()
        right = (our == value) | (our.isnan() & value.isnan())
        assert right[exact].all(), f"{name}: {our[exact]}, not {value[exact]}"
        assert our[~exact].isfinite().all(), f"{name} is not finite"
        if (~exact).any():
            dtype = low[name].dtype
            if dtype == torch.float16:  # smaller numbers are rounded as the least normal one is
                unit = unit.clamp(min=torch.finfo(dtype).smallest_normal)
            scaled = [x[~exact] / unit[~exact] for x in (our, theirs, value)]
            pools[name, case.dtype, dtype].add(case, *scaled)


if __name__ == "__main__":
    backend, op, first, end = sys.argv[1:]
    for name in OPS if op == "all" else [op]:
        sweep(name, backend, range(int(first), int(end)))
        print(f"{name}: cases {first} to {int(end) - 1} passed", flush=True)
