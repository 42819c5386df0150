"""SViTT: a joint encoder of all frames with sparse edges and sparse nodes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vidl.kernels.select_tokens import kept_count
from vidl.masking import VisualKind, VisualMask
from vidl.models.cards import Card
from vidl.models.fusing import Fusing
from vidl.models.learning import contrast, fill_words, match_hard
from vidl.models.singularity import SMALL, TINY, BeitRecipe
from vidl.models.system import Inputs, Seen
from vidl.nn import Beit, Edges, KeysOfText
from vidl.nn.bert import EPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvittRecipe(BeitRecipe):
    """Sizes, masks and losses of `Svitt`.

    Stated by the paper or its code: 4 frames, then 8 with `keep_rate=0.6`; BEiT-B/16 on all frames
    together with a 3-D table of relative positions; blocks of 56 tokens that attend to themselves,
    3 random blocks and CLS; 70 % of the tokens kept after layers 3, 6 and 9; 10 % of the visual
    keys kept in the fusion for retrieval, 50 % for questions; the text, the losses and their
    weights of Singularity. The released configuration does not enable the last kind of pruning. Our
    choice: `mask_ratio` (0 in the preset base), the tiny and small presets. Also ours: the
    features of VTC are means of normed patches, where the code has another norm for the mean.

    Attributes:
        mask: any kind: the frames may keep different numbers of patches.
        block, random_blocks: tokens of a block, and random blocks that it attends to; block 0: all
            tokens attend to all.
        keep_keys: share of the visual keys that a caption keeps after the second fusion layer; with
            2 layers after the first.

    The other fields and the errors are those of `vidl.models.FusionRecipe`.
    """

    frames: int = 4
    mask: VisualKind = "clip"
    block: int = 56
    random_blocks: int = 3
    keep_rate: float = 0.7
    keep_keys: float = 0.1
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "block", "random_blocks")
        if not 0 < self.keep_keys <= 1:
            raise ValueError(f"need keep_keys in (0, 1], got {self.keep_keys}")

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        n = self.visible
        tokens = {"patches": math.prod(self.grid), "encoder": 1 + n}
        for layer, left in self._kept(n):
            tokens[f"after layer {layer}"] = 1 + left
            n = left
        return tokens | {"fusion": 1 + kept_count(n, self.keep_keys)}

    def variants(self) -> dict[str, Any]:
        """The recipe dense, with sparse edges only, and with edges, pruning and mask."""
        whole: dict[str, Any] = dict(mask_ratio=0.0, keep_rate=1.0, keep_keys=1.0)
        return {
            "dense": dataclasses.replace(self, block=0, **whole),
            "edges": dataclasses.replace(self, **whole),
            "edges and nodes": self,
        }


PRESETS = {
    "tiny": SvittRecipe(**TINY | dict(block=16, random_blocks=2, keep_keys=0.5)),
    "small": SvittRecipe(**SMALL),
    "base": SvittRecipe(),
    "frames8": SvittRecipe(frames=8, keep_rate=0.6),
}
PRESETS["sparse"] = PRESETS["base"]  # the published model is sparse


class Svitt(Fusing):
    """Sparse video-text transformers.

    BEiT encodes all frames of a clip as one sequence. A block of tokens attends to itself, to
    random blocks and to CLS (edges); after three layers the tokens that CLS attends to least are
    dropped (nodes). In the fusion a caption keeps the visual tokens that its first word attends to
    most. Losses: contrastive (VTC), matching (VTM) and masked words (MLM). Source: SViTT, arXiv
    2304.08809, figure 3.
    """

    card = Card(
        "SViTT", "2304.08809", "patches of all frames, block-sparse and pruned",
        "two encoders and fusion", "WebVid-2M",
        "4 frames, BEiT-B/16 joint, blocks of 56 and 3 random, keep 0.7, keys 0.1, weights 1",
        "mask_ratio (0 in the preset base)",
    )  # fmt: skip
    objectives = {"vtc": contrast, "vtm": match_hard, "mlm": fill_words}
    axes = ("B", "N")

    def __init__(self, recipe: SvittRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, SvittRecipe):
            raise TypeError(f"need recipe as a SvittRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        edges = Edges(r.block, r.random_blocks) if r.block else None
        self.vision = Beit(**r.vision, joint=True, num_frames=r.frames, edges=edges)
        self.norm = nn.LayerNorm(r.width, eps=EPS)
        self.add_text(r)
        self.add_heads(r)
        if r.keep_keys < 1 and r.fusion_layers > 1:
            self.keys = KeysOfText(r.keep_keys, layer=min(1, r.fusion_layers - 2))

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip, and the captions."""
        mask = self.recipe.visual_mask(inputs.samples, inputs.step)
        clips = self.encode_clips(inputs.video, mask, step=int(inputs.step))
        return self.with_captions(inputs, mask, clips)

    def encode_clips(
        self, video: Tensor, mask: VisualMask | None = None, *, step: int = 0
    ) -> Tensor:
        """CLS and the tokens of all frames, [B, N, C].

        Args:
            video, mask: see `TwoTowers.encode_clips`.
            step: the random blocks depend on it and on the recipe's seed.
        """
        self.check_clips(video, mask)
        ids_keep = None if mask is None else mask.ids_keep
        return self.norm(self.vision(video, ids_keep, step=step, seed=self.recipe.seed).tokens)

    def clip_features(self, clips: Tensor) -> Tensor:
        """The projected mean of the patches, [B, embed_dim]."""
        return self.project_clip(clips[:, 1:].mean(1))

    def tokens_of(
        self, clips: Tensor, text: Tensor, partner: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens that captions attend to, and the row of each caption among them."""
        return clips, partner

    def resized(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a run with fewer frames: tables of positions are inflated in time."""
        return {
            name: self.vision.fitted(x) if name.endswith("relative_position_bias_table") else x
            for name, x in weights.items()
        }
