"""Dataclasses of tensors as inputs and outputs of torch.compile and torch.utils._pytree."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def register(kind: Any) -> None:
    """Make a dataclass whose constructor takes `checked` a pytree of its tensors."""
    # Its name in a serialized program, as in "vidl.Groups".
    serialized = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    names = [field.name for field in fields(kind)]

    def flatten(x: Any) -> tuple[list[Any], Any]:
        values = [getattr(x, name) for name in names]
        tensors = [v if isinstance(v, Tensor) else None for v in values]
        return tensors, tuple(None if isinstance(v, Tensor) else v for v in values)

    def unflatten(tensors: Iterable[Any], others: Any) -> Any:
        values = [o if t is None else t for t, o in zip(tensors, others, strict=True)]
        return kind(**dict(zip(names, values, strict=True)), checked=True)

    torch.utils._pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=serialized
    )
