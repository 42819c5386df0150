"""Singularity: one frame of a clip in training, several in evaluation."""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.masking import VisualMask
from vidl.models.cards import Card
from vidl.models.fusing import Fusing, FusionRecipe
from vidl.models.learning import contrast, fill_words, match_hard
from vidl.nn import Beit, BertInTime, Pruning, groups_in_time
from vidl.nn.bert import EPS
from vidl.nn.frames_in_time import zero_of

HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeitRecipe(FusionRecipe):
    """Sizes of a model whose clip encoder is BEiT.

    The fields and the errors are those of `vidl.models.FusionRecipe`.
    """

    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tubelet_size != 1:
            raise ValueError(
                f"need tubelet_size=1: BEiT embeds patches of frames, got {self.tubelet_size}"
            )

    @property
    def vision(self) -> dict[str, Any]:
        """The options of `vidl.nn.Beit`."""
        pruning = Pruning(self.keep_rate, when="after_mlp")
        return dict(
            img_size=self.image_size, patch_size=self.patch_size, embed_dim=self.width,
            depth=self.depth, num_heads=self.heads, prune_layers=self.prune_layers,
            pruning=pruning, mean=self.mean, std=self.std, backend=self.backend,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingularityRecipe(BeitRecipe):
    """Sizes, masks and losses of `Singularity`.

    Stated by the paper or its code: 1 frame, BEiT-B/16, pixels in -1 to 1, BERT-base with 9 text
    and 3 fusion layers, 50 % of the words masked, a learned temperature of 0.07, negatives of one
    rank, all weights 1; Singularity-temporal: 4 frames, `time_layers=2`; evaluation with 4 frames
    whose tokens are concatenated before the fusion. Our choice: masks and pruning (`mask_ratio`,
    `keep_rate`; 0 and 1 in the preset base), and the tiny and small presets. Also ours: the
    features of VTC are means of normed patches after the layers over time. The code norms the mean
    of BEiT's patches, before these layers, so that its features do not show motion.

    Attributes:
        frames: frames of a clip in training.
        frames_tested: frames of a clip in evaluation; 0: as in training, which models with
            `time_layers` need.
        ensemble: how the frames of a clip match a caption: tokens of all frames are concatenated
            ("concat"), or each frame gets a score, of which the "mean", "max" or log of summed
            exponentials ("lse") counts.
        time_layers: layers of BERT over time after the encoder; 0: none.
        gather: contrast with the features of all ranks.

    The other fields and the errors are those of `vidl.models.FusionRecipe`.
    """

    stills = "one"

    frames: int = 1
    frames_tested: int = 4
    ensemble: Literal["concat", "mean", "max", "lse"] = "concat"
    time_layers: int = 0
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "frames_tested", "time_layers")
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' (frames keep equally many patches), got {self.mask!r}"
            )
        if self.time_layers and self.frames_tested > self.frames:
            raise ValueError(
                f"need frames_tested <= frames={self.frames} with time_layers, whose time "
                f"embedding has so many rows, got {self.frames_tested}"
            )

    @property
    def evaluation_frames(self) -> int:
        """Frames of a clip in evaluation."""
        return self.frames_tested or self.frames


TINY: dict[str, Any] = dict(
    image_size=64, patch_size=8, width=128, depth=4, heads=4, prune_layers=(1, 2), text_width=128,
    text_layers=2, fusion_layers=2, text_heads=4, embed_dim=64, mask_ratio=0.5, keep_rate=0.7,
)  # fmt: skip
SMALL: dict[str, Any] = dict(width=384, heads=6, text_width=384, text_layers=6, text_heads=6)
SPARSE: dict[str, Any] = dict(mask_ratio=0.5, keep_rate=0.7)

PRESETS = {
    "tiny": SingularityRecipe(**TINY),
    "small": SingularityRecipe(**SMALL),
    "base": SingularityRecipe(),
    "sparse": SingularityRecipe(**SPARSE),
    "temporal": SingularityRecipe(frames=4, time_layers=2),
}


class Singularity(Fusing):
    """Video-language pre-training on single frames.

    BEiT encodes each frame; the frame's feature is the mean of its patches. In the temporal variant
    layers of BERT then attend over time at each place. The last layers of BERT attend to the tokens
    of all frames. Losses: contrastive (VTC), matching (VTM) and masked words (MLM). Source:
    Singularity, arXiv 2206.03428, figure 2.
    """

    card = Card(
        "Singularity", "2206.03428", "patches of one frame", "two encoders and fusion",
        "CC3M, WebVid-2M (17M: also COCO, VG, SBU, CC12M)",
        "1 frame, BEiT-B/16, BERT 9 + 3, words 0.5, temperature 0.07, weights 1",
        "mask_ratio and keep_rate (none in the preset base)",
    )  # fmt: skip
    objectives = {"vtc": contrast, "vtm": match_hard, "mlm": fill_words}

    def __init__(self, recipe: SingularityRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, SingularityRecipe):
            raise TypeError(f"need recipe as a SingularityRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = Beit(**r.vision)
        self.norm = nn.LayerNorm(r.width, eps=EPS)
        if r.time_layers:
            self.time = nn.Parameter(torch.zeros(r.frames, r.width))
            self.late = BertInTime(
                r.width, r.time_layers, r.heads, dropout=r.dropout, backend=r.backend
            )
        self.add_text(r)
        self.add_heads(r)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of each frame, [B, T, N, C]."""
        self.check_clips(video, mask)
        B, T = video.shape[0], video.shape[2]
        frames = self.vision(video, None if mask is None else mask.ids_keep)
        x = self.norm(frames.tokens)
        if self.recipe.time_layers:
            every = mask is None and self.vision.keep_rate == 1
            groups = groups_in_time(frames.ids, T, math.prod(self.vision.grid), every=every)
            x = x + (self.time[:T].repeat(B, 1)[:, None] if T > 1 else zero_of([self.time]))
            x = self.late(x, groups)
        return x.unflatten(0, (B, T))

    def clip_features(self, clips: Tensor) -> Tensor:
        """The projected mean of each frame's patches, [B, T, embed_dim]."""
        return self.project_clip(clips[:, :, 1:].mean(2))

    def match(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not match" and "matches", [S, 2]; see `Fusing.match`.

        In evaluation the frames count as the recipe's `ensemble` says.
        """
        kind = self.recipe.ensemble
        if self.training or kind == "concat":
            return super().match(clips, text, attention_mask, partner, words)
        odds = torch.stack([
            super(Singularity, self).match(frame[:, None], text, attention_mask, partner, words)
            .diff(dim=1)[:, 0]
            for frame in clips.unbind(1)
        ])  # fmt: skip
        reduced = {"mean": odds.mean(0), "max": odds.amax(0), "lse": odds.logsumexp(0)}[kind]
        return torch.stack([torch.zeros_like(reduced), reduced], 1)

    def resized(self, weights: Any) -> dict[str, Tensor]:
        """The weights of a run with fewer frames: later frames get no time embedding."""
        return with_more_frames(weights, "time", self.recipe.frames)


def with_more_frames(weights: Any, name: str, frames: int) -> dict[str, Tensor]:
    """Pad a time embedding with zeros, as VindLU does from 1 to 4 to 8 frames."""
    weights = dict(weights)
    if name in weights and weights[name].shape[0] < frames:
        table = weights[name]
        weights[name] = torch.cat([table, table.new_zeros(frames - len(table), table.shape[1])])
    return weights
