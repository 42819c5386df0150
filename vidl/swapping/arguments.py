"""Checks of the arguments of the public functions; each error names the argument."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def check_model(model: Any) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: need a torch.nn.Module, got {type(model).__name__}")


def check_number(name: str, number: Any) -> None:
    """Raise unless `number` is an int or a float."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name}: need a number, got {type(number).__name__}")


def layer_indices(layers: Iterable[int]) -> Sequence[int]:
    """The layers in ascending order, each once; raises unless they are integers."""
    if not isinstance(layers, Iterable) or isinstance(layers, Mapping | Tensor):
        raise TypeError(f"layers: need a list of integers, got {type(layers).__name__}")
    numbers = list(layers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"layers: need integers, got {type(number).__name__}")
    return sorted(set(numbers))
