"""VLC: a transformer that begins as a masked autoencoder of images learns from captions alone."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidl.masking import MaskedWords, VisualMask, mask_words
from vidl.models.cards import Card
from vidl.models.learning import match_swapped, reconstruct_pixels, swap_half
from vidl.models.merging import MergedRecipe, Merging, fill_words_together
from vidl.models.singularity import with_more_frames
from vidl.models.system import Inputs, Seen
from vidl.nn import JointViT, Merged, Words
from vidl.objectives import word_patch_alignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlcRecipe(MergedRecipe):
    """Sizes, masks and losses of `Vlc`.

    Stated by the paper or its code: images of 384 x 384, ViT-B/16 that begins with the weights of
    MAE, 60 % of the patches masked in all passes, 15 % of the words masked, a decoder of 8 layers
    and 512 channels, half of the images swapped, weights 1, and 0.1 for WPA. Our choice: both
    passes of a step see the same patches; swapped images come from the batch; pixels are normalised
    as in MAE; the word head is BERT's; clips of several frames; the tiny and small presets.

    Attributes:
        frames: frames of a clip; the published model has 1. With several, all patches attend to
            each other, a learned time embedding tells the frames, and pixels are reconstructed
            frame by frame.
        mask: "frame" or "tube": every frame keeps the same number of patches.
        wpa: weight of the alignment of words and patches.

    There are no features of clips and captions: `embed_dim`, `temperature` and `gather` are not
    used. The other fields and the errors are those of `MergedRecipe`.
    """

    stills = "one"

    frames: int = 1
    image_size: int = 384
    mask_ratio: float = 0.6
    wpa: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "wpa")
        if self.tubelet_size != 1:
            raise ValueError(
                f"need tubelet_size=1: MAE embeds patches of frames, got {self.tubelet_size}"
            )
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' (frames keep equally many patches), got {self.mask!r}"
            )

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        return {"patches": math.prod(self.grid), "encoder": 1 + self.visible}


PRESETS = {
    "tiny": VlcRecipe(
        frames=4, image_size=64, patch_size=8, width=128, depth=4, heads=4, text_width=128,
        text_heads=4, decoder_width=64, decoder_depth=1, decoder_heads=2,
    ),
    "small": VlcRecipe(
        image_size=224, width=384, heads=6, text_width=384, text_heads=6, decoder_width=256,
        decoder_depth=4, decoder_heads=8,
    ),
    "base": VlcRecipe(),
}  # fmt: skip
PRESETS["sparse"] = PRESETS["base"]  # the published model is sparse


@dataclass(frozen=True, eq=False)
class Passes:
    """What the two passes of a step give: captions with masked words, and whole captions.

    The second pass has half of the clips swapped.

    Attributes:
        hidden: the masked words.
        clips, text: tokens of the first pass, [B, 1 + K, C] and [B, L, C].
        swapped: whether the second pass has another clip, [B] bool.
        pooled: one vector for each pair of the second pass, [B, C].
        pair_clips, pair_text: tokens of the second pass.
    """

    hidden: MaskedWords
    clips: Tensor
    text: Tensor
    swapped: Tensor
    pooled: Tensor
    pair_clips: Tensor
    pair_text: Tensor


def align_words(model: "Vlc", seen: Seen) -> Tensor:
    """WPA: words and patches of matching pairs come closer, those of swapped ones move apart.

    The first and the last word, [CLS] and [SEP], and CLS of the clip take no part, as in ViLT.
    """
    passes: Passes = seen.more
    words = seen.inputs.attention_mask != 0
    number = words.cumsum(1)
    between = words & (number > 1) & (number < number[:, -1:])
    distances = word_patch_alignment(passes.pair_text, passes.pair_clips[:, 1:], between)
    return torch.where(passes.swapped, -distances, distances).mean()


class Vlc(Merging):
    """Pre-training of one transformer for patches and words, from captions without labels.

        clip -> CLS, visible patches -+                    +-> decoder: pixels of masked patches
                                      +-> ViT, all attend -+-> words at [MASK]
        caption -> words, [MASK] -----+
        a clip, or another one -------+                    +-> first word: does it match?
                                      +-> ViT, all attend -+-> transport between words and patches
        caption -> words -------------+

    Clips are embedded once, and both passes are encoded together. There are no features of clips
    and captions alone, so that retrieval matches all pairs. Source: VLC, arXiv 2205.09256, 3.
    """

    card = Card(
        "VLC", "2205.09256", "visible patches of one image", "one encoder for clip and words",
        "COCO, VG, SBU, CC3M",
        "384 px, ViT-B/16 from MAE, mask 0.6 in all passes, words 0.15, decoder 8 x 512, half of "
        "the images swapped, weights 1, WPA 0.1",
        "one mask for both passes, images swapped within the batch, clips of several frames; "
        "presets tiny and small",
    )  # fmt: skip
    objectives = {
        "mvm": reconstruct_pixels, "mlm": fill_words_together, "vtm": match_swapped,
        "wpa": align_words,
    }  # fmt: skip
    pretraining_only = ("text.cls.", *Merging.pretraining_only)
    not_joining = ("text.cls.", *Merging.not_joining)
    normed_head = True

    def __init__(self, recipe: VlcRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, VlcRecipe):
            raise TypeError(f"need recipe as a VlcRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = JointViT(
            r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
            num_frames=r.frames, position="sincos_2d", class_token=True, backend=r.backend,
            **r.embedding,
        )  # fmt: skip
        if r.frames > 1:
            self.time = nn.Parameter(torch.zeros(r.frames, r.width))
        self.text = Words(r.vocabulary.size, r.width, dropout=r.dropout, mlm_head=r.mlm > 0)
        # Row 0 is added to words, row 1 to patches.
        self.token_type_embeddings = nn.Embedding(2, r.width)
        nn.init.normal_(self.token_type_embeddings.weight, std=0.02)
        self.pooler = nn.Linear(r.width, r.width)
        self.matches = nn.Linear(r.width, 2)
        self.add_decoder(r, (1, *r.grid[1:]), "mae")

    def see(self, inputs: Inputs) -> Seen:
        """Encode captions with masked words beside their clips, and whole ones beside others."""
        r = self.recipe
        mask = r.visual_mask(inputs.samples, inputs.step, inputs.video.shape[2])
        clips = self.encode_clips(inputs.video, mask)
        hidden = mask_words(
            r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
            vocabulary=r.vocabulary,
        )  # fmt: skip
        texts = [
            self.encode_text(ids, inputs.attention_mask, words=inputs.words)
            for ids in (hidden.ids, inputs.ids)
        ]
        own = torch.arange(inputs.ids.shape[0], device=clips.device)
        partner, swapped = swap_half(r, inputs)
        merged, x = self.together(
            clips, torch.cat(texts), inputs.attention_mask.repeat(2, 1),
            torch.cat([own, partner]), None if inputs.words is None else 2 * inputs.words,
        )  # fmt: skip
        (own_clips, pair_clips), (own_text, pair_text) = (y.chunk(2) for y in merged.split(x))
        pooled = self.pool(merged, x).chunk(2)[1]
        passes = Passes(hidden, own_clips, own_text, swapped, pooled, pair_clips, pair_text)
        return Seen(inputs, mask, clips, more=passes)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """CLS and the embedded visible patches, [B, 1 + N, C].

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            mask: from the recipe's `visual_mask`; None: all patches are visible.
        """
        self.check_clips(video, mask)
        time = self.time[: video.shape[2]] if self.recipe.frames > 1 else None
        x = self.vision.embed(video, None if mask is None else mask.ids_keep, time)
        return x + self.token_type_embeddings.weight[1]

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The embedded words, [B, L, C]; rows of padding are never read. See `vidl.nn.Words`."""
        text = super().encode_text(ids, attention_mask, words=words)
        return text + self.token_type_embeddings.weight[0]

    def pool(self, merged: Merged, x: Tensor) -> Tensor:
        """Linear and tanh of the first word of each pair, [S, C]."""
        return torch.tanh(self.pooler(merged.split(x)[1][:, 0]))

    def predict_words(self, text: Tensor, positions: Tensor) -> Tensor:
        """Logits of words at these positions of [B L], [M, vocabulary]."""
        return self.text.predict_words(text, positions)

    def reconstruct(self, passes: Passes, mask: VisualMask) -> Tensor:
        """The predicted pixels of masked patches, [B, M, pixels], from CLS and each frame."""
        T, frames = mask.grid[0], mask.per_frame()
        cls, patches = passes.clips[:, :1], passes.clips[:, 1:]
        patches = patches.unflatten(1, (T, -1)).flatten(0, 1)  # [B T, K / T, C]
        tokens = torch.cat([cls.repeat_interleave(T, 0), patches], 1)
        pixels = self.decoder(tokens, frames.ids_keep, frames.ids_mask)
        return pixels.view(*mask.ids_mask.shape, -1)

    def resized(self, weights: Any) -> dict[str, Tensor]:
        """The weights of a run with fewer frames: later frames get no time embedding."""
        weights = dict(weights)
        if self.recipe.frames > 1:
            weights.setdefault("time", torch.zeros(0, self.recipe.width))
        return with_more_frames(weights, "time", self.recipe.frames)
