"""What a family of models declares, and what a swapped module remembers.

A family is one file of this folder. It has a constant FAMILY, and classes that are swapped in: each
subclasses the original, bears its name (so that what is saved names the original; the module tells
them apart) and overrides `forward` and little else. It has no `__init__` and no parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vidl.swapping.report import Change

REMEMBERED = "_vidl"  # the attribute with a module's State; no parameter, buffer or module


@dataclass
class State:
    """What a swapped module remembers: the way back, and the options of its `forward`.

    Attributes:
        original: the class that it had.
        swapped: the class that it has.
        backend: of the operations, as `vidl.swap` was told.
        memory: anything else that a family keeps with the module; copied and pickled with it.
        undo: called with the module, the last one first, before it gets its class back; functions
            of a module, so that they can be pickled.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    backend: str = "auto"
    memory: dict[str, Any] = field(default_factory=dict)
    undo: list[Callable[[nn.Module], None]] = field(default_factory=list)


def never(module: nn.Module) -> str | None:
    """There is no reason against it."""
    return None


@dataclass(frozen=True)
class Rule:
    """A class, and the one that takes its place.

    Attributes:
        original: exactly this class; a subclass may compute something else, and is left.
        swapped: a subclass of it.
        why_not: the reason why this module cannot be swapped, or None; it changes nothing.
        note: what the report should say of this module though it is swapped, given its backend.
        setup: called with the module after its class changed and its State is there.
        undo: called with the module before it gets its class back.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    why_not: Callable[[nn.Module], str | None] = never
    note: Callable[[nn.Module, str], str] = lambda module, backend: ""
    setup: Callable[[nn.Module], None] | None = None
    undo: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Tower:
    """A transformer whose layers can drop tokens.

    Attributes:
        original, swapped: its class, exactly, and the one that takes its place.
        blocks: for each class of layers the one that drops; it reads memory["pruning"],
            memory["layer"] and memory["prefix"] of its State.
        layers: the layers of such a model.
        prefix: how many of its tokens, in front, always stay.
        why_not: the reason why these layers cannot drop tokens so, or None; it changes nothing.
        every: whether layers that drop nothing are swapped too, as they must know what others did.
        setup, undo: as of a Rule.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    blocks: dict[type[nn.Module], type[nn.Module]]
    layers: Callable[[Any], Sequence[nn.Module]]
    prefix: Callable[[Any], int]
    why_not: Callable[[Any, Any, Sequence[int]], str | None]
    every: bool = False
    setup: Callable[[nn.Module], None] | None = None
    undo: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Family:
    """What one file knows of its models.

    Attributes:
        rules: for classes of modules.
        whole: a step for what is no matter of one module: called with the model and the backend
            after all rules. It calls `remember` for each module that it changes, with the undo, and
            returns the changes, those that it left among them.
        towers: for `vidl.prune`.
        mask: for `vidl.mask`: called with the model, the ratio and the backend; it returns what
            became of each transformer, as `whole` does.
    """

    rules: Sequence[Rule] = ()
    whole: Callable[[nn.Module, str], Sequence[Change]] | None = None
    towers: Sequence[Tower] = ()
    mask: Callable[[nn.Module, float, str], Sequence[Change]] | None = None


def state_of(module: nn.Module) -> State | None:
    """What a module remembers, if anything of it was swapped."""
    return module.__dict__.get(REMEMBERED)


def original(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was swapped."""
    state = state_of(module)
    return type(module) if state is None else state.original


def own_forward(module: nn.Module) -> str | None:
    """The reason why another class would go unnoticed, or None."""
    if "forward" not in vars(module):
        return None
    return "its forward was replaced on the object itself, as accelerate's hooks do: swap it before"


def remember(
    module: nn.Module,
    backend: str = "auto",
    *,
    swapped: type[nn.Module] | None = None,
    undo: Callable[[nn.Module], None] | None = None,
) -> State:
    """Give a module its State, or add to the one it has; and a new class, if there is one.

    Raises:
        ValueError: the new class would not be called.
    """
    if swapped is not None and (reason := own_forward(module)):
        raise ValueError(f"cannot swap {full_name(type(module))}: {reason}")
    state = state_of(module)
    if state is None:
        state = State(type(module), type(module), backend)
        module.__dict__[REMEMBERED] = state
    if swapped is not None:
        module.__class__ = state.swapped = swapped
    if undo is not None:
        state.undo.append(undo)
    return state


def full_name(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"
