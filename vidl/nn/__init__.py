"""Building blocks of models: modules whose parameters are named as their stock twins' are."""

from vidl.nn.block import Block
from vidl.nn.decoder import MaeDecoder
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.frame_selector import FrameSelector, SelectedFrames
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.vit import Frames, ViT

__all__ = [
    "Block",
    "DividedBlock",
    "FrameSelector",
    "Frames",
    "MaeDecoder",
    "MaskedPatchEmbed",
    "SelectedFrames",
    "SpaceTimeTransformer",
    "ViT",
]
