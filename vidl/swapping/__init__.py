"""The kernels in existing models: modules are swapped in place, and can be swapped back."""

from vidl.swapping.mask import mask
from vidl.swapping.prune import prune
from vidl.swapping.report import Change, Report
from vidl.swapping.swap import swap, unswap

__all__ = ["Change", "Report", "mask", "prune", "swap", "unswap"]
