"""What a model can do with clips and captions; evaluation asks for abilities, not for classes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vidl.masking import VisualMask


class Encodes(Protocol):
    """Encodes clips and captions separately; a clip's tokens are enough for all that follows."""

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """Tokens of clips, [B, ...]."""

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """Tokens of captions, [B, L, C]."""


class Aligns(Encodes, Protocol):
    """Compares clips and captions by features of each."""

    def clip_features(self, clips: Tensor) -> Tensor:
        """Features of clips, [B, embed_dim] or [B, T, embed_dim], from their tokens."""

    def text_features(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Features of captions, [B, embed_dim], from their tokens."""

    def similarity(self, clips: Tensor, text: Tensor) -> Tensor:
        """Similarities of features, [S, B]."""


@dataclass(frozen=True, eq=False)
class Joint:
    """Captions fused with clips.

    Attributes:
        pooled: one vector for each pair, [S, joined_width]; for each pair and view, [S, views,
            joined_width], in a model with views (see `System.over_views`).
        text: the tokens of the captions, [S, L, C].
    """

    pooled: Tensor
    text: Tensor


class Joins(Encodes, Protocol):
    """Fuses captions with clips."""

    @property
    def joined_width(self) -> int:
        """Channels of `Joint.pooled`."""

    def join(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Joint:
        """Fuse S captions with the clip of each.

        Args:
            clips: tokens of B clips, from `encode_clips`.
            text, attention_mask: tokens of captions, [S, L, C] from `encode_text`, and [S, L].
            partner: the clip of each caption, [S] int64; None: caption b has clip b (S = B).
            words: an upper bound of the words in the captions; see `vidl.nn.Bert`.
        """


class Matches(Joins, Protocol):
    """Tells whether a caption describes a clip."""

    def match(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not match" and "matches", [S, 2]; arguments are those of `join`."""


class Describes(Encodes, Protocol):
    """Has rows of a clip to which a decoder of words can attend; see `vidl.models.Captioning`."""

    @property
    def described_width(self) -> int:
        """Channels of `described`."""

    def described(self, clips: Tensor) -> Tensor:
        """The rows of clips, [B, N, described_width], from their tokens."""


class Taught(Protocol):
    """Learns from a frozen model of its kind."""

    @property
    def taught(self) -> bool:
        """Whether it has a frozen model, or needs none."""

    def teach(
        self,
        weights: Mapping[str, Tensor],
        tokenizer: Callable[[Sequence[str], int], tuple[Tensor, Tensor]],
        captions: Iterable[str],
    ) -> None:
        """Make the frozen model from the weights of a run, and from captions of the data."""


VERBS: dict[type, str] = {
    Aligns: "compares features of clips and captions",
    Joins: "fuses captions with clips",
    Matches: "matches captions with clips",
    Describes: "gives a decoder of words the rows of a clip",
    Taught: "learns from a frozen model",
}


def can(model: Any, ability: type) -> bool:
    """Whether a model, or a class of models, has all methods of an ability."""
    if not isinstance(model, (type, nn.Module)):
        raise TypeError(f"need model as a module or its class, got {model!r}")
    if not isinstance(ability, type):
        raise TypeError(f"need ability as one of vidl.models, such as Joins, got {ability!r}")
    names = [n for n in dir(ability) if not n.startswith("_")]
    return all(hasattr(model, name) for name in names)


def need(model: Any, *abilities: type, to: str) -> None:
    """Raise unless a model has one of some abilities.

    Args:
        to: what the ability is needed for, e.g. "to re-rank".

    Raises:
        ValueError: names the models that have one of them.
    """
    if any(can(model, ability) for ability in abilities):
        return
    from vidl.models import MODELS

    able = [n for n, entry in MODELS.items() if any(can(entry.model, a) for a in abilities)]
    verbs = " or ".join(VERBS[ability] for ability in abilities)
    raise ValueError(
        f"need a model that {verbs} {to}: {', '.join(able)}; got {type(model).__name__}"
    )
