"""Open-ended question answering: a classifier of known answers on the fusion encoder."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_dtype, check_shape, check_tensors
from vidl.masking import VisualMask
from vidl.models.smaug import Smaug

UNKNOWN = -1


class Answering(nn.Module):
    """A pre-trained model with a classifier of answers on its fusion encoder.

        logits = Linear(GELU(Linear(CLS of the question fused with the clip)))

    Questions replace captions, and answers are classes. The hidden layer is twice as wide as CLS,
    as in ALPRO and VIOLET. Sources: ALPRO, arXiv 2112.09583, 4; VIOLET, arXiv 2111.12681.

    Args:
        model: pre-trained; the parts that answering does not use (projections, heads, decoder) are
            frozen.
        answers: the classes; see `frequent_answers`.

    Raises:
        ValueError: the model has no fusion layers, or the answers are empty or not distinct.
    """

    def __init__(self, model: Smaug, answers: Sequence[str]) -> None:
        super().__init__()
        if not isinstance(model, Smaug) or not model.recipe.fusion_layers:
            raise ValueError(
                f"need a model with fusion layers to answer, got {type(model).__name__}"
            )
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise TypeError(f"need answers as a list of str, got {type(answers).__name__}")
        if not all(isinstance(answer, str) for answer in answers):
            raise TypeError(f"need answers as a list of str, got {list(answers)[:5]}")
        if not answers or len(set(answers)) < len(answers):
            raise ValueError(f"need answers that differ, got {len(answers)}: {list(answers)[:5]}")
        self.model, self.recipe, self.answers = model, model.recipe, list(answers)
        self._numbers = {answer: number for number, answer in enumerate(answers)}
        used = (model.vision, model.text.embeddings, model.text.encoder, model.selector)
        learning = {id(p) for part in used for p in part.parameters() if p.requires_grad}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        model.time.requires_grad_(True)
        width = model.recipe.text_width
        hidden, last = nn.Linear(width, 2 * width), nn.Linear(2 * width, len(answers))
        for layer in (hidden, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(hidden, nn.GELU(), last)

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
            video, ids, attention_mask, samples, step, words: see `TwoTowers`.
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
        clips = self.encode_clips(video, self.recipe.visual_mask(samples, step))
        text = self.encode_text(ids, attention_mask, words=words)
        logits = self.answer(clips, text, attention_mask, words=words)
        # If no answer of the batch is known, the loss and its gradients are 0.
        total = F.cross_entropy(logits.float(), answers, ignore_index=UNKNOWN, reduction="sum")
        loss = total / (answers != UNKNOWN).sum().clamp(min=1)
        return {"loss": loss, "qa": loss}

    @property
    def vision(self) -> Any:
        """The clip encoder of the model."""
        return self.model.vision

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """See `TwoTowers.encode_clips`."""
        return self.model.encode_clips(video, mask)

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """See `TwoTowers.encode_text`; the text is a question."""
        return self.model.encode_text(ids, attention_mask, words=words)

    def answer(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of all answers to each question, [S, answers].

        Arguments are those of `Smaug.fuse`.
        """
        fused = self.model.fuse(clips, text, attention_mask, partner, words)
        return self.head(fused[:, 0])

    def numbers(self, answers: Iterable[str | None]) -> Tensor:
        """The classes of these answers, [B] int64; -1: unknown."""
        answers = _checked(answers)
        return torch.tensor([self._numbers.get(answer or "", UNKNOWN) for answer in answers])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """See `TwoTowers.unpruned`."""
        with self.model.unpruned():
            yield


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
