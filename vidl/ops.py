"""The ops, one line each; `help(op)` gives shapes, dtypes and errors."""

from vidl.kernels.masked_patch_embed import masked_patch_embed

__all__ = ["masked_patch_embed"]
