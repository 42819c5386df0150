"""ClipBERT: a few short clips of a video, from pixels to words in one model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_floating,
    check_shape,
    check_tensors,
)
from vidl.kernels.groups import Grid
from vidl.masking import MaskedWords, VisualMask, mask_words
from vidl.masking.visual import check_mask
from vidl.models.abilities import Joint
from vidl.models.cards import Card
from vidl.models.learning import match_swapped, swap_half
from vidl.models.merging import fill_words_together
from vidl.models.recipe import Recipe
from vidl.models.system import Inputs, Seen, System
from vidl.nn import Bert, GridFeatures
from vidl.nn.arguments import check_state
from vidl.nn.bert import bert_name
from vidl.nn.checkpoints import check_fit
from vidl.nn.grid_features import check_stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipBertRecipe(Recipe):
    """Sizes, masks and losses of `ClipBert`.

    Stated by the paper or its code: pre-training on images of up to 768 pixels, ResNet-50 with a
    convolution and a max pooling to 12 x 12 places, 100 of them in training, the same in the whole
    batch, BERT-base with 12 layers, 15 % of the words masked, half of the pairs swapped, weights 1;
    for videos of MSRVTT 8 views of 2 frames of 448 pixels in training, and 16 views in evaluation,
    whose scores are combined by the log of summed exponentials (mean and max also occur). Our
    choice: square crops, pixels in the order RGB and normalised as in ImageNet, for weights of timm
    and torchvision (the code takes detectron2's: BGR, 0 to 255 without a deviation, the stride in
    the first 1 x 1), batch norms that keep their statistics, one pass for both losses, in which the
    words of swapped pairs do not count, words that are averaged over views, and the tiny and small
    presets.

    Attributes:
        cnn: name of a ResNet in timm.
        stride: pixels between neighbours in the last feature map of the CNN: 8, 16 or 32; pooling
            doubles it.
        frames: frames of a view, which are averaged.
        views: short clips of a sample in training, each of `frames` frames.
        views_tested: short clips of a sample in evaluation.
        aggregate: how the scores of the views of a sample are combined: "mean", "max" or the log of
            summed exponentials ("lse").
        mask: "frame": a view keeps its own places; "tube": all views keep the same. All samples of
            a batch keep the same places.
        mask_ratio: share of the places that are left out, in [0, 1); the CNN sees them.
        text_width, text_heads: of BERT.
        text_layers: layers of BERT, which see words and places together.
        vtm, mlm: weights of the losses; a loss with weight 0 is not computed.

    There are no features of clips and captions: `embed_dim`, `temperature` and `gather` are not
    used. The other fields and the errors are those of `vidl.models.Recipe`.
    """

    stills = "one"

    frames: int = 1
    image_size: int = 768
    mask_ratio: float = 0.305
    cnn: str = "resnet50"
    stride: int = 32
    views: int = 1
    views_tested: int = 16
    aggregate: Literal["mean", "max", "lse"] = "lse"
    vtm: float = 1.0
    mlm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "views", "views_tested", "text_layers")
        self._at_least(0, "vtm", "mlm")
        check_stride(self.stride)
        if self.image_size % (2 * self.stride):
            raise ValueError(
                f"need image_size as a multiple of {2 * self.stride}, twice the stride, got "
                f"{self.image_size}"
            )
        if self.tubelet_size != 1:
            raise ValueError(f"need tubelet_size=1: a CNN sees frames, got {self.tubelet_size}")
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' (views keep equally many places), got {self.mask!r}"
            )

    @property
    def grid(self) -> Grid:
        """Views, rows and columns of places."""
        side = self.image_size // (2 * self.stride)
        return self.views, side, side

    @property
    def training_frames(self) -> int:
        """Frames of a sample in training: those of all views."""
        return self.frames * self.views

    @property
    def evaluation_frames(self) -> int:
        """Frames of a sample in evaluation: those of all views."""
        return self.frames * self.views_tested

    def views_of(self, frames: int) -> int:
        """The views of a sample with so many frames; a still is one view."""
        return frames // self.frames if frames > 1 else 1

    def tokens(self) -> dict[str, int]:
        """Tokens of one sample at each stage."""
        return {"patches": math.prod(self.grid), "encoder": self.visible}

    def variants(self) -> dict[str, Any]:
        """The recipe dense (all places) and as it is."""
        return {"dense": dataclasses.replace(self, mask_ratio=0.0), "masked": self}

    def visual_mask(
        self, samples: Tensor, step: int | Tensor, frames: int | None = None
    ) -> VisualMask | None:
        """The places that are kept at a step, the same for all samples; None: all.

        Arguments are those of `Recipe.visual_mask`.
        """
        frames = self.training_frames if frames is None else frames
        return super().visual_mask(torch.zeros_like(samples), step, self.views_of(frames))


PRESETS = {
    "tiny": ClipBertRecipe(
        cnn="test_resnet", stride=8, image_size=64, frames=2, views=2, views_tested=4,
        mask_ratio=0.25, text_width=128, text_layers=4, text_heads=4,
    ),
    "small": ClipBertRecipe(
        cnn="resnet18", image_size=384, frames=2, views=2, views_tested=8, mask_ratio=0.3,
        text_width=384, text_layers=6, text_heads=6,
    ),
    "base": ClipBertRecipe(),
}  # fmt: skip
PRESETS["sparse"] = PRESETS["base"]  # the published model is sparse


@dataclass(frozen=True, eq=False)
class Pass:
    """What the pass of a step gives: captions with masked words, half of them with other clips.

    Attributes:
        hidden: the masked words; those of swapped pairs have no label.
        text: tokens of the captions, [B, L, C].
        pooled: one vector for each pair and view, [B, views, C].
        swapped: whether a caption has another clip, [B] bool.
    """

    hidden: MaskedWords
    text: Tensor
    pooled: Tensor
    swapped: Tensor


class ClipBert(System):
    """Pre-training from sparsely sampled clips, end to end.

        views of a video -> frames -> ResNet -> mean over frames -> places -+
                                                                            +-> BERT, for each view
                                                   caption -> words, [MASK] +
                                        MLM: words at [MASK],  VTM: first word, over all views

    There are no features of clips and captions alone, so that retrieval matches all pairs. Source:
    ClipBERT, arXiv 2102.06183, figure 2.
    """

    card = Card(
        "ClipBERT", "2102.06183", "CNN grid of a few short clips, averaged over frames",
        "CNN, then one encoder for clip and words", "COCO, VG",
        "images up to 768 px, ResNet-50, 100 of 144 places, BERT-base, words 0.15, half of the "
        "pairs swapped, weights 1; 8 views of 2 frames of 448 px for MSRVTT, 16 in evaluation, lse",
        "square crops, RGB and ImageNet's normalisation, frozen statistics of batch norms, one "
        "pass for both losses, words averaged over views; presets tiny and small",
    )  # fmt: skip
    objectives = {"mlm": fill_words_together, "vtm": match_swapped}
    pretraining_only = ("text.cls.",)
    not_joining = ("text.cls.", "matches.")

    def __init__(self, recipe: ClipBertRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, ClipBertRecipe):
            raise TypeError(f"need recipe as a ClipBertRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = GridFeatures(
            r.cnn, r.text_width, r.stride, max(100, r.grid[1]), r.dropout, mean=r.mean, std=r.std
        )
        self.text = Bert(
            r.vocabulary.size, r.text_width, 0, 0, r.text_heads, dropout=r.dropout,
            merge_layers=r.text_layers, mlm_head=r.mlm > 0, backend=r.backend,
        )  # fmt: skip
        self.pooler = nn.Linear(r.text_width, r.text_width)
        self.matches = nn.Linear(r.text_width, 2)

    def starts(self) -> dict[str, Any]:
        """See `System.starts`; the weights of BERT's pooler are loaded, too."""
        return {"vision": self.vision, "text": _Texts(self)}

    def see(self, inputs: Inputs) -> Seen:
        """Encode captions with masked words beside the views of their clips, or of others."""
        r = self.recipe
        mask = r.visual_mask(inputs.samples, inputs.step, inputs.video.shape[2])
        clips = self.encode_clips(inputs.video, mask)
        hidden = mask_words(
            r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
            vocabulary=r.vocabulary,
        )  # fmt: skip
        partner, swapped = swap_half(r, inputs)
        of_swapped = swapped[hidden.positions // max(inputs.ids.shape[1], 1)]
        hidden = dataclasses.replace(hidden, labels=hidden.labels.masked_fill(of_swapped, -100))
        text = self.encode_text(hidden.ids, inputs.attention_mask, words=inputs.words)
        joint = self.join(clips, text, inputs.attention_mask, partner, inputs.words)
        more = Pass(hidden, joint.text, joint.pooled, swapped)
        return Seen(inputs, mask, clips, text, more=more)

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The places of each view, [B, views, n, C].

        Args:
            video: the frames of all views, view after view, [B, 3, T, H, W], uint8 or normalised;
                any strides. A single frame is a still.
            mask: from the recipe's `visual_mask`; None: all places are kept.
        """
        self.check_clips(video, mask)
        views = self.recipe.views_of(video.shape[2])
        return self.vision(video, views, None if mask is None else mask.ids_keep)

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The embedded words, [B, L, C]. See `vidl.nn.Bert.encode`."""
        return self.text.encode(ids, attention_mask, words=words)

    @property
    def joined_width(self) -> int:
        """Channels of `Joint.pooled`."""
        return self.recipe.text_width

    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Captions merged with each view of clips; see `vidl.models.Joins`.

        Returns:
            A vector for each pair and view, [S, views, C], and the tokens of the captions, averaged
            over views.
        """
        tensors = dict(clips=clips, text=text, attention_mask=attention_mask, partner=partner)
        check_tensors(("partner",), **tensors)
        check_floating(clips=clips, text=text)
        check_shape("clips", clips, "B", "views", "N", self.recipe.text_width)
        check_shape("text", text, "S", "L", self.recipe.text_width)
        check_shape("attention_mask", attention_mask, *text.shape[:2])
        if words is not None:
            check_count("words", words)
        S, views = text.shape[0], clips.shape[1]
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, S)
            of_view = torch.arange(views, device=clips.device)
            partner = (partner[:, None] * views + of_view).flatten()
        elif clips.shape[0] != S:
            raise ValueError(f"need partner for {S} captions in text and {clips.shape[0]} clips")
        rows, _ = self.text.merge(
            text.repeat_interleave(views, 0), attention_mask.repeat_interleave(views, 0),
            clips.flatten(0, 1), partner=partner, words=None if words is None else views * words,
        )  # fmt: skip
        rows = rows.unflatten(0, (S, views))
        return Joint(torch.tanh(self.pooler(rows[:, :, 0])), rows.mean(1))

    def over_views(self, scores: Tensor) -> Tensor:
        """The scores of pairs, [S, ...], from those of their views, [S, views, ...].

        For `aggregate="lse"`, the cross-entropy of the result is the log of the exponentials summed
        over views and classes, minus that over the views of the right class.
        """
        kind = self.recipe.aggregate
        if kind == "mean":
            return scores.mean(1)
        return scores.amax(1) if kind == "max" else scores.logsumexp(1)

    def match(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not match" and "matches", [S, 2]; see `vidl.models.Matches`."""
        pooled = self.join(clips, text, attention_mask, partner, words).pooled
        return self.over_views(self.matches(pooled))

    @property
    def described_width(self) -> int:
        """Channels of `described`."""
        return self.recipe.text_width

    def described(self, clips: Tensor) -> Tensor:
        """The places of all views, [B, N, C]: the rows that a decoder of words attends to."""
        check_tensors(clips=clips, model=self.matches.weight)
        check_floating(clips=clips)
        check_shape("clips", clips, "B", "views", "N", self.recipe.text_width)
        return clips.flatten(1, 2)

    def predict_words(self, text: Tensor, positions: Tensor) -> Tensor:
        """Logits of words at these positions of [B L], [M, vocabulary]."""
        return self.text.predict_words(text, positions)

    def check_clips(self, video: Tensor, mask: VisualMask | None = None) -> None:
        """Check the arguments of `encode_clips`."""
        super().check_clips(video)
        r, frames = self.recipe, video.shape[2]
        if frames != 1 and frames % r.frames or frames == 0:
            raise ValueError(
                f"need video of whole views of model.frames={r.frames} frames, or of one frame, "
                f"got {frames}"
            )
        if mask is not None:
            check_mask(mask)
            check_tensors(video=video, mask=mask.ids_keep)
            grid = (r.views_of(frames), *r.grid[1:])
            if tuple(mask.grid) != grid:
                raise ValueError(f"need mask of {grid} places as video has, got {mask.grid}")


class _Texts:
    """What weights of BERT are loaded into: the encoder of clip and words, and the pooler."""

    def __init__(self, model: ClipBert) -> None:
        self.model = model

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of BERT; see `Bert.load_pretrained`.

        The weights of the pooler may be missing, as in a BERT for masked words and in DistilBERT:
        it keeps its initial weights.

        Returns:
            The names of weights that were skipped.

        Raises:
            ValueError: see `Bert.load_pretrained`, or those of the pooler have another shape.
        """
        check_state(state_dict)
        named = {name: bert_name(name) for name in state_dict}
        own = {name: ours for name, ours in named.items() if ours.startswith("pooler.")}
        pooler = {ours.removeprefix("pooler.dense."): state_dict[n] for n, ours in own.items()}
        if pooler:
            check_fit(self.model.pooler, pooler)
        skipped = self.model.text.load_pretrained(state_dict)
        self.model.pooler.load_state_dict(pooler, strict=bool(pooler))
        return [name for name in skipped if name not in own]
