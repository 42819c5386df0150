"""Checks of arguments, for operations and for what is built on them; each error names the argument.

They compare attributes only: no values of tensors are read, and nothing waits for a device.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def check_tensors(optional: Sequence[str] = (), **tensors: Any) -> None:
    """The arguments are tensors on one device; those in `optional` may be None."""
    first, device = "", None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            if x is None and name in optional:
                continue
            raise TypeError(f"need {name} as a tensor, got {type(x).__name__}")
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"need {name} on {device} as {first} is, got {x.device}")


def check_floating(**tensors: Tensor) -> None:
    """The tensors are of floating dtypes."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"need {name} in a floating dtype, got {x.dtype}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"need {name} in {str(dtype).removeprefix('torch.')}, got {x.dtype}")


def check_shape(name: str, x: Tensor, *sizes: int | str) -> None:
    """A tensor has these sizes; a letter stands for any size."""
    fits = x.ndim == len(sizes)
    for size, wanted in zip(x.shape, sizes, strict=False):
        fits = fits and (isinstance(wanted, str) or size == wanted)
    if not fits:
        raise ValueError(f"need {name} [{', '.join(map(str, sizes))}], got {tuple(x.shape)}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"need {name} as True or False, got {value!r}")


def check_counts(name: str, values: Sequence[int], length: int, least: int = 1) -> None:
    """So many counts, in a tuple or a list."""
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"need {name} as {length} ints, got {values!r}")
    if len(values) != length:
        raise ValueError(f"need {name} as {length} ints, got {tuple(values)}")
    for value in values:
        check_count(name, value, least)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from one number or both."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"need {name} as one or two ints, got {tuple(sides)}")
    check_counts(name, sides, 2)
    return sides[0], sides[1]


def numbers(name: str, values: Iterable[float]) -> list[float]:
    """Finite numbers, as floats."""
    if not hasattr(values, "__iter__"):
        raise TypeError(f"need {name} as a list of numbers, got {values!r}")
    return [finite(name, value) for value in values]


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; without a call of PyTorch, which takes a microsecond, where it has it."""
    return x if x.dtype == dtype else x.to(dtype)


def check_count(name: str, value: int, least: int = 0) -> None:
    """A count is an int, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"need {name} as an int, got {value!r}")
    if value < least:
        raise ValueError(f"need {name} >= {least}, got {value}")


def finite(name: str, value: float) -> float:
    """`value` as a float, which is neither NaN nor infinite in float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"need {name} as a number, got {value!r}")
    if not abs(value) <= LARGEST:
        raise ValueError(f"need a finite {name}, got {value}")
    return float(value)


def require(condition: Tensor, message: str, **numbers: int) -> None:
    """Assert `condition`, a boolean scalar, without a host sync.

    A condition on the CPU is known at once: the error is then a `ValueError`. On another device,
    and under `torch.compile`, it is an assertion. A graph is compiled once for all numbers, so its
    message has their names.

    Args:
        message: with the names of the numbers in braces.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message.replace("{", "").replace("}", ""))
    elif condition.device.type == "cpu" and type(condition) is Tensor:
        if not condition:
            raise ValueError(message.format(**numbers))
    else:
        torch._assert_async(condition, message.format(**numbers))
