"""What models share whose caption attends to the clip in the last layers of BERT."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from vidl.kernels.select_tokens import kept_count
from vidl.masking import VisualMask
from vidl.models.abilities import Joint
from vidl.models.joining import Joining
from vidl.models.recipe import VitRecipe
from vidl.models.system import Inputs, Seen
from vidl.models.two_towers import TwoTowers
from vidl.nn import Bert, KeysOfText, Projection
from vidl.objectives import ContrastiveLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionRecipe(VitRecipe):
    """Sizes, pruning and losses of a model with fusion layers.

    Attributes:
        prune_layers: layers of the vision encoder that prune tokens, counted from 0.
        keep_rate: share of the tokens that each of them keeps, in (0, 1]; 1: no pruning.
        fusion_layers: layers of BERT after its `text_layers` that attend to the clip.
        vtc, vtm, mlm: weights of the losses; a loss with weight 0 is not computed.
        temperature: initial temperature of VTC; it is learned.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    prune_layers: tuple[int, ...] = (3, 6, 9)
    keep_rate: float = 1.0
    text_layers: int = 9
    fusion_layers: int = 3
    word_ratio: float = 0.5
    vtc: float = 1.0
    vtm: float = 1.0
    mlm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "fusion_layers", "vtc", "vtm", "mlm")
        if wrong := [layer for layer in self.prune_layers if not 0 <= layer < self.depth]:
            raise ValueError(f"need prune_layers in [0, {self.depth}), the depth, got {wrong}")
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"need keep_rate in (0, 1], got {self.keep_rate}")
        if (self.vtm or self.mlm) and not self.fusion_layers:
            raise ValueError("need fusion_layers >= 1 for vtm and mlm, or vtm=0 and mlm=0")

    def tokens(self) -> dict[str, int]:
        """Tokens of one clip at each stage."""
        T, n = self.grid[0], self.visible // self.grid[0]
        tokens = {"patches": T * self.grid[1] * self.grid[2], "encoder": T * (1 + n)}
        for layer, left in self._kept(n):
            tokens[f"after layer {layer}"] = T * (1 + left)
            n = left
        return tokens | {"fusion": T * (1 + n)}

    def _kept(self, n: int, extra: int = 0) -> list[tuple[int, int]]:
        """The layers that prune, and the tokens that each of them keeps of n; `extra`: fused."""
        left = []
        for layer in self.prune_layers:
            kept = kept_count(n, self.keep_rate)
            n = kept + extra if kept < n else n
            left.append((layer, n))
        return left

    def variants(self) -> dict[str, Any]:
        """The recipe dense (no mask, no pruning), masked only, and masked and pruned."""
        return {
            "dense": dataclasses.replace(self, mask_ratio=0.0, keep_rate=1.0),
            "masked": dataclasses.replace(self, keep_rate=1.0),
            "masked and pruned": self,
        }


class Fusing(TwoTowers, Joining):
    """A clip encoder, and BERT whose last layers fuse captions with the clip.

    A subclass creates `vision`, calls `add_text` and `add_heads`, and implements `encode_clips`.
    """

    pretraining_only: ClassVar[tuple[str, ...]] = ("text.cls.",)
    not_joining: ClassVar[tuple[str, ...]] = (
        "project_clip.",
        "project_text.",
        "matches.",
        "contrast.",
        "text.cls.",
    )
    axes: ClassVar[tuple[str, ...]] = ("B", "T", "N")
    keys: KeysOfText | None = None  # the tokens that captions keep within the fusion

    def add_text(self, recipe: Any) -> None:
        """Create BERT with its fusion layers."""
        r = recipe
        self.text = Bert(
            r.vocabulary.size, r.text_width, r.text_layers, r.fusion_layers, r.text_heads,
            visual_width=r.width, dropout=r.dropout, backend=r.backend,
            mlm_head="mlm" in self.objectives and r.mlm > 0,
        )  # fmt: skip

    def add_heads(self, recipe: Any, contrast: ContrastiveLoss | None = None) -> None:
        """Create projections, the classifier of pairs, and the contrastive loss if not given."""
        r = recipe
        self.project_clip = Projection(r.width, r.embed_dim)
        self.project_text = Projection(r.text_width, r.embed_dim)
        self.contrast = contrast or ContrastiveLoss(r.temperature, gather=r.gather)
        self.matches = nn.Linear(r.text_width, 2)

    def see(self, inputs: Inputs) -> Seen:
        """Encode the visible patches of each clip, and the captions."""
        mask = self.recipe.visual_mask(inputs.samples, inputs.step, inputs.video.shape[2])
        return self.with_captions(inputs, mask, self.encode_clips(inputs.video, mask))

    def with_captions(
        self, inputs: Inputs, mask: VisualMask | None, clips: Tensor, more: Any = None
    ) -> Seen:
        """Encode the captions, and compute the features of both."""
        text = self.encode_text(inputs.ids, inputs.attention_mask, words=inputs.words)
        v, t = self.clip_features(clips), self.text_features(text)
        return Seen(inputs, mask, clips, text, v, t, more)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens are kept."""
        rate, keys = self.vision.keep_rate, self.keys
        try:
            self.vision.set_keep_rate(1.0)
            self.keys = None
            yield
        finally:
            self.vision.set_keep_rate(rate)
            self.keys = keys

    def tokens_of(
        self, clips: Tensor, text: Tensor, partner: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens [S, N, C] that captions attend to, and the row of each caption among them."""
        return clips.flatten(1, -2), partner

    def fuse(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """Captions fused with clips, [S, L, C].

        Args:
            clips: [B, ..., N, C], from `encode_clips`.
            text, attention_mask: [S, L, C] from `Bert.encode`, and [S, L].
            partner: the clip of each caption, [S] int64; None: caption b has clip b (S = B).
            words: an upper bound of the words in the captions; see `vidl.nn.Bert`.
        """
        self.check_pairs(clips, text, attention_mask, partner)
        visual, partner = self.tokens_of(clips, text, partner)
        return self.text.fuse(
            text, attention_mask, visual, partner=partner, words=words, keys=self.keys
        )

    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Captions fused with clips, and CLS of each; arguments are those of `fuse`."""
        rows = self.fuse(clips, text, attention_mask, partner, words)
        return Joint(rows[:, 0], rows)
