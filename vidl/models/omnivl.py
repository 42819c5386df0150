"""OmniVL: one encoder of images and clips, in two stages; it matches captions and writes them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidl.masking import VisualKind, VisualMask
from vidl.models.cards import Card
from vidl.models.fusing import Fusing
from vidl.models.learning import match_hard, write_words
from vidl.models.recipe import VitRecipe
from vidl.models.system import Inputs, Seen
from vidl.nn import Bert, Momentum, Projection, TimeSformer, WordsDecoder
from vidl.objectives import UnifiedContrastiveLoss

# A number of a text is a polynomial of its words at this point, modulo 2^64.
POINT = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, kw_only=True)
class OmnivlRecipe(VitRecipe):
    """Sizes, masks and losses of `Omnivl`.

    There is no public code. Stated by the abstract: one visual encoder of images and videos, image
    and video pre-training decoupled in two stages, UniVLC over texts and labels, and generation
    beside understanding. Reported by UnIVAL: TimeSformer and BERT. All numbers are our choice: 8
    frames of 224 pixels, ViT-B/16, 9 text layers, 3 layers of the alignment decoder and 3 of the
    generation decoder, the features of CLS, a temperature of 0.07 that is learned, no queue, a
    momentum of 0.995, all weights 1, masks (`mask_ratio`; 0 in the preset base), and the tiny and
    small presets. Also ours: the queue has features of a momentum encoder, as in ALBEF, which sees
    the same patches and has no dropout.

    Attributes:
        frames: 1 in the first stage, which trains on images, or on one frame of a clip. A run with
            more frames and `start.model` is the second stage; it may have images beside clips.
        mask: "tube": attention over time needs the same places in all frames.
        fusion_layers: layers of BERT after its `text_layers` that attend to the clip: the alignment
            decoder.
        writer_layers: layers of the generation decoder.
        queue: earlier samples with which UniVLC contrasts; 0: those of the batch only, without a
            momentum encoder.
        momentum: rate of the momentum encoder.
        vtc, vtm, lm: weights of UniVLC, matching and language modelling; a loss with weight 0 is
            not computed.
        temperature: initial temperature of UniVLC; it is learned.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    stills = "one"

    frames: int = 8
    mask: VisualKind = "tube"
    text_layers: int = 9
    fusion_layers: int = 3
    writer_layers: int = 3
    queue: int = 0
    momentum: float = 0.995
    vtc: float = 1.0
    vtm: float = 1.0
    lm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "fusion_layers", "queue", "vtc", "vtm", "lm")
        self._at_least(1, "writer_layers")
        if self.mask != "tube":
            raise ValueError(
                f"need mask 'tube': attention over time needs equal places, got {self.mask!r}"
            )
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"need momentum in [0, 1], got {self.momentum}")
        if self.queue and not self.vtc:
            raise ValueError(f"need vtc > 0 with a queue, or queue=0, got queue={self.queue}")
        if self.vtm and not self.fusion_layers:
            raise ValueError("need fusion_layers >= 1 for vtm, or vtm=0")

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        seen = 1 + self.visible
        return {"patches": math.prod(self.grid), "encoder": seen, "decoders": seen}

    def variants(self) -> dict[str, Any]:
        """The recipe dense (no visual mask) and as it is."""
        return {"dense": dataclasses.replace(self, mask_ratio=0.0), "masked": self}


TINY: dict[str, Any] = dict(
    frames=4, image_size=64, patch_size=8, width=128, depth=4, heads=4, text_width=128,
    text_layers=2, fusion_layers=2, writer_layers=2, text_heads=4, embed_dim=64, mask_ratio=0.5,
)  # fmt: skip
PRESETS = {
    "tiny": OmnivlRecipe(**TINY),
    "small": OmnivlRecipe(width=384, heads=6, text_width=384, text_layers=6, text_heads=6),
    "base": OmnivlRecipe(),
    "sparse": OmnivlRecipe(mask_ratio=0.5),
}


def unify(model: "Omnivl", seen: Seen) -> Tensor:
    """UniVLC: clips and texts are compared; those of one text or label are all positives."""
    return model.contrast(seen.v, seen.t, seen.inputs.clip_ids, seen.more)


class Omnivl(Fusing):
    """Pre-training on images and clips with texts or labels, for understanding and generation.

        image -> 2-D patches --------------+
        clip  -> 3-D patches, time on -> TimeSformer -+- UniVLC -+- BERT <- text or label
                                                      |          |
                          alignment decoder: VTM <----+----------+
                          generation decoder: LM <----+

    Images skip attention over time. Labels are texts, such as "a video of surfing": samples with
    equal words are positives of each other in UniVLC, and no negatives in matching. In the second
    stage the embedding of 3-D patches starts as that of images, inflated, and attention over time
    adds nothing at first. Source: OmniVL, arXiv 2209.07526.
    """

    card = Card(
        "OmniVL", "2209.07526", "patches of images, tubelets of clips",
        "two encoders, alignment and generation decoders",
        "images and videos with texts or labels (15.3M, of which 2.8M videos, as reported)",
        "from abstract: one encoder of images and videos, decoupled stages, UniVLC over texts and "
        "labels; architecture reported: TimeSformer, BERT",
        "all numbers; features of CLS; queue of momentum features (0 in the presets); mask_ratio "
        "(0 in the preset base)",
    )  # fmt: skip
    objectives = {"vtc": unify, "vtm": match_hard, "lm": write_words}
    pretraining_only = ("decoder.", "momentum.", "contrast.queue.")
    not_joining = (*Fusing.not_joining, *pretraining_only)
    axes = ("B", "N")
    contrast: UnifiedContrastiveLoss

    def __init__(self, recipe: OmnivlRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, OmnivlRecipe):
            raise TypeError(f"need recipe as an OmnivlRecipe, got {type(recipe).__name__}")
        self.recipe = r = recipe
        self.vision = clip_encoder(r)
        self.add_text(r)
        contrast = UnifiedContrastiveLoss(
            r.temperature, queue=r.queue, dim=r.embed_dim, numbers=2, gather=r.gather
        )
        self.add_heads(r, contrast)
        self.decoder = WordsDecoder(
            r.vocabulary.size, r.text_width, r.writer_layers, r.text_heads, visual_width=r.width,
            dropout=r.dropout, backend=r.backend,
        )  # fmt: skip
        self.decoder.start_from(self.text)
        if r.queue:
            text = Bert(
                r.vocabulary.size, r.text_width, r.text_layers, 0, r.text_heads, mlm_head=False,
                backend=r.backend,
            )  # fmt: skip
            self.momentum = Momentum(
                r.momentum, vision=clip_encoder(r), text=text,
                project_clip=Projection(r.width, r.embed_dim),
                project_text=Projection(r.text_width, r.embed_dim),
            )  # fmt: skip
            self.momentum.start(self)

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip and the captions, if need be twice."""
        words = numbers_of(inputs.ids, inputs.attention_mask)
        clips = inputs.samples if inputs.clip_ids is None else inputs.clip_ids
        inputs = dataclasses.replace(inputs, clip_ids=torch.stack([clips, words], 1))
        mask = self.recipe.visual_mask(inputs.samples, inputs.step, inputs.video.shape[2])
        keys = self._keys(inputs, mask) if self.recipe.queue else None
        return self.with_captions(inputs, mask, self.encode_clips(inputs.video, mask), keys)

    @torch.no_grad()
    def _keys(self, inputs: Inputs, mask: VisualMask | None) -> tuple[Tensor, Tensor]:
        """The features of a batch by the momentum encoder, of clips and of captions."""
        slow: Any = self.momentum
        clips = slow.vision(inputs.video, None if mask is None else mask.ids_keep)
        text = slow.text.encode(inputs.ids, inputs.attention_mask, words=inputs.words)
        return slow.project_clip(clips[:, 0]), slow.project_text(text[:, 0])

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """CLS and the visible patches, frame by frame, [B, 1 + K, C].

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides. T = 1: an image.
            mask: from the recipe's `visual_mask`; None: all patches are visible.
        """
        self.check_clips(video, mask)
        return self.vision(video, None if mask is None else mask.ids_keep)

    @property
    def writer(self) -> WordsDecoder:
        """The generation decoder."""
        return self.decoder

    def starts(self) -> dict[str, Any]:
        """See `System.starts`; the generation decoder takes the weights of the text encoder."""
        return {"vision": self.vision, "text": _Texts(self)}

    def begin(self) -> None:
        """Set the momentum encoder equal to the encoders."""
        if self.recipe.queue:
            self.momentum.start(self)

    def after_step(self) -> None:
        """Move the momentum encoder."""
        if self.recipe.queue:
            self.momentum.update(self)

    def unpruned(self) -> Any:
        """See `System.unpruned`; nothing is pruned."""
        return super(Fusing, self).unpruned()

    def resized(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a run with other frames, e.g. of the first stage, which has images only.

        See `TimeSformer.resized`. The queue is empty again.
        """
        part = "vision."
        vision = {n.removeprefix(part): x for n, x in weights.items() if n.startswith(part)}
        moved = {f"{part}{name}": x for name, x in self.vision.resized(vision).items()}
        new = ("momentum.", "contrast.queue.")
        own = {name: x for name, x in self.state_dict().items() if name.startswith(new)}
        return {**weights, **moved, **own}


class _Texts:
    """What weights of BERT are loaded into: the text encoder, and then the generation decoder."""

    def __init__(self, model: Omnivl) -> None:
        self.model = model

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """See `Bert.load_pretrained`."""
        skipped = self.model.text.load_pretrained(state_dict)
        self.model.decoder.start_from(self.model.text)
        return skipped


def clip_encoder(recipe: Any) -> TimeSformer:
    """The encoder of images and clips."""
    r = recipe
    return TimeSformer(
        r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
        num_frames=r.grid[0], stills=True, backend=r.backend, **r.embedding,
    )  # fmt: skip


def numbers_of(ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A number of each text, [B] int64, equal for equal words whatever the padding.

    Args:
        ids, attention_mask: words, [B, L] int64, and [B, L], nonzero where there is one.
    """
    powers = [pow(POINT, power, 2**64) for power in range(1, ids.shape[1] + 1)]
    signed = [x - 2**64 if x >= 2**63 else x for x in powers]
    return ((ids + 1).where(attention_mask != 0, 0) * ids.new_tensor(signed)).sum(1)
