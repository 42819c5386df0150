"""Answers of several people to a question: the accuracy of VQA, and what to train for."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# So many people make an answer right, if at least one more was asked.
AGREEING = 3
ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
# Contractions that are no other word without their apostrophe; "its", "were" or "ill" are.
_CONTRACTIONS = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't "
    "needn't shouldn't wasn't weren't won't wouldn't i'm i've you're you've you'll you'd he's "
    "they're they've they'll they'd we've she's it'll it'd that's that'll there's there're here's "
    "what's what're what'll where's who's who'll who've how's when's why's could've should've "
    "would've might've must've somebody's someone's something's everyone's y'all o'clock ma'am"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
# Signs that belong to an answer, as in 3:30, girl's, 50%, #1 or 4*4; a period may be a decimal.
_KEPT = frozenset(":'%#&*.")
_SYMBOLS = frozenset("+=<>|~^`")
_PERIOD = re.compile(r"\.(?!\d)|(?<=[^\W\d_])\.")
_COMMA = re.compile(r"(?<=\d),(?=\d)")


@functools.lru_cache(maxsize=2**16)
def normalised(answer: str) -> str:
    """An answer as VQA compares it.

    Lower case; without periods that are no decimal points, without commas between digits, and with
    a space for other punctuation but apostrophes, colons and % # & *; number words up to twenty,
    and "none", as digits; without articles; with the apostrophes of contractions. Words are
    separated by one space. Source: VQA, arXiv 1505.00468, and the page "Evaluation" of
    visualqa.org.
    """
    text = _COMMA.sub("", _PERIOD.sub("", answer.lower().replace("\u2019", "'")))
    text = "".join(" " if _separates(sign) else sign for sign in text)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _separates(sign: str) -> bool:
    if sign in _KEPT:
        return False
    return sign in _SYMBOLS or unicodedata.category(sign).startswith("P")


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The accuracy of VQA of an answer to a question that several people have answered.

    It is the mean, over the people, of min(1, matches / 3), where matches are the others who gave
    this answer. With ten people that is 0.3, 0.6, 0.9 and 1 for one to four of them. Where fewer
    than four were asked, no answer could reach 1: there, the share of people who gave it. Answers
    are compared as `normalised`. Source: VQA, arXiv 1505.00468, and the page "Evaluation" of
    visualqa.org.

    Args:
        answer: the answer.
        answers: those of the people, one each.

    Returns:
        From 0 to 1.

    Raises:
        TypeError, ValueError: an answer is no text, or there are none.
    """
    if not isinstance(answer, str):
        raise TypeError(f"need answer as str, got {answer!r:.80}")
    return soft_scores(answers).get(normalised(answer), 0.0)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """The accuracy of VQA of every answer that was given, by its normalised text."""
    counts = _counted(answers)
    asked = sum(counts.values())
    return {text: _score(count, asked) for text, count in counts.items()}


def shares(answers: Sequence[str]) -> dict[str, float]:
    """The share of people who gave an answer, by its normalised text."""
    counts = _counted(answers)
    asked = sum(counts.values())
    return {text: count / asked for text, count in counts.items()}


def _score(count: int, asked: int) -> float:
    """The score of an answer that `count` of so many people gave."""
    if asked <= AGREEING:
        return count / asked
    among_others = count * min(count - 1, AGREEING) + (asked - count) * min(count, AGREEING)
    return among_others / (AGREEING * asked)


def _counted(answers: Sequence[str]) -> Counter[str]:
    check_answers(answers)
    return Counter(map(normalised, answers))


def check_answers(answers: Sequence[str]) -> None:
    """Raise unless these are the answers of one or more people."""
    listed = isinstance(answers, Sequence) and not isinstance(answers, (str, bytes))
    if not listed or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"need answers as a list of str, got {answers!r:.80}")
    if not answers:
        raise ValueError("need answers of at least one person, got none")
