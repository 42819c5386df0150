"""Groups that depend on a few numbers: made once for all layers and steps."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vidl.kernels.groups import Groups


def kept(make: Callable[..., Groups]) -> Callable[..., Groups]:
    """Keep what a function of numbers and, last, a device has made."""

    @functools.lru_cache(maxsize=64)
    def made(*numbers: Any) -> Groups:
        with torch.inference_mode(False):  # else training could not use them after an inference
            return make(*numbers)

    @functools.wraps(make)
    def groups(*numbers: Any) -> Groups:
        capturing = numbers[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
        if tracing() or capturing:
            # What is made here belongs to a graph, or is no real tensor: nothing to keep.
            return make(*numbers)
        return made(*numbers)

    return groups


def tracing() -> bool:
    """Whether tensors have no numbers to look at."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
