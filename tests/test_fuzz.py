"""Random calls of every op against oracles in float64, which share no code with vidl.

tests/fuzz/: cases.py draws the calls, oracles.py and attention.py hold the oracles, sweep.py
compares. A failure names its case, and `sweep.py` runs one case alone.
"""

import pytest
import torch
from fuzz.cases import case_of
from fuzz.sweep import OPS, sweep
from where import Where

from vidl.kernels import library

# A warning of torch.var for an empty input.
pytestmark = pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom")


def library_op(op):
    return op if op in library.OPS else "token_scores"


@pytest.mark.parametrize("backend, count", [("native", 100), ("emulated", 100), ("reference", 20)])
@pytest.mark.parametrize("op", OPS)
def test_some_cases(op, backend, count):
    Where(backend, "cpu").skip_unless_runs(library_op(op), torch.float16)
    sweep(op, backend, range(count if op in library.OPS else count // 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, count", [("native", 3000), ("emulated", 2000), ("reference", 1000), ("triton", 24)]
)
@pytest.mark.parametrize("op", OPS)
def test_many_cases(op, backend, count):
    Where(backend, "cpu").skip_unless_runs(library_op(op), torch.float16)
    sweep(op, backend, range(count))


@pytest.mark.parametrize("op", OPS)
def test_a_number_names_a_case(op):
    one, two = (case_of(op, 5, library.DTYPES) for _ in range(2))
    assert str(one) == str(two) != str(case_of(op, 6, library.DTYPES))
    for name, x in one.inputs.items():
        if x is not None:
            assert torch.equal(x.nan_to_num(), two.inputs[name].nan_to_num())
