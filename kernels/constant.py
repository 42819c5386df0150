"""What torch.compile takes for a constant in place of tracing it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant(function: Function) -> Function:
    """Mark a function whose result is a constant of the graph.

    As `torch.compiler.assume_constant_result` does, but without an import of torch._dynamo, which
    takes longer than all other imports of vidl.
    """
    # torch.compile ignores the mark of `functools.cache` and traces the function below it.
    constant = _plain(function) if hasattr(function, "cache_info") else function
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant


def _plain(function: Function) -> Function:
    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        return function(*args)

    return plain  # type: ignore[return-value]
