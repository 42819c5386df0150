"""The ops, one line each; `help(op)` gives shapes, dtypes and errors."""

from vidl.kernels.frame_difference import RunLengths, frame_difference, run_length_ids
from vidl.kernels.groups import Groups
from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.kernels.select_tokens import Selected, gumbel_scores, kept_count, select_tokens
from vidl.kernels.space_time_attention import ReplicatedGlobal, space_time_attention
from vidl.kernels.token_scores import token_scores

__all__ = [
    "Groups",
    "ReplicatedGlobal",
    "RunLengths",
    "Selected",
    "frame_difference",
    "gumbel_scores",
    "kept_count",
    "masked_patch_embed",
    "masked_patch_loss",
    "run_length_ids",
    "select_tokens",
    "space_time_attention",
    "token_scores",
]
