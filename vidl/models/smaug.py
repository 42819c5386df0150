"""SMAUG: embed visible patches only, prune unimportant tokens, then fuse clip and caption."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_dtype, check_floating, check_shape, check_tensors
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

    The parts of the paper that we could access name the components and their order: visible patches
    only, pruning inside the encoder frame by frame, frames selected by the text, MVM on pixels.
    They do not report hyperparameters, so every default is our choice: the encoders are ViT-B/16
    and BERT-base, split as in Singularity; pruning follows EViT; word_ratio is Singularity's; the
    decoder is a shallower version of MAE's.

    Attributes:
        mask: "frame" or "tube": every frame keeps the same number of patches.
        mask_ratio: share of masked patches, in [0, 1); 0 also disables MVM.
        prune_layers: layers of the vision encoder that prune tokens, counted from 0.
        keep_rate: share of the tokens that each of them keeps, in (0, 1]; 1: no pruning.
        fuse: how pruned tokens are fused into one; "sum" is EViT's fused token; None: dropped.
        frame_time: where the time embedding of a frame is added: "before" the encoder, so that VTC,
            which averages over frames, sees their order; or "after" it, for the fusion only.
        frames_kept: number of frames that the caption selects.
        fusion_layers: layers of BERT after its `text_layers` that attend to the clip.
        decoder_width, decoder_depth, decoder_heads: of the MVM decoder.
        vtc, vtm, mlm, mvm: weights of the losses; a loss with weight 0 is not computed.
        temperature: initial temperature of VTC; it is learned.

    The other fields and the errors are those of `vidl.models.Recipe`.
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
                f"need mask 'frame' or 'tube' (frames keep equally many patches), got {self.mask!r}"
            )
        self._at_least(1, "decoder_width", "decoder_heads")
        self._at_least(0, "decoder_depth", "fusion_layers", "vtc", "vtm", "mlm", "mvm")
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
        """Tokens of one clip at each stage."""
        T, n = self.grid[0], self.visible // self.grid[0]
        tokens = {"patches": math.prod(self.grid), "encoder": T * (1 + n)}
        for layer in self.prune_layers:
            kept = kept_count(n, self.keep_rate)
            n = kept + (self.fuse is not None) if kept < n else n
            tokens[f"after layer {layer}"] = T * (1 + n)
        return tokens | {"fusion": self.frames_kept * (1 + n)}

    def variants(self) -> dict[str, "SmaugRecipe"]:
        """The recipe dense (no mask, no pruning), masked only, and masked and pruned."""
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
    """Sparse masked pre-training on clips and captions.

    Patches are masked at random and only visible patches are embedded. A ViT encodes each frame
    separately and prunes tokens between its layers. The caption selects frames, and the last layers
    of BERT attend to their tokens. Losses: contrastive (VTC), matching (VTM), masked words (MLM)
    and masked pixels (MVM). A learned time embedding is added to each frame (our choice: without it
    the model cannot see the order of frames). Source: SMAUG, arXiv 2211.11446, figure 2.
    """

    def __init__(self, recipe: SmaugRecipe) -> None:
        super().__init__()
        if not isinstance(recipe, SmaugRecipe):
            raise TypeError(f"need recipe as a SmaugRecipe, got {type(recipe).__name__}")
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
        """The losses of a batch: "loss", their weighted sum, "vtc", "vtm", "mlm" and "mvm".

        Arguments and errors are those of `TwoTowers`.
        """
        self.check_batch(video, ids, attention_mask, samples, clip_ids)
        r = self.recipe
        mask = r.visual_mask(samples, step)
        frames = self.encode_frames(video, mask)
        clips = self.in_time(frames, video.shape[0])
        text = self.encode_text(ids, attention_mask, words=words)
        v, t = (
            self.clip_features(clips),
            self.text_features(text),
        )  # [B, T, embed_dim], [B, embed_dim]

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
        """The tokens of each frame after pruning, [B, T, N, C]."""
        return self.in_time(self.encode_frames(video, mask), video.shape[0])

    def encode_frames(self, video: Tensor, mask: VisualMask | None = None) -> Frames:
        """The encoder's output for each frame; mask None: all patches are visible."""
        self.check_clips(video, mask)
        before = self.recipe.frame_time == "before"
        time = self.time[: video.shape[2] // self.recipe.tubelet_size] if before else None
        return self.vision(video, None if mask is None else mask.ids_keep, time)

    def in_time(self, frames: Frames, B: int) -> Tensor:
        """The tokens of each frame with its time embedding, [B, T, N, C]; CLS is the first."""
        tokens = frames.tokens.unflatten(0, (B, -1))
        if self.recipe.frame_time == "before":  # the encoder added it
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
        """Captions fused with the frames that each caption selects from a clip, [S, L, C].

        Args:
            clips: [B, T, N, C].
            text, attention_mask: [S, L, C] from `Bert.encode`, and [S, L].
            partner: the clip of each caption, [S] int64; None: caption b has clip b (S = B).
            words: an upper bound of the words in the captions; see `vidl.nn.Bert`.
        """
        tensors = dict(clips=clips, text=text, attention_mask=attention_mask, partner=partner)
        check_tensors(("attention_mask", "partner"), **tensors)
        check_floating(clips=clips, text=text)
        check_shape("clips", clips, "B", "T", "N", self.recipe.width)
        check_shape("text", text, "S", "L", self.recipe.text_width)
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, text.shape[0])
        elif clips.shape[0] != text.shape[0]:
            raise ValueError(
                f"need partner for {text.shape[0]} captions in text and {clips.shape[0]} clips"
            )
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
        """The logits of "does not match" and "matches" for each caption and its clip, [S, 2].

        Arguments are those of `fuse`.
        """
        pairs = self.fuse(clips, text, attention_mask, partner, words)
        return self.matches(pairs[:, 0])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens and all frames are kept."""
        rate, frames = self.vision.keep_rate, self.selector.keep
        try:
            self.vision.set_keep_rate(1.0)
            self.selector.keep = self.recipe.grid[0]
            yield
        finally:
            self.vision.set_keep_rate(rate)
            self.selector.keep = frames

    def reconstruct(self, frames: Frames, mask: VisualMask) -> Tensor:
        """The predicted pixels of masked patches, [B, M, pixels]."""
        ids_mask = mask.per_frame().ids_mask
        pixels = self.decoder(frames.tokens, frames.ids, ids_mask)
        return pixels.view(*mask.ids_mask.shape, -1)
