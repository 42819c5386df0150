"""What torch.compile takes for a constant in place of tracing it."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant(function: Function) -> Function:
    """Mark a function whose result is a constant of the graph.

    As `torch.compiler.assume_constant_result` does, but without an import of torch._dynamo, which
    takes longer than all other imports of vidl.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
