"""Losses: contrastive (VTC, UniVLC), matching (VTM), masked words and pixels (MLM, MVM), WPA."""

from vidl.objectives.contrastive import ContrastiveLoss, gather_with_gradient
from vidl.objectives.masked import MaskedPatchLoss, masked_word_loss
from vidl.objectives.matching import Negatives, hard_negatives, matching_loss
from vidl.objectives.transport import transport_plan, word_patch_alignment
from vidl.objectives.unified import Queue, UnifiedContrastiveLoss

__all__ = [
    "ContrastiveLoss",
    "MaskedPatchLoss",
    "Negatives",
    "Queue",
    "UnifiedContrastiveLoss",
    "gather_with_gradient",
    "hard_negatives",
    "masked_word_loss",
    "matching_loss",
    "transport_plan",
    "word_patch_alignment",
]
