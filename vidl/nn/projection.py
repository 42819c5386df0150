"""From a tower's feature to the space in which clips and captions are compared."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """Linear, after a ReLU if `relu`; the losses bring the result to length one.

    Singularity projects both features to 256 numbers; Frozen in Time, and MAC with it, put a ReLU
    before the text's projection. Weights are named as those of `nn.Linear`. Sources: Singularity,
    arXiv 2206.03428; Frozen in Time, arXiv 2104.00650, 3.2 (m-bain/frozen-in-time, model.py).

    Args:
        width: of the feature.
        dim: of the common space.
        relu: whether the feature goes through a ReLU first.
    """

    def __init__(self, width: int, dim: int = 256, *, relu: bool = False) -> None:
        super().__init__(width, dim)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., dim]."""
        return super().forward(F.relu(x) if self.relu else x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"
