"""Fused kernels for masked and token-pruned video-language training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidl.bench.tuning.tune import tune as tune
    from vidl.bench.tuning.tune import tuning as tuning
    from vidl.swapping import mask as mask
    from vidl.swapping import prune as prune
    from vidl.swapping import swap as swap
    from vidl.swapping import unswap as unswap

__version__ = "0.1.0"

# Where the names of the package are, so that `import vidl` does not import torch.
LAZY = {
    **{name: ("vidl.swapping", name) for name in ("mask", "prune", "swap", "unswap")},
    "tune": ("vidl.bench.tuning.tune", "tune"),
    "tuning": ("vidl.bench.tuning.tune", "tuning"),
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        from importlib import import_module

        module, attribute = LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'vidl' has no attribute {name!r}")
