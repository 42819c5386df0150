"""Masks of clips and captions, drawn on the device from (seed, step, sample)."""

from vidl.masking.draws import uniform

__all__ = ["uniform"]
