"""Captions of clips: a decoder writes them word by word."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vidl.kernels.arguments import check_count
from vidl.models.abilities import Describes, need
from vidl.models.finetuned import FineTuned
from vidl.models.learning import next_word_loss
from vidl.nn import WordsDecoder
from vidl.nn.beam_search import Special, Written, beam_search, greedy_search

BEAMS = 5


class Captioning(FineTuned):
    """A pre-trained model with a decoder that writes captions.

        loss = - mean over words, and the end, of log p(word | words before it, rows of the clip)

    The decoder attends to the clip's tokens: of a model with fusion layers to those of all frames,
    of a model with one encoder to those of the clip encoded without words. It starts with the
    weights of the text encoder, see `vidl.nn.WordsDecoder.start_from`; with fusion layers also
    cross-attention is pre-trained. The text encoder and the heads of the model are not used. The
    papers of these systems report no captioning: decoder and loss are those of BLIP, without label
    smoothing. Source: BLIP, arXiv 2201.12086, 3.1 and 3.2.

    Args:
        model: pre-trained, with the ability `Describes`.
        tokenizer: that of the captions: from texts and a number of tokens to ids and attention
            mask, [B, L] int64 both, with [CLS] before the words of a text and [SEP] after them, as
            `vidl.data.text.Tokenizer`.
        layers: layers of the decoder.

    Raises:
        ValueError: the model has no rows for a decoder, layers is less than 1, or the vocabulary of
            the tokenizer does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[Sequence[str], int], tuple[Tensor, Tensor]],
        *,
        layers: int = 3,
    ) -> None:
        need(model, Describes, to="to write captions")
        super().__init__(model)
        check_count("layers", layers, 1)
        if not callable(tokenizer):
            raise TypeError(f"need a callable tokenizer, got {type(tokenizer).__name__}")
        r = self.recipe
        self.decoder = WordsDecoder(
            r.vocabulary.size, r.text_width, layers, r.text_heads,
            visual_width=model.described_width,
            max_positions=model.text.embeddings.max_positions, dropout=r.dropout, backend=r.backend,
        )  # fmt: skip
        self.start_decoder()
        ids, mask = tokenizer([""], 3)
        begin, end = int(ids[0, 0]), int(ids[0, int(mask[0].sum()) - 1])
        if max(begin, end) >= r.vocabulary.size:
            raise ValueError(
                f"need a tokenizer of at most {r.vocabulary.size} tokens, the vocabulary of the "
                f"model, got token {max(begin, end)}"
            )
        never = tuple(word for word in r.vocabulary.special if word != end)
        self.special = Special(begin, end, int(ids[0, -1]), never)

    def start_decoder(self) -> None:
        """Copy the weights of the model's `writer`; see `vidl.nn.WordsDecoder.start_from`."""
        self.decoder.start_from(self.model.writer)

    @property
    def longest(self) -> int:
        """Words of the longest caption, including [CLS] and [SEP]."""
        return self.decoder.embeddings.max_positions

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        step: int | Tensor = 0,
        *,
        clip_ids: Tensor | None = None,
        words: int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch of captions.

        Args:
            video, ids, attention_mask, samples, step, words: see `System.forward`.
            clip_ids: not used.

        Returns:
            "loss" and "caption", the same float32 scalar.

        Raises:
            ValueError: captions are longer than the decoder, or see `System.forward`.
        """
        self.model.check_batch(video, ids, attention_mask, samples, clip_ids)
        if ids.shape[1] > self.longest:
            raise ValueError(
                f"need ids of at most {self.longest} words, the positions of the decoder, got "
                f"{ids.shape[1]}"
            )
        if words is not None:
            check_count("words", words)
            if words > ids.numel():
                raise ValueError(f"need words from 0 to {ids.numel()} (B * L), got {words}")
        mask = self.recipe.visual_mask(samples, step, video.shape[2])
        rows = self.model.described(self.encode_clips(video, mask))
        loss = next_word_loss(self.decoder, rows, ids, attention_mask, words)
        return {"loss": loss, "caption": loss}

    def generate(
        self, clips: Tensor, words: int, *, beams: int = BEAMS, length_penalty: float = 1.0
    ) -> Written:
        """Write a caption of each clip; in evaluation mode and without gradients.

        Args:
            clips: tokens of clips, from `encode_clips`.
            words: the longest caption, in words and [SEP].
            beams: beginnings of a caption that are followed; 1: the most probable word is taken.
            length_penalty: captions are compared by log p / words^length_penalty.

        Returns:
            The ids of the words, [B, words] int64, and the score of each caption, [B]; see
            `vidl.nn.beam_search.Written`.

        Raises:
            ValueError: words is more than the decoder has positions, or a number is out of range.
        """
        check_count("words", words, 1)
        check_count("beams", beams, 1)
        if words > self.longest:
            raise ValueError(
                f"need words of at most {self.longest}, the positions of the decoder, got {words}"
            )
        texts = self.decoder.write(self.model.described(clips), texts=beams)
        if beams == 1:
            return greedy_search(texts, self.special, words, length_penalty=length_penalty)
        return beam_search(texts, self.special, words, beams, length_penalty=length_penalty)
