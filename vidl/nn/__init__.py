"""Building blocks of models, with parameters named as in timm, Hugging Face and MAE."""

from vidl.nn.bert import Bert
from vidl.nn.block import Block
from vidl.nn.captions import Captions
from vidl.nn.decoder import MaeDecoder
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.frame_selector import FrameSelector, SelectedFrames
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.positions import inflate_table, resize_table
from vidl.nn.projection import Projection
from vidl.nn.pruning import Pruning
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
    "Pruning",
    "SelectedFrames",
    "SpaceTimeTransformer",
    "ViT",
    "inflate_table",
    "resize_table",
]
