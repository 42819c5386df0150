"""Accuracy of multiple choice and of open-ended question answering."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidl.data.dataset import ClipSet
from vidl.data.formats import Row
from vidl.evaluation.encoding import (
    Gallery,
    Options,
    encode_texts,
    encoded_clips,
    evaluating,
    of_all_ranks,
)
from vidl.evaluation.ranks import ranks
from vidl.evaluation.retrieval import (
    broken_lines,
    check_compares,
    check_matches,
    match_scores,
    matches,
)
from vidl.models.abilities import Aligns, need
from vidl.models.answering import Answers
from vidl.models.vqa import vqa_accuracy


@dataclass(frozen=True)
class Accuracy:
    """The result of `multiple_choice`, `question_answering` and `pairs_of_clips`.

    Attributes:
        questions: number of questions.
        right: number of correct answers; an answer to a question that several people answered
            counts as its accuracy in VQA.
        answerable: number of questions whose answer, or one of several, is among the model's.
        broken: clips that could not be read, and why; questions about them count as wrong.
        soft: number of questions that several people answered.
    """

    questions: int
    right: float
    answerable: int
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    soft: int = 0

    @property
    def accuracy(self) -> float:
        """Correct answers in percent of all questions."""
        return 100 * self.right / self.questions

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps({"accuracy": self.accuracy} | dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        right = f"{self.right:.1f}" if self.soft else f"{self.right}"
        lines = [f"{self.questions} questions, {right} correct: {self.accuracy:.1f} %"]
        if self.soft:
            lines.append(f"{self.soft} have answers of several people: their accuracy is VQA's")
        if self.answerable < self.questions:
            unknown = self.questions - self.answerable
            lines.append(f"{unknown} have an answer outside the model's answer set")
        return "\n".join(lines + broken_lines(self.broken))


def multiple_choice(
    model: Any,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
    *,
    fused: bool | None = None,
) -> Accuracy:
    """Multiple choice: choose the option with the highest score; a tie counts as wrong.

    If a row has a question, it is put before each option. Runs over all ranks. Source: Singularity,
    arXiv 2206.03428, 4.1, which scores with the matching head.

    Args:
        model: see `retrieval`.
        dataset: rows with `options` and `correct`.
        options: batches, masks, pruning.
        fused: score with the fusion encoder (True) or with the similarity of features (False);
            None: with the fusion encoder if the model was trained to match.

    Raises:
        ValueError: a row has no options, or the model was not trained to match, or has no features,
            as `fused` needs it.
    """
    if fused is None:
        check_compares(model, "for multiple choice")
    elif fused:
        check_matches(model, "for fused=True")
    by_match = matches(model) if fused is None else fused

    if not by_match:
        need(model, Aligns, to="for multiple choice")

    def right(clips: Tensor, rows: Sequence[Row], partner: Tensor, gallery: Gallery) -> Tensor:
        count = torch.tensor([len(row.options) for row in rows])
        prompts = [f"{row.question or ''} {text}".strip() for row in rows for text in row.options]
        pairs = list(zip(partner.repeat_interleave(count).tolist(), prompts, strict=True))
        # Equal options are scored once, so that rounding cannot break a tie.
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        texts = encode_texts(model, gallery, [text for _, text in numbers])
        clip_of = torch.tensor([clip for clip, _ in numbers])
        if by_match:
            scores = match_scores(model, clips, texts, clip_of).cpu()
        else:
            scores = model.similarity(model.clip_features(clips), texts.features).cpu()
            scores = scores[clip_of, torch.arange(len(numbers))]
        scores = scores[torch.tensor([numbers[pair] for pair in pairs])]
        of_row = torch.arange(len(rows))[:, None]
        own = torch.arange(len(rows)).repeat_interleave(count) == of_row  # [rows, options of all]
        correct = torch.zeros_like(own)
        first = count.cumsum(0) - count
        correct[of_row[:, 0], first + torch.tensor([row.correct for row in rows])] = True
        return ranks(scores.expand(len(rows), -1).masked_fill(~own, -math.inf), correct) == 1

    def check(row: Row) -> bool:
        if not row.options or row.correct is None:
            raise ValueError(f"need options and the correct one of each row, got {row}")
        return True

    return answer_all(model, dataset, options, right, check)


def question_answering(
    model: Answers,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
) -> Accuracy:
    """Open-ended question answering with the known answers of a model.

    The answer with the highest score is given, the first of those with equal scores. It is correct
    if it equals the answer of the row exactly. In a row with the answers of several people it
    counts as its `vidl.models.vqa.vqa_accuracy`. Runs over all ranks.

    Args:
        model: `vidl.models.Answering` or `vidl.models.Ranking`, fine-tuned; otherwise see
            `retrieval`.
        dataset: rows with a question and an answer.
        options: batches, masks, pruning.

    Raises:
        ValueError: a row has no question or no answer.
    """

    def right(clips: Tensor, rows: Sequence[Row], partner: Tensor, gallery: Gallery) -> Tensor:
        texts = encode_texts(model.model, gallery, [row.question or "" for row in rows])
        partner = partner.to(clips.device)
        scores = model.answer(clips, texts.tokens, texts.attention_mask, partner)
        numbers = scores.argmax(1).cpu()
        exact = numbers == model.numbers(row.answer for row in rows)
        if not any(row.answers for row in rows):
            return exact
        accuracies = exact.double()
        for place, row in enumerate(rows):
            if row.answers:
                accuracies[place] = vqa_accuracy(model.answers[int(numbers[place])], row.answers)
        return accuracies

    soft = 0

    def check(row: Row) -> bool:
        nonlocal soft
        if not row.question or row.given is None:
            raise ValueError(f"need a question and an answer in each row, got none for {row.media}")
        soft += bool(row.answers)
        return model.knows(row.given)

    return dataclasses.replace(answer_all(model, dataset, options, right, check), soft=soft)


def answer_all(
    model: Any,
    dataset: ClipSet,
    options: Options,
    right: Callable[[Tensor, Sequence[Row], Tensor, Gallery], Tensor],
    check: Callable[[Row], bool],
    *,
    pairs: bool = False,
) -> Accuracy:
    """Encode each clip once and answer all questions about it.

    Args:
        model, dataset, options: see above.
        right: from the tokens of some clips, some rows, the clip of each row and the gallery to a
            tensor on the CPU: which rows are answered correctly (bool), or how well, from 0 to 1.
        check: whether the model can give the row's answer; raises if the row is not a question.
        pairs: whether the rows have two clips.
    """
    gallery = Gallery(dataset, pairs=pairs)
    answerable = sum(check(dataset.row(index)) for index in range(len(dataset)))
    broken: dict[str, str] = {}
    count: float = 0
    with evaluating(model, options):
        for numbers, clips in encoded_clips(model, gallery, options, broken):
            own = [gallery.rows[number] for number in numbers]
            rows = [dataset.row(index) for indices in own for index in indices]
            partner = torch.arange(len(own)).repeat_interleave(torch.tensor([*map(len, own)]))
            for at in range(0, len(rows), options.text_batch):
                part = slice(at, at + options.text_batch)
                count += right(clips, rows[part], partner[part], gallery).sum().item()
    broken = {name: why for part in of_all_ranks(broken) for name, why in part.items()}
    return Accuracy(len(dataset), sum(of_all_ranks(count)), answerable, broken)
