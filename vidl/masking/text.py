"""Masks of captions for masked language modelling (MLM).

Drawn from (seed, step, sample, position), so they depend neither on the padding of a batch nor on
its split over ranks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, check_dtype, check_tensors, finite
from vidl.masking.draws import uniform

Replace = Literal["bert", "mask"]

# Streams of `uniform` beside the caller's stream: which words are masked, what replaces each, and
# which random word.
HIDDEN, REPLACED, RANDOM = 1 << 58, 2 << 58, 3 << 58
IGNORED = -100  # label of a word that is not predicted: the default of F.cross_entropy


@dataclass(frozen=True)
class Vocabulary:
    """The properties of a tokenizer that masks depend on; the defaults are bert-base-uncased's.

    Attributes:
        size: number of tokens.
        mask: id of [MASK].
        special: ids that are never masked: [PAD], [UNK], [CLS], [SEP], [MASK].

    Raises:
        TypeError, ValueError: a number is not an int, or is out of range.
    """

    size: int = 30522
    mask: int = 103
    special: tuple[int, ...] = (0, 100, 101, 102, 103)

    def __post_init__(self) -> None:
        check_count("size", self.size, 1)
        check_count("mask", self.mask)
        if self.mask >= self.size:
            raise ValueError(f"need mask in [0, {self.size}), got {self.mask}")
        if not isinstance(self.special, (tuple, list)):
            raise TypeError(f"need special as a tuple of ids, got {self.special!r}")
        for special in self.special:
            check_count("special", special)


UNCASED = Vocabulary()


@dataclass(frozen=True, eq=False)
class MaskedWords:
    """A batch of captions with masked words.

    Attributes:
        ids: [B, L] int64, the captions with masked words replaced.
        hidden: [B, L] bool, the masked words ("bert" leaves a tenth of them unchanged).
        positions: [M] int64, flat indices of the masked words; for `Bert.predict_words`.
        labels: [M] int64, the original words; -100 where fewer than M words are masked.
    """

    ids: Tensor
    hidden: Tensor
    positions: Tensor
    labels: Tensor


def mask_words(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    ids: Tensor,
    attention_mask: Tensor,
    mask_ratio: float,
    *,
    replace: Replace = "bert",
    word_starts: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    most: int | None = None,
    stream: int = 0,
) -> MaskedWords:
    """Mask each word independently with probability `mask_ratio`.

    "bert" replaces 80 % of the masked words by [MASK] and 10 % by a random word, and leaves the
    rest unchanged; "mask" replaces all by [MASK], as MAC and SimVTP do. Padding and special tokens
    are never masked. No host synchronisation. Sources: BERT, arXiv 1810.04805, 3.1; whole words:
    google-research/bert, README of May 31st, 2019.

    Args:
        seed, step, samples: as in `vidl.masking.uniform`; samples [B] int64.
        ids: [B, L] int64.
        attention_mask: [B, L], nonzero where there is a word.
        mask_ratio: in [0, 1].
        replace: "bert" or "mask".
        word_starts: [B, L] bool, true at the first piece of each word: all pieces of a word are
            masked together. Use `~continuations(words)[ids]`. None: pieces are independent.
        vocabulary: default: bert-base-uncased.
        most: number of positions and labels returned for the whole batch, M; default
            `most_hidden(B * L, mask_ratio)`. If more words are masked, the last ones are masked but
            not predicted.
        stream: different streams give independent masks of the same samples.

    Raises:
        TypeError: `ids` is not int64.
        ValueError: a shape, a number or an option is wrong.
    """
    vocabulary = UNCASED if vocabulary is None else vocabulary
    _check(samples, ids, attention_mask, mask_ratio, replace, word_starts, vocabulary)
    check_count("stream", stream)
    if most is not None:
        check_count("most", most)
    L = ids.shape[1]

    def draw(use: int) -> Tensor:
        return uniform(seed, step, samples, L, stream=stream | use)

    word = attention_mask != 0
    for special in vocabulary.special:
        word = word & (ids != special)
    chosen = draw(HIDDEN)
    if word_starts is not None:
        # Each piece uses the random number of the first piece of its word.
        place = torch.arange(L, device=ids.device)
        chosen = chosen.gather(1, torch.where(word_starts, place, 0).cummax(1).values)
    hidden = word & (chosen < mask_ratio)

    replaced = torch.where(hidden, vocabulary.mask, ids)
    if replace == "bert":
        fate = draw(REPLACED)
        other = (draw(RANDOM).double() * vocabulary.size).long()
        replaced = torch.where(hidden & (fate >= 0.8), other, replaced)
        replaced = torch.where(fate >= 0.9, ids, replaced)

    most = most_hidden(ids.numel(), mask_ratio) if most is None else most
    # Masked words first, in order.
    positions = torch.argsort((~hidden).flatten().byte(), stable=True)[:most]
    labels = torch.where(hidden, ids, IGNORED).flatten().index_select(0, positions)
    return MaskedWords(replaced, hidden, positions, labels)


def most_hidden(words: int, mask_ratio: float) -> int:
    """Upper bound of the number of masked words: 8 standard deviations above the mean.

        n p + 8 sqrt(n p (1 - p))

    It does not depend on the draw, so shapes are static. Ratios from 0.15 exceed it less than once
    in 10^10 batches; with whole words of three pieces each, once in 20,000.
    """
    check_count("words", words)
    _check_ratio(mask_ratio)
    spread = math.sqrt(words * mask_ratio * (1 - mask_ratio))
    return min(words, math.ceil(words * mask_ratio + 8 * spread))


def continuations(words: Sequence[str]) -> Tensor:
    """Which tokens of a WordPiece vocabulary continue a word: those that begin with "##".

    Args:
        words: the vocabulary in the order of its ids.

    Returns:
        [len(words)] bool.
    """
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise TypeError(f"need words as a list of str, got {type(words).__name__}")
    if not all(isinstance(word, str) for word in words):
        raise TypeError("need words as a list of str, got other types in it")
    return torch.tensor([word.startswith("##") for word in words], dtype=torch.bool)


def _check(
    samples: Tensor,
    ids: Tensor,
    attention_mask: Tensor,
    mask_ratio: float,
    replace: Replace,
    word_starts: Tensor | None,
    vocabulary: Vocabulary,
) -> None:
    tensors = dict(samples=samples, ids=ids, attention_mask=attention_mask)
    check_tensors(optional=("word_starts",), **tensors, word_starts=word_starts)
    check_dtype("ids", ids, torch.int64)
    if ids.ndim != 2 or attention_mask.shape != ids.shape:
        raise ValueError(
            "need ids and attention_mask [B, L], got "
            f"{tuple(ids.shape)} and {tuple(attention_mask.shape)}"
        )
    if samples.shape != ids.shape[:1]:
        raise ValueError(f"need samples [{ids.shape[0]}], got {tuple(samples.shape)}")
    if word_starts is not None and (
        word_starts.shape != ids.shape or word_starts.dtype != torch.bool
    ):
        raise ValueError(
            f"need word_starts {tuple(ids.shape)} in bool, got {tuple(word_starts.shape)} in "
            f"{word_starts.dtype}"
        )
    _check_ratio(mask_ratio)
    if replace not in ("bert", "mask"):
        raise ValueError(f"need replace 'bert' or 'mask', got {replace!r}")
    if not isinstance(vocabulary, Vocabulary):
        raise TypeError(f"need vocabulary as a Vocabulary, got {type(vocabulary).__name__}")


def _check_ratio(mask_ratio: float) -> None:
    if not 0 <= finite("mask_ratio", mask_ratio) <= 1:
        raise ValueError(f"need mask_ratio in [0, 1], got {mask_ratio}")
