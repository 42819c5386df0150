"""Fused kernels for masked and token-pruned video-language training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidl.swapping import mask as mask
    from vidl.swapping import prune as prune
    from vidl.swapping import swap as swap
    from vidl.swapping import unswap as unswap

__version__ = "0.1.0"

SWAPPING = ("mask", "prune", "swap", "unswap")


def __getattr__(name: str) -> Any:
    # So that `import vidl` does not import torch.
    if name in SWAPPING:
        from vidl import swapping

        return getattr(swapping, name)
    raise AttributeError(f"module 'vidl' has no attribute {name!r}")
