"""BLEU, ROUGE-L and CIDEr-D against pycocoevalcap, sacrebleu, rouge-score and plain numbers."""

import math
import random

import pytest

from vidl.evaluation import bleu, cider_d, rouge_l
from vidl.evaluation.caption_metrics import words

WORDS = ["a", "red", "dog", "cat", "runs", "over", "the", "green", "grass", "and", "sings"]


def drawn(clips=40, seed=0):
    """Captions like their references, ragged, some equal, one empty, one of a single word."""
    rng = random.Random(seed)
    references = [
        [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(rng.randint(1, 4))]
        for _ in range(clips)
    ]
    captions = []
    for own in references:
        text = rng.choice(own).split()
        kept = [rng.choice(WORDS) if rng.random() < 0.25 else word for word in text]
        captions.append(" ".join(kept[: rng.randint(4, 12)]))
    captions[3], captions[4], captions[5] = "", "dog", references[5][0]
    return captions, references


def coco(scorer, captions, references):
    """A score of pycocoevalcap, which wants words that are separated by one space."""
    return scorer.compute_score(
        {number: own for number, own in enumerate(references)},
        {number: [text] for number, text in enumerate(captions)},
    )[0]


@pytest.mark.parametrize("seed", range(3))
def test_as_pycocoevalcap(seed):
    scorers = (
        pytest.importorskip("pycocoevalcap.bleu.bleu"),
        pytest.importorskip("pycocoevalcap.rouge.rouge"),
        pytest.importorskip("pycocoevalcap.cider.cider"),
    )
    captions, references = drawn(seed=seed)
    expected = coco(scorers[0].Bleu(4), captions, references)
    for n in range(1, 5):
        assert bleu(captions, references, n) == pytest.approx(expected[n - 1], rel=1e-6)
    expected = coco(scorers[1].Rouge(), captions, references)
    assert rouge_l(captions, references) == pytest.approx(expected, rel=1e-9)
    expected = coco(scorers[2].Cider(), captions, references)
    assert cider_d(captions, references) == pytest.approx(expected, rel=1e-9)
    assert 0.1 < bleu(captions, references) < 1 < cider_d(captions, references) < 10


def test_bleu_as_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    captions, references = drawn()
    most = max(map(len, references))
    columns = [[own[at] if at < len(own) else None for own in references] for at in range(most)]
    expected = sacrebleu.corpus_bleu(captions, columns, smooth_method="none", tokenize="none").score
    assert 100 * bleu(captions, references) == pytest.approx(expected, rel=1e-9)


def test_rouge_l_as_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    captions, references = drawn()
    first = [own[:1] for own in references]
    scores = [
        scorer.score(own, text)["rougeL"] for text, (own,) in zip(captions, first, strict=True)
    ]
    expected = sum(score.fmeasure for score in scores) / len(scores)
    assert rouge_l(captions, first, beta=1.0) == pytest.approx(expected, rel=1e-9)


def test_plain_numbers():
    captions = ["a red dog runs", "the cat"]
    references = [["a red dog sleeps now", "the red dog runs"], ["the cat"]]
    # 1-grams: a, red, dog, runs and the, cat; 2-grams: a red, red dog, dog runs and the cat;
    # 3-grams: a red dog, red dog runs; no 4-gram. The closest references have 4 and 2 words.
    assert bleu(captions, references, 3) == pytest.approx(1.0)
    assert bleu(captions, references) == 0
    # The first shares a, red, dog with a reference, and red, dog, runs with another one.
    F = 2.44 * (3 / 4) * (3 / 4) / (3 / 4 + 1.44 * 3 / 4)
    assert rouge_l(captions, references) == pytest.approx((F + 1) / 2)
    # Two clips, one n-gram each: all weights are log 2 and cancel.
    assert cider_d(["cat", "dog"], [["cat"], ["dog"]]) == pytest.approx(10 / 4)
    assert cider_d(["cat", "cat"], [["cat"], ["dog"]]) == pytest.approx(10 / 4 / 2)
    # "cat dog" has two unigrams of equal weight, of which one is in the reference, whose length
    # differs by one bigram.
    expected = 10 / 4 * (math.exp(-1 / 72) * math.sqrt(1 / 2) + 1) / 2
    assert cider_d(["cat dog", "ring"], [["cat"], ["ring"]]) == pytest.approx(expected)
    # A weight of zero: all clips have the word.
    assert cider_d(["cat", "cat"], [["cat"], ["cat"]]) == 0
    assert bleu(["a b c"], [["a b c d e"]], 1) == pytest.approx(math.exp(1 - 5 / 3))


def test_words_are_letters_and_digits():
    assert " ".join(words("A man's red_dog, 3 rings; Ünder...")) == "a man s red dog 3 rings ünder"
    same = ["A RED dog!"], [["a red dog"]]
    assert bleu(*same, 3) == rouge_l(*same) == pytest.approx(1)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d])
def test_arguments(metric):
    for captions, references, complaint in (
        ([], [], "need captions, and references of each, got 0 and 0"),
        (["a"], [["a"], ["b"]], "need captions, and references of each, got 1 and 2"),
        (["a"], [[]], "need references of every caption, got none of caption 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            metric(captions, references)
    for captions, references, complaint in (
        ("a", [["a"]], "need captions as a list, got str"),
        (["a"], ["a"], "need references of str, got 'a'"),
        ([1], [["a"]], "need captions of str, got"),
        (["a"], [[None]], "need references of str, got"),
    ):
        with pytest.raises(TypeError, match=complaint):
            metric(captions, references)
    for name in {bleu: ["n"], rouge_l: ["beta"], cider_d: ["sigma"]}[metric]:
        with pytest.raises(ValueError, match=f"need {name} >"):
            metric(["a"], [["a"]], **{name: 0})
