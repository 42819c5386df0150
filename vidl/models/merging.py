"""What models share that encode clips and words together, in one transformer."""

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from vidl.kernels.groups import Grid
from vidl.kernels.masked_patch_loss.op import Target
from vidl.masking import VisualMask
from vidl.models.abilities import Joint
from vidl.models.joining import Joining
from vidl.models.recipe import VitRecipe
from vidl.models.system import Seen
from vidl.nn import Captions, JointViT, MaeDecoder, Merged, Words
from vidl.objectives import MaskedPatchLoss, masked_word_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedRecipe(VitRecipe):
    """Sizes and losses of a model with one encoder for clips and words.

    Attributes:
        width: of the encoder, which words share: `text_width` is equal to it.
        text_layers: 0: words have embeddings but no layers of their own.
        decoder_width, decoder_depth, decoder_heads: of the decoder of pixels.
        vtm, mlm, mvm: weights of the losses; a loss with weight 0 is not computed.

    The other fields and the errors are those of `vidl.models.Recipe`.
    """

    text_layers: int = 0
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    vtm: float = 1.0
    mlm: float = 1.0
    mvm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "decoder_width", "decoder_heads")
        self._at_least(0, "decoder_depth", "vtm", "mlm", "mvm")
        self._multiple("decoder_width", "decoder_heads")
        if self.text_width != self.width:
            raise ValueError(f"need text_width={self.width}, the width, got {self.text_width}")
        if self.text_layers:
            raise ValueError(f"need text_layers=0: words have no layers, got {self.text_layers}")

    def variants(self) -> dict[str, Any]:
        """The recipe dense (no visual mask) and masked."""
        return {"dense": dataclasses.replace(self, mask_ratio=0.0), "masked": self}


def fill_words_together(model: Any, seen: Seen) -> Tensor:
    """MLM: masked words are predicted from the words and the visible patches beside them.

    `seen.more` has the masked words `hidden`, and `text`, the tokens of the captions with them.
    """
    hidden = seen.more.hidden
    logits = model.predict_words(seen.more.text, hidden.positions)
    return masked_word_loss(logits, hidden.labels)


class Merging(Joining):
    """A transformer whose rows are the patches of clips and the words of captions.

    A subclass creates `vision`, `text` and `matches`, and implements `encode_clips`, `pool` and
    `see`.
    """

    pretraining_only: ClassVar[tuple[str, ...]] = ("decoder.",)
    not_joining: ClassVar[tuple[str, ...]] = ("decoder.", "matches.")
    vision: JointViT
    text: Words

    def add_decoder(self, recipe: Any, grid: Grid, target: Target, **options: Any) -> None:
        """Create the decoder of pixels and its loss, if the recipe has masks and `mvm`.

        Args:
            grid, options: of `MaeDecoder`, as far as they differ between models.
            target: of `MaskedPatchLoss`.
        """
        r = recipe
        if not (r.mvm > 0 and r.mask_ratio > 0):
            return
        self.decoder = MaeDecoder(
            grid, r.patch_size, r.width, tubelet_size=r.tubelet_size, dim=r.decoder_width,
            depth=r.decoder_depth, num_heads=r.decoder_heads, backend=r.backend, **options,
        )  # fmt: skip
        self.pixels = MaskedPatchLoss(
            r.patch_size, r.tubelet_size, target=target, mean=r.mean, std=r.std, backend=r.backend
        )

    @abstractmethod
    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The embedded visible patches, [B, N, C]: the encoder needs the words beside them."""

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """The embedded words, [B, L, C]. See `vidl.nn.Words`."""
        return self.text(ids, attention_mask, words=words)

    def together(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None,
        words: int | None,
    ) -> tuple[Merged, Tensor]:
        """Encode S captions, [S, L, C], beside the clip of each; arguments are those of `join`.

        Returns:
            The rows of clips and words, and the encoded rows.
        """
        clips = clips if partner is None else clips[partner]
        merged = Merged(clips, Captions(text, attention_mask, words))
        return merged, self.vision(merged.rows(clips, text), merged.joint())

    def described(self, clips: Tensor) -> Tensor:
        """Clips encoded without words, [B, N, C]: the rows that a decoder of words attends to."""
        return self.vision(super().described(clips))

    @abstractmethod
    def pool(self, merged: Merged, x: Tensor) -> Tensor:
        """One vector for each pair, [S, C], from the encoded rows."""

    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Captions encoded beside clips, and a vector for each pair; see `vidl.models.Joins`."""
        self.check_pairs(clips, text, attention_mask, partner)
        merged, x = self.together(clips, text, attention_mask, partner, words)
        return Joint(self.pool(merged, x), merged.split(x)[1])
