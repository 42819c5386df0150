"""Writing webdataset shards: clips are decoded once, made smaller, and stored with their captions.

A shard is a tar file of samples, in random order. `ShardStream` reads it, and so does any program
that reads webdataset. Shards are written by several processes, or by the nodes of a Ray cluster. A
shard gets its name when it is complete, so an interrupted run continues with the shards that are
missing.
"""

import dataclasses
import errno
import fractions
import hashlib
import io
import json
import math
import multiprocessing
import os
import socket
import tarfile
import urllib.parse
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy

from vidl.data import video
from vidl.data.dataset import kinds, require_single
from vidl.data.formats import IMAGES, VIDEOS, Row
from vidl.data.video import BrokenClip
from vidl.files import replaced
from vidl.progress import progress

# The options of a folder of shards, and the resolution of time in videos that are written.
SETTINGS, SECOND = "shards.json", 90_000
# Quality and speed of the encoder, and the distance of key frames: a reader that needs a few frames
# decodes little more than those. Without B-frames, packets are in the order of their frames.
ENCODER = {"crf": "23", "preset": "veryfast", "g": "16", "bf": "0"}
# Port of Ray's client server, and how long a cluster may take to accept a connection, in seconds.
CLIENT_PORT, PATIENCE = 10001, 5.0


@dataclass(frozen=True)
class Sharding:
    """How rows become shards.

    Args:
        short: the shorter side of videos and images, in pixels; smaller ones keep their size. None:
            files are copied as they are, except parts of videos, which are cut out.
        per_shard: samples of a shard.
        seed: seed of the order of the samples.

    Raises:
        ValueError: a number is out of range.
    """

    short: int | None = 256
    per_shard: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.short is not None and self.short < 16:
            raise ValueError(f"need short >= 16 pixels, got {self.short}")
        if self.per_shard < 1:
            raise ValueError(f"need per_shard >= 1, got {self.per_shard}")


@dataclass(frozen=True)
class Written:
    """What a folder of shards holds: numbers of shards and samples, bytes, and broken clips."""

    shards: int
    samples: int
    size: int
    broken: list[tuple[str, str]]  # name, reason


def write_shards(
    rows: Sequence[Row],
    to: Path,
    options: Sharding | None = None,
    *,
    workers: int = 1,
    ray: str | None = None,
) -> Written:
    """Write rows to shards `video-000000.tar`, ... and `image-000000.tar`, ... in a folder.

    Beside each shard, `video-000000.json` has its number of samples and its broken clips.

    Args:
        rows: rows from `annotations.load`; those without a caption count as broken.
        to: the folder; one with some of these shards is continued.
        options: see `Sharding`; default: as there.
        workers: processes.
        ray: address of a Ray cluster whose nodes write the shards, in place of `workers`; "auto":
            the cluster of this machine; "local": a new one on this machine. All nodes need vidl,
            the clips and the folder under the same names.

    Raises:
        ValueError: there are no rows, a row has two clips, workers < 1, there is no such cluster,
            or the folder has shards of other rows or options.
        ModuleNotFoundError, NoDecoder: PyAV cannot run here, or Ray is not installed.
        OSError: a shard cannot be written, or the nodes do not share the folder.
    """
    options = options or Sharding()
    if workers < 1:
        raise ValueError(f"need workers >= 1, got {workers}")
    if ray is not None:
        _check_reachable(ray)
    require_single(rows, "to write shards")
    video.choose_decoder("pyav")
    parts = _parts(rows, options)
    to.mkdir(parents=True, exist_ok=True)
    _check_settings(to, rows, options)
    for left in to.glob(".*.tar.*"):  # of an interrupted run
        left.unlink()
    missing = [(name, part) for name, part in parts if _report(to / f"{name}.tar") is None]
    job = _Job(rows, to, options)
    if ray is not None:
        for _ in progress(_on_cluster(job, missing, ray), "writing shards", len(missing)):
            pass
        lost = [name for name, _ in parts if _report(to / f"{name}.tar") is None]
        if lost:
            raise OSError(
                errno.ENOENT, f"{lost[0]} is missing: need a folder that all nodes share", str(to)
            )
    elif workers == 1:
        for item in progress(missing, "writing shards"):
            job(item)
    elif missing:
        # Not forked: FFmpeg's threads do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(min(workers, len(missing))) as pool:
            for _ in progress(pool.imap_unordered(job, missing), "writing shards", len(missing)):
                pass
    reports = [_report(to / f"{name}.tar") or {"samples": 0, "broken": []} for name, _ in parts]
    files = [file for name, _ in parts if (file := to / f"{name}.tar").exists()]
    return Written(
        shards=len(files),
        samples=sum(report["samples"] for report in reports),
        size=sum(file.stat().st_size for file in files),
        broken=[(name, reason) for report in reports for name, reason in report["broken"]],
    )


def _check_reachable(address: str) -> None:
    """Raise a ValueError unless a server listens at the address: Ray would try for minutes."""
    scheme, _, place = address.rpartition("://")
    # Ray finds or starts these clusters itself; other schemes belong to programs that extend it.
    if address in ("auto", "local") or scheme not in ("", "ray"):
        return
    try:
        parts = urllib.parse.urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port or (CLIENT_PORT if scheme else None)
    except ValueError:
        host = port = None
    if not host or port is None:
        raise ValueError(
            f"need ray (--ray) as auto, local, HOST:PORT or ray://HOST, got {address!r}"
        )
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"need ray (--ray) as the address of a running Ray cluster, got {address!r}: nothing "
            f"answers at port {port} of {host} ({reason}). `ray start --head` starts one; `ray "
            "status` there tells if it runs"
        ) from None


def _on_cluster(job: "_Job", items: list[tuple[str, list[int]]], address: str) -> Iterator[None]:
    """Write shards as tasks of a Ray cluster; yields when one is complete."""
    import ray

    new = not ray.is_initialized()
    if new:
        try:
            ray.init(address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises many classes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"need ray (--ray) as the address of a Ray cluster, got {address!r}: {reason}"
            ) from error
    try:
        write = ray.remote(_write)
        waiting, running = deque(items), list[Any]()
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < most:
                name, part = waiting.popleft()
                running.append(write.remote(_moved(job, part), (name, part)))
            complete, running = ray.wait(running)
            yield ray.get(complete[0])
    finally:
        if new:
            ray.shutdown()


def _moved(job: "_Job", part: list[int]) -> "_Job":
    """A job with some rows, whose files have absolute names.

    Other nodes have other current folders, and the table of the rows may be in the cache of this
    machine.
    """
    rows = {
        index: dataclasses.replace(row, media=os.path.abspath(row.media))
        for index, row in ((index, job.rows[index]) for index in part)
    }
    return dataclasses.replace(job, rows=rows, to=job.to.absolute())


def _write(job: "_Job", item: tuple[str, list[int]]) -> None:
    job(item)


def _parts(rows: Sequence[Row], options: Sharding) -> list[tuple[str, list[int]]]:
    """Name of each shard, and its rows; a shard has videos or images."""
    if not len(rows):
        raise ValueError("need rows to write, got none")
    order = numpy.random.default_rng(options.seed).permutation(len(rows))
    images, parts = kinds(rows)[order], []
    for kind, chosen in (("video", order[~images]), ("image", order[images])):
        for number, begin in enumerate(range(0, len(chosen), options.per_shard)):
            part = chosen[begin : begin + options.per_shard].tolist()
            parts.append((f"{kind}-{number:06}", part))
    return parts


def _check_settings(to: Path, rows: Sequence[Row], options: Sharding) -> None:
    some = numpy.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int).tolist()
    content = json.dumps([dataclasses.astuple(rows[i]) for i in some])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    settings = dataclasses.asdict(options) | {"rows": len(rows), "digest": digest}
    file = to / SETTINGS
    if not file.exists():
        with replaced(file) as unfinished:
            unfinished.write_text(json.dumps(settings) + "\n")
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}; remove the folder or choose another") from error
    changed = {n: before.get(n) for n in settings if before.get(n) != settings[n]}
    if changed:
        now = {name: settings[name] for name in changed}
        raise ValueError(f"{to} has shards with {changed}, got {now}: choose another folder")


def _report(shard: Path) -> dict[str, Any] | None:
    """What was written to a shard; None: it is not complete."""
    try:
        report: dict[str, Any] = json.loads(shard.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return report if shard.exists() or report["samples"] == 0 else None


@dataclass(frozen=True)
class _Job:
    """Writes a shard, given its name and rows; sent to other processes."""

    rows: Sequence[Row] | Mapping[int, Row]
    to: Path
    options: Sharding

    def __call__(self, item: tuple[str, list[int]]) -> None:
        name, part = item
        samples, broken = 0, []
        shard = self.to / f"{name}.tar"
        with replaced(shard) as unfinished:
            with tarfile.open(unfinished, "w") as tar:
                for index in part:
                    try:
                        media, suffix = self._media(self.rows[index])
                    except BrokenClip as error:
                        broken.append((error.name, error.reason))
                        continue
                    _add(tar, f"{index:09}.{suffix}", media)
                    _add(tar, f"{index:09}.json", _facts(self.rows[index]))
                    samples += 1
            with replaced(shard.with_suffix(".json")) as report:
                report.write_text(json.dumps({"samples": samples, "broken": broken}) + "\n")
        if samples == 0:
            shard.unlink()

    def _media(self, row: Row) -> tuple[bytes, str]:
        """The file of a clip in the shard, and its suffix."""
        if not row.captions:
            raise BrokenClip(row.media, "no caption")
        short, part = self.options.short, row.start is not None or row.end is not None
        if short is None and not (part and row.kind == "video"):
            suffix = PurePath(row.media).suffix[1:].lower()
            if suffix not in (IMAGES if row.kind == "image" else VIDEOS):
                raise BrokenClip(row.media, f"webdataset has no name for {suffix!r} files")
            video.read_clip(row.media, 1, decoder="pyav")  # a broken one is no sample
            return Path(row.media).read_bytes(), suffix
        frames = video.frames(row.media, start=row.start, end=row.end)
        if row.kind == "image":
            return _jpeg(next(frames)[1], short), "jpg"
        return _mp4(row.media, frames, short), "mp4"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _facts(row: Row) -> bytes:
    """The annotations of a row as JSON; its file is named without folders."""
    facts: dict[str, Any] = {"caption": list(row.captions), "file": PurePath(row.media).name}
    for name in ("id", "question", "answer", "start", "end"):
        if getattr(row, name) not in (None, ""):
            facts[name] = getattr(row, name)
    if row.answers:
        facts["answer"] = list(row.answers)
    return json.dumps(facts, ensure_ascii=False).encode()


def _smaller(picture: numpy.ndarray, short: int | None, multiple: int = 1) -> tuple[int, int]:
    """Height and width with a shorter side of at most `short`, as multiples of a number."""
    height, width = picture.shape[:2]
    scale = 1.0 if short is None else min(1.0, short / min(height, width))
    new = (max(1, round(side * scale / multiple)) * multiple for side in (height, width))
    return next(new), next(new)


def _jpeg(picture: numpy.ndarray, short: int | None) -> bytes:
    from PIL import Image

    height, width = _smaller(picture, short)
    image = Image.fromarray(numpy.ascontiguousarray(picture))
    content = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(content, "jpeg", quality=95)
    return content.getvalue()


def _mux(container: Any, packets: list[Any], durations: deque[int]) -> None:
    """Write packets with the durations of their frames, which the encoder does not pass on."""
    for packet in packets:
        packet.duration = durations.popleft()
        container.mux(packet)


def _with_durations(
    frames: Iterator[tuple[float, numpy.ndarray]],
) -> Iterator[tuple[float, numpy.ndarray, float]]:
    """Frames with the time until the next one; the last is shown as long as the shortest."""
    last, shortest = None, math.inf
    for frame in frames:
        if last is not None:
            shortest = min(shortest, frame[0] - last[0])
            yield *last, frame[0] - last[0]
        last = frame
    if last is not None:
        yield *last, shortest if shortest < math.inf else 1 / 30


def _mp4(name: str, frames: Iterator[tuple[float, numpy.ndarray]], short: int | None) -> bytes:
    """Encode frames at their times, in H.264 without sound."""
    import av

    content = io.BytesIO()
    stream: Any = None
    durations: deque[int] = deque()  # of the frames in the encoder
    with av.open(content, "w", format="mp4") as container:
        for seconds, picture, duration in _with_durations(frames):
            if stream is None:
                shape = picture.shape
                height, width = _smaller(picture, short, multiple=2)
                stream = container.add_stream("libx264", rate=30, options=ENCODER)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.codec_context.time_base = fractions.Fraction(1, SECOND)
                stream.thread_count = 1  # the processes share the cores
            if picture.shape != shape:
                raise BrokenClip(name, f"the frame at {seconds:.2f} s has another size")
            frame = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(width, height, "yuv420p", interpolation="AREA")
            frame.pts, frame.time_base = round(seconds * SECOND), fractions.Fraction(1, SECOND)
            durations.append(round(duration * SECOND))
            _mux(container, stream.encode(frame), durations)
        if stream is None:
            raise BrokenClip(name, "no frames")
        _mux(container, stream.encode(None), durations)
    return content.getvalue()
