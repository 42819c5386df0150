"""All operations. The docstring of each gives shapes, dtypes, errors and the source."""

from vidl.kernels.frame_difference import RunLengths, frame_difference, run_length_ids
from vidl.kernels.groups import Groups, Positions
from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.kernels.select_tokens import Selected, kept_count, select_tokens
from vidl.kernels.space_time_attention import ReplicatedGlobal, space_time_attention
from vidl.kernels.token_scores import (
    cls_attention_scores,
    key_similarity_scores,
    mean_attention_scores,
    value_weighted_scores,
)

__all__ = [
    "Groups",
    "Positions",
    "ReplicatedGlobal",
    "RunLengths",
    "Selected",
    "cls_attention_scores",
    "frame_difference",
    "kept_count",
    "key_similarity_scores",
    "masked_patch_embed",
    "masked_patch_loss",
    "mean_attention_scores",
    "run_length_ids",
    "select_tokens",
    "space_time_attention",
    "value_weighted_scores",
]
