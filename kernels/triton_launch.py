"""What every launch of a Triton kernel needs, on the host."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# debug keeps the assertions about indices; it would also check every addition for overflow.
OPTIONS = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True}


def block_size(n: int, most: int) -> int:
    """The size of a block for n elements: a power of two, at most `most`."""
    return min(triton.next_power_of_2(max(n, 1)), most)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
