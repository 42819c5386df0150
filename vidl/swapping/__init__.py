"""The kernels in models that exist already: instances change in place, and change back."""

from vidl.swapping.mask import mask
from vidl.swapping.prune import prune
from vidl.swapping.report import Change, Report
from vidl.swapping.swap import swap, unswap

__all__ = ["Change", "Report", "mask", "prune", "swap", "unswap"]
