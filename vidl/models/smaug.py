"""SMAUG: embed visible patches only, prune unimportant tokens, then fuse clip and caption."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.select_tokens.op import Fuse
from vidl.masking import VisualMask
from vidl.models.cards import Card
from vidl.models.fusing import Fusing, FusionRecipe
from vidl.models.learning import contrast, fill_words, match_hard, reconstruct_pixels
from vidl.models.system import Inputs, Seen
from vidl.nn import FrameSelector, MaeDecoder, Pruning, ViT
from vidl.nn.vit import Frames
from vidl.objectives import MaskedPatchLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmaugRecipe(FusionRecipe):
    """Sizes, masks and losses of `Smaug`.

    The parts of the paper that we could access name the components and their order: visible patches
    only, pruning inside the encoder frame by frame, frames selected by the text, MVM on pixels.
    They do not report hyperparameters, so every default is our choice: the encoders are ViT-B/16
    and BERT-base, split as in Singularity; pruning follows EViT; word_ratio is Singularity's; the
    decoder is a shallower version of MAE's.

    Attributes:
        mask: "frame" or "tube": every frame keeps the same number of patches.
        mask_ratio: share of masked patches, in [0, 1); 0 also disables MVM.
        fuse: how pruned tokens are fused into one; "sum" is EViT's fused token; None: dropped.
        frame_time: where the time embedding of a frame is added: "before" the encoder, so that VTC,
            which averages over frames, sees their order; or "after" it, for the fusion only.
        frames_kept: number of frames that the caption selects.
        decoder_width, decoder_depth, decoder_heads: of the MVM decoder.
        mvm: weight of masked visual modelling.

    The other fields and the errors are those of `vidl.models.FusionRecipe`.
    """

    mask_ratio: float = 0.65
    keep_rate: float = 0.7
    fuse: Fuse | None = "sum"
    frame_time: Literal["before", "after"] = "after"
    frames_kept: int = 2
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    mvm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in ("frame", "tube"):
            raise ValueError(
                f"need mask 'frame' or 'tube' (frames keep equally many patches), got {self.mask!r}"
            )
        self._at_least(1, "decoder_width", "decoder_heads")
        self._at_least(0, "decoder_depth", "mvm")
        if not 1 <= self.frames_kept <= self.grid[0]:
            raise ValueError(
                f"need frames_kept in [1, {self.grid[0]}], the frames of a clip, got "
                f"{self.frames_kept}: lower it, or raise frames"
            )

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        T, n = self.grid[0], self.visible // self.grid[0]
        tokens = {"patches": math.prod(self.grid), "encoder": T * (1 + n)}
        for layer, left in self._kept(n, extra=int(self.fuse is not None)):
            tokens[f"after layer {layer}"] = T * (1 + left)
            n = left
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


class Smaug(Fusing):
    """Sparse masked pre-training on clips and captions.

    Patches are masked at random and only visible patches are embedded. A ViT encodes each frame
    separately and prunes tokens between its layers. The caption selects frames, and the last layers
    of BERT attend to their tokens. Losses: contrastive (VTC), matching (VTM), masked words (MLM)
    and masked pixels (MVM). A learned time embedding is added to each frame (our choice: without it
    the model cannot see the order of frames). Source: SMAUG, arXiv 2211.11446, figure 2.
    """

    card = Card(
        "SMAUG", "2211.11446", "visible patches of each frame", "two encoders and fusion, decoder",
        "not reported", "components and their order", "all hyperparameters",
    )  # fmt: skip
    objectives = {
        "vtc": contrast, "vtm": match_hard, "mlm": fill_words, "mvm": reconstruct_pixels
    }  # fmt: skip
    pretraining_only = ("decoder.", *Fusing.pretraining_only)
    not_joining = ("decoder.", *Fusing.not_joining)

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
        self.add_text(r)
        self.selector = FrameSelector(
            r.width, r.text_width, r.frames_kept, r.grid[0], backend=r.backend
        )
        self.add_heads(r)
        if r.mvm > 0 and r.mask_ratio > 0:
            self.decoder = MaeDecoder(
                (1, *r.grid[1:]), r.patch_size, r.width, tubelet_size=r.tubelet_size,
                dim=r.decoder_width, depth=r.decoder_depth, num_heads=r.decoder_heads,
                backend=r.backend,
            )  # fmt: skip
            self.pixels = MaskedPatchLoss(
                r.patch_size, r.tubelet_size, mean=r.mean, std=r.std, backend=r.backend
            )

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip, and the captions."""
        mask = self.recipe.visual_mask(inputs.samples, inputs.step)
        frames = self.encode_frames(inputs.video, mask)
        clips = self.in_time(frames, inputs.video.shape[0])
        return self.with_captions(inputs, mask, clips, frames)

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

    def tokens_of(
        self, clips: Tensor, text: Tensor, partner: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens of the frames that each caption selects, [S, N, C]."""
        clips = clips if partner is None else clips[partner]
        selected = self.selector(clips[:, :, 0], text[:, 0], clips)
        return selected.tokens.flatten(1, 2), None

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens and all frames are kept."""
        frames = self.selector.keep
        try:
            self.selector.keep = self.recipe.grid[0]
            with super().unpruned():
                yield
        finally:
            self.selector.keep = frames

    def reconstruct(self, frames: Frames, mask: VisualMask) -> Tensor:
        """The predicted pixels of masked patches, [B, M, pixels]."""
        ids_mask = mask.per_frame().ids_mask
        pixels = self.decoder(frames.tokens, frames.ids, ids_mask)
        return pixels.view(*mask.ids_mask.shape, -1)
