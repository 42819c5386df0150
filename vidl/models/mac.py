"""MAC: contrastive learning of masked clips and masked captions."""

import dataclasses
import math

from torch import Tensor

from vidl.masking import VisualMask, mask_words
from vidl.models.cards import Card
from vidl.models.learning import contrast
from vidl.models.recipe import VitRecipe
from vidl.models.system import Inputs, Seen
from vidl.models.two_towers import TwoTowers
from vidl.nn import Bert, Projection, SpaceTimeTransformer
from vidl.nn.divided import TimeGroups
from vidl.objectives import ContrastiveLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MacRecipe(VitRecipe):
    """Sizes and masks of `Mac`.

    Stated by the paper, or by Frozen in Time, on which it builds: 4 frames, ViT-B/16, masks that
    differ between frames, DistilBERT, words replaced by [MASK], ReLU and projection to 256, a
    temperature of 0.05. Our choice: `mask_ratio`, which gives the 60 % fewer FLOPs that the paper
    reports; `word_ratio`, from BERT; and `time`, because with such masks "the same position in
    another frame" is ambiguous.

    Attributes:
        time: which tokens attend to one another through time; see `vidl.nn.SpaceTimeTransformer`.
        temperature: temperature of the contrastive loss; fixed.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    mask_ratio: float = 0.6
    time: TimeGroups = "slot"
    text_layers: int = 6
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time == "slot" and self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' with time 'slot', got {self.mask!r}: frames must "
                "keep equally many patches; time 'position' and 'joint' accept any mask"
            )

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        return {"patches": math.prod(self.grid), "encoder": 1 + self.visible}

    def variants(self) -> dict[str, "MacRecipe"]:
        """The recipe dense (no mask) and masked."""
        return {"dense": dataclasses.replace(self, mask_ratio=0.0), "masked": self}


PRESETS = {
    "tiny": MacRecipe(
        image_size=64, patch_size=8, width=128, depth=4, heads=4, text_width=128, text_layers=2,
        text_heads=4, embed_dim=64,
    ),
    "small": MacRecipe(width=384, heads=6, text_width=384, text_heads=6),
    "base": MacRecipe(),
}  # fmt: skip


class Mac(TwoTowers):
    """Masked contrastive pre-training on clips and captions.

    Two encoders without decoder or fusion: Frozen in Time's divided space-time transformer on the
    visible patches, BERT on the masked caption, and a contrastive loss between their CLS tokens.
    Source: MAC, arXiv 2212.00986, figure 2.
    """

    card = Card(
        "MAC", "2212.00986", "visible patches of all frames", "two encoders",
        "CC3M, WebVid-2M", "4 frames, ViT-B/16, DistilBERT, projection to 256, temperature 0.05",
        "mask_ratio, word_ratio, the groups of temporal attention",
    )  # fmt: skip
    objectives = {"vtc": contrast}

    def __init__(self, recipe: MacRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, MacRecipe):
            raise TypeError(f"need recipe as a MacRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = SpaceTimeTransformer(
            r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
            num_frames=r.grid[0], time=r.time, backend=r.backend, **r.embedding,
        )  # fmt: skip
        self.text = Bert(
            r.vocabulary.size, r.text_width, r.text_layers, 0, r.text_heads, token_types=0,
            dropout=r.dropout, backend=r.backend,
        )  # fmt: skip
        self.project_clip = Projection(r.width, r.embed_dim)
        self.project_text = Projection(r.text_width, r.embed_dim, relu=True)
        self.contrast = ContrastiveLoss(r.temperature, learned=False, form="sum", gather=r.gather)

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip, and the captions with masked words."""
        r = self.recipe
        mask = r.visual_mask(inputs.samples, inputs.step)
        clips = self.encode_clips(inputs.video, mask)
        hidden = mask_words(
            r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
            replace="mask", vocabulary=r.vocabulary,
        )  # fmt: skip
        text = self.encode_text(hidden.ids, inputs.attention_mask, words=inputs.words)
        v, t = self.clip_features(clips), self.text_features(text)
        return Seen(inputs, mask, clips, text, v, t)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """CLS and the tokens of the visible patches, [B, 1 + K, C]."""
        self.check_clips(video, mask)
        return self.vision(video, None if mask is None else mask.ids_keep)
