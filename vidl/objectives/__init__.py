"""Losses: contrastive (VTC), matching (VTM), masked words (MLM) and masked pixels (MVM)."""

from vidl.objectives.contrastive import ContrastiveLoss, gather_with_gradient
from vidl.objectives.masked import MaskedPatchLoss, masked_word_loss
from vidl.objectives.matching import Negatives, hard_negatives, matching_loss

__all__ = [
    "ContrastiveLoss",
    "MaskedPatchLoss",
    "Negatives",
    "gather_with_gradient",
    "hard_negatives",
    "masked_word_loss",
    "matching_loss",
]
