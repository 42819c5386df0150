"""What pruned models of timm refuse: a grid of tokens."""

import inspect
from typing import Any

from vidl.swapping.registry import state_of


def refuse_grids(model: Any, forward: Any, *args: Any, **options: Any) -> Any:
    """timm would fill a grid with what is left of one, and not notice."""
    call = inspect.signature(forward).bind(*args, **options)
    call.apply_defaults()
    state = state_of(model)
    if state and state.memory.get("pruned") and call.arguments["output_fmt"] == "NCHW":
        raise ValueError(
            "a pruned model has no grid of tokens: need output_fmt='NLC' (or reshape=False), got "
            "'NCHW'; vidl.unswap(model) brings back the grid"
        )
    return forward(*args, **options)
