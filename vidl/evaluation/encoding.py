"""The model on each clip of a data set once, over all ranks; what is broken is never replaced."""

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
from vidl.data.progress import progress
from vidl.data.sampler import InOrder, Key
from vidl.models import TwoTowers

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is evaluated.

    Attributes:
        batch_size: clips at a time; captions and pairs are `text_batch` at a time.
        text_batch: captions, or pairs of a clip and a caption, at a time.
        workers: processes that read clips; 0: this one.
        masked: whether clips are masked as the recipe says, with the masks of step 0; else the
            model sees all of them.
        pruned: whether tokens and frames are pruned as the recipe says; else all stay.
        dtype: of autocast; None: as the caller has it.
        quiet: no progress on the terminal.

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
    """Each clip of a data set once, however many of its rows show it.

    Rows of the same file, from the same start to the same end, show the same clip: questions have
    a row each. Clips that cannot be read are left out.

    Args:
        dataset: clips as they are for evaluation, not for training.

    Raises:
        ValueError: the data set draws random frames and crops, has no tokenizer, or is empty.

    Attributes:
        rows: of each clip, those that show it.
    """

    def __init__(self, dataset: ClipSet) -> None:
        if getattr(dataset, "train", False):
            raise ValueError("need a data set made with train=False to evaluate")
        if dataset.tokenizer is None:
            raise ValueError("need a data set with a tokenizer to evaluate")
        super().__init__(seed=dataset.seed, if_broken="count")
        self.dataset = dataset
        numbers: dict[tuple[Any, ...], list[int]] = {}
        for index in range(len(dataset)):
            row = dataset.row(index)
            numbers.setdefault((row.media, row.kind, row.start, row.end), []).append(index)
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
    """Captions or questions as a model encodes them.

    Attributes:
        features: [n, E].
        tokens: [n, L, C].
        attention_mask: [n, L].
    """

    features: Tensor
    tokens: Tensor
    attention_mask: Tensor

    def __getitem__(self, chosen: Tensor) -> "Texts":
        return Texts(self.features[chosen], self.tokens[chosen], self.attention_mask[chosen])


@contextmanager
def evaluating(model: Any, options: Options) -> Iterator[None]:
    """Without gradients and dropout, in `options.dtype`, unpruned if wanted; then as before.

    Raises:
        ValueError: the model is sharded. Ranks would wait for one another at each of its layers,
            and they have other numbers of batches.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("need a model that is whole on every rank, got a sharded one")
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
    """Where a model is."""
    return next(model.parameters()).device


def encoded_clips(
    model: TwoTowers, gallery: Gallery, options: Options, broken: dict[str, str]
) -> Iterator[tuple[list[int], Tensor]]:
    """The clips of this rank: their numbers in the gallery, and their tokens.

    Args:
        model: within `evaluating`.
        gallery: ranks take turns, clip by clip.
        options: how.
        broken: becomes the names and reasons of those that could not be read.
    """
    rank, ranks = place()
    sampler = InOrder(gallery.images(), options.batch_size, rank=rank, world_size=ranks)
    loader = Loader(gallery, sampler, workers=options.workers, limit=1.0)
    for batch in shown(loader, "clips", options, len(sampler)):
        broken |= batch.broken
        if not len(batch):
            continue
        video = batch.video.to(device_of(model))
        if video.shape[2] == 1:  # a picture is a clip that does not move, as in training
            video = video.expand(-1, -1, model.recipe.frames, -1, -1)
        mask = None
        if options.masked:
            mask = model.recipe.visual_mask(batch.index.to(video.device), 0)
        yield batch.index.tolist(), model.encode_clips(video, mask)


def encode_texts(model: TwoTowers, gallery: Gallery, texts: Sequence[str]) -> Texts:
    """Captions or questions, encoded at once.

    Args:
        model: within `evaluating`.
        gallery: has the tokenizer, and the length of its results.
        texts: how many fit into memory.

    Raises:
        ValueError: the tokenizer knows words that the model does not.
    """
    tokenizer, known = gallery.dataset.tokenizer, model.recipe.vocabulary.size
    assert tokenizer is not None
    if len(tokenizer) > known:
        raise ValueError(
            f"need a tokenizer of at most {known} tokens, which the model knows, got "
            f"{len(tokenizer)}: it was trained with another one"
        )
    ids, attention_mask = tokenizer(texts, gallery.dataset.words)
    count = int(attention_mask.sum())  # still on the host
    device = device_of(model)
    ids, attention_mask = ids.to(device), attention_mask.to(device)
    tokens = model.encode_text(ids, attention_mask, words=count)
    return Texts(model.text_features(tokens), tokens, attention_mask)


def place() -> tuple[int, int]:
    """Our rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def of_all_ranks(own: Any) -> list[Any]:
    """What each rank has, in their order; a tensor on the CPU, or plain Python objects."""
    if place()[1] == 1:
        return [own]
    found: list[Any] = [None] * place()[1]
    dist.all_gather_object(found, own)
    return found


def shown(
    items: Iterable[Item], what: str, options: Options, total: int | None = None
) -> Iterable[Item]:
    """The same items; the terminal of the first rank sees how many there were."""
    return items if options.quiet or place()[0] else progress(items, what, total)
