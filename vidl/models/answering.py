"""Open-ended question answering: a classifier of known answers on the fusion encoder."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.arguments import check_count, check_dtype, check_shape, check_tensors
from vidl.models.abilities import Joint
from vidl.models.finetuned import FineTuned, classifier, prepare_to_join
from vidl.models.vqa import check_answers, normalised, soft_scores

UNKNOWN = -1


class Answers(FineTuned, ABC):
    """A pre-trained model that answers questions: what its two forms share.

    Questions replace captions. A subclass adds the layers that give an answer, `answer` and `loss`.

    Args:
        model: pre-trained, with the ability `Joins`; the parts that answering does not use
            (projections, heads, decoders) are frozen.
        answers: the possible answers; see `frequent_answers`.

    Raises:
        ValueError: the model cannot fuse, or the answers are empty or not distinct.
    """

    def __init__(self, model: Any, answers: Sequence[str]) -> None:
        prepare_to_join(model, to="to answer")
        super().__init__(model)
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise TypeError(f"need answers as a list of str, got {type(answers).__name__}")
        if not all(isinstance(answer, str) for answer in answers):
            raise TypeError(f"need answers as a list of str, got {list(answers)[:5]}")
        if not answers or len(set(answers)) < len(answers):
            raise ValueError(f"need answers that differ, got {len(answers)}: {list(answers)[:5]}")
        self.answers = list(answers)
        self._numbers = {answer: number for number, answer in enumerate(answers)}
        self._normalised: dict[str, int] = {}
        for number, answer in enumerate(answers):
            self._normalised.setdefault(normalised(answer), number)

    @abstractmethod
    def answer(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The scores of all answers to each question, [S, answers].

        Args:
            clips: tokens of B clips, from `encode_clips`.
            text, attention_mask: tokens of questions, [S, L, C] from `encode_text`, and [S, L].
            partner: the clip of each question, [S] int64; None: question b has clip b (S = B).
            words: an upper bound of the words in the questions; see `vidl.nn.Bert`.
        """

    @abstractmethod
    def loss(
        self, joint: Joint, attention_mask: Tensor, answers: Tensor, words: int | None = None
    ) -> Tensor:
        """The loss of each question, [B] float32; that of a question without an answer is unused.

        Args:
            joint: the questions fused with their clips.
            attention_mask: [B, L], nonzero at words.
            answers: numbers of the right answers, [B] int64, all known.
            words: an upper bound of the words in the questions.
        """

    @abstractmethod
    def soft_loss(
        self, joint: Joint, attention_mask: Tensor, targets: Tensor, words: int | None = None
    ) -> Tensor:
        """The loss of each question that several people answered, [B] float32.

        Args:
            targets: weights of all answers, [B, answers] float32, from `targets`; that of a
                question whose weights are all 0 is unused.
            joint, attention_mask, words: see `loss`.
        """

    @abstractmethod
    def weigh(self, answers: Sequence[str]) -> dict[str, float]:
        """The weights of the answers of several people, by their normalised texts."""

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        step: int | Tensor = 0,
        *,
        answers: Tensor | None = None,
        clip_ids: Tensor | None = None,
        words: int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch of questions.

        Args:
            video, ids, attention_mask, samples, step, words: see `System.forward`.
            answers: [B] int64, from `numbers`, or weights of all answers, [B, answers] floating
                point, from `targets`; questions without a known answer are ignored. None: the first
                answer for every question, for a trial run.
            clip_ids: not used.

        Returns:
            "loss" and "qa", the same float32 scalar.
        """
        self.model.check_batch(video, ids, attention_mask, samples, clip_ids)
        if answers is None:
            answers = ids.new_zeros(ids.shape[0])
        check_tensors(ids=ids, answers=answers)
        soft = answers.ndim == 2 and answers.is_floating_point()
        if soft:
            check_shape("answers", answers, ids.shape[0], len(self.answers))
        else:
            check_dtype("answers", answers, torch.int64)
            check_shape("answers", answers, ids.shape[0])
        mask = self.recipe.visual_mask(samples, step, video.shape[2])
        clips = self.encode_clips(video, mask)
        text = self.encode_text(ids, attention_mask, words=words)
        joint = self.model.join(clips, text, attention_mask, words=words)
        if soft:
            known = (answers > 0).any(1)
            losses = self.soft_loss(joint, attention_mask, answers.float(), words)
        else:
            known = answers != UNKNOWN
            losses = self.loss(joint, attention_mask, answers.where(known, 0), words)
        # If no answer of the batch is known, the loss and its gradients are 0.
        loss = losses.where(known, 0).sum() / known.sum().clamp(min=1)
        return {"loss": loss, "qa": loss}

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """See `Encodes.encode_text`; the text is a question."""
        return self.model.encode_text(ids, attention_mask, words=words)

    def numbers(self, answers: Iterable[str | None]) -> Tensor:
        """The numbers of these answers, [B] int64; -1: unknown."""
        answers = _checked(answers)
        return torch.tensor([self._numbers.get(answer or "", UNKNOWN) for answer in answers])

    def targets(self, answers: Iterable[str | Sequence[str] | None]) -> Tensor:
        """The weights of all answers to questions, [B, answers] float32 in [0, 1].

        Args:
            answers: the answer to each question, which has the weight 1, or the answers of several
                people, which `weigh` weighs; those are compared without case, punctuation and
                articles (`vidl.models.vqa.normalised`). None: no answer.
        """
        answers = _checked(answers, several=True)
        targets = torch.zeros(len(answers), len(self.answers))
        for own, given in zip(targets, answers, strict=True):
            for number, weight in self._known(given).items():
                own[number] = weight
        return targets

    def knows(self, answers: str | Sequence[str] | None) -> bool:
        """Whether this answer, or that of one of several people, is among the answers."""
        return any(self._known(given) for given in _checked([answers], several=True))

    def _known(self, answer: Any) -> dict[int, float]:
        """The weights of the known ones among the answers to a question, by their numbers."""
        if isinstance(answer, str) or answer is None:
            number = self._numbers.get(answer or "", UNKNOWN)
            return {} if number == UNKNOWN else {number: 1.0}
        numbers = self._normalised
        return {numbers[text]: x for text, x in self.weigh(answer).items() if text in numbers}


class Answering(Answers):
    """A pre-trained model with a classifier of answers on its fusion encoder.

        logits = Linear(GELU(Linear(the pooled question and clip)))

    Questions replace captions, and answers are classes. The hidden layer is twice as wide as its
    input, as in ALPRO and VIOLET; VLC has a LayerNorm before GELU. With one answer a question the
    loss is the cross-entropy. With those of several people it is the binary cross-entropy of every
    answer with its accuracy in VQA, summed over answers, as in UNITER and ViLT. Sources: ALPRO,
    arXiv 2112.09583, 4; VIOLET, arXiv 2111.12681; VLC, arXiv 2205.09256; UNITER, arXiv 1909.11740;
    ViLT, arXiv 2102.03334.

    Args:
        model, answers: see `Answers`; the answers are the classes.

    Raises:
        ValueError: see `Answers`.
    """

    def __init__(self, model: Any, answers: Sequence[str]) -> None:
        super().__init__(model, answers)
        width = model.joined_width
        self.head = classifier(width, 2 * width, len(answers), normed=model.normed_head)

    def answer(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of all answers to each question, [S, answers]; see `Answers.answer`."""
        pooled = self.model.join(clips, text, attention_mask, partner, words).pooled
        return self.model.over_views(self.head(pooled))

    def loss(
        self, joint: Joint, attention_mask: Tensor, answers: Tensor, words: int | None = None
    ) -> Tensor:
        """The cross-entropy of each question, [B]; see `Answers.loss`."""
        logits = self.model.over_views(self.head(joint.pooled).float())
        return F.cross_entropy(logits, answers, reduction="none")

    def soft_loss(
        self, joint: Joint, attention_mask: Tensor, targets: Tensor, words: int | None = None
    ) -> Tensor:
        """The binary cross-entropies of each question, summed over answers, [B] float32."""
        logits = self.model.over_views(self.head(joint.pooled).float())
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)

    def weigh(self, answers: Sequence[str]) -> dict[str, float]:
        """The accuracy of each answer in VQA; see `vidl.models.vqa.vqa_accuracy`."""
        return soft_scores(answers)


def frequent_answers(answers: Iterable[str | Sequence[str] | None], most: int) -> list[str]:
    """The most frequent answers of a training set; ties are in alphabetical order.

    Args:
        answers: the answer to each question, or those of several people, each of which counts, as
            `vidl.models.vqa.normalised`.
        most: number of answers; published systems use 1000 to 2000 for MSRVTT-QA and
            ActivityNet-QA.

    Raises:
        ValueError: there are no answers, or most < 1.
    """
    check_count("most", most, 1)
    counts: Counter[str] = Counter()
    for answer in _checked(answers, several=True):
        counts.update([answer] if isinstance(answer, str) else map(normalised, answer or ()))
    counts.pop("", None)
    if not counts:
        raise ValueError("need answers, got none")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]


def _checked(answers: Iterable[Any], *, several: bool = False) -> list[Any]:
    """The answers as a list; with `several`, an answer may be a list of those of people."""
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        raise TypeError(f"need answers as a list of str or None, got {type(answers).__name__}")
    answers = list(answers)
    for answer in answers:
        if several and isinstance(answer, (list, tuple)):
            check_answers(answer)
        elif answer is not None and not isinstance(answer, str):
            raise TypeError(f"need answers as a list of str or None, got {answer!r} in it")
    return answers
