"""Building blocks of models: modules whose parameters are named as their stock twins' are."""

from vidl.nn.bert import Bert
from vidl.nn.block import Block
from vidl.nn.captions import Captions
from vidl.nn.decoder import MaeDecoder
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.frame_selector import FrameSelector, SelectedFrames
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.projection import Projection
from vidl.nn.vit import Frames, ViT

__all__ = [
    "Bert",
    "Block",
    "Captions",
    "DividedBlock",
    "FrameSelector",
    "Frames",
    "MaeDecoder",
    "MaskedPatchEmbed",
    "Projection",
    "SelectedFrames",
    "SpaceTimeTransformer",
    "ViT",
]
