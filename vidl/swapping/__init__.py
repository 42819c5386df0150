"""The kernels in models that exist already: instances change in place, and change back."""

from vidl.swapping.in_place import swap, unswap
from vidl.swapping.masking import mask
from vidl.swapping.pruning import prune
from vidl.swapping.report import Change, Report

__all__ = ["Change", "Report", "mask", "prune", "swap", "unswap"]
