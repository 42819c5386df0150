"""The commands `vidl data convert | check | preview | speed | shard`."""

import io
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.data import annotations, crops, video
from vidl.data.cache import CachedClips
from vidl.data.dataset import Clips, text_of
from vidl.data.folders import matching
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.sharding import Sharding, write_shards
from vidl.data.video import BrokenClip
from vidl.files import replaced
from vidl.progress import progress


def convert(
    file: Path, to: Path | None, *, format: str | None, media: Path | None, **options: Any
) -> Path:
    """Convert annotations to an Arrow table; returns its path."""
    if to is None and matching(file) != [str(file)]:
        raise ValueError(f"need the name of the table for the files {file}")
    to = to or Path(f"{file.with_suffix('')}.arrow")
    begin = time.perf_counter()
    count = annotations.convert(file, to, format=format, media=media, **options)
    print(f"{to}: {count} rows in {time.perf_counter() - begin:.1f} s")
    return to


def check(file: Path, media: Path | None, *, workers: int, outside: bool = False) -> int:
    """Decode every clip of an annotation file and list broken clips; returns their number."""
    video.choose_decoder("pyav")  # without it, every clip would be listed
    rows = annotations.load((file, media), outside=outside)
    # each clip once, in the order of the rows: with questions, a clip has several rows
    both = ((row.media, row.second) for row in progress(rows, "reading rows"))
    names = list(dict.fromkeys(name for pair in both for name in pair if name is not None))
    frames, seconds = 0, 0.0
    broken: list[BrokenClip] = []
    truncated: list[str] = []
    with ThreadPoolExecutor(workers) as pool:  # PyAV decodes without the GIL
        for name, facts in zip(
            names, progress(pool.map(_inspect, names), "decoding", len(names)), strict=True
        ):
            if isinstance(facts, BrokenClip):
                broken.append(facts)
                continue
            frames, seconds = frames + facts.frames, seconds + facts.seconds
            if facts.truncated:
                truncated.append(f"{name}: {facts.seconds:.1f} s of {facts.declared:.1f} s")
    for error in broken:
        print(f"broken     {error}")
    for line in truncated:
        print(f"truncated  {line}")
    print(f"{len(names)} clips in {len(rows)} rows, {frames} frames, {seconds / 60:.1f} minutes")
    print(f"{len(broken)} broken, {len(truncated)} truncated")
    return len(broken)


def _inspect(name: str) -> video.Facts | BrokenClip:
    try:
        return video.inspect(name)
    except BrokenClip as error:
        return error


def shard(file: Path, media: Path | None, to: Path, *, short: int | None, per_shard: int,
          seed: int, workers: int, ray: str | None = None,
          outside: bool = False) -> int:  # fmt: skip
    """Write webdataset shards; returns the number of broken clips."""
    rows = annotations.load((file, media), outside=outside)
    begin = time.perf_counter()
    written = write_shards(rows, to, Sharding(short, per_shard, seed), workers=workers, ray=ray)
    for name, reason in written.broken:
        print(f"broken     {name}: {reason}")
    size, seconds = written.size / 1e6, time.perf_counter() - begin
    print(f"{to}: {written.samples} samples in {written.shards} shards, {size:.1f} MB, "
          f"{len(written.broken)} broken, {seconds:.1f} s")  # fmt: skip
    return len(written.broken)


def preview(
    file: Path,
    media: Path | None,
    to: Path,
    *,
    clips: int,
    frames: int,
    size: int,
    mask_ratio: float | None,
    patch: int,
    seed: int,
    outside: bool = False,
) -> int:
    """Write a picture of some clips below their captions; returns the number of broken clips."""
    from PIL import Image

    if size % patch:
        raise ValueError(
            f"need a size that is a multiple of the patch size, got {size} and {patch}"
        )
    form = Image.registered_extensions().get(to.suffix.lower())
    if form not in Image.SAVE:
        raise ValueError(f"need a picture such as preview.png, got {to}")
    rows = annotations.load((file, media), outside=outside)
    generator = torch.Generator().manual_seed(seed)
    strips, broken = [], 0
    for index in torch.randperm(len(rows), generator=generator)[:clips].tolist():
        row = rows[index]
        try:
            both = [
                video.read_clip(name, frames, start=row.start, end=row.end)
                for name in (row.media, row.second)
                if name is not None
            ]
        except BrokenClip as error:
            print(f"broken     {error}")
            broken += 1
            continue
        strips.append(_title(_texts(row), frames * (size + 4)))
        for pictures in both:
            pictures = crops.centre_crop(pictures, size)
            strips.append(_strip(pictures))
            if mask_ratio is not None:
                strips.append(_strip(hide(pictures, mask_ratio, patch, generator)))
    if not strips:
        raise ValueError(f"none of {broken} clips of {file} can be read")
    picture = io.BytesIO()
    Image.fromarray(torch.cat(strips).numpy()).save(picture, form)
    with replaced(to) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    print(f"wrote {to}")
    return broken


def speed(
    file: Path,
    media: Path | None,
    *,
    frames: int,
    size: int,
    clips: int,
    seed: int,
    outside: bool = False,
) -> int:
    """Time each decoder on the same clips in one thread; returns the number of broken clips."""
    rows = annotations.load((file, media), outside=outside)
    why_not = {decoder: video.why_not(decoder) for decoder in video.DECODERS}
    options: dict[str, Any] = dict(frames=frames, size=size, train=True, seed=seed)
    readers: dict[str, Clips] = {
        name: Clips(rows, decoder=name, **options) for name, reason in why_not.items() if not reason
    }
    readers["cached"] = CachedClips(rows, **options)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    broken = set()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(clips, generator=generator) % len(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of the loader
    try:
        for number, index in enumerate(progress(order.tolist(), "reading", clips)):
            # In turns and in random order, so that a cold file or a busy machine affects all alike.
            for turn in torch.randperm(len(readers), generator=generator).tolist():
                name, reader = list(readers.items())[turn]
                try:
                    if name == "cached":
                        reader.read(Key(0, index))  # decodes the clip at the first time
                    begin = time.perf_counter()
                    reader.read(Key(number, index))
                    seconds[name].append(time.perf_counter() - begin)
                except BrokenClip as error:
                    broken.add(str(error))
    finally:
        torch.set_num_threads(threads)
    for line in sorted(broken):
        print(f"broken     {line}")
    if not all(seconds.values()):
        raise ValueError(f"none of {clips} clips of {file} can be read")
    print(f"one process reads samples of {frames} x {size} x {size} (decode, crop, resize):")
    for name, times in seconds.items():
        median, slow = statistics.median(times), max(times)
        print(
            f"  {name:<11} {len(times) / sum(times):7.1f} clips/s, median {median * 1e3:.1f} ms, "
            f"longest {slow * 1e3:.1f} ms"
        )
    for name, reason in why_not.items():
        if reason:
            print(f"  {name:<11} cannot run here: {reason}")
    return len(broken)


def hide(pictures: Tensor, ratio: float, patch: int, generator: torch.Generator) -> Tensor:
    """Grey out a random share of the patches of every frame.

    Args:
        pictures: uint8 [T, H, W, 3], sides that are multiples of the patch.
        ratio: share of grey patches.
        patch: height and width of a patch.
        generator: random number generator.

    Returns:
        The pictures with grey patches, uint8 [T, H, W, 3].
    """
    T, H, W, _ = pictures.shape
    patches = (H // patch) * (W // patch)
    order = torch.rand(T, patches, generator=generator).argsort(dim=1)
    hidden = (order < round(patches * ratio)).view(T, H // patch, W // patch)
    hidden = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[..., None]
    return torch.where(hidden, torch.tensor(127, dtype=torch.uint8), pictures)


def _texts(row: Row) -> str:
    text = f"{Path(row.media).name}: {text_of(row)}"
    choices = f" [{' | '.join(row.options)}]" if row.options else ""
    answers = dict.fromkeys(row.answers or filter(None, [row.answer]))
    return text + choices + (f" - {', '.join(answers)}" if answers else "")


def _strip(pictures: Tensor) -> Tensor:
    """Frames side by side with a white border: uint8 [H + 4, T (W + 4), 3]."""
    framed = F.pad(pictures, (0, 0, 2, 2, 2, 2), value=255)
    return framed.transpose(0, 1).flatten(1, 2)


def _title(text: str, width: int) -> Tensor:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, 16), "white")
    ImageDraw.Draw(image).text((2, 2), text, "black")
    return torch.from_numpy(numpy.array(image))
