"""SMAUG: what is masked is never embedded, what is unimportant goes before it is fused."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.select_tokens import kept_count
from vidl.kernels.select_tokens.op import Fuse
from vidl.masking import VisualMask, mask_words
from vidl.models.recipe import Recipe
from vidl.models.two_towers import TwoTowers
from vidl.nn import Bert, FrameSelector, MaeDecoder, Projection, Pruning, ViT
from vidl.nn.vit import Frames
from vidl.objectives import (
    ContrastiveLoss,
    MaskedPatchLoss,
    hard_negatives,
    masked_word_loss,
    matching_loss,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmaugRecipe(Recipe):
    """Sizes, masks and losses of `Smaug`.

    What could be read of the paper names the parts and their order: visible patches only, pruning
    inside the encoder frame by frame, frames selected by the text, MVM on pixels. It gives none of
    the numbers, so every default is our choice: the encoders are ViT-B/16 and BERT-base, split as
    Singularity splits it; pruning is EViT's; the share of hidden words is Singularity's; the
    decoder is a shorter one of MAE's.

    Attributes:
        mask: "frame" or "tube", which leave each frame equally many patches.
        mask_ratio: 0 means no MVM either.
        prune_layers: of the vision encoder, counted from 0.
        keep_rate: of each of these, in (0, 1]; 1: nothing is pruned.
        fuse: what becomes of pruned tokens; "sum" is EViT's fused token.
        frame_time: whether the time of a frame is added "before" the encoder, which VTC, a mean
            over frames, needs to tell their order, or "after" it, for the fusion alone.
        frames_kept: how many frames the caption selects.
        fusion_layers: of BERT, after its `text_layers`.
        decoder_width, decoder_depth, decoder_heads: of the decoder of pixels.
        vtc, vtm, mlm, mvm: weights of the losses; one whose weight is 0 is not computed.
        temperature: of VTC at first; it is learned.

    The others, and what is raised, are those of `vidl.models.Recipe`.
    """

    mask_ratio: float = 0.65
    prune_layers: tuple[int, ...] = (3, 6, 9)
    keep_rate: float = 0.7
    fuse: Fuse | None = "sum"
    frame_time: Literal["before", "after"] = "after"
    frames_kept: int = 2
    text_layers: int = 9
    fusion_layers: int = 3
    word_ratio: float = 0.5
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    vtc: float = 1.0
    vtm: float = 1.0
    mlm: float = 1.0
    mvm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube', so that frames keep equally many, got {self.mask!r}"
            )
        if wrong := [layer for layer in self.prune_layers if not 0 <= layer < self.depth]:
            raise ValueError(f"need prune_layers in [0, {self.depth}), the depth, got {wrong}")
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"need keep_rate in (0, 1], got {self.keep_rate}")
        if not 1 <= self.frames_kept <= self.grid[0]:
            raise ValueError(
                f"need frames_kept in [1, {self.grid[0]}], the frames of a clip, got "
                f"{self.frames_kept}: lower it, or raise frames"
            )
        if (self.vtm or self.mlm) and not self.fusion_layers:
            raise ValueError("need fusion_layers >= 1 for vtm and mlm, or vtm=0 and mlm=0")

    def tokens(self) -> dict[str, int]:
        """Of one clip, at each stage."""
        T, n = self.grid[0], self.visible // self.grid[0]
        found = {"patches": math.prod(self.grid), "encoder": T * (1 + n)}
        for layer in self.prune_layers:
            kept = kept_count(n, self.keep_rate)
            n = kept + (self.fuse is not None) if kept < n else n
            found[f"after layer {layer}"] = T * (1 + n)
        return found | {"fusion": self.frames_kept * (1 + n)}

    def ways(self) -> dict[str, "SmaugRecipe"]:
        """The recipe without masks and pruning, with masks alone, and with both."""
        whole: dict[str, Any] = dict(keep_rate=1.0, frames_kept=self.grid[0])
        return {
            "dense": dataclasses.replace(self, mask_ratio=0.0, **whole),
            "masked": dataclasses.replace(self, **whole),
            "masked and pruned": self,
        }


PRESETS = {
    "tiny": SmaugRecipe(
        image_size=64, patch_size=8, width=128, depth=4, heads=4, prune_layers=(1, 2),
        text_width=128, text_layers=2, fusion_layers=2, text_heads=4, embed_dim=64,
        decoder_width=64, decoder_depth=1, decoder_heads=2,
    ),
    "small": SmaugRecipe(
        width=384, heads=6, text_width=384, text_layers=6, text_heads=6, decoder_width=256,
        decoder_heads=4,
    ),
    "base": SmaugRecipe(),
}  # fmt: skip


class Smaug(TwoTowers):
    """Sparse masked pre-training of a clip and its caption.

    Patches are masked at random and only visible ones are embedded; a ViT sees each frame by itself
    and prunes on the way; the caption selects frames, whose tokens BERT's last layers attend to.
    It learns by contrast (VTC), matching (VTM), hidden words (MLM) and masked pixels (MVM). A
    learned embedding of the frame's time is added (our choice: nothing could tell their order
    otherwise). Source: SMAUG, arXiv 2211.11446, figure 2.
    """

    def __init__(self, recipe: SmaugRecipe) -> None:
        super().__init__()
        self.recipe = r = recipe
        self.vision = ViT(
            r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
            prune_layers=r.prune_layers, pruning=Pruning(r.keep_rate, fuse=r.fuse),
            backend=r.backend, **r.embedding,
        )  # fmt: skip
        self.time = nn.Parameter(torch.zeros(r.grid[0], r.width))
        self.text = Bert(
            r.vocabulary.size, r.text_width, r.text_layers, r.fusion_layers, r.text_heads,
            visual_width=r.width, dropout=r.dropout, mlm_head=r.mlm > 0, backend=r.backend,
        )  # fmt: skip
        self.selector = FrameSelector(
            r.width, r.text_width, r.frames_kept, r.grid[0], backend=r.backend
        )
        self.project_clip = Projection(r.width, r.embed_dim)
        self.project_text = Projection(r.text_width, r.embed_dim)
        self.contrast = ContrastiveLoss(r.temperature, gather=r.gather)
        self.matches = nn.Linear(r.text_width, 2)
        if r.mvm > 0 and r.mask_ratio > 0:
            self.decoder = MaeDecoder(
                (1, *r.grid[1:]), r.patch_size, r.width, tubelet_size=r.tubelet_size,
                dim=r.decoder_width, depth=r.decoder_depth, num_heads=r.decoder_heads,
                backend=r.backend,
            )  # fmt: skip
            self.pixels = MaskedPatchLoss(
                r.patch_size, r.tubelet_size, mean=r.mean, std=r.std, backend=r.backend
            )

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        step: int | Tensor = 0,
        *,
        clip_ids: Tensor | None = None,
        words: int | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            ids: captions, [B, L] int64.
            attention_mask: [B, L], not zero where there is a word.
            samples: index of each sample in the data set, [B] int64.
            step: of the training; masks and negatives depend on it and on `samples`.
            clip_ids: [B] int64, the clip of each sample; None: all differ.
            words: an upper bound of the words in `ids`; see `vidl.nn.Bert`.

        Returns:
            "loss", the weighted sum, and each loss by its name: float32 scalars.

        Raises:
            TypeError, ValueError, RuntimeError: as its parts do.
        """
        r = self.recipe
        mask = r.visual_mask(samples, step)
        frames = self.encode_frames(video, mask)
        clips = self.in_time(frames, video.shape[0])
        text = self.encode_text(ids, attention_mask, words=words)
        v, t = self.clip_features(clips), self.text_features(text)  # [B, T, E], [B, E]

        losses = {}
        if r.vtc:
            losses["vtc"] = self.contrast(v, t, clip_ids)
        if r.vtm:
            similarity = self.similarity(v, t)
            negatives = hard_negatives(r.seed, step, samples, similarity, clip_ids)
            captions, partner = negatives.pairs()
            most = None if words is None else 2 * words + ids.numel()
            pairs = self.match(clips, text[captions], attention_mask[captions], partner, most)
            losses["vtm"] = matching_loss(pairs, negatives)
        if r.mlm:
            hidden = mask_words(
                r.seed, step, samples, ids, attention_mask, r.word_ratio, vocabulary=r.vocabulary
            )
            text = self.encode_text(hidden.ids, attention_mask, words=words)
            logits = self.text.predict_words(
                self.fuse(clips, text, attention_mask, words=words), hidden.positions
            )
            losses["mlm"] = masked_word_loss(logits, hidden.labels)
        if r.mvm and mask is not None:
            losses["mvm"] = self.pixels(self.reconstruct(frames, mask), video, mask.ids_mask)
        total = sum(getattr(r, name) * loss for name, loss in losses.items())
        return {"loss": total, **losses}

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of each frame that the encoder does not prune, [B, T, n, C]."""
        return self.in_time(self.encode_frames(video, mask), video.shape[0])

    def encode_frames(self, video: Tensor, mask: VisualMask | None = None) -> Frames:
        """What the encoder finds in each frame; None: nothing is masked."""
        before = self.recipe.frame_time == "before"
        time = self.time[: video.shape[2] // self.recipe.tubelet_size] if before else None
        return self.vision(video, None if mask is None else mask.ids_keep, time)

    def in_time(self, frames: Frames, B: int) -> Tensor:
        """The tokens of each frame and when it was, [B, T, n, C]; the first one is its CLS."""
        tokens = frames.tokens.unflatten(0, (B, -1))
        if self.recipe.frame_time == "before":  # they know it
            return tokens
        return tokens + self.time[: tokens.shape[1], None]

    def fuse(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """Captions that have seen a clip: the frames that each selects of it, [P, L, C].

        Args:
            clips: [B, T, n, C].
            text, attention_mask: [P, L, C] of `Bert.encode`, and [P, L].
            partner: the clip of each caption, [P] int64; None: its own, P = B.
        """
        clips = clips if partner is None else clips[partner]
        selected = self.selector(clips[:, :, 0], text[:, 0], clips)
        return self.text.fuse(text, attention_mask, selected.tokens.flatten(1, 2), words=words)

    def match(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not match" and "matches" of each caption with a clip, [P, 2].

        Arguments are those of `fuse`.
        """
        pairs = self.fuse(clips, text, attention_mask, partner, words)
        return self.matches(pairs[:, 0])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Within this all visible tokens and all frames stay, whatever the recipe says."""
        rate, frames = self.vision.keep_rate, self.selector.keep
        try:
            self.vision.set_keep_rate(1.0)
            self.selector.keep = self.recipe.grid[0]
            yield
        finally:
            self.vision.set_keep_rate(rate)
            self.selector.keep = frames

    def reconstruct(self, frames: Frames, mask: VisualMask) -> Tensor:
        """The pixels of masked patches, [B, T m, t p p 3]."""
        ids_mask = mask.per_frame().ids_mask
        pixels = self.decoder(frames.tokens, frames.ids, ids_mask)
        return pixels.view(*mask.ids_mask.shape, -1)
