"""ALPRO: aligned clips and captions, merged in one encoder; a frozen model teaches entities."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidl.masking import VisualKind, VisualMask
from vidl.models.abilities import Joint
from vidl.models.cards import Card
from vidl.models.joining import Joining
from vidl.models.learning import contrast, fill_words
from vidl.models.prompting import (
    Prompter,
    clip_encoder,
    frequent_entities,
    rectangles,
    text_encoder,
)
from vidl.models.recipe import VitRecipe
from vidl.models.system import Inputs, Seen
from vidl.models.two_towers import TwoTowers
from vidl.nn import Projection
from vidl.objectives import ContrastiveLoss, Negatives, hard_negatives, matching_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlproRecipe(VitRecipe):
    """Sizes, masks and losses of `Alpro`.

    Stated by the paper or its code: 4 frames, TimeSformer-B/16 whose patches are averaged over
    time, BERT-base with 6 text and 6 merge layers, 15 % of the words masked, a learned temperature
    of 0.07, two hard negatives, 1000 entities with 12 prompts each, rectangles of 30 to 50 % of the
    area, a threshold of 0.2 (on the confidence: the code compares the number of the entity), all
    weights 1. Our choice: entities are the most frequent words of the captions but function words,
    the words of the prompts, the GELU of the entity head, masks (`mask_ratio`; 0 in the preset
    base), and the tiny and small presets.

    Attributes:
        mask: "tube": the average over time needs the same places in all frames.
        merge_layers: layers of BERT after its `text_layers` that see words and clip together.
        entities: number of entities of PEM.
        threshold: least confidence of the prompter for a clip to count in PEM.
        vtc, vtm, mlm, pem: weights of the losses; a loss with weight 0 is not computed. PEM needs
            `start.teacher`, a run of ALPRO, usually with `pem=0 vtm=0 mlm=0`.
        temperature: initial temperature of VTC; it is learned.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    mask: VisualKind = "tube"
    text_layers: int = 6
    merge_layers: int = 6
    entities: int = 1000
    threshold: float = 0.2
    vtc: float = 1.0
    vtm: float = 1.0
    mlm: float = 1.0
    pem: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "text_layers", "entities")
        self._at_least(0, "merge_layers", "vtc", "vtm", "mlm", "pem")
        if self.text_width != self.width:
            raise ValueError(f"need text_width={self.width}, the width, got {self.text_width}")
        if self.mask != "tube":
            raise ValueError(f"need mask 'tube': patches are averaged over time, got {self.mask!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"need threshold in [0, 1], got {self.threshold}")
        if (self.vtm or self.mlm or self.pem) and not self.merge_layers:
            raise ValueError("need merge_layers >= 1 for vtm, mlm and pem, or weights of 0")

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        return {
            "patches": math.prod(self.grid), "encoder": 1 + self.visible,
            "fusion": 1 + self.visible // self.grid[0],
        }  # fmt: skip

    def variants(self) -> dict[str, Any]:
        """The recipe dense (no visual mask) and as it is."""
        return {"dense": dataclasses.replace(self, mask_ratio=0.0), "masked": self}


TINY: dict[str, Any] = dict(
    image_size=64, patch_size=8, width=128, depth=4, heads=4, text_width=128, text_layers=2,
    merge_layers=2, text_heads=4, embed_dim=64, mask_ratio=0.5, entities=16,
)  # fmt: skip
PRESETS = {
    "tiny": AlproRecipe(**TINY),
    "small": AlproRecipe(
        width=384, heads=6, text_width=384, text_layers=4, merge_layers=4, text_heads=6
    ),
    "base": AlproRecipe(),
    "sparse": AlproRecipe(mask_ratio=0.5),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """The 3 B pairs of VTM: own pairs, negative clips, negative captions.

    Attributes:
        negatives: of the batch.
        pooled: one vector for each pair, [3 B, C].
        clips: tokens of the clips of the own pairs after the merge, [B, 1 + n, C].
    """

    negatives: Negatives
    pooled: Tensor
    clips: Tensor


def match_merged(model: "Alpro", seen: Seen) -> Tensor:
    """VTM: does the caption describe the clip? A hard negative of each."""
    return matching_loss(model.matches(seen.more.pooled), seen.more.negatives)


def predict_entities(model: "Alpro", seen: Seen) -> Tensor:
    """PEM: which entities does a rectangle show? The prompter sees the rest of the clip black.

    The patches of the rectangle, after the merge with the own caption, are averaged. Clips whose
    prompter is not confident, or whose rectangle has no visible patch, do not count.
    """
    inputs, r = seen.inputs, model.recipe
    _, rows, columns = r.grid
    inside = rectangles(r.seed, inputs.step, inputs.samples, rows, columns)  # [B, rows, columns]
    pixels = inside.repeat_interleave(r.patch_size, 1).repeat_interleave(r.patch_size, 2)
    video: Any = inputs.video
    black = model.black.to(video.dtype) if video.is_floating_point() else 0
    targets = model.prompter(video.where(pixels[:, None, None], black))
    patches = seen.more.clips[:, 1:]
    counted = inside.flatten(1)
    if seen.mask is not None:  # the places of the first frame are those of all
        counted = counted.gather(1, seen.mask.ids_keep[:, : patches.shape[1]])
    weights = counted.to(patches.dtype)
    mean = (weights[:, None] @ patches)[:, 0] / weights.sum(1, keepdim=True).clamp(min=1)
    logits = model.entities(mean)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = -(targets * logits.log_softmax(1)).sum(1)
    counts = (targets.amax(1) >= r.threshold) & counted.any(1)
    return losses.where(counts, 0).sum() / counts.sum().clamp(min=1)


class Alpro(TwoTowers, Joining):
    """Pre-training that aligns clips and captions before it merges them, with prompted entities.

        clip -> TimeSformer -> mean over time -+- VTC -+- BERT, text layers <- caption
                                               +-------+
                                                   |
                             BERT, merge layers: words and patches in one sequence
                   VTM: first word,  MLM: words at [MASK],  PEM: entities of a rectangle
                                                                     |
        rectangle of the clip -> frozen ALPRO <-> prompts "a video of a dog"

    Source: ALPRO, arXiv 2112.09583, figure 2.
    """

    card = Card(
        "ALPRO", "2112.09583", "patches of all frames, averaged over time",
        "two encoders, then one for both", "CC3M, WebVid-2M",
        "4 frames, TimeSformer-B/16, BERT 6 + 6, words 0.15, temperature 0.07, 1000 entities, "
        "threshold 0.2, weights 1",
        "mask_ratio (0 in the preset base), entities by frequency, words of the prompts",
    )  # fmt: skip
    objectives = {
        "vtc": contrast, "vtm": match_merged, "mlm": fill_words, "pem": predict_entities
    }  # fmt: skip
    pretraining_only = ("prompter.", "entities.", "text.cls.")
    not_joining = ("project_clip.", "project_text.", "matches.", "contrast.", *pretraining_only)

    def __init__(self, recipe: AlproRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, AlproRecipe):
            raise TypeError(f"need recipe as an AlproRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = clip_encoder(r)
        self.text = text_encoder(
            r, r.vocabulary.size, merge_layers=r.merge_layers, mlm_head=r.mlm > 0
        )
        self.project_clip = Projection(r.width, r.embed_dim)
        self.project_text = Projection(r.text_width, r.embed_dim)
        self.contrast = ContrastiveLoss(r.temperature, gather=r.gather)
        self.matches = nn.Linear(r.width, 2)
        if r.pem > 0:
            self.entities = nn.Sequential(
                nn.Linear(r.width, 2 * r.width), nn.GELU(), nn.Linear(2 * r.width, r.entities)
            )
            self.prompter = Prompter(r)
            black = [-mean / std for mean, std in zip(r.mean, r.std, strict=True)]
            self.register_buffer("black", torch.tensor(black).view(3, 1, 1, 1), persistent=False)

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip and the captions, and merge the pairs."""
        r = self.recipe
        mask = r.visual_mask(inputs.samples, inputs.step)
        clips = self.encode_clips(inputs.video, mask)
        text = self.encode_text(inputs.ids, inputs.attention_mask, words=inputs.words)
        v, t = self.clip_features(clips), self.text_features(text)
        pairs = self._pairs(inputs, clips, text, v, t) if r.vtm or r.pem else None
        return Seen(inputs, mask, clips, text, v, t, pairs)

    def _pairs(self, inputs: Inputs, clips: Tensor, text: Tensor, v: Tensor, t: Tensor) -> Pairs:
        B = clips.shape[0]
        negatives = hard_negatives(
            self.recipe.seed, inputs.step, inputs.samples, self.similarity(v, t), inputs.clip_ids
        )
        captions, partner = negatives.pairs()
        most = None if inputs.words is None else 2 * inputs.words + inputs.ids.numel()
        words, patches = self.text.merge(
            text[captions], inputs.attention_mask[captions], clips, partner=partner, words=most
        )
        return Pairs(negatives, words[:, 0], patches[:B])

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """CLS, and the mean over time of the visible patches at each place, [B, 1 + n, C].

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            mask: from the recipe's `visual_mask`; None: all patches are visible.
        """
        self.check_clips(video, mask)
        x = self.vision(video, None if mask is None else mask.ids_keep)
        T = video.shape[2] // self.recipe.tubelet_size
        return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (T, -1)).mean(1)], 1)

    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Captions merged with clips, and the first word of each; see `vidl.models.Joins`."""
        self.check_pairs(clips, text, attention_mask, partner)
        rows, _ = self.text.merge(text, attention_mask, clips, partner=partner, words=words)
        return Joint(rows[:, 0], rows)

    @property
    def taught(self) -> bool:
        """Whether the prompter has its weights and prompts, or is not needed."""
        return self.recipe.pem == 0 or bool(self.prompter.taught)

    def teach(
        self,
        weights: Mapping[str, Tensor],
        tokenizer: Callable[[Sequence[str], int], tuple[Tensor, Tensor]],
        captions: Iterable[str],
    ) -> None:
        """Give the prompter the weights of a trained ALPRO, and prompts from captions.

        Args:
            weights: of a run of ALPRO.
            tokenizer: that of the run's captions, as in `vidl.models.Ranking`.
            captions: of the training set; their most frequent words but function words become the
                entities.

        Raises:
            ValueError: weights are missing or of another shape, there are fewer words than
                entities, or the model has no PEM.
        """
        if self.recipe.pem == 0:
            raise ValueError("need pem > 0 to teach entities, got 0")
        entities = frequent_entities(captions, self.recipe.entities)
        self.prompter.teach(weights, tokenizer, entities)
