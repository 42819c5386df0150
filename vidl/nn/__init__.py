"""Building blocks of models: modules whose parameters are named as their stock twins' are."""

from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.pruned_block import PrunedBlock

__all__ = ["MaskedPatchEmbed", "PrunedBlock"]
