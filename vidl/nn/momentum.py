"""Copies of modules that follow them slowly."""

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import finite


class Momentum(nn.Module):
    """Copies of parts of a model, which are their moving averages.

        copy = rate * copy + (1 - rate) * part,  after each step

    The copies are frozen and never have dropout. They are saved and sharded with the model. Source:
    MoCo, arXiv 1911.05722, 3.2.

    Args:
        rate: in [0, 1]; 0: a copy is equal to its part.
        copies: modules with the names that their parts have in the model; a copy may lack
            parameters of its part.

    Raises:
        TypeError, ValueError: a copy is no module, or the rate is out of range.
    """

    def __init__(self, rate: float, **copies: nn.Module) -> None:
        super().__init__()
        if not 0 <= finite("rate", rate) <= 1:
            raise ValueError(f"need rate in [0, 1], got {rate}")
        self.rate = rate
        for name, copy in copies.items():
            if not isinstance(copy, nn.Module):
                raise TypeError(f"need {name} as a module, got {type(copy).__name__}")
            self.add_module(name, copy)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Momentum":
        """The copies stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Set the copies equal to the parts of a model.

        Raises:
            TypeError, ValueError: the model is no module, or lacks a part.
        """
        for own, part in self._pairs(model):
            own.copy_(part)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the copies towards the parts of a model; errors are those of `start`."""
        for own, part in self._pairs(model):
            own.lerp_(part, 1 - self.rate)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        if not isinstance(model, nn.Module):
            raise TypeError(f"need model as a module, got {type(model).__name__}")
        parts = dict(model.named_parameters())
        own = dict(self.named_parameters())
        if missing := [name for name in own if name not in parts]:
            raise ValueError(f"need model with the parameters {', '.join(missing)}")
        return [(parameter, parts[name]) for name, parameter in own.items()]

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
