"""What all launches of Triton kernels share, on the host."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}


def block_size(n: int, most: int) -> int:
    """The size of a block for n elements: a power of 2, at most `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The context of a launch: Triton launches on the current device, not on that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def strides_of(x: Tensor) -> list[int]:
    """The strides of `x`, but 0 where a size of 1 makes them arbitrary: keeps addresses aligned."""
    return [stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride(), strict=True)]
