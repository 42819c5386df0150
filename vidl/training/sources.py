"""Create the data sets and the tokenizer of a run from its configuration."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vidl.data.cache import CachedClips
from vidl.data.dataset import Clips, ClipSet, pairs
from vidl.data.loader import Loader
from vidl.data.moving_shapes import MovingShapes, motions, words_of_questions
from vidl.data.sampler import EpochSampler
from vidl.data.sampling import Sampling
from vidl.data.shards import ShardStream
from vidl.data.text import Tokenizer, load_tokenizer, train_tokenizer
from vidl.masking import Vocabulary
from vidl.models import Recipe
from vidl.training.config import STREAMS, Config
from vidl.training.names import TOKENIZER, local

# Captions from which a vocabulary is built, at most.
CAPTIONS = 1_000_000


def open_tokenizer(config: Config, resumed: Path | None) -> Tokenizer:
    """The tokenizer of a run.

    In this order: the tokenizer of the run that is resumed, `data.tokenizer`, the tokenizer of the
    run at `start.model`, or a new one built from the captions.

    Args:
        config: configuration of the run.
        resumed: folder of the run that is resumed; None: a new run.

    Raises:
        ValueError: there is none, and the data are a stream, whose captions are not read in
            advance.
    """
    data = config.data
    if resumed is not None:
        return load_tokenizer(resumed / "tokenizer.json")
    if data.tokenizer is not None:
        return load_tokenizer(local(data.tokenizer, "data.tokenizer", TOKENIZER))
    if config.start.model is not None and (Path(config.start.model) / "tokenizer.json").is_file():
        return load_tokenizer(config.start.model)
    if data.source in STREAMS:
        raise ValueError(f"need data.tokenizer with data.source {data.source!r}")
    return train_tokenizer(itertools.islice(captions(config), CAPTIONS))


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The properties of a tokenizer that masks depend on."""
    t = tokenizer
    special = (t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id)
    return Vocabulary(len(t), t.mask_id, tuple(number for number in special if number is not None))


def open_loader(
    config: Config, recipe: Recipe, tokenizer: Tokenizer, rank: int, world_size: int
) -> Loader:
    """The loader of one rank."""
    data = config.data
    dataset = open_clips(config, recipe, tokenizer)
    options: dict[str, Any] = dict(workers=data.workers, limit=data.broken)
    if isinstance(dataset, Clips) and data.source in STREAMS:
        if data.buffer < 1:
            raise ValueError(f"need data.buffer >= 1, got {data.buffer}")
        place: dict[str, Any] = dict(rank=rank, world_size=world_size, buffer=data.buffer)
        if data.source == "shards":
            return Loader(ShardStream(data.files, dataset, data.batch_size, **place), **options)
        from vidl.data.tables import TableStream

        place |= dict(media=data.media, outside=data.outside, columns=data.columns)
        place |= dict(subset=data.subset, split=data.split)
        return Loader(TableStream(data.files, dataset, data.batch_size, **place), **options)
    sampler = EpochSampler(
        dataset.kinds(), data.batch_size, seed=config.run.seed, rank=rank, world_size=world_size
    )
    _check_queue(recipe, len(dataset), data.batch_size * world_size)
    return Loader(dataset, sampler, **options)


def _check_queue(recipe: Recipe, samples: int, batch: int) -> None:
    """Raise if a model's queue of earlier samples does not fit the data."""
    queue = getattr(recipe, "queue", 0)
    if queue and not batch <= queue <= samples:
        raise ValueError(
            f"need model.queue=0, or from {batch}, the batch of all ranks, to {samples}, the "
            f"samples of an epoch, got {queue}"
        )


def open_clips(config: Config, recipe: Recipe, tokenizer: Tokenizer | None) -> ClipSet:
    """The training clips; for a stream, the sample options without rows."""
    data = config.data
    sizes: dict[str, Any] = dict(frames=recipe.training_frames, size=recipe.image_size)
    words: dict[str, Any] = dict(seed=config.run.seed, tokenizer=tokenizer, words=data.words)
    if data.source == "moving_shapes":
        sizes |= dict(task=data.task, difficulty=data.difficulty, looks=data.looks)
        return MovingShapes("train", data.clips, **sizes, **words)
    rows = [] if data.source in STREAMS else annotated(config)
    _require_pairs(rows, data.task == "pair", "data.files")
    kind = CachedClips if data.cache else Clips
    return kind(
        rows, train=True, flip=data.flip, scale=data.scale, augment=data.augment,
        decoder=data.decoder, sampling=_sampling(config, recipe, recipe.training_frames),
        **sizes, **words,
    )  # fmt: skip


def open_searched(
    config: Config, recipe: Recipe, tokenizer: Tokenizer, *, task: str = "retrieval"
) -> ClipSet | None:
    """The evaluation set of a task, if there is one.

    For retrieval the clips of moving_shapes differ in their motion only.
    """
    chosen, data = config.evaluation, config.data
    sizes: dict[str, Any] = dict(frames=recipe.evaluation_frames, size=recipe.image_size)
    words: dict[str, Any] = dict(seed=config.run.seed, tokenizer=tokenizer, words=data.words)
    if data.source == "moving_shapes" and not chosen.files:
        pairs, retrieval = chosen.pairs, task == "retrieval"
        if retrieval:
            pairs = min(pairs, len(motions(data.difficulty)))
        sizes |= dict(task=data.task, difficulty=data.difficulty, same_looks=retrieval)
        return MovingShapes("val", pairs, **sizes, **words)
    if not chosen.files:
        return None
    rows = _load(chosen.files, chosen.media, data.outside)
    _require_pairs(rows, task == "pair", "evaluation.files")
    kind = CachedClips if data.cache else Clips
    sampling = _sampling(config, recipe, recipe.evaluation_frames)
    return kind(rows, train=False, decoder=data.decoder, sampling=sampling, **sizes, **words)


def _sampling(config: Config, recipe: Recipe, frames: int) -> Sampling:
    """How the frames of a sample are chosen; names the fields in its errors."""
    data, views = config.data, recipe.views_of(frames)
    if data.sampling == "headtail" and views > 1:
        raise ValueError(
            f"need data.sampling spans or rate with several views (model.views), got headtail and "
            f"{views}"
        )
    return Sampling(kind=data.sampling, rate=data.rate, views=views)


def annotated(config: Config) -> Any:
    """The rows of the training annotations."""
    return _load(config.data.files, config.data.media, config.data.outside)


def require_text(config: Config, text: str) -> None:
    """Raise a ValueError if the clips of moving_shapes have another text."""
    if config.data.source == "moving_shapes" and config.data.task != text:
        raise ValueError(f"need data.task={text} for this task, got {config.data.task}")


def _require_pairs(rows: Any, wanted: bool, field: str) -> None:
    """Raise a ValueError if rows have two clips where they need one, or the reverse."""
    if not len(rows):
        return
    wrong = pairs(rows) != wanted
    if wrong.any():
        row = rows[int(wrong.argmax())]
        needed = "with second and label, for pairs of clips" if wanted else "of one clip"
        given = "one" if wanted else "one with second (see `vidl finetune pair`)"
        raise ValueError(f"need rows in {field} {needed}, got {given}: {row.media}")


def training_answers(config: Config) -> Iterator[str | Sequence[str] | None]:
    """The answers of the training rows; several for a question that several people answered."""
    if config.data.source == "moving_shapes":
        dataset = open_clips(config, config.recipe(), None)
        return (dataset.row(index).given for index in range(len(dataset)))
    return (row.given for row in annotated(config))


def _load(files: list[str], media: str | None, outside: bool) -> Any:
    from vidl.data import annotations

    return annotations.load(*((file, media) for file in files), outside=outside)


def captions(config: Config) -> Iterable[str]:
    """The training captions, and words that a vocabulary also needs."""
    if config.data.source == "moving_shapes":
        dataset = open_clips(config, config.recipe(), None)
        assert isinstance(dataset, MovingShapes)
        texts = (dataset.caption(index) for index in range(len(dataset)))
        # For fine-tuning, which keeps the vocabulary of the run.
        return itertools.chain(words_of_questions(), texts)
    return (text for row in annotated(config) for text in (*row.captions, row.question or ""))
