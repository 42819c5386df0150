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
            answers: [B] int64, from `numbers`; unknown answers are ignored. None: the first answer
                for every question, for a trial run.
            clip_ids: not used.

        Returns:
            "loss" and "qa", the same float32 scalar.
        """
        self.model.check_batch(video, ids, attention_mask, samples, clip_ids)
        if answers is None:
            answers = ids.new_zeros(ids.shape[0])
        check_tensors(ids=ids, answers=answers)
        check_dtype("answers", answers, torch.int64)
        check_shape("answers", answers, ids.shape[0])
        mask = self.recipe.visual_mask(samples, step, video.shape[2])
        clips = self.encode_clips(video, mask)
        text = self.encode_text(ids, attention_mask, words=words)
        joint = self.model.join(clips, text, attention_mask, words=words)
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


class Answering(Answers):
    """A pre-trained model with a classifier of answers on its fusion encoder.

        logits = Linear(GELU(Linear(the pooled question and clip)))

    Questions replace captions, and answers are classes. The hidden layer is twice as wide as its
    input, as in ALPRO and VIOLET; VLC has a LayerNorm before GELU. Sources: ALPRO, arXiv
    2112.09583, 4; VIOLET, arXiv 2111.12681; VLC, arXiv 2205.09256.

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


def frequent_answers(answers: Iterable[str | None], most: int) -> list[str]:
    """The most frequent answers of a training set; ties are in alphabetical order.

    Args:
        answers: the answers to all questions.
        most: number of answers; published systems use 1000 to 2000 for MSRVTT-QA and
            ActivityNet-QA.

    Raises:
        ValueError: there are no answers, or most < 1.
    """
    check_count("most", most, 1)
    counts = Counter(answer for answer in _checked(answers) if answer)
    if not counts:
        raise ValueError("need answers, got none")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]


def _checked(answers: Iterable[str | None]) -> list[str | None]:
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        raise TypeError(f"need answers as a list of str or None, got {type(answers).__name__}")
    answers = list(answers)
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"need answers as a list of str or None, got {answer!r} in it")
    return answers
