"""Swapped kernels during training: a context manager, and callbacks of two trainers.

The callbacks are imported when they are used, since each needs its library.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from vidl.swapping.arguments import check_model
from vidl.swapping.swap import swap, swapped_modules, unswap
from vidl.swapping.work import Part, Savings, without_wrapper

if TYPE_CHECKING:
    from vidl.swapping.huggingface.trainer import TransformersCallback as TransformersCallback
    from vidl.swapping.lightning import LightningCallback as LightningCallback

__all__ = ["LightningCallback", "Savings", "Swapped", "TransformersCallback"]

# Where the callbacks are.
LAZY = {
    "TransformersCallback": "vidl.swapping.huggingface.trainer",
    "LightningCallback": "vidl.swapping.lightning",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module 'vidl.swapping.trainers' has no attribute {name!r}")


class Swapped:
    """A model that is swapped while a block runs, and counts what that saves.

    Enter the block before the model is compiled or wrapped by DDP, FSDP or accelerate. The first
    training step runs a few samples twice more, on a copy of the model, to count their FLOPs and
    tokens with and without the swap; training itself is not affected.

    Args:
        model: contains modules of timm, torchvision or transformers; called in training.
        change: swaps the model: `vidl.swap`, or a function that calls `vidl.prune` or `vidl.mask`.

    Attributes:
        savings: counted FLOPs and tokens so far; print it.
        report: what `change` returned.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `change` cannot swap the model.
    """

    def __init__(self, model: nn.Module, change: Callable[[nn.Module], Any] = swap) -> None:
        check_model(model)
        self.model, self.change = model, change
        self.savings, self.report = Savings(), None
        self._handles: list[Any] = []

    def __enter__(self) -> "Swapped":
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def start(self, *, children: bool = False) -> None:
        """Swap the model and begin to count.

        Args:
            children: count the calls of the model's children that were swapped, since the model
                itself is not called.
        """
        self.report = self.change(self.model)
        modules = list(self.model.children()) if children else [self.model]
        swapped = [m for m in modules if next(swapped_modules(m), None) is not None]
        self.savings.parts = [Part(module) for module in swapped]
        self._handles = [part.watch() for part in self.savings.parts]

    def stop(self) -> None:
        """Restore the model; a model that something else has changed stays swapped, with a warning.

        A forward that accelerate put on the model for mixed precision is removed: it would call the
        swapped forward.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if next(swapped_modules(self.model), None) is None:
            return
        without_wrapper(self.model)
        try:
            unswap(self.model)
        except ValueError as error:
            warnings.warn(f"the model stays swapped: {error}", stacklevel=2)
