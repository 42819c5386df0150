"""Open questions about clips: one of the answers that training knew, by the fusion encoder."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.masking import VisualMask
from vidl.models.smaug import Smaug

UNKNOWN = -1


class Answering(nn.Module):
    """A pre-trained model whose fusion encoder reads a question, and a classifier of answers.

        logits = Linear(GELU(Linear(CLS of the question fused with the clip)))

    Questions take the place of captions, answers are classes. The hidden layer is twice as wide as
    CLS, as ALPRO and VIOLET have it. Sources: ALPRO, arXiv 2112.09583, 4; VIOLET, arXiv 2111.12681.

    Args:
        model: pre-trained; what answering does not use (projections, heads, decoder) is frozen.
        answers: all that can be given; see `frequent_answers`.

    Raises:
        ValueError: the model has no fusion layers, or answers are missing or equal.
    """

    def __init__(self, model: Smaug, answers: Sequence[str]) -> None:
        super().__init__()
        if not isinstance(model, Smaug) or not model.recipe.fusion_layers:
            raise ValueError(
                f"need a model with fusion layers to answer, got {type(model).__name__}"
            )
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
            video, ids, attention_mask, samples, step, words: as the model has them.
            answers: [B] int64, of `numbers`; those that are unknown teach nothing. None: the first
                one, for a trial.
            clip_ids: not used.

        Returns:
            "loss" and "qa", the same float32 scalar.
        """
        if answers is None:
            answers = ids.new_zeros(ids.shape[0])
        clips = self.encode_clips(video, self.recipe.visual_mask(samples, step))
        text = self.encode_text(ids, attention_mask, words=words)
        logits = self.answer(clips, text, attention_mask, words=words)
        # Of a batch without any known answer this is 0, and so are its gradients.
        total = F.cross_entropy(logits.float(), answers, ignore_index=UNKNOWN, reduction="sum")
        loss = total / (answers != UNKNOWN).sum().clamp(min=1)
        return {"loss": loss, "qa": loss}

    @property
    def vision(self) -> Any:
        """The model's encoder of clips."""
        return self.model.vision

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """As the model does."""
        return self.model.encode_clips(video, mask)

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """As the model does, of questions."""
        return self.model.encode_text(ids, attention_mask, words=words)

    def answer(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of all answers to each question, [P, answers].

        Arguments are those of `Smaug.fuse`.
        """
        fused = self.model.fuse(clips, text, attention_mask, partner, words)
        return self.head(fused[:, 0])

    def numbers(self, answers: Iterable[str | None]) -> Tensor:
        """Which of the answers these are, [B] int64; -1: none."""
        return torch.tensor([self._numbers.get(each or "", UNKNOWN) for each in answers])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """As the model does."""
        with self.model.unpruned():
            yield


def frequent_answers(answers: Iterable[str | None], most: int) -> list[str]:
    """The most frequent answers of a training set, those of equal frequency by their letters.

    Args:
        answers: of all questions.
        most: how many; the field takes 1000 to 2000 of MSRVTT-QA and ActivityNet-QA.

    Raises:
        ValueError: there are none.
    """
    counts = Counter(answer for answer in answers if answer)
    if most < 1 or not counts:
        raise ValueError(f"need answers and most >= 1, got {len(counts)} answers and most={most}")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]
