"""The ops, one line each; `help(op)` gives shapes, dtypes and errors."""

from vidl.kernels.frame_difference import RunLengths, frame_difference, run_length_ids
from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.space_time_attention import Groups, space_time_attention
from vidl.kernels.token_scores import token_scores

__all__ = [
    "Groups",
    "RunLengths",
    "frame_difference",
    "masked_patch_embed",
    "run_length_ids",
    "space_time_attention",
    "token_scores",
]
