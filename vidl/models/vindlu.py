"""VindLU: Singularity with attention over time in every layer of the encoder."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.masking import VisualKind, VisualMask
from vidl.models.cards import Card
from vidl.models.fusing import Fusing
from vidl.models.learning import contrast, fill_words, match_hard
from vidl.models.singularity import SMALL, SPARSE, TINY, BeitRecipe, with_more_frames
from vidl.nn import Beit
from vidl.nn.bert import EPS
from vidl.nn.frames_in_time import zero_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class VindluRecipe(BeitRecipe):
    """Sizes, masks and losses of `Vindlu`.

    Stated by the paper or its code: 4 frames (training begins with 1, and goes on with 4 or 8),
    BEiT-B/16 with attention over time behind a gate of 0 and DropPath of 0.1, BERT-base with 9 text
    and 3 fusion layers, 50 % of the words masked, features of all ranks, all weights 1; attention
    over time after the MLP in the code, before the attention of frames in the paper. Masked visual
    modelling has a weight of 0 in the code, and is not part of this model. Our choice: pruning and
    masks (`keep_rate`, `mask_ratio`; 1 and 0 in the preset base), tube masks, with which all frames
    show the same places, and the tiny and small presets. Also ours: the features of VTC are means
    of normed patches, where the code has another norm for the mean.

    Attributes:
        mask: "tube" or "frame": every frame keeps the same number of patches.
        time: where in a block the attention over time is: "first" or "last".
        drop_path: rate of stochastic depth.

    The other fields and the errors are those of `vidl.models.FusionRecipe`.
    """

    stills = "one"

    frames: int = 4
    mask: VisualKind = "tube"
    time: Literal["first", "last"] = "last"
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' (frames keep equally many patches), got {self.mask!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"need drop_path in [0, 1), got {self.drop_path}")


PRESETS = {
    "tiny": VindluRecipe(**TINY, drop_path=0.0),
    "small": VindluRecipe(**SMALL),
    "base": VindluRecipe(),
    "sparse": VindluRecipe(**SPARSE),
}


class Vindlu(Fusing):
    """Video-language pre-training with attention over time in every layer.

    BEiT encodes each frame, and at each place the frames attend to one another. A still skips the
    attention over time. The frame's feature is the mean of its patches; the last layers of BERT
    attend to the tokens of all frames. Losses: contrastive (VTC), matching (VTM) and masked words
    (MLM). Source: VindLU, arXiv 2212.05051, figure 2.
    """

    card = Card(
        "VindLU", "2212.05051", "patches of each frame, attention over time",
        "two encoders and fusion", "CC3M, WebVid-2M (17M, 25M: also COCO, VG, SBU, CC12M, WebVid)",
        "4 frames, BEiT-B/16, gate 0, BERT 9 + 3, words 0.5, weights 1",
        "mask_ratio and keep_rate (none in the preset base), tube masks",
    )  # fmt: skip
    objectives = {"vtc": contrast, "vtm": match_hard, "mlm": fill_words}

    def __init__(self, recipe: VindluRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, VindluRecipe):
            raise TypeError(f"need recipe as a VindluRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = Beit(**r.vision, time=r.time, drop_path=r.drop_path)
        self.time = nn.Parameter(torch.zeros(r.frames, r.width))
        self.norm = nn.LayerNorm(r.width, eps=EPS)
        self.add_text(r)
        self.add_heads(r)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of each frame, [B, T, N, C]."""
        self.check_clips(video, mask)
        B, T = video.shape[0], video.shape[2]
        time = self.time[:T] if T > 1 else None
        frames = self.vision(video, None if mask is None else mask.ids_keep, time)
        x = self.norm(frames.tokens)
        return (x + zero_of([self.time]) if T == 1 else x).unflatten(0, (B, T))

    def clip_features(self, clips: Tensor) -> Tensor:
        """The projected mean of each frame's patches, [B, T, embed_dim]."""
        return self.project_clip(clips[:, :, 1:].mean(2))

    def resized(self, weights: Any) -> dict[str, Tensor]:
        """The weights of a run with fewer frames: later frames get no time embedding."""
        return with_more_frames(weights, "time", self.recipe.frames)
