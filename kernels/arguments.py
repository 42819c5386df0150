"""Checks of arguments that several operations share."""

import torch
from torch import Tensor


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
    if not abs(value) <= torch.finfo(torch.float32).max:
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
