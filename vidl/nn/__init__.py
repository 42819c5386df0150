"""Building blocks of models: modules whose parameters are named as their stock twins' are."""

from vidl.nn.bert import Bert
from vidl.nn.captions import Captions
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.projection import Projection
from vidl.nn.pruned_block import PrunedBlock

__all__ = ["Bert", "Captions", "MaskedPatchEmbed", "Projection", "PrunedBlock"]
