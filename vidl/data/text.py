"""Captions to tokens: a vocabulary made of captions, or that of a file, as BERT uses it."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = ("tokenizer.json", "vocab.txt")


class Tokenizer:
    """Texts to ids of a fixed length, for the text encoders.

    Args:
        tokenizer: of the package `tokenizers`.

    Raises:
        ValueError: it has none of the tokens [PAD], [CLS], [SEP] and [MASK].
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise ValueError(f"need a tokenizer as BERT's; this one has no {', '.join(missing)}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str], words: int) -> tuple[Tensor, Tensor]:
        """Tokens of texts, cut or padded to one length.

        Args:
            texts: B texts.
            words: tokens of each, L, [CLS] and [SEP] among them.

        Returns:
            ids: int64 [B, L].
            attention_mask: 1 where there is a token, 0 at padding, int64 [B, L].

        Raises:
            ValueError: there is no room for a word.
        """
        if words < 3:
            raise ValueError(f"need room for [CLS], a word and [SEP], got words={words}")
        ids = torch.full((len(texts), words), self.pad_id)
        mask = torch.zeros(len(texts), words, dtype=torch.int64)
        for row, encoded in enumerate(self._tokenizer.encode_batch(list(texts))):
            tokens = encoded.ids
            if len(tokens) > words:
                tokens = [*tokens[: words - 1], self.sep_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without those that are no words."""
        return self._tokenizer.decode(list(ids))

    def tokens(self) -> list[str]:
        """The vocabulary in the order of its ids; pieces that continue a word begin with ##."""
        return [self._tokenizer.id_to_token(number) for number in range(len(self))]

    def save(self, file: str | Path) -> None:
        """Write tokenizer.json; the file appears when it is whole."""
        file = Path(file)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        unfinished.replace(file)

    def __getstate__(self) -> str:
        return self._tokenizer.to_str()

    def __setstate__(self, text: str) -> None:
        from tokenizers import Tokenizer as Library

        self.__init__(Library.from_str(text))  # type: ignore[misc]


def train_tokenizer(texts: Iterable[str], *, size: int = 8192) -> Tokenizer:
    """Make a WordPiece vocabulary of captions, lower case, as BERT's uncased one is.

    The most frequent words are tokens, and so are single characters, of which other words are put
    together. The trainer of the library `tokenizers` finds longer pieces, but others in each run.

    Args:
        texts: the captions of the training set.
        size: of the vocabulary, at most.

    Returns:
        The tokenizer; the same texts give the same one.

    Raises:
        ValueError: the size has no room for the characters.
    """
    from tokenizers import models

    splitter = _bert(models.WordPiece())
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        words = splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    characters = sorted(set("".join(counts)))
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if size < len(pieces):
        raise ValueError(f"need room for {len(pieces)} tokens and characters, got size={size}")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = list(dict.fromkeys([*pieces, *ranked]))[:size]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return _framed(_bert(models.WordPiece(vocabulary, unk_token="[UNK]")))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.json, BERT's vocab.txt, or a Hugging Face folder that has one of them.

    Args:
        path: the file or folder.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none, or it is not like BERT's.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    path = Path(path)
    file = next((path / name for name in NAMES if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"need {' or '.join(NAMES)}, or a folder with one, got {path}")
    if file.suffix == ".txt":
        return _framed(_bert(models.WordPiece.from_file(str(file), unk_token="[UNK]")))
    try:
        tokenizer = Library.from_file(str(file))
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer)


def _bert(model: Any) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer = Library(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _framed(tokenizer: Any) -> Tokenizer:
    """Puts [CLS] before and [SEP] behind every text."""
    from tokenizers import processors

    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    if cls is not None and sep is not None:  # else Tokenizer says which are missing
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return Tokenizer(tokenizer)
