"""Data sets that return whole batches; a broken clip is dropped together with its caption."""

import dataclasses
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidl.data import crops, video
from vidl.data.augment import augmentation, augmented
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.sampling import SPANS, Sampling
from vidl.data.text import Tokenizer
from vidl.data.video import BrokenClip

IF_BROKEN = ("replace", "count", "raise")
# After so many broken clips in a row, reading stops: the folder is probably wrong.
IN_A_ROW = 20


class TooManyBroken(RuntimeError):
    """Too many clips cannot be read; the run stops."""


@dataclass(frozen=True)
class Sample:
    """One clip with its text."""

    pictures: Tensor  # uint8 [T, H, W, 3]; of a row with two clips the frames of both
    index: int
    row: Row
    text: str  # the chosen caption, or the question


@dataclass(frozen=True)
class Batch:
    """Clips and their texts; either all videos or all images."""

    video: Tensor  # uint8 [B, 3, T, H, W], a view of [B, T, H, W, 3]
    index: Tensor  # rows of the data set, int64 [B]
    text: list[str]
    rows: list[Row]
    ids: Tensor | None = None  # tokens of the texts, int64 [B, L]
    attention_mask: Tensor | None = None  # int64 [B, L], 1 at tokens, 0 at padding
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # name, reason
    # Of a stream: worker, epoch, samples read in it, mark.
    place: tuple[int, int, int, Any] | None = None

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def split(self, size: int) -> list["Batch"]:
        """Batches of `size` samples each; the last one has the rest."""
        names = ("video", "index", "text", "rows", "ids", "attention_mask")
        fields = {name: x for name in names if (x := getattr(self, name)) is not None}
        return [
            dataclasses.replace(self, **{name: x[i : i + size] for name, x in fields.items()})
            for i in range(0, len(self), size)
        ]

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; the loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: change(it) for name, it in fields.items() if isinstance(it, Tensor)}
        return dataclasses.replace(self, **tensors)


class ClipSet(Dataset[Batch], ABC):
    """Base class of data sets of clips: reads samples and collates them to batches.

    Args:
        seed: seed of the run; random numbers depend on the seed, the epoch and the row only.
        if_broken: what happens if a clip cannot be read. "replace": it is replaced, with its
            caption, by another row that is not in the batch (training); "count": the batch is
            smaller (evaluation); "raise": the error is raised.
        tokenizer: tokenizer of the texts.
        words: tokens of each text, L.

    Raises:
        ValueError: unknown `if_broken`.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        if_broken: str = "replace",
        tokenizer: Tokenizer | None = None,
        words: int = 32,
    ):
        if if_broken not in IF_BROKEN:
            raise ValueError(f"need if_broken among {', '.join(IF_BROKEN)}, got {if_broken!r}")
        self.seed, self.if_broken, self.tokenizer, self.words = seed, if_broken, tokenizer, words

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Row:
        """The annotations of a sample."""

    @abstractmethod
    def read(self, key: Key) -> Sample:
        """Read one sample; raises BrokenClip if its clip cannot be read."""

    @abstractmethod
    def images(self) -> numpy.ndarray:
        """True for images, false for videos: bool [rows]."""

    def kinds(self) -> numpy.ndarray:
        """Group of each row, integers [rows]; rows of a training batch have the same group."""
        return self.images()

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these rows; PyTorch's DataLoader calls this."""
        samples, broken = [], []
        tried = {key.index for key in keys}
        for key in keys:
            for _ in range(IN_A_ROW):
                try:
                    samples.append(self.read(key))
                    break
                except BrokenClip as error:
                    if self.if_broken == "raise":
                        raise
                    broken.append((error.name, error.reason))
                if self.if_broken == "count":
                    break
                key = self._substitute(key, tried, broken)
            else:
                name, reason = broken[-1]
                problem = f"{IN_A_ROW} clips in a row cannot be read; the last is {name}"
                raise TooManyBroken(f"{problem}: {reason}")
        return batch_of(samples, broken, self.tokenizer, self.words)

    def _substitute(self, key: Key, tried: set[int], broken: list[tuple[str, str]]) -> Key:
        """Another row of the same group that was not tried yet; adds it to `tried`."""
        kinds = self.kinds()
        rng = video.generator(self.seed, key.epoch, key.index, "substitute")
        for _ in range(1000):
            index = rng.randrange(len(kinds))
            if index not in tried and kinds[index] == kinds[key.index]:
                tried.add(index)
                return Key(key.epoch, index)
        name, reason = broken[-1]
        raise TooManyBroken(f"no row is left to replace a broken clip, {name}: {reason}")


class Clips(ClipSet):
    """Videos and images with captions or questions from annotation files.

    Args:
        rows: rows from `annotations.load`; images are read as one frame.
        frames: frames of each video, T.
        size: height and width of a frame.
        train: true: random frames, crops, flips and captions; false: the middle frame of each
            span, centre crops, no flip and the first caption.
        flip: flip half of the clips, except those whose text says left or right.
        scale: smallest and largest area of a random crop.
        augment: see `vidl.data.augment.augmentation`; in training only.
        decoder: see `read_clip`.
        sampling: how the frames of a video are chosen.
        if_broken: see `ClipSet`; default: "replace" for training, else "count".
        seed, tokenizer, words: see `ClipSet`.

    Raises:
        ValueError: some rows have one clip, others have two.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        frames: int,
        size: int,
        train: bool,
        flip: bool = True,
        scale: tuple[float, float] = (0.5, 1.0),
        augment: str = "none",
        decoder: str = "auto",
        sampling: Sampling = SPANS,
        seed: int = 0,
        if_broken: str | None = None,
        tokenizer: Tokenizer | None = None,
        words: int = 32,
    ):
        if_broken = if_broken or ("replace" if train else "count")
        super().__init__(seed=seed, if_broken=if_broken, tokenizer=tokenizer, words=words)
        self.rows, self.frames, self.size, self.train = rows, frames, size, train
        self.flip, self.scale, self.decoder = flip, scale, video.choose_decoder(decoder)
        self.sampling = sampling
        self.augmentation = augmentation(augment)
        self._images = kinds(rows)
        double = pairs(rows)
        if double.any() and not double.all():
            require_single(rows, "or of two clips, not both")

    def __len__(self) -> int:
        return len(self.rows)

    def images(self) -> numpy.ndarray:
        return self._images

    def row(self, index: int) -> Row:
        return self.rows[index]

    def read(self, key: Key) -> Sample:
        return self.prepare(self.rows[key.index], key)

    def prepare(self, row: Row, key: Key, source: video.Source | None = None) -> Sample:
        """The sample of a row, read from `source` if given, else from the row's media file."""
        rng = video.generator(self.seed, key.epoch, key.index) if self.train else None
        text = text_of(row, rng)
        flip = self.flip and not re.search(r"\b(left|right)", f"{text} {row.given}".lower())
        pictures = self._cropped(self.pictures(row, rng, source), rng, flip)
        if row.second is not None:
            other = self.pictures(dataclasses.replace(row, media=row.second), rng)
            pictures = torch.cat([pictures, self._cropped(other, rng, flip)])
        if rng is not None and self.augmentation is not None:
            pictures = augmented(pictures, self.augmentation, rng)
        return Sample(pictures, key.index, row, text)

    def _cropped(self, pictures: Tensor, rng: random.Random | None, flip: bool) -> Tensor:
        if rng is None:
            return crops.centre_crop(pictures, self.size)
        return crops.random_crop(pictures, self.size, rng, scale=self.scale, flip=flip)

    def pictures(
        self, row: Row, rng: random.Random | None, source: video.Source | None = None
    ) -> Tensor:
        """The frames of a sample before cropping: uint8 [T, H, W, 3]."""
        still = row.kind == "image"
        return video.read_clip(
            row.media if source is None else source,
            1 if still else self.frames,
            rng=rng,
            start=row.start,
            end=row.end,
            decoder=self.decoder,
            sampling=SPANS if still else self.sampling,
        )


def kinds(rows: Sequence[Row]) -> numpy.ndarray:
    """True for images, false for videos: bool [rows]."""
    from vidl.data.annotations import Annotations

    if isinstance(rows, Annotations):
        return rows.kinds()
    return numpy.array([row.kind == "image" for row in rows], bool)


def pairs(rows: Sequence[Row]) -> numpy.ndarray:
    """True for rows of two clips: bool [rows]."""
    from vidl.data.annotations import Annotations

    if isinstance(rows, Annotations):
        return rows.pairs()
    return numpy.array([row.second is not None for row in rows], bool)


def require_single(rows: Sequence[Row], purpose: str) -> None:
    """Raise a ValueError that names the first row of two clips, if there is one."""
    double = pairs(rows)
    if double.any():
        name = rows[int(double.argmax())].media
        raise ValueError(f"need rows of one clip {purpose}, got one with second: {name}")


def text_of(row: Row, rng: Any = None) -> str:
    """The question of a row, or its first caption; with `rng` a random caption."""
    if row.question is not None or not row.captions:
        return row.question or ""
    return rng.choice(row.captions) if rng else row.captions[0]


def batch_of(
    samples: Sequence[Sample],
    broken: list[tuple[str, str]],
    tokenizer: Tokenizer | None,
    words: int,
    place: tuple[int, int, int, Any] | None = None,
) -> Batch:
    """Stack samples; the batch is empty if all clips were broken."""
    text = [sample.text for sample in samples]
    pictures = [sample.pictures for sample in samples]
    stacked = torch.stack(pictures) if samples else torch.empty(0, 0, 0, 0, 3, dtype=torch.uint8)
    ids, attention_mask = tokenizer(text, words) if tokenizer else (None, None)
    return Batch(
        video=video.as_clip(stacked),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        text=text,
        rows=[sample.row for sample in samples],
        ids=ids,
        attention_mask=attention_mask,
        broken=broken,
        place=place,
    )
