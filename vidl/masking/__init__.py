"""Random masks of clips and captions, drawn on the device from (seed, step, sample)."""

from vidl.masking.draws import uniform
from vidl.masking.text import MaskedWords, Vocabulary, continuations, mask_words, most_hidden
from vidl.masking.visual import (
    VisualKind,
    VisualMask,
    replace_masked,
    visual_mask,
    zero_masked,
)

__all__ = [
    "MaskedWords",
    "VisualKind",
    "VisualMask",
    "Vocabulary",
    "continuations",
    "mask_words",
    "most_hidden",
    "replace_masked",
    "uniform",
    "visual_mask",
    "zero_masked",
]
