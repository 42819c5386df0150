"""Projection of a clip's or caption's feature to the space in which the two are compared."""

import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_flag, check_floating, check_tensors


class Projection(nn.Linear):
    """Linear, after a ReLU if `relu`; the losses normalise the result to unit length.

    Singularity projects both features to 256 channels; Frozen in Time and MAC apply a ReLU before
    the text projection. Weights are named as in `nn.Linear`. Sources: Singularity, arXiv
    2206.03428; Frozen in Time, arXiv 2104.00650, 3.2 (m-bain/frozen-in-time, model.py).

    Args:
        width: channels of the feature.
        dim: channels of the common space.
        relu: apply a ReLU to the feature first.
    """

    def __init__(self, width: int, dim: int = 256, *, relu: bool = False) -> None:
        check_count("width", width, 1)
        check_count("dim", dim, 1)
        check_flag("relu", relu)
        super().__init__(width, dim)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., dim]."""
        check_tensors(x=x, model=self.weight)
        check_floating(x=x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"need x [..., {self.in_features}], got {tuple(x.shape)}")
        return super().forward(F.relu(x) if self.relu else x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"
