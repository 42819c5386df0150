"""Wrong values of an argument, made from a right one, for test_bad_calls.py.

A kind is a dict: the label of a fault -> a function from the right value to a wrong one.
"""

from collections.abc import Callable
from typing import Any

import torch

Kind = dict[str, Callable[[Any], Any]]
NAN, INF = float("nan"), float("inf")

# Faults of type: the error must name this argument. For the others it may name another one, which
# the value does not fit to.
OWN = ("none", "text", "list", "number", "bool", "half", "nan", "inf", "negative", "zero", "object")


def values(**wrong: Any) -> Kind:
    """These values, by their labels."""
    return {label: lambda right, value=value: value for label, value in wrong.items()}


def cut(*dims: int) -> Kind:
    """A tensor with one element less in one of these dimensions."""
    return {f"cut{dim}": lambda x, dim=dim: x.narrow(dim, 0, x.shape[dim] - 1) for dim in dims}


def optional(kind: Kind) -> Kind:
    return without(kind, "none")


def without(kind: Kind, *labels: str) -> Kind:
    return {label: wrong for label, wrong in kind.items() if label not in labels}


OTHER = values(none=None, text="x", object=object())
TENSOR: Kind = OTHER | {
    "list": lambda x: x.tolist(),
    "number": lambda x: 1,
    "meta": lambda x: x.to("meta"),
    "more": lambda x: x[None],
    "complex": lambda x: x.to(torch.complex64),
    "flags": lambda x: x.bool(),
}
FLOATS: Kind = TENSOR | {"int64": lambda x: x.long()}
IDS: Kind = TENSOR | {"int16": lambda x: x.short(), "floats": lambda x: x.float()}

_NUMBER = OTHER | values(list=[1], nan=NAN, inf=INF, bool=True, tensor=torch.zeros(2))
COUNT = _NUMBER | values(half=2.5, negative=-1)
POSITIVE = COUNT | values(zero=0)
FACTOR = _NUMBER
RATE = _NUMBER | values(negative=-0.5, more=1.5)  # in [0, 1]
SHARE = RATE | values(zero=0.0)  # in (0, 1]
OPTION = values(none=None, text="fast", number=3, list=["auto"], tensor=torch.zeros(2))
FLAG = values(none=None, text="no", number=2, list=[], tensor=torch.zeros(2))
MODULE = values(none=None, text="x", number=3, object=object())
MEAN = values(
    text="x", number=0.5, texts=["a"] * 3, nones=[None] * 3, short=[0.5] * 2, nan=[NAN] * 3
)
STD = MEAN | values(zeros=[0.0] * 3, negative=[-1.0] * 3)
GRID = values(
    none=None, text="abc", number=4, short=(2, 2), halves=(2, 2.5, 2), zero=(2, 0, 2),
    negative=(2, -2, 2), nan=(2, NAN, 2), tensor=torch.ones(3),
)  # fmt: skip
SIZE = values(
    none=None, text="4", half=4.0, bool=True, zero=0, negative=-4, short=(4,), long=(4, 4, 4),
    halves=(4.0, 4), texts=("4", "4"), zeros=(0, 0),
)  # fmt: skip
