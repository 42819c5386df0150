"""Which files know which models, what such a file declares, and what a swapped module stores.

A family of models is one file in timm/, torchvision/ or huggingface/. It has a constant FAMILY and
the classes that replace the model's own. Each replacement subclasses the original and has the same
name, so that saved models name the original. It overrides `forward` and little else, and has no
`__init__` and no parameters.
"""

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vidl.swapping.report import Change

# Files of this folder, each with the module that defines the classes that it replaces. A file is
# imported only if that module is: otherwise no model can have such classes.
FAMILIES = {
    "timm.attention": "timm.layers.attention",
    "huggingface.videomae": "transformers.models.videomae.modeling_videomae",
    "huggingface.timesformer": "transformers.models.timesformer.modeling_timesformer",
    "huggingface.bert": "transformers.models.bert.modeling_bert",
    "huggingface.bridgetower": "transformers.models.bridgetower.modeling_bridgetower",
    "huggingface.beit": "transformers.models.beit.modeling_beit",
    "huggingface.data2vec": "transformers.models.data2vec.modeling_data2vec_vision",
    "huggingface.patches": "transformers.modeling_utils",
    "huggingface.pruning": "transformers.modeling_utils",
    "huggingface.masking": "transformers.modeling_utils",
    # After the others, because it reads what they changed.
    "huggingface.attention": "transformers.modeling_utils",
    "timm.embed": "timm.layers.patch_embed",
    "timm.naflex": "timm.models.naflexvit",
    "timm.vit": "timm.models.vision_transformer",
    "timm.pruning": "timm.models.eva",
    "timm.beit": "timm.models.beit",
    "timm.swin": "timm.models.swin_transformer",
    "torchvision.swin": "torchvision.models.video.swin_transformer",
    "torchvision.mvit": "torchvision.models.video.mvit",
}

# The first and the last version that the tests ran with.
TESTED = {
    "timm": ("1.0.31", "1.0.31"),
    "torchvision": ("0.29.2", "0.29.2"),
    "transformers": ("5.23.0", "5.24.0"),
}

REMEMBERED = "_vidl"  # the attribute with a module's State; not a parameter, buffer or module


@dataclass
class State:
    """What a swapped module stores: its original class, and the options of its new `forward`.

    Attributes:
        original: the class before the swap.
        swapped: the class after the swap.
        backend: of the ops, as given to `vidl.swap`.
        memory: anything else that a family stores; copied and pickled with the module.
        undo: functions of the module, called last to first before its class is restored; defined at
            module level, so that they can be pickled.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    backend: str = "auto"
    memory: dict[str, Any] = field(default_factory=dict)
    undo: list[Callable[[nn.Module], None]] = field(default_factory=list)


def never(module: nn.Module) -> str | None:
    """The default of `Rule.why_not`: every module of the class can be swapped."""
    return None


@dataclass(frozen=True)
class Rule:
    """A class and its replacement.

    Attributes:
        original: exactly this class is replaced; a subclass may compute something else, so it is
            left as it is.
        swapped: a subclass of it.
        why_not: returns the reason why a module cannot be swapped, or None; changes nothing.
        note: returns the report's note on a swapped module, given its backend.
        setup: called with the module after its class changed and its State exists.
        undo: called with the module before its class is restored.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    why_not: Callable[[nn.Module], str | None] = never
    note: Callable[[nn.Module, str], str] = lambda module, backend: ""
    setup: Callable[[nn.Module], None] | None = None
    undo: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Tower:
    """A transformer whose layers `vidl.prune` can change.

    Attributes:
        original, swapped: exactly its class, and the replacement.
        blocks: the pruning replacement of each class of layers; it reads memory["plan"] of its
            State (see `vidl.swapping.prune.Plan`).
        layers: returns the layers of such a model.
        prefix: returns the number of tokens in front that always stay.
        why_not: returns the reason why these layers cannot be pruned, given the model, the
            `vidl.nn.Pruning` and the layers, or None; changes nothing.
        around: returns the reason why a module that contains such a model needs all of its tokens,
            or None; changes nothing.
        every: replace all layers, because they must know what other layers dropped.
        setup, undo: as in `Rule`.
    """

    original: type[nn.Module]
    swapped: type[nn.Module]
    blocks: dict[type[nn.Module], type[nn.Module]]
    layers: Callable[[Any], Sequence[nn.Module]]
    prefix: Callable[[Any], int]
    why_not: Callable[[Any, Any, Sequence[int]], str | None]
    around: Callable[[nn.Module], str | None] = never
    every: bool = False
    setup: Callable[[nn.Module], None] | None = None
    undo: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Family:
    """What one file declares about its models.

    Attributes:
        rules: classes and their replacements.
        whole: a step that concerns the whole model: called with the model and the backend after all
            rules. It calls `remember` for each module that it changes, with the undo, and returns
            the changes, including the modules that it left.
        towers: for `vidl.prune`.
        mask: for `vidl.mask`: called with the model, the ratio and the backend; returns the changes
            like `whole`.
    """

    rules: Sequence[Rule] = ()
    whole: Callable[[nn.Module, str], Sequence[Change]] | None = None
    towers: Sequence[Tower] = ()
    mask: Callable[[nn.Module, float, str], Sequence[Change]] | None = None


def families_of(model: nn.Module) -> list[Family]:
    """The families that may know modules of a model."""
    libraries = {kind.__module__.split(".")[0] for m in model.modules() for kind in type(m).__mro__}
    families = []
    for file, defines in FAMILIES.items():
        library = defines.split(".")[0]
        if library in libraries and defines in sys.modules:
            check_version(library)
            try:
                families.append(importlib.import_module(f"vidl.swapping.{file}").FAMILY)
            except (ImportError, AttributeError) as error:  # another version lacks what it needs
                warnings.warn(
                    f"vidl.swap cannot change models of {library} "
                    f"{sys.modules[library].__version__} ({file}): {error}",
                    stacklevel=3,
                )
    return families


@functools.cache
def check_version(library: str) -> None:
    """Warn once if a library's version is outside the tested range."""
    first, last = TESTED[library]
    version = sys.modules[library].__version__
    if not _numbers(first) <= _numbers(version) <= _numbers(last):
        warnings.warn(
            f"vidl.swap was tested with {library} {first} to {last}, this is {version}: compare "
            "the outputs of your model before and after the swap",
            stacklevel=4,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def state_of(module: nn.Module) -> State | None:
    """The State of a swapped module; None if it is not swapped."""
    return module.__dict__.get(REMEMBERED)


def original(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any swap."""
    state = state_of(module)
    return type(module) if state is None else state.original


def own_forward(module: nn.Module) -> str | None:
    """The reason why a new class would have no effect, or None."""
    if "forward" not in vars(module):
        return None
    return "its forward was replaced on the object, as accelerate's hooks do: swap before that"


def remember(
    module: nn.Module,
    backend: str = "auto",
    *,
    swapped: type[nn.Module] | None = None,
    undo: Callable[[nn.Module], None] | None = None,
) -> State:
    """Give a module a State, or extend the one it has; and optionally a new class.

    Raises:
        ValueError: the forward of the new class would not be called.
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
