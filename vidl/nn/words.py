"""Words as the input of a transformer that also sees patches."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, check_dtype, check_flag, check_tensors
from vidl.nn.arguments import check_dropout, check_state
from vidl.nn.bert import BertEmbeddings, PredictsWords, bert_name, initialise, with_tied_head
from vidl.nn.captions import Captions
from vidl.nn.checkpoints import load_or_explain


class Words(PredictsWords):
    """BERT's embeddings of words, positions and segments, and its word head, without layers.

    Parameters are named as in Hugging Face's `BertModel`. Source: SimVTP, arXiv 2212.03490, 3.1.

    Args:
        vocab_size, width, max_positions, token_types, dropout, mlm_head: as in `Bert`.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        width: int = 768,
        max_positions: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        *,
        mlm_head: bool = False,
    ) -> None:
        super().__init__()
        for name, count, least in (
            ("vocab_size", vocab_size, 1), ("width", width, 1),
            ("max_positions", max_positions, 1), ("token_types", token_types, 0),
        ):  # fmt: skip
            check_count(name, count, least)
        check_dropout(dropout)
        check_flag("mlm_head", mlm_head)
        self.width = width
        self.embeddings = BertEmbeddings(vocab_size, width, max_positions, token_types, dropout)
        if mlm_head:
            self.add_word_head()
        self.apply(functools.partial(initialise, width=width))

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """Embed words.

        Args:
            ids: [B, L] int64.
            attention_mask: [B, L], nonzero at words; None: no padding.
            words: number of rows to compute; see `Captions`.

        Returns:
            [B, L, C], zero at padding.

        Raises:
            ValueError: shapes do not fit, or captions are longer than `max_positions`.
        """
        weight: Tensor = self.embeddings.word_embeddings.weight
        optional = ("attention_mask",)
        check_tensors(optional, ids=ids, attention_mask=attention_mask, model=weight)
        check_dtype("ids", ids, torch.int64)
        longest = self.embeddings.max_positions
        if ids.ndim != 2 or ids.shape[1] > longest:
            raise ValueError(f"need ids [B, L], L at most {longest}, got {tuple(ids.shape)}")
        captions = Captions(ids, attention_mask, words)
        return captions.unpack(self.embeddings(captions.pack(ids), captions.columns()))

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the embeddings, and with `mlm_head` the word head, of Hugging Face's BERT.

        Returns:
            The names of weights that were skipped, such as those of layers.

        Raises:
            ValueError: weights are missing or of another shape (all are named), or the checkpoint's
                output layer is not its word embedding.
        """
        check_state(state_dict)
        weights = {bert_name(name): weight for name, weight in state_dict.items()}
        own = self.state_dict()
        weights = with_tied_head(weights) if hasattr(self, "cls") else weights
        load_or_explain(self, {name: x for name, x in weights.items() if name in own})
        return [name for name in state_dict if bert_name(name) not in own]
