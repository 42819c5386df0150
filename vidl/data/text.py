"""BERT-style tokenizers: built from captions or loaded from a file."""

from __future__ import annotations

import collections
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidl.files import replaced

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = ("tokenizer.json", "vocab.txt")
# Fields of tokenizer_config.json, and their names in BertNormalizer.
OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class Tokenizer:
    """Converts texts to token ids of a fixed length.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Raises:
        ValueError: one of the special tokens [PAD], [UNK], [CLS], [SEP], [MASK] is missing.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise ValueError(f"need a tokenizer like BERT's, got one without {', '.join(missing)}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str], words: int) -> tuple[Tensor, Tensor]:
        """Tokenize texts, truncated or padded to one length.

        Args:
            texts: B texts.
            words: tokens of each text, L, including [CLS] and [SEP].

        Returns:
            ids: int64 [B, L].
            attention_mask: int64 [B, L], 1 at tokens, 0 at padding.

        Raises:
            ValueError: words < 3.
        """
        if words < 3:
            raise ValueError(f"need words >= 3 for [CLS], a word and [SEP], got {words}")
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
        """The text of tokens, without special tokens."""
        return self._tokenizer.decode(list(ids))

    def tokens(self) -> list[str]:
        """The vocabulary in the order of ids; pieces that continue a word begin with ##."""
        return [self._tokenizer.id_to_token(number) for number in range(len(self))]

    def save(self, file: str | Path) -> None:
        """Write tokenizer.json, atomically."""
        with replaced(Path(file)) as unfinished:
            unfinished.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def __getstate__(self) -> str:
        return self._tokenizer.to_str()

    def __setstate__(self, text: str) -> None:
        from tokenizers import Tokenizer as Library

        self.__init__(Library.from_str(text))  # type: ignore[misc]


def train_tokenizer(texts: Iterable[str], *, size: int = 8192) -> Tokenizer:
    """Build a lower-case WordPiece vocabulary from captions, in the style of bert-base-uncased.

    The tokens are the most frequent words, and all characters, from which other words are composed.
    The trainer of the library `tokenizers` finds longer pieces, but is not deterministic.

    Args:
        texts: the captions of the training set.
        size: maximal size of the vocabulary.

    Returns:
        The tokenizer; a deterministic function of the texts.

    Raises:
        ValueError: `size` is smaller than the number of characters and special tokens.
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
        raise ValueError(f"need size >= {len(pieces)}, the number of characters, got {size}")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = list(dict.fromkeys([*pieces, *ranked]))[:size]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return _framed(_bert(models.WordPiece(vocabulary, unk_token="[UNK]")))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, a vocab.txt of BERT, or a Hugging Face folder with one of them.

    The options of a vocab.txt (`do_lower_case`, `strip_accents`, `tokenize_chinese_chars`) are read
    from the tokenizer_config.json beside it. Without `do_lower_case` texts are lower-cased, as in
    transformers, with a warning if the vocabulary has capitals.

    Args:
        path: the file or folder.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no such file, the tokenizer is not like BERT's, or an option has another type.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    path = Path(path)
    file = next((path / name for name in NAMES if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"need {' or '.join(NAMES)}, or a folder with one, got {path}")
    if file.suffix == ".txt":
        tokenizer = _bert(
            models.WordPiece.from_file(str(file), unk_token="[UNK]"), **_options(file)
        )
        return _framed(tokenizer)
    try:
        tokenizer = Library.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer)


def _options(vocabulary: Path) -> dict[str, Any]:
    """The options of BERT's normalizer for a vocab.txt."""
    file = vocabulary.with_name("tokenizer_config.json")
    config = {}
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file}: need an object, got {config!r:.40}")
    options = {}
    for name, option in OPTIONS.items():
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{file}: need {name} as true or false, got {value!r}")
        if value is not None:
            options[option] = value
    if "lowercase" not in options:
        words = vocabulary.read_text(encoding="utf-8").split()
        capitals = [word for word in words if word != word.lower() and word[0] != "["]
        if capitals:
            warnings.warn(
                f"{vocabulary}: texts are lower-cased, but {len(capitals)} words such as "
                f"{capitals[0]!r} have capitals: need do_lower_case in {file.name} beside it",
                stacklevel=3,
            )
    return options


def _bert(
    model: Any,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer = Library(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=strip_accents,
        handle_chinese_chars=handle_chinese_chars,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _framed(tokenizer: Any) -> Tokenizer:
    """A tokenizer that adds [CLS] and [SEP] to every text."""
    from tokenizers import processors

    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    if cls is not None and sep is not None:  # otherwise Tokenizer raises an error
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return Tokenizer(tokenizer)
