"""Read frames of a video or image as uint8.

Frames are chosen by time, not by number: `vidl.data.sampling` chooses instants, such as one of each
equal span of a clip, and the frame shown at each instant is read. So variable frame rates and wrong
frame counts do not matter.
"""

import bisect
import contextlib
import functools
import importlib.util
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vidl.data.containers import Source, has_index, open_container, path_of, video_stream
from vidl.data.pictures import (
    MIRRORED,
    UPRIGHT,
    check_whole,
    is_still,
    orientation_of,
    orientation_of_still,
)
from vidl.data.sampling import SPANS, Sampling

# "auto" tries them in this order: PyAV is faster when it skips packets that it need not decode, and
# it reports damaged frames (docs/contributors/measured.md, 2026-11-22).
DECODERS = ("pyav", "torchcodec")

# Codecs whose decoder can skip a packet if no other frame refers to its frame.
SKIPPING = ("h264", "hevc", "mpeg2video", "mpeg4")

# Decoding times never decrease in one recording; seconds that rounding and damage may cause.
JOINED = 0.25


class BrokenClip(RuntimeError):
    """A file that cannot be read as a clip.

    Args:
        name: the file.
        reason: why it cannot be read.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both arguments, for pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class NoDecoder(RuntimeError):
    """No decoder of videos can run here."""


@dataclass(frozen=True)
class Facts:
    """Properties of a video, measured by decoding all of it."""

    frames: int
    seconds: float
    declared: float | None  # duration in the header, in seconds
    width: int
    height: int

    @property
    def truncated(self) -> bool:
        """Whether the header says more than 10 % and 0.5 s more than the file has."""
        missing = (self.declared or 0) - self.seconds
        return missing > max(0.5, 0.1 * self.seconds)


def generator(seed: int, epoch: int, sample: int, purpose: str = "") -> random.Random:
    """The random generator of a sample in an epoch; equal in any worker and after resumption.

    Args:
        seed: seed of the run.
        epoch: number of the epoch.
        sample: row of the data set.
        purpose: any text; different purposes give independent numbers.
    """
    return random.Random(f"{seed} {epoch} {sample} {purpose}")


def read_clip(
    source: Source,
    frames: int,
    *,
    rng: random.Random | None = None,
    start: float | None = None,
    end: float | None = None,
    stream: int | None = None,
    decoder: str = "auto",
    sampling: Sampling = SPANS,
) -> Tensor:
    """Read `frames` frames spread over a video, or over a part of it.

    Frames of an image, or of a video with fewer frames than requested, are repeated. A truncated
    video is read up to its end; `inspect` detects truncation. A truncated picture, text, a
    playlist, the cover picture of a sound file, and recordings that were joined with `cat` are
    broken; a part of the first of joined recordings can be read.

    Args:
        source: the name of a regular file (no URL), or the bytes of a file.
        frames: number of frames, T.
        rng: draws random instants (`rand`); None: the middle of each span (`middle`).
        start: begin of the part, in seconds; default: the first frame.
        end: end of the part, in seconds; default: the end of the last frame.
        stream: index of the video stream; default: FFmpeg's best stream.
        decoder: "pyav", "torchcodec" or "auto".
        sampling: how the instants are chosen.

    Returns:
        The frames, upright, RGB: uint8 [T, H, W, 3]. `as_clip` views them as [3, T, H, W].

    Raises:
        BrokenClip: the file cannot be read, does not have the part, is shorter than a view, or a
            frame is damaged.
        ModuleNotFoundError, NoDecoder: the decoder cannot run here; see `choose_decoder`.
        TypeError: the source is neither a file name nor bytes, or a number is something else.
        ValueError: frames < 1, `start` or `end` is not finite, or unknown decoder.
    """
    if frames < 1:
        raise ValueError(f"need at least 1 frame, got {frames}")
    _check_source(source)
    part = Part(frames, rng, _seconds("start", start), _seconds("end", end), sampling)
    read = {"pyav": _read_by_pyav, "torchcodec": _read_by_torchcodec}[choose_decoder(decoder)]
    with _breaking(source):
        return read(source, part, stream)


def inspect(source: Source, *, stream: int | None = None) -> Facts:
    """Decode every frame of a video or image with PyAV, without keeping them.

    Args:
        source: a file name, or the bytes of a file.
        stream: see `read_clip`.

    Returns:
        Number and size of the frames, and the duration.

    Raises:
        BrokenClip: the file cannot be read, or frames of it are damaged.
    """
    _check_source(source)
    times, damaged, width, height = [], 0, 0, 0
    with _breaking(source), open_container(source) as container:
        video = video_stream(container, stream)
        packets = _packets(container, video, 0, math.inf)
        for time, frame in _decode(video, packets):
            times.append(time)
            damaged += frame.is_corrupt
            width, height = frame.width, frame.height
        if not times:
            raise ValueError("no frames")
        ticks = max(times) + _last_ticks(video, packets) - min(times)
        seconds, declared = float(ticks * video.time_base), _declared(container, video)
    if damaged:
        raise BrokenClip(name_of(source), f"{damaged} of {len(times)} frames are damaged")
    return Facts(len(times), seconds, declared, width, height)


def frames(
    source: Source, *, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, Any]]:
    """Decode all frames of a part of a video, or an image, with PyAV.

    Args:
        source, start, end: see `read_clip`.

    Yields:
        Time after the begin of the part, in seconds, and the frame: uint8 [H, W, 3], a NumPy array.
        The first frame has time 0; it is the one that is shown when the part begins.

    Raises:
        BrokenClip: the file cannot be read, has no frame in the part, or a frame is damaged.
    """
    from av.video.reformatter import VideoReformatter

    _check_source(source)
    part = Part(1, None, _seconds("start", start), _seconds("end", end))
    with _breaking(source), open_container(source) as container:
        stream = video_stream(container, None)
        packets = _packets(container, stream, part.start or 0, part.end or math.inf)
        times = _times(packets) if _timed(stream, packets) else [0]
        origin = stream.start_time if stream.start_time is not None else min(times, default=0)
        second = float(1 / stream.time_base)
        begin, stop = (part.start or 0) * second, math.inf if end is None else end * second
        exif = orientation_of_still(bytes(packets[0])) if packets and is_still(container) else None
        reformatter = VideoReformatter()  # see _pictures

        def picture(frame: Any) -> Any:
            if frame.is_corrupt:
                raise ValueError("a frame is damaged")
            upright = UPRIGHT[exif or orientation_of(frame)]
            return upright(reformatter.reformat(frame, format="rgb24").to_ndarray())

        first, shown, time = True, None, 0.0
        for tick, frame in _decode(stream, packets):
            time = tick - origin
            if time >= stop:
                break
            if time <= begin:
                shown = frame
                continue
            if first:
                yield 0.0, picture(shown or frame)
                first = False
                if shown is None:
                    continue
            yield (time - begin) / second, picture(frame)
        if first:
            part.instants(0, time + _last_ticks(stream, packets), second)  # an error if it is empty
            if shown is None:
                raise ValueError("no frames")
            yield 0.0, picture(shown)


def as_clip(pictures: Tensor) -> Tensor:
    """View frames [..., T, H, W, 3] as a clip [..., 3, T, H, W] for the ops; no copy."""
    return pictures.movedim(-1, -4)


def name_of(source: Source) -> str:
    """The name of a source in messages."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def reason_of(error: Exception) -> str:
    """The message of an error in one line, without the name of the file."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def _breaking(source: Source) -> Iterator[None]:
    """Raise any error of a decoder as BrokenClip: FFmpeg's have no base class but Exception."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise BrokenClip(name_of(source), reason_of(error)) from error


def _check_source(source: object) -> None:
    if not isinstance(source, (str, bytes, PathLike)):
        raise TypeError(f"need source as a file name or bytes, got {type(source).__name__}")


def _seconds(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"need {name} in seconds, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"need {name} in finite seconds, got {value}")
    return value


@dataclass(frozen=True)
class Part:
    """The requested instants of a video; the fields are arguments of `read_clip`."""

    frames: int
    rng: random.Random | None
    start: float | None
    end: float | None
    sampling: Sampling = SPANS

    def instants(self, begin: float, end: float, second: float = 1) -> list[float]:
        """The requested instants of a video from `begin` to `end`, in units of 1/`second` s."""
        first = begin if self.start is None else max(begin, self.start * second)
        last = end if self.end is None else min(end, self.end * second)
        if first >= last:
            wanted = f"{self.start or 0:g} s to {math.inf if self.end is None else self.end:g} s"
            given = f"{begin / second:g} s to {end / second:g} s"
            raise ValueError(f"need frames from {wanted}, got a video from {given}")
        return self.sampling.instants(first, last, self.frames, self.rng, second)


# The functions for PyAV read all packets (compressed frames) of the part before they decode the
# first one. So the time of each frame is known, and packets that no wanted frame needs are skipped.


def _read_by_pyav(source: Source, part: Part, index: int | None) -> Tensor:
    import numpy

    with open_container(source) as container:
        stream = video_stream(container, index)
        packets = _packets(container, stream, part.start or 0, part.end or math.inf)
        pictures = None
        if _timed(stream, packets):
            pictures = _pictures(stream, packets, part, _times(packets), skip=True)
        if pictures is None:  # no times, or hidden frames as in VP8
            times = sorted(time for time, _ in _decode(stream, packets))
            pictures = _pictures(stream, packets, part, times, skip=False)
        if pictures is None:
            raise ValueError("decoding twice gives different frames")
    return torch.from_numpy(numpy.stack(pictures))


def _pictures(
    stream: Any, packets: list[Any], part: Part, times: list[int], *, skip: bool
) -> list[Any] | None:
    """The requested frames, given the times of all frames; None if one is missing."""
    from av.video.reformatter import VideoReformatter

    if not times:
        raise ValueError("no frames")
    scale = stream.time_base
    origin = times[0] if stream.start_time is None else stream.start_time
    ends = times[0] - origin, times[-1] + _last_ticks(stream, packets) - origin
    ticks = part.instants(*ends, second=float(1 / scale))
    wanted = [times[max(0, bisect.bisect_right(times, origin + t) - 1)] for t in ticks]
    exif = orientation_of_still(bytes(packets[0])) if is_still(stream.container) else None
    # orientation_of leaves a frame in a reference cycle of PyAV. A frame's own reformatter has
    # threads; a forked worker that collects the cycle would wait for them for ever.
    reformatter = VideoReformatter()
    pictures: dict[int, Any] = {}
    for time, frame in _decode(stream, packets, set(wanted) if skip else None):
        if time not in wanted:
            continue
        at = f"the frame at {float((time - origin) * scale):.2f} s"
        if frame.is_corrupt:
            raise ValueError(f"{at} is damaged")
        exif = exif or orientation_of(frame)
        picture = UPRIGHT[exif](reformatter.reformat(frame, format="rgb24").to_ndarray())
        if pictures and picture.shape != next(iter(pictures.values())).shape:
            raise ValueError(f"{at} has another size than the frames before it")
        pictures[time] = picture
    return [pictures[time] for time in wanted] if pictures.keys() >= set(wanted) else None


def _packets(container: Any, stream: Any, start: float, end: float) -> list[Any]:
    """The packets of a part in file order, from a key frame shown at `start` or earlier."""
    origin, second = stream.start_time or 0, 1 / stream.time_base
    begin, stop = origin + start * second, origin + (end + 1) * second  # shown after they arrive
    # frames without times are counted from the first frame of the file
    if start > 1 and stream.start_time is not None and container.format.name != "avi":
        packets = _packets_from(container, stream, begin, stop)
        if _timed(stream, packets):
            return packets
        container.seek(int(origin - second), stream=stream)
    return _packets_here(container, stream, stop)


def _packets_from(container: Any, stream: Any, begin: float, stop: float) -> list[Any]:
    """The packets from the last key frame at `begin` or earlier, up to `stop`, in ticks."""
    origin, margin = stream.start_time, 1 / stream.time_base
    # Without an index, FFmpeg searches a time in the bytes of the file. In joined recordings it
    # finds any of them, so such a file is read from its begin.
    if has_index(container):
        # FFmpeg may seek to a frame that is no key frame, and the next one may be after `begin`
        while begin - margin > origin:
            container.seek(int(begin - margin), stream=stream)
            packets = _packets_here(container, stream, stop)
            if packets and packets[0].pts is not None and packets[0].pts <= begin:
                return packets
            margin *= 4
        container.seek(int(origin - 1 / stream.time_base), stream=stream)
    return _packets_here(container, stream, stop, begin)


def _packets_here(container: Any, stream: Any, stop: float, begin: float = -math.inf) -> list[Any]:
    """The packets from the next key frame, or the last one at `begin`, up to `stop`, in ticks."""
    packets: list[Any] = []
    last, ended = -math.inf, True
    try:
        for packet in container.demux(stream):
            if packet.dts is not None:
                if packet.dts < last - JOINED / stream.time_base:
                    seconds = float((last - packet.dts) * stream.time_base)
                    raise _Joined(
                        f"joined recordings: times go back by {seconds:.1f} s in the file"
                    )
                last = packet.dts
                if packet.dts > stop:
                    ended = False
                    break
            # the last packet of a truncated file is incomplete
            if packet.size and not packet.is_corrupt and (packets or packet.is_keyframe):
                if packet.is_keyframe and packet.pts is not None and packet.pts <= begin:
                    packets.clear()
                packets.append(packet)
    except _Joined:
        raise
    except Exception:  # of the demuxer
        if not packets:  # otherwise use what could be read
            raise
    if ended:
        check_whole(container, stream.codec_context.name, packets)
    return packets


class _Joined(ValueError):
    """Two recordings in one file, as of `cat a.ts b.ts`: an instant has several frames."""


def _timed(stream: Any, packets: list[Any]) -> bool:
    """Whether packets have the times of their frames; in AVI they only have an order."""
    has_times = stream.container.format.name != "avi"
    return has_times and all(packet.pts is not None for packet in packets)


def _times(packets: list[Any]) -> list[int]:
    """The times of the frames in ticks of the stream, ascending, from the packets."""
    return sorted(packet.pts for packet in packets if not packet.is_discard)


def _ticks(stream: Any) -> int:
    """Duration of a frame in ticks, from the frame rate."""
    rate = stream.average_rate or stream.guessed_rate or 25
    return max(1, round(1 / (rate * stream.time_base)))


def _last_ticks(stream: Any, packets: list[Any]) -> int:
    """Duration of the last frame in ticks."""
    if not _timed(stream, packets):
        return _ticks(stream)
    shown = ((packet.pts, packet.duration) for packet in packets if not packet.is_discard)
    return max(shown, default=(0, 0))[1] or _ticks(stream)


def _decode(
    stream: Any, packets: list[Any], wanted: set[int] | None = None
) -> Iterator[tuple[int, Any]]:
    """Time and frame of all frames, or at least of those shown at the wanted times."""
    context, timed = stream.codec_context, _timed(stream, packets)
    number = 0
    for run in [packets] if wanted is None else _runs(packets, wanted):
        context.flush_buffers()
        for frame in _decode_run(context, run, wanted):
            yield frame.pts if timed else number * _ticks(stream), frame
            number += 1


def _runs(packets: list[Any], wanted: set[int]) -> Iterator[list[Any]]:
    """Runs of packets with the wanted frames; each run starts at a key frame."""
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    spans = []
    for number, packet in enumerate(packets):
        if packet.pts in wanted:
            # frames after a key frame but shown before it refer to the previous key frame
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
    """The frames of these packets, without unwanted frames that no other frame refers to."""
    for packet in packets:
        skip = wanted is not None and packet.pts not in wanted and context.name in SKIPPING
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        yield from context.decode(packet)
    yield from context.decode(None)


def _declared(container: Any, stream: Any) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _read_by_torchcodec(source: Source, part: Part, index: int | None) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    _check_for_torchcodec(source, index)
    decoder = VideoDecoder(
        source if isinstance(source, bytes) else path_of(source),
        stream_index=index,
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
    )
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    if begin is None or end is None:
        raise ValueError("no frames")
    # torchcodec rounds the times of frames: an instant at a frame must not fall before it
    seconds = [min(instant + 1e-6, end - 1e-6) for instant in part.instants(begin, end)]
    return decoder.get_frames_played_at(seconds).data


def _check_for_torchcodec(source: Source, index: int | None) -> None:
    """Raise an error for what torchcodec shows wrongly: text, mirrored pictures, joined videos."""
    with open_container(source) as container:
        stream = video_stream(container, index)
        # torchcodec mixes the frames of joined recordings; the index of an MP4 file is of one
        single = container.format.name.startswith("mov,") and has_index(container)
        packets = _packets(container, stream, 0, 0 if single else math.inf)
        _, frame = next(_decode(stream, packets))
        exif = orientation_of_still(bytes(packets[0])) if is_still(container) else None
        if (exif or 1) != 1 or orientation_of(frame) in MIRRORED:
            raise ValueError("the picture is mirrored or rotated: need decoder='pyav'")


def choose_decoder(decoder: str = "auto") -> str:
    """The decoder that a call uses.

    Args:
        decoder: "pyav", "torchcodec" or "auto".

    Returns:
        One of `DECODERS`.

    Raises:
        ValueError: unknown decoder.
        ModuleNotFoundError: PyAV is needed and not installed.
        NoDecoder: the decoder, or with "auto" every decoder, cannot run here; gives the reason.
    """
    if decoder != "auto" and decoder not in DECODERS:
        raise ValueError(f"need a decoder among {', '.join(DECODERS)} or auto, got {decoder!r}")
    asked = DECODERS if decoder == "auto" else (decoder,)
    reasons = {name: why_not(name) for name in asked}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if "pyav" in asked and importlib.util.find_spec("av") is None:
        import av  # noqa: F401  the error names the package
    reasons = {name: why_not(name) for name in DECODERS}
    raise NoDecoder(
        f"decoder {decoder!r} cannot run here: "
        + "; ".join(f"{name}: {reason or 'can'}" for name, reason in reasons.items())
    )


@functools.cache
def why_not(decoder: str) -> str | None:
    """The reason why a decoder cannot run here, or None; decodes a small clip to find out.

    Args:
        decoder: one of `DECODERS`.
    """
    # two uncompressed grey frames: decoding detects a missing FFmpeg, importing does not
    clip = b"YUV4MPEG2 W16 H16 F1:1 Ip A1:1 C420jpeg\n" + 2 * (b"FRAME\n" + bytes(16 * 16 * 3 // 2))
    probe = {"pyav": _frames_by_pyav, "torchcodec": _frames_by_torchcodec}[decoder]
    try:
        count = probe(clip)
        return None if count == 2 else f"decoded {count} frames of 2"
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a partly installed library may raise any error
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _frames_by_pyav(clip: bytes) -> int:
    import av

    av.codec.Codec("h264", "r")
    with av.open(io.BytesIO(clip)) as container:
        return sum(1 for _ in container.decode(video=0))


def _frames_by_torchcodec(clip: bytes) -> int:
    from torchcodec.decoders import VideoDecoder

    return sum(1 for _ in VideoDecoder(clip))
