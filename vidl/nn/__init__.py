"""Building blocks of models: modules whose parameters are named as their stock twins' are."""

from vidl.nn.block import Block
from vidl.nn.patch_embed import MaskedPatchEmbed

__all__ = ["Block", "MaskedPatchEmbed"]
