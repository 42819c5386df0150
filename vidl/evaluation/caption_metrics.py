"""BLEU, ROUGE-L and CIDEr-D of captions, as the COCO caption evaluation defines them.

Why these are our own: the code that papers use, pycocoevalcap, was last released in 2020, brings
100 MB of Java programs, and tokenizes with one of them. sacrebleu has BLEU, rouge-score has ROUGE-L
with another balance of precision and recall, and no maintained library has CIDEr-D without Java or
models to download. Three libraries with three tokenizers would replace the few formulas below; so
they are oracles in the tests instead. METEOR and SPICE need Java, and are not offered.

The tokenizer is ours: lower case, letters and digits. The Penn Treebank tokenizer of the COCO
evaluation also drops punctuation but splits contractions in another place ("don't"), so scores of
real captions can differ from published ones in the last digit.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

# The longest n-grams of BLEU and of CIDEr-D.
LONGEST = 4
Ngrams = Counter[tuple[str, ...]]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], n: int = LONGEST) -> float:
    """BLEU-n of a set of captions.

        BP * (p_1 p_2 ... p_n)^(1/n),  BP = min(1, exp(1 - references / captions))

    p_k is the share of the k-grams of all captions that occur in a reference of the same clip; a
    k-gram counts at most as often as in one reference. BP compares the words of all captions with
    those of the references that are closest in length, the shorter of two. There is no smoothing:
    without any common n-gram BLEU is 0. Source: Papineni et al., BLEU, ACL 2002.

    Args:
        captions: a caption for each clip.
        references: for each clip, its references.
        n: length of the longest n-grams.

    Returns:
        From 0 to 1.

    Raises:
        TypeError, ValueError: there are no captions, a clip has no reference, or n < 1.
    """
    own, others = _tokenized(captions, references)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"need n >= 1, got {n!r}")
    common, total, written, wanted = [0] * n, [0] * n, 0, 0
    for caption, texts in zip(own, others, strict=True):
        written += len(caption)
        wanted += min((abs(len(text) - len(caption)), len(text)) for text in texts)[1]
        for k in range(1, n + 1):
            most: Ngrams = Counter()
            for text in texts:
                most |= _ngrams(text, k)
            grams = _ngrams(caption, k)
            common[k - 1] += (grams & most).total()
            total[k - 1] += grams.total()
    if not all(common):
        return 0.0
    shares = (one / whole for one, whole in zip(common, total, strict=True))
    return min(1.0, math.exp(1 - wanted / written)) * math.prod(shares) ** (1 / n)


def rouge_l(
    captions: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2
) -> float:
    """The mean ROUGE-L of captions: an F-measure of the longest common subsequence.

        (1 + beta^2) P R / (R + beta^2 P)

    P and R are the longest common subsequence in proportion to the caption and to the reference,
    each the largest over the references of a clip. Source: Lin, ROUGE, ACL 2004 workshop; beta is
    that of the COCO caption evaluation, arXiv 1504.00325.

    Args:
        captions, references: see `bleu`.
        beta: weight of the recall.

    Returns:
        From 0 to 1.

    Raises:
        TypeError, ValueError: see `bleu`; or beta is not positive.
    """
    own, others = _tokenized(captions, references)
    if not isinstance(beta, (int, float)) or not beta > 0:
        raise ValueError(f"need beta > 0, got {beta!r}")
    total = 0.0
    for caption, texts in zip(own, others, strict=True):
        common = [_common(caption, text) for text in texts]
        if not any(common):
            continue
        precision = max(common) / len(caption)
        recall = max(c / len(text) for c, text in zip(common, texts, strict=True) if c)
        total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / len(own)


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0
) -> float:
    """The mean CIDEr-D of captions: how similar they are to references in rare n-grams.

        10 / references * sum_references mean_k exp(-(l - l')^2 / (2 sigma^2)) *
            min(g_k, g'_k) . g'_k / (|g_k| |g'_k|),  k = 1 to 4

    g_k are the counts of the k-grams of a caption times log(clips / clips with this k-gram in a
    reference), g'_k those of a reference, and l, l' the lengths of both. The weights depend on the
    whole evaluation set: of a single clip, or if all clips have equal references, CIDEr-D is 0.
    Source: Vedantam et al., CIDEr, arXiv 1411.5726.

    Args:
        captions, references: see `bleu`.
        sigma: how much lengths may differ.

    Returns:
        From 0 to 10.

    Raises:
        TypeError, ValueError: see `bleu`; or sigma is not positive.
    """
    own, others = _tokenized(captions, references)
    if not isinstance(sigma, (int, float)) or not sigma > 0:
        raise ValueError(f"need sigma > 0, got {sigma!r}")
    clips: Ngrams = Counter()
    for texts in others:
        clips.update({gram for text in texts for k in _lengths() for gram in _ngrams(text, k)})
    total = 0.0
    for caption, texts in zip(own, others, strict=True):
        vectors = _weighted(caption, clips, len(own))
        similar = 0.0
        for text in texts:
            # As in the COCO evaluation, lengths are numbers of bigrams.
            longer = max(len(caption) - 1, 0) - max(len(text) - 1, 0)
            pairs = zip(vectors, _weighted(text, clips, len(own)), strict=True)
            close = math.exp(-(longer**2) / (2 * sigma**2))
            similar += close * sum(_similarity(*pair) for pair in pairs) / LONGEST
        total += similar / len(texts)
    return 10 * total / len(own)


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of captions and references, after checking both."""
    for name, texts in (("captions", captions), ("references", references)):
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"need {name} as a list, got {type(texts).__name__}")
    for name, texts in (("captions", [captions]), ("references", references)):
        for own in texts:
            strings = isinstance(own, Sequence) and not isinstance(own, str)
            if not strings or not all(isinstance(text, str) for text in own):
                raise TypeError(f"need {name} of str, got {own!r:.80}")
    if not captions or len(captions) != len(references):
        raise ValueError(
            f"need captions, and references of each, got {len(captions)} and {len(references)}"
        )
    for number, own in enumerate(references):
        if not own:
            raise ValueError(f"need references of every caption, got none of caption {number}")
    return [words(text) for text in captions], [[words(text) for text in own] for own in references]


def words(text: str) -> list[str]:
    """The words of a text: lower case, letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def _lengths() -> range:
    return range(1, LONGEST + 1)


def _ngrams(text: list[str], n: int) -> Ngrams:
    return Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1))


def _common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        last = row
        row = [0]
        for at, own in enumerate(other):
            row.append(last[at] + 1 if own == word else max(last[at + 1], row[at]))
    return row[-1]


def _weighted(text: list[str], clips: Ngrams, count: int) -> list[dict[tuple[str, ...], float]]:
    """The weighted n-grams of a text, for each n."""
    return [
        {gram: n * math.log(count / max(1, clips[gram])) for gram, n in _ngrams(text, k).items()}
        for k in _lengths()
    ]


def _similarity(one: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """min(one, other) . other / (|one| |other|)."""
    norms = math.hypot(*one.values()) * math.hypot(*other.values())
    if not norms:
        return 0.0
    shared = one.keys() & other.keys()
    return math.fsum(min(one[gram], other[gram]) * other[gram] for gram in shared) / norms
