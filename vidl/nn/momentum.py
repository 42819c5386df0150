"""Copies of modules that follow them slowly."""

import torch
from torch import nn

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
            self.add_module(name, copy)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Momentum":
        """The copies stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Set the copies equal to the parts of a model."""
        for name, parameter in self.named_parameters():
            parameter.copy_(model.get_parameter(name))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the copies towards the parts of a model."""
        for name, parameter in self.named_parameters():
            parameter.lerp_(model.get_parameter(name), 1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
