"""Frames of a video or a picture, as uint8: which instants are read, and by which decoder.

Instants, not frame numbers, choose the frames: a clip is cut into equal spans of time and one
instant of each is shown, so variable frame rates and headers that miscount need no care.
"""

import bisect
import functools
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

Source = str | PathLike[str] | bytes

# "auto" tries them in this order: PyAV is faster when it skips packets that it need not decode, and
# it reports damaged frames (docs/contributors/measured.md, 2026-11-22).
DECODERS = ("pyav", "torchcodec")

# Their decoders leave out, one packet at a time, frames that no other frame refers to.
SKIPPING = ("h264", "hevc", "mpeg2video", "mpeg4")


class BrokenClip(RuntimeError):
    """A file that cannot be read as a clip: its name, and what is wrong with it.

    Args:
        name: the file.
        reason: what is wrong.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Facts:
    """What a file holds, found by decoding all of it."""

    frames: int
    seconds: float
    declared: float | None  # what the header says, in seconds
    width: int
    height: int

    @property
    def truncated(self) -> bool:
        """Whether the header promises at least a tenth, and half a second, more than there is."""
        missing = (self.declared or 0) - self.seconds
        return missing > max(0.5, 0.1 * self.seconds)


def generator(seed: int, epoch: int, sample: int, purpose: str = "") -> random.Random:
    """The random numbers of one sample in one epoch: the same in any worker, and after a resume.

    Args:
        seed: of the run.
        epoch: how often the data were seen before.
        sample: the row of the data set.
        purpose: any word; other words give other numbers.
    """
    return random.Random(f"{seed} {epoch} {sample} {purpose}")


def instants(
    begin: float, end: float, frames: int, rng: random.Random | None = None
) -> list[float]:
    """One instant of each of `frames` equal spans of [begin, end).

    instant i = begin + (i + u_i) (end - begin) / frames,  u_i = 1/2, or uniform in [0, 1)

    Args:
        begin: where the clip begins, in any unit.
        end: where it ends.
        frames: how many spans, T.
        rng: draws a random instant of each span (`rand`); without it the centres (`middle`).

    Returns:
        T instants, ascending.

    Raises:
        ValueError: fewer than one frame.

    Source: Temporal Segment Networks, arXiv 1608.00859; `rand` and `middle` of Frozen in Time.
    """
    if frames < 1:
        raise ValueError(f"need at least 1 frame, got {frames}")
    span = end - begin  # divided last: exact where an instant is that of a frame
    return [begin + (i + (rng.random() if rng else 0.5)) * span / frames for i in range(frames)]


def read_clip(
    source: Source,
    frames: int,
    *,
    rng: random.Random | None = None,
    start: float | None = None,
    end: float | None = None,
    stream: int | None = None,
    decoder: str = "auto",
) -> Tensor:
    """Read `frames` pictures spread over a video, or over a part of it.

    A still picture, or a video with fewer frames than asked for, repeats what it has. A truncated
    file is read as far as it goes; `inspect` tells.

    Args:
        source: a file, or the bytes of one.
        frames: how many, T.
        rng: random instants (`rand`); without it the middle of each span (`middle`).
        start: where the part begins, in seconds; default: the first frame.
        end: where it ends, in seconds; default: the end of the last frame.
        stream: index of the video stream; default: the one that FFmpeg calls best.
        decoder: "pyav", "torchcodec" or "auto".

    Returns:
        The pictures, upright, RGB: uint8 [T, H, W, 3]. `as_clip` views it as [3, T, H, W].

    Raises:
        BrokenClip: the file cannot be read, has no such part, or a frame is damaged.
        RuntimeError: the decoder that was asked for cannot run here.
        ValueError: fewer than one frame, or no such decoder.
    """
    if frames < 1:
        raise ValueError(f"need at least 1 frame, got {frames}")
    part = Part(frames, rng, start, end)
    read = {"pyav": _read_by_pyav, "torchcodec": _read_by_torchcodec}[choose_decoder(decoder)]
    try:
        return read(source, part, stream)
    # What the libraries raise on junk; av.error.FFmpegError is an OSError or a ValueError.
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise BrokenClip(name_of(source), reason_of(error)) from error


def inspect(source: Source, *, stream: int | None = None) -> Facts:
    """Decode every frame of a video or picture with PyAV, and keep none.

    Args:
        source: a file, or the bytes of one.
        stream: as `read_clip` has it.

    Returns:
        How many frames there are, of which size, and how long they last.

    Raises:
        BrokenClip: the file cannot be read, or frames of it are damaged.
    """
    times, damaged, width, height = [], 0, 0, 0
    try:
        with _open(source) as container:
            video = _stream(container, stream)
            packets = _packets(container, video, 0, math.inf)
            for time, frame in _decode(video, packets):
                times.append(time)
                damaged += frame.is_corrupt
                width, height = frame.width, frame.height
            if not times:
                raise ValueError("it has no frames")
            ticks = max(times) + _last_ticks(video, packets) - min(times)
            seconds, declared = float(ticks * video.time_base), _declared(container, video)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise BrokenClip(name_of(source), reason_of(error)) from error
    if damaged:
        raise BrokenClip(name_of(source), f"{damaged} of {len(times)} frames are damaged")
    return Facts(len(times), seconds, declared, width, height)


def as_clip(pictures: Tensor) -> Tensor:
    """View pictures [..., T, H, W, 3] as a clip [..., 3, T, H, W], as the ops take it; no copy."""
    return pictures.movedim(-1, -4)


def name_of(source: Source) -> str:
    """What messages call a source."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def reason_of(error: Exception) -> str:
    """One line that says what went wrong, without the file's name, which stands before it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


@dataclass(frozen=True)
class Part:
    """Which instants of a video are wanted; the arguments of `read_clip` have these names."""

    frames: int
    rng: random.Random | None
    start: float | None
    end: float | None

    def instants(self, begin: float, end: float, second: float = 1) -> list[float]:
        """The wanted instants of a video from `begin` to `end`, which count `second` a second."""
        first = begin if self.start is None else max(begin, self.start * second)
        last = end if self.end is None else min(end, self.end * second)
        if first >= last:
            wanted = f"{self.start or 0:g} s to {math.inf if self.end is None else self.end:g} s"
            has = f"{begin / second:g} s to {end / second:g} s"
            raise ValueError(f"need frames from {wanted}, it has those from {has}")
        return instants(first, last, self.frames, self.rng)


# PyAV. All packets (compressed frames) of the part are read before the first is decoded, so that
# the instant of each frame is known, and packets on which no wanted frame depends are left out.


def _open(source: Source) -> Any:
    import av

    return av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))


def _stream(container: Any, index: int | None) -> Any:
    if index is None:
        found = container.streams.best("video")
        if found is None:
            raise ValueError("it has no video stream")
    else:
        videos = {stream.index: stream for stream in container.streams.video}
        if index not in videos:
            raise ValueError(f"need a video stream among {sorted(videos)}, got {index}")
        found = videos[index]
    found.codec_context.thread_count = 1  # the workers of a loader share the cores already
    return found


def _read_by_pyav(source: Source, part: Part, index: int | None) -> Tensor:
    import numpy

    with _open(source) as container:
        stream = _stream(container, index)
        packets = _packets(container, stream, part.start or 0, part.end or math.inf)
        pictures = None
        if _timed(stream, packets):
            pictures = _pictures(stream, packets, part, _times(packets), leave_out=True)
        if pictures is None:  # also if a packet's frame is not shown, as the hidden ones of VP8
            times = sorted(time for time, _ in _decode(stream, packets))
            pictures = _pictures(stream, packets, part, times, leave_out=False)
        if pictures is None:
            raise ValueError("its frames are others when they are decoded again")
    return torch.from_numpy(numpy.stack(pictures))


def _pictures(
    stream: Any, packets: list[Any], part: Part, times: list[int], *, leave_out: bool
) -> list[Any] | None:
    """The wanted pictures, of frames shown at these times; None if one is not there."""
    import numpy

    if not times:
        raise ValueError("it has no frames")
    scale, origin = stream.time_base, stream.start_time or 0
    ends = times[0] - origin, times[-1] + _last_ticks(stream, packets) - origin
    ticks = part.instants(*ends, second=float(1 / scale))
    wanted = [times[max(0, bisect.bisect_right(times, origin + t) - 1)] for t in ticks]
    pictures: dict[int, Any] = {}
    for time, frame in _decode(stream, packets, set(wanted) if leave_out else None):
        if time not in wanted:
            continue
        at = f"the frame at {float((time - origin) * scale):.2f} s"
        if frame.is_corrupt:
            raise ValueError(f"{at} is damaged")
        picture = numpy.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        if pictures and picture.shape != next(iter(pictures.values())).shape:
            raise ValueError(f"{at} has another size than those before it")
        pictures[time] = picture
    return [pictures[time] for time in wanted] if pictures.keys() >= set(wanted) else None


def _packets(container: Any, stream: Any, start: float, end: float) -> list[Any]:
    """The packets of a part, in the order of the file and from a key frame on."""
    origin, second = stream.start_time or 0, 1 / stream.time_base
    margin = second  # frames are shown later than their packets come
    # where frames have no times they are counted, from the first one on
    if start > 1 and stream.start_time is not None and container.format.name != "avi":
        container.seek(int(origin + start * second - margin), stream=stream)
    stop = origin + end * second + margin
    found: list[Any] = []
    try:
        for packet in container.demux(stream):
            if packet.dts is not None and packet.dts > stop:
                break
            # the one at the end of a truncated file is not whole
            if packet.size and not packet.is_corrupt and (found or packet.is_keyframe):
                found.append(packet)
    except (OSError, ValueError):
        if not found:  # else what there is of the file can be read
            raise
    return found


def _timed(stream: Any, packets: list[Any]) -> bool:
    """Whether packets know when their frames are shown; in AVI they know the order only."""
    has_times = stream.container.format.name != "avi"
    return has_times and all(packet.pts is not None for packet in packets)


def _times(packets: list[Any]) -> list[int]:
    """When frames are shown, ascending, in ticks of the stream, as the packets tell."""
    return sorted(packet.pts for packet in packets if not packet.is_discard)


def _ticks(stream: Any) -> int:
    """How long a frame is shown, where nothing else tells."""
    rate = stream.average_rate or stream.guessed_rate or 25
    return max(1, round(1 / (rate * stream.time_base)))


def _last_ticks(stream: Any, packets: list[Any]) -> int:
    """How long the last frame is shown."""
    if not _timed(stream, packets):
        return _ticks(stream)
    shown = ((packet.pts, packet.duration) for packet in packets if not packet.is_discard)
    return max(shown, default=(0, 0))[1] or _ticks(stream)


def _decode(
    stream: Any, packets: list[Any], wanted: set[int] | None = None
) -> Iterator[tuple[int, Any]]:
    """Decode all frames, or at least those shown at the wanted times, and when each is shown."""
    context, timed = stream.codec_context, _timed(stream, packets)
    number = 0
    for run in [packets] if wanted is None else _runs(packets, wanted):
        context.flush_buffers()
        for frame in _decode_run(context, run, wanted):
            yield frame.pts if timed else number * _ticks(stream), frame
            number += 1


def _runs(packets: list[Any], wanted: set[int]) -> Iterator[list[Any]]:
    """Runs of packets, each from a key frame on, that hold the wanted frames."""
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    spans = []
    for number, packet in enumerate(packets):
        if packet.pts in wanted:
            # frames behind a key frame, but shown before it, refer to the key frame before
            before = (k for k in reversed(keys[: bisect.bisect_right(keys, number)]))
            key = next((k for k in before if packets[k].pts <= packet.pts), 0)
            spans.append((key, number))
    begin, last = 0, -1
    for key, number in sorted(spans):
        if key > last + 1:
            yield packets[begin : last + 1]
            begin = key
        last = max(last, number)
    yield packets[begin : last + 1]


def _decode_run(context: Any, packets: list[Any], wanted: set[int] | None = None) -> Iterator[Any]:
    """All frames of these packets, but for some that are not wanted and that none refers to."""
    for packet in packets:
        skip = wanted is not None and packet.pts not in wanted and context.name in SKIPPING
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        yield from context.decode(packet)
    yield from context.decode(None)


def _declared(container: Any, stream: Any) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


# torchcodec


def _read_by_torchcodec(source: Source, part: Part, index: int | None) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(
        source if isinstance(source, bytes) else str(source),
        stream_index=index,
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
    )
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    if begin is None or end is None:
        raise ValueError("it has no frames")
    # its frames begin at rounded seconds: what begins with a frame must not fall before it
    seconds = [min(instant + 1e-6, end - 1e-6) for instant in part.instants(begin, end)]
    return decoder.get_frames_played_at(seconds).data


# Which decoder


def choose_decoder(decoder: str = "auto") -> str:
    """Name the decoder that a call runs on.

    Args:
        decoder: "pyav", "torchcodec" or "auto".

    Returns:
        One of `DECODERS`.

    Raises:
        ValueError: unknown decoder.
        ModuleNotFoundError: "auto", and PyAV is not installed.
        RuntimeError: the decoder, or with "auto" every decoder, cannot run here; gives the reason.
    """
    if decoder != "auto" and decoder not in DECODERS:
        raise ValueError(f"need a decoder among {', '.join(DECODERS)} or auto, got {decoder!r}")
    asked = DECODERS if decoder == "auto" else (decoder,)
    reasons = {name: why_not(name) for name in asked}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if decoder == "auto":
        import av  # noqa: F401  if it is not installed, the error names the package
    reasons = {name: why_not(name) for name in DECODERS}
    raise RuntimeError(
        f"decoder {decoder!r} cannot run here: "
        + "; ".join(f"{name}: {reason or 'can'}" for name, reason in reasons.items())
    )


@functools.cache
def why_not(decoder: str) -> str | None:
    """The reason why a decoder cannot decode here, or None: it is given a clip.

    Args:
        decoder: one of `DECODERS`.
    """
    # two grey frames, uncompressed: enough to find FFmpeg missing, which importing does not
    clip = b"YUV4MPEG2 W16 H16 F1:1 Ip A1:1 C420jpeg\n" + 2 * (b"FRAME\n" + bytes(16 * 16 * 3 // 2))
    probe = {"pyav": _frames_by_pyav, "torchcodec": _frames_by_torchcodec}[decoder]
    try:
        count = probe(clip)
        return None if count == 2 else f"decoded {count} frames of 2"
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever a library that is half there raises is the reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _frames_by_pyav(clip: bytes) -> int:
    import av

    av.codec.Codec("h264", "r")
    with av.open(io.BytesIO(clip)) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames_by_torchcodec(clip: bytes) -> int:
    from torchcodec.decoders import VideoDecoder

    return sum(1 for _ in VideoDecoder(clip))
