"""Triton's interpreter with checked addresses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Every address that a kernel reads or writes must lie in a tensor that it was given."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    spans: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in spans:
            inside |= (addresses >= begin) & (addresses + size <= end)
        assert inside.all(), "an address is out of range"

    class Builder(interpreter.InterpreterBuilder):  # type: ignore[misc, name-defined]
        def create_masked_load(self, ptrs, mask, *rest):
            check(ptrs, mask)
            return super().create_masked_load(ptrs, mask, *rest)

        def create_masked_store(self, ptrs, value, mask, *rest):
            check(ptrs, mask)
            return super().create_masked_store(ptrs, value, mask, *rest)

    class Executor(interpreter.GridExecutor):  # type: ignore[misc, name-defined]
        def _init_args_hst(self, *given):
            args, kwargs = super()._init_args_hst(*given)
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            spans[:] = [span_of(x) for x in tensors if x.numel()]
            return args, kwargs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "__class__", Builder)
        patch.setattr(interpreter, "GridExecutor", Executor)
        yield


def span_of(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first element of a tensor, and of the end of the last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
