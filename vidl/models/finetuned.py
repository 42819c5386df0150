"""What a model that got layers for a task shares with a system."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vidl.masking import VisualMask
from vidl.models.abilities import Joins, need


def prepare_to_join(model: Any, to: str) -> None:
    """Check that a model fuses texts with clips, and freeze what fusion does not use.

    Args:
        to: what it is needed for, e.g. "to answer".

    Raises:
        ValueError: the model cannot fuse.
    """
    need(model, Joins, to=to)
    if not isinstance(model, nn.Module):
        raise TypeError(f"need model as a module, got {model!r}")
    if not getattr(model.recipe, "fusion_layers", 1):
        raise ValueError(f"need a model with fusion_layers >= 1 {to}, got 0")
    unused: Any = model.not_joining
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)


def classifier(width: int, hidden: int, classes: int, *, normed: bool) -> nn.Sequential:
    """Two linear layers with GELU between them, after a LayerNorm if `normed`."""
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, classes)
    for layer in (first, last):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    norms = [nn.LayerNorm(hidden)] if normed else []
    return nn.Sequential(first, *norms, nn.GELU(), last)


class FineTuned(nn.Module):
    """A pre-trained model, `model`, to which a subclass adds layers for a task.

    Args:
        model: one of `vidl.models`.
    """

    pretraining_only: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.recipe = model, model.recipe

    def starts(self) -> dict[str, Any]:
        """See `System.starts`."""
        return self.model.starts()

    def set_keep_rate(self, keep_rate: float) -> None:
        """See `System.set_keep_rate`."""
        self.model.set_keep_rate(keep_rate)

    def resized(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `System.resized`; for weights of the model with its layers for the task."""
        own = {n.removeprefix("model."): x for n, x in weights.items() if n.startswith("model.")}
        others = {n: x for n, x in weights.items() if not n.startswith("model.")}
        return others | {f"model.{name}": x for name, x in self.model.resized(own).items()}

    def begin(self) -> None:
        """See `System.begin`."""
        self.model.begin()

    def after_step(self) -> None:
        """See `System.after_step`."""
        self.model.after_step()

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """See `Encodes.encode_clips`."""
        return self.model.encode_clips(video, mask)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """See `System.unpruned`."""
        with self.model.unpruned():
            yield
