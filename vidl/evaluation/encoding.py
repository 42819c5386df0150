"""Encode each clip of a data set once, over all ranks; broken clips are never replaced."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vidl.data.dataset import ClipSet, Sample
from vidl.data.formats import Row
from vidl.data.loader import Loader
from vidl.data.sampler import InOrder, Key
from vidl.models.abilities import Aligns, can
from vidl.objectives.contrastive import rank_and_size
from vidl.progress import progress

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is evaluated.

    Attributes:
        batch_size: clips of a batch.
        text_batch: captions, or pairs of a clip and a caption, of a batch.
        workers: processes that read clips; 0: the calling process.
        masked: mask clips as in the recipe, with the masks of step 0; false: no mask.
        pruned: prune tokens and frames as in the recipe; false: keep all.
        dtype: dtype of autocast; None: the caller's autocast state.
        quiet: do not print progress.

    Raises:
        ValueError: a number is out of range.
    """

    batch_size: int = 32
    text_batch: int = 128
    workers: int = 0
    masked: bool = False
    pruned: bool = True
    dtype: torch.dtype | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.text_batch < 1 or self.workers < 0:
            raise ValueError(
                "need batch_size >= 1, text_batch >= 1 and workers >= 0, got "
                f"{self.batch_size}, {self.text_batch} and {self.workers}"
            )


class Gallery(ClipSet):
    """The distinct clips of a data set.

    Rows with the same file, start and end are the same clip, or the same pair of clips; with
    questions, a clip has several rows. Clips that cannot be read are left out.

    Args:
        dataset: a data set for evaluation (`train=False`).
        pairs: whether its rows have two clips.

    Raises:
        ValueError: the data set draws random frames and crops, has no tokenizer, or is empty; a row
            has two clips and should have one.

    Attributes:
        rows: the rows of each clip.
    """

    def __init__(self, dataset: ClipSet, *, pairs: bool = False) -> None:
        if getattr(dataset, "train", False):
            raise ValueError("need a data set made with train=False to evaluate")
        if dataset.tokenizer is None:
            raise ValueError("need a data set with a tokenizer to evaluate")
        super().__init__(seed=dataset.seed, if_broken="count")
        self.dataset = dataset
        numbers: dict[tuple[Any, ...], list[int]] = {}
        for index in range(len(dataset)):
            row = dataset.row(index)
            if row.second is not None and not pairs:
                raise ValueError(
                    "need rows of one clip, got one with second (`pairs_of_clips` reads them): "
                    f"{row.media}"
                )
            key = (row.media, row.second, row.kind, row.start, row.end)
            numbers.setdefault(key, []).append(index)
        self.rows = list(numbers.values())
        if not self.rows:
            raise ValueError("need at least one row to evaluate, got none")

    def __len__(self) -> int:
        return len(self.rows)

    def images(self) -> numpy.ndarray:
        return self.dataset.images()[[rows[0] for rows in self.rows]]

    def row(self, index: int) -> Row:
        return self.dataset.row(self.rows[index][0])

    def read(self, key: Key) -> Sample:
        sample = self.dataset.read(Key(key.epoch, self.rows[key.index][0]))
        return dataclasses.replace(sample, index=key.index)


@dataclass(frozen=True, eq=False)
class Texts:
    """Encoded captions or questions.

    Attributes:
        features: [B, embed_dim]; [B, 0] of a model that only matches.
        tokens: [B, L, C].
        attention_mask: [B, L].
    """

    features: Tensor
    tokens: Tensor
    attention_mask: Tensor

    def __getitem__(self, chosen: Tensor) -> "Texts":
        return Texts(self.features[chosen], self.tokens[chosen], self.attention_mask[chosen])


@contextmanager
def evaluating(model: Any, options: Options) -> Iterator[None]:
    """A context without gradients and dropout, with `options.dtype` and `options.pruned`.

    Raises:
        ValueError: the model is sharded. Its layers synchronise all ranks, but ranks have different
            numbers of batches.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("need a model that is not sharded, got one with sharded parameters")
    training, dtype = model.training, options.dtype
    casting = nullcontext() if dtype is None else torch.autocast(device_of(model).type, dtype)
    pruning = nullcontext() if options.pruned else model.unpruned()
    model.eval()
    try:
        with torch.no_grad(), casting, pruning:
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next(model.parameters()).device


def encoded_clips(
    model: Any, gallery: Gallery, options: Options, broken: dict[str, str]
) -> Iterator[tuple[list[int], Tensor]]:
    """Encode the clips of this rank, batch by batch.

    Args:
        model: within `evaluating`.
        gallery: the clips; rank r encodes clips r, r + ranks, ...
        options: batches, masks, workers.
        broken: filled with the names of clips that cannot be read and the reasons.

    Yields:
        The indices of the clips in the gallery, and their tokens.
    """
    rank, ranks = rank_and_size()
    sampler = InOrder(gallery.images(), options.batch_size, rank=rank, world_size=ranks)
    loader = Loader(gallery, sampler, workers=options.workers, limit=1.0)
    for batch in shown(loader, "clips", options, len(sampler)):
        broken |= batch.broken
        if not len(batch):
            continue
        video = batch.video.to(device_of(model))
        if video.shape[2] == 1 and model.recipe.stills == "repeat":  # as in training
            video = video.expand(-1, -1, model.recipe.training_frames, -1, -1)
        mask = None
        if options.masked:
            mask = model.recipe.visual_mask(batch.index.to(video.device), 0, video.shape[2])
        yield batch.index.tolist(), model.encode_clips(video, mask)


def encode_texts(model: Any, gallery: Gallery, texts: Sequence[str]) -> Texts:
    """Encode captions or questions in one batch.

    Args:
        model: within `evaluating`.
        gallery: its data set has the tokenizer and the number of tokens.
        texts: at most as many as fit into memory.

    Raises:
        ValueError: the vocabulary of the tokenizer is larger than that of the model.
    """
    tokenizer, known = gallery.dataset.tokenizer, model.recipe.vocabulary.size
    assert tokenizer is not None
    if len(tokenizer) > known:
        raise ValueError(
            f"need a tokenizer of at most {known} tokens, the vocabulary of the model, got "
            f"{len(tokenizer)}: the model was trained with another tokenizer"
        )
    ids, attention_mask = tokenizer(texts, gallery.dataset.words)
    count = int(attention_mask.sum())  # before the copy to the device: no synchronisation
    device = device_of(model)
    ids, attention_mask = ids.to(device), attention_mask.to(device)
    tokens = model.encode_text(ids, attention_mask, words=count)
    aligned = can(model, Aligns)
    features = model.text_features(tokens, attention_mask) if aligned else tokens[:, 0, :0]
    return Texts(features, tokens, attention_mask)


def of_all_ranks(own: Any) -> list[Any]:
    """Gather CPU tensors or plain Python objects from all ranks, in the order of ranks."""
    size = rank_and_size()[1]
    if size == 1:
        return [own]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, own)
    return gathered


def shown(
    items: Iterable[Item], what: str, options: Options, total: int | None = None
) -> Iterable[Item]:
    """Iterate over items; rank 0 shows the progress on the terminal."""
    return items if options.quiet or rank_and_size()[0] else progress(items, what, total)
