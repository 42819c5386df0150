"""The ops, one line each; `help(op)` gives shapes, dtypes and errors."""

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.kernels.select_tokens import Selected, gumbel_scores, kept_count, select_tokens
from vidl.kernels.space_time_attention import Groups, ReplicatedGlobal, space_time_attention

__all__ = [
    "Groups",
    "ReplicatedGlobal",
    "Selected",
    "gumbel_scores",
    "kept_count",
    "masked_patch_embed",
    "masked_patch_loss",
    "select_tokens",
    "space_time_attention",
]
