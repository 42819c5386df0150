"""Open-ended question answering: a decoder of words ranks known answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.arguments import check_count
from vidl.models.abilities import Joint
from vidl.models.answering import Answers
from vidl.models.vqa import shares
from vidl.nn import Captions, WordsDecoder

# Logits of words that are computed at once, at most: 512 MiB in float32.
LOGITS = 2**27


class Ranking(Answers):
    """A pre-trained model with a decoder of words that ranks answers.

        log p(answer) = sum over its words, and the end, of log p(word | words before it, rows)

    The decoder reads the rows of the question fused with its clip. The training loss is -log p of
    the right answer; with the answers of several people, the sum over distinct answers of -log p
    times the share of people who gave it, as in ALBEF. To answer a question, the `top` answers
    whose first word is the most probable are ranked by log p; ties are broken by the order of the
    answers. Answers whose words are equal, such as "Dog" and "dog" to a tokenizer that ignores
    case, have equal scores. The decoder starts with the weights of the text encoder, see
    `start_decoder`. Sources: ALBEF, arXiv 2107.07651, 3.4; Singularity, arXiv 2206.03428, with 3
    layers and `top` 128.

    Args:
        model, answers: see `Answers`.
        tokenizer: that of the questions: from texts and a number of tokens to ids and attention
            mask, [B, L] int64 both, with [CLS] before the words of a text and [SEP] after them, as
            `vidl.data.text.Tokenizer`.
        layers: layers of the decoder.
        top: number of answers that are ranked by all of their words.

    Raises:
        ValueError: see `Answers`; layers or top is less than 1, or the vocabulary of the tokenizer
            is larger than that of the model.
    """

    answer_ids: Tensor
    answer_mask: Tensor
    rows: Tensor

    def __init__(
        self,
        model: Any,
        answers: Sequence[str],
        tokenizer: Callable[[Sequence[str], int], tuple[Tensor, Tensor]],
        *,
        layers: int = 3,
        top: int = 128,
    ) -> None:
        super().__init__(model, answers)
        check_count("layers", layers, 1)
        check_count("top", top, 1)
        if not callable(tokenizer):
            raise TypeError(f"need a callable tokenizer, got {type(tokenizer).__name__}")
        r = self.recipe
        self.top = top
        self.decoder = WordsDecoder(
            r.vocabulary.size, r.text_width, layers, r.text_heads,
            max_positions=model.text.embeddings.max_positions, dropout=r.dropout, backend=r.backend,
        )  # fmt: skip
        self.start_decoder()
        ids, mask = tokenizer(self.answers, model.text.embeddings.max_positions)
        if int(ids.max()) >= r.vocabulary.size:
            raise ValueError(
                f"need a tokenizer of at most {r.vocabulary.size} tokens, the vocabulary of the "
                f"model, got token {int(ids.max())}"
            )
        longest = int(mask.sum(1).max())
        # Equal words are scored once, so that rounding cannot break a tie.
        numbers: dict[tuple[int, ...], int] = {}
        rows = [numbers.setdefault(tuple(row), len(numbers)) for row in ids.tolist()]
        first = torch.tensor([rows.index(number) for number in range(len(numbers))])
        for name, tensor in (
            ("answer_ids", ids[first, :longest]),  # [distinct answers, words]
            ("answer_mask", mask[first, :longest]),
            ("rows", torch.tensor(rows)),  # [answers]: where the words of each answer are
        ):
            self.register_buffer(name, tensor, persistent=False)

    def start_decoder(self) -> None:
        """Copy the weights of the model's `writer`; see `vidl.nn.WordsDecoder.start_from`."""
        self.decoder.start_from(self.model.writer)

    def answer(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """log p of the best answers to each question, -inf for the others, [S, answers] float32.

        Arguments are those of `Answers.answer`.
        """
        fused = self.model.join(clips, text, attention_mask, partner, words).text
        S, (distinct, L) = fused.shape[0], self.answer_ids.shape
        top = min(self.top, distinct)
        scores = fused.new_full((S, distinct), -torch.inf, dtype=torch.float32)
        step = max(1, LOGITS // (top * max(L - 1, 1) * self.recipe.vocabulary.size))
        for at in range(0, S, step):
            part = slice(at, at + step)
            rows, mask = fused[part], attention_mask[part]
            chosen = self._likely(rows, mask, top)  # [questions, top]
            questions = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(top)
            ranked = self._log_likelihood(rows, mask, chosen.flatten(), questions)
            scores[part] = scores[part].scatter(1, chosen, ranked.unflatten(0, (-1, top)))
        return scores[:, self.rows]

    def loss(
        self, joint: Joint, attention_mask: Tensor, answers: Tensor, words: int | None = None
    ) -> Tensor:
        """-log p of the right answer to each question, [B]; see `Answers.loss`."""
        questions = torch.arange(joint.text.shape[0], device=joint.text.device)
        return -self._log_likelihood(
            joint.text, attention_mask, self.rows[answers], questions, words
        )

    def soft_loss(
        self, joint: Joint, attention_mask: Tensor, targets: Tensor, words: int | None = None
    ) -> Tensor:
        """The weighted sum of -log p of the answers to each question, [B]; see `Answers.soft_loss`.

        The number of answers is read on the host.
        """
        used = targets > 0
        used[:, 0] |= ~used.any(1)  # with its weight of 0: every question has a pair
        questions, answers = used.nonzero(as_tuple=True)
        log_p = self._log_likelihood(
            joint.text, attention_mask, self.rows[answers], questions, words
        )
        weighted = -targets[questions, answers] * log_p
        losses = torch.zeros_like(targets, dtype=weighted.dtype)
        return losses.index_put((questions, answers), weighted).sum(1)

    def weigh(self, answers: Sequence[str]) -> dict[str, float]:
        """The share of people who gave each answer."""
        return shares(answers)

    def _likely(self, fused: Tensor, attention_mask: Tensor, top: int) -> Tensor:
        """The distinct answers whose first words are the most probable, [questions, top]."""
        S, distinct = fused.shape[0], self.answer_ids.shape[0]
        if top == distinct:
            return torch.arange(distinct, device=fused.device).expand(S, -1)
        begin = self.answer_ids[:1, :1].expand(S, -1)  # [CLS]
        questions = torch.arange(S, device=fused.device)
        logits = self._decode(begin, None, fused, attention_mask, questions)[:, 0]
        first = logits.float()[:, self.answer_ids[:, 1]]  # in the order of the probabilities
        return first.argsort(dim=1, descending=True, stable=True)[:, :top]

    def _log_likelihood(
        self,
        fused: Tensor,
        attention_mask: Tensor,
        answers: Tensor,
        questions: Tensor,
        words: int | None = None,
    ) -> Tensor:
        """log p of distinct answers to questions, [M] float32.

        Args:
            fused, attention_mask: of S questions.
            answers, questions: numbers of the M pairs, [M] both.
            words: an upper bound of the words in the questions.
        """
        ids, mask = self.answer_ids[answers], self.answer_mask[answers]
        # A word is predicted wherever another one follows.
        logits = self._decode(ids[:, :-1], mask[:, 1:], fused, attention_mask, questions, words)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return -losses.view_as(ids[:, 1:]).where(mask[:, 1:] != 0, 0).sum(1)

    def _decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        fused: Tensor,
        attention_mask: Tensor,
        questions: Tensor,
        words: int | None = None,
    ) -> Tensor:
        """The logits of the words after `ids`, [M, L, vocabulary]; text m answers questions[m]."""
        captions = Captions(fused, attention_mask, words)
        return self.decoder(
            ids, mask, captions.pack(fused),
            partner=questions, cu_visual=captions.cu_words(), max_visual=fused.shape[1],
        )  # fmt: skip
