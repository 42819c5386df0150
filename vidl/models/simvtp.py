"""SimVTP: one transformer encodes visible tubelets and words together, and reconstructs both."""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.masking import MaskedWords, VisualKind, VisualMask, mask_words
from vidl.models.cards import Card
from vidl.models.learning import contrast, reconstruct_pixels
from vidl.models.merging import MergedRecipe, Merging, fill_words_together
from vidl.models.system import Inputs, Seen
from vidl.models.two_towers import check_features
from vidl.nn import Captions, JointViT, Merged, Words
from vidl.objectives import ContrastiveLoss, hard_negatives


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimVtpRecipe(MergedRecipe):
    """Sizes, masks and losses of `SimVtp`.

    Stated by the paper or its code: 16 frames, tubelets of 2 x 16 x 16, ViT-B, 90 % of the tubelets
    masked by a tube mask (160 of 1568 stay), 75 % of the words replaced by [MASK], a decoder of 4
    layers and 384 channels, a temperature of 0.05, all weights 1. Our choice: the mean of a sample
    is taken over its words without padding, where the code counts padding; the tiny and small
    presets.

    Attributes:
        embed_dim: equal to the width.
        vtc: weight of the contrastive loss.
        temperature: temperature of the contrastive loss; fixed.

    The other fields and the errors are those of `MergedRecipe`.
    """

    rounding = "drop_floor"

    frames: int = 16
    tubelet_size: int = 2
    mask: VisualKind = "tube"
    mask_ratio: float = 0.9
    word_ratio: float = 0.75
    embed_dim: int = 768
    temperature: float = 0.05
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    vtc: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "vtc")
        if self.embed_dim != self.width:
            raise ValueError(f"need embed_dim={self.width}, the width, got {self.embed_dim}")

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        return {"patches": math.prod(self.grid), "encoder": self.visible}


PRESETS = {
    "tiny": SimVtpRecipe(
        frames=4, image_size=64, patch_size=8, width=128, depth=4, heads=4, text_width=128,
        text_heads=4, embed_dim=128, mask_ratio=0.75, word_ratio=0.5, decoder_width=64,
        decoder_depth=1, decoder_heads=2,
    ),
    "small": SimVtpRecipe(
        width=384, heads=6, text_width=384, text_heads=6, embed_dim=384, decoder_width=192,
        decoder_heads=3,
    ),
    "base": SimVtpRecipe(),
}  # fmt: skip
PRESETS["sparse"] = PRESETS["base"]  # the published model is sparse


@dataclass(frozen=True, eq=False)
class Pairs:
    """Each caption with its own clip, then with a random other clip, encoded together.

    Attributes:
        hidden: the masked words.
        exist: whether there is another clip, [B].
        pooled: the mean of each pair's tokens, [2 B, C].
        clips, text: the tokens of the own pairs, [B, N, C] and [B, L, C].
    """

    hidden: MaskedWords
    exist: Tensor
    pooled: Tensor
    clips: Tensor
    text: Tensor


def match_random(model: "SimVtp", seen: Seen) -> Tensor:
    """VTM over 2 B pairs: a caption with its clip, and with a random other clip."""
    pairs: Pairs = seen.more
    logits = model.matches(pairs.pooled)
    ignored = torch.where(pairs.exist, 0, -100)
    labels = torch.cat([torch.ones_like(ignored), ignored])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


class SimVtp(Merging):
    """Masked autoencoding of clips and captions in one encoder.

        clip    -> visible tubelets -+                    +-> decoder: pixels of masked tubelets
                                     +-> ViT, all attend -+-> words at [MASK]
        caption -> words, [MASK] ----+                    +-> mean of a pair: does it match?
        clip alone -> ViT -> mean,  caption alone -> ViT -> mean: contrastive loss

    Clips are embedded once for all passes. The pairs of VTM include the own pairs, whose tokens
    also give the masked words and pixels, so that 2 B pairs are encoded together, where the paper's
    code encodes 3 B. Source: SimVTP, arXiv 2212.03490, figure 2.
    """

    card = Card(
        "SimVTP", "2212.03490", "visible tubelets of all frames", "one encoder for clip and words",
        "WebVid-2M", "ViT-B, tube mask 0.9, words 0.75, decoder 4 x 384, temperature 0.05",
        "mean without padding; presets tiny and small",
    )  # fmt: skip
    objectives = {
        "mvm": reconstruct_pixels, "mlm": fill_words_together, "vtc": contrast, "vtm": match_random
    }  # fmt: skip
    pretraining_only = ("words.", *Merging.pretraining_only)
    not_joining = ("words.", "contrast.", *Merging.not_joining)

    def __init__(self, recipe: SimVtpRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, SimVtpRecipe):
            raise TypeError(f"need recipe as a SimVtpRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = JointViT(
            r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
            num_frames=r.grid[0], backend=r.backend, **r.embedding,
        )  # fmt: skip
        self.text = Words(r.vocabulary.size, r.width, dropout=r.dropout)
        self.contrast = ContrastiveLoss(r.temperature, learned=False, form="sum", gather=r.gather)
        self.matches = nn.Linear(r.width, 2)
        if r.mlm > 0:
            self.words = nn.Linear(r.width, r.vocabulary.size)
        self.add_decoder(r, r.grid, "videomae", position="sincos_1d", prefix=0, embed_bias=False)

    def see(self, inputs: Inputs) -> Seen:
        """Encode clips and captions alone, and in pairs."""
        r = self.recipe
        mask = r.visual_mask(inputs.samples, inputs.step)
        hidden = mask_words(
            r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
            replace="mask", vocabulary=r.vocabulary,
        )  # fmt: skip
        clips = self.encode_clips(inputs.video, mask)
        text = self.encode_text(hidden.ids, inputs.attention_mask, words=inputs.words)
        v = t = None
        if r.vtc:
            v = self.clip_features(clips)
            t = self.text_features(text, inputs.attention_mask, words=inputs.words)
        pairs = self._pairs(inputs, hidden, clips, text) if r.vtm or r.mlm or r.mvm else None
        return Seen(inputs, mask, clips, text, v, t, pairs)

    def _pairs(self, inputs: Inputs, hidden: MaskedWords, clips: Tensor, text: Tensor) -> Pairs:
        B, device = inputs.ids.shape[0], clips.device
        samples, attention_mask, words = inputs.samples, inputs.attention_mask, inputs.words
        partner = torch.arange(B, device=device)
        exist = torch.ones(B, dtype=torch.bool, device=device)
        if self.recipe.vtm:
            alike = torch.zeros(B, B, device=device)  # every other clip is equally likely
            negatives = hard_negatives(
                self.recipe.seed, inputs.step, samples, alike, inputs.clip_ids
            )
            partner, exist = torch.cat([partner, negatives.clips]), negatives.exist
            text, attention_mask = text.repeat(2, 1, 1), attention_mask.repeat(2, 1)
            words = None if words is None else 2 * words
        merged, x = self.together(clips, text, attention_mask, partner, words)
        own_clips, own_text = (part[:B] for part in merged.split(x))
        return Pairs(hidden, exist, merged.mean(x), own_clips, own_text)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The embedded visible tubelets, [B, N, C]: the encoder needs the words beside them.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            mask: from the recipe's `visual_mask`; None: all tubelets are visible.
        """
        self.check_clips(video, mask)
        return self.vision.embed(video, None if mask is None else mask.ids_keep)

    def clip_features(self, clips: Tensor) -> Tensor:
        """The mean of the tokens that the encoder gives for clips alone, [B, C]."""
        return self.vision(clips).mean(1)

    def text_features(
        self, text: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The mean of the tokens that the encoder gives for captions alone, [B, C]."""
        captions = Captions(text, attention_mask, words)
        x = captions.unpack(self.vision(captions.pack(text), captions.joint()))
        return x.sum(1) / captions.lengths().clamp(min=1)[:, None]

    def embed_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The features of clips, [B, C]."""
        return self.clip_features(self.encode_clips(video, mask))

    def embed_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The features of captions, [B, C]."""
        text = self.encode_text(ids, attention_mask, words=words)
        return self.text_features(text, attention_mask, words=words)

    def similarity(self, clips: Tensor, text: Tensor) -> Tensor:
        """Cosine similarity over the temperature, [S, B], of features [S, C] and [B, C]."""
        check_features(clips, text)
        return self.contrast.similarity(clips, text)

    def pool(self, merged: Merged, x: Tensor) -> Tensor:
        """The mean of the rows of each pair, [S, C]."""
        return merged.mean(x)

    def predict_words(self, text: Tensor, positions: Tensor) -> Tensor:
        """Logits of words at these positions of [B L], [M, vocabulary]."""
        return self.words(text.flatten(0, 1).index_select(0, positions))

    def reconstruct(self, pairs: Pairs, mask: VisualMask) -> Tensor:
        """The predicted pixels of masked tubelets, [B, M, pixels]."""
        return self.decoder(pairs.clips, mask.ids_keep, mask.ids_mask)
