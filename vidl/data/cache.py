"""Clips that are decoded once; for small data sets, where decoding would dominate a step."""

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from vidl.data import crops, video
from vidl.data.dataset import Clips
from vidl.data.formats import Row
from vidl.data.sampling import SPANS
from vidl.files import cache_folder, replaced

# Cached frames per frame of a sample, and their short side as a multiple of the sample's size: a
# random crop of half the area is then still sharp.
DENSE, LARGER = 4, 1.5
# Increased when the same file gives other frames, so that cached clips are not used any more.
READER = 2


class CachedClips(Clips):
    """Clips whose downscaled frames are cached on disk when they are first read.

    The cache has `DENSE` times as many frames as a sample, evenly spaced; random sampling chooses
    among them. It is stored in $VIDL_CACHE (default: ~/.cache/vidl) under a name that depends on
    the path, size and time of the file and on the options. Arguments are those of `Clips`.

    Raises:
        ValueError: the sampling is "rate".
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.sampling.kind == "rate":
            raise ValueError(
                "need data.sampling spans or headtail with data.cache=true, whose frames are "
                "evenly spaced, got rate"
            )

    def pictures(
        self, row: Row, rng: random.Random | None, source: video.Source | None = None
    ) -> Tensor:
        """See `Clips.pictures`; bytes are not cached."""
        if source is not None:
            return super().pictures(row, rng, source)
        still = row.kind == "image"
        count = 1 if still else DENSE * self.frames
        kept = self._kept(row, count)
        sampling = SPANS if still else self.sampling
        instants = sampling.instants(0, count, 1 if still else self.frames, rng)
        return torch.from_numpy(kept[[int(instant) for instant in instants]])

    def _kept(self, row: Row, count: int) -> numpy.ndarray:
        try:
            facts = os.stat(row.media)
        except (OSError, ValueError) as error:
            raise video.BrokenClip(row.media, video.reason_of(error)) from error
        key = (
            Path(row.media).resolve(), facts.st_size, facts.st_mtime_ns, row.start, row.end, count,
            self.size, self.decoder, READER,
        )  # fmt: skip
        name = hashlib.sha256(str(key).encode()).hexdigest()[:24]
        folder = cache_folder() / "clips"
        file = folder / f"{name}.npy"
        if not file.exists():
            pictures = video.read_clip(
                row.media, count, start=row.start, end=row.end, decoder=self.decoder
            )
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(file) as unfinished, open(unfinished, "wb") as content:
                numpy.save(content, _smaller(pictures, self.size).numpy())
        return numpy.load(file, mmap_mode="r")


def _smaller(pictures: Tensor, size: int) -> Tensor:
    height, width = pictures.shape[1:3]
    scale = LARGER * size / min(height, width)
    if scale >= 1:
        return pictures
    return crops.resize(pictures, round(height * scale), round(width * scale)).contiguous()
