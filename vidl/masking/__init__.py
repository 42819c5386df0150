"""Masks of clips and captions, drawn on the device from (seed, step, sample)."""

from vidl.masking.draws import uniform
from vidl.masking.text import MaskedWords, Vocabulary, continuations, mask_words, most_hidden

__all__ = [
    "MaskedWords",
    "Vocabulary",
    "continuations",
    "mask_words",
    "most_hidden",
    "uniform",
]
