"""The ops, one line each; `help(op)` gives shapes, dtypes and errors."""

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.space_time_attention import Groups, space_time_attention
from vidl.kernels.token_scores import token_scores

__all__ = ["Groups", "masked_patch_embed", "space_time_attention", "token_scores"]
