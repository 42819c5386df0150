"""Building blocks of models, with parameters named as in timm, Hugging Face and MAE."""

from vidl.nn.beit import Beit, Edges
from vidl.nn.bert import Bert
from vidl.nn.block import Block
from vidl.nn.captions import Captions
from vidl.nn.decoder import MaeDecoder
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.frame_selector import FrameSelector, SelectedFrames
from vidl.nn.frames_in_time import BertInTime, FramesInTime, groups_in_time
from vidl.nn.grid_features import GridFeatures
from vidl.nn.joint_vit import JointViT
from vidl.nn.keys_of_text import KeysOfText
from vidl.nn.merged import Merged
from vidl.nn.momentum import Momentum
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.positions import inflate_table, resize_table
from vidl.nn.projection import Projection
from vidl.nn.pruning import Pruning
from vidl.nn.timesformer import TimeSformer, TimeSformerBlock
from vidl.nn.vit import Frames, ViT
from vidl.nn.words import Words
from vidl.nn.words_decoder import WordsDecoder

__all__ = [
    "Beit",
    "Bert",
    "BertInTime",
    "Block",
    "Captions",
    "DividedBlock",
    "Edges",
    "FrameSelector",
    "Frames",
    "FramesInTime",
    "GridFeatures",
    "JointViT",
    "KeysOfText",
    "MaeDecoder",
    "MaskedPatchEmbed",
    "Merged",
    "Momentum",
    "Projection",
    "Pruning",
    "SelectedFrames",
    "SpaceTimeTransformer",
    "TimeSformer",
    "TimeSformerBlock",
    "ViT",
    "Words",
    "WordsDecoder",
    "groups_in_time",
    "inflate_table",
    "resize_table",
]
