"""Open a file as a video or image: regular files only, and neither text nor playlists."""

import functools
import io
import os
import stat
import struct
from os import PathLike
from typing import Any

Source = str | PathLike[str] | bytes

# Demuxers of FFmpeg that draw text as a video, follow a playlist to other files, or read from a
# device or the network.
REFUSED = {
    "adf", "alsa", "bin", "concat", "dash", "fbdev", "hls", "idf", "imf", "kmsgrab", "lavfi", "oss",
    "rtp", "rtsp", "sap", "sdp", "tty", "v4l2", "vapoursynth", "video4linux2", "webm_dash_manifest",
    "x11grab", "xbin",
}  # fmt: skip

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def path_of(source: str | PathLike[str]) -> str:
    """The absolute path of a regular file; other files may block, and URLs need a network.

    Args:
        source: a file name; no URL.

    Raises:
        OSError: no such file.
        ValueError: a folder, a FIFO, a device or a socket.
    """
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"need a regular file, got {KINDS.get(stat.S_IFMT(mode), 'another kind')}")
    # FFmpeg reads a relative name such as concat:a as a protocol
    return os.path.abspath(source)


def open_container(source: Source) -> Any:
    """Open a file with PyAV.

    Args:
        source: a file name, or the bytes of a file.

    Returns:
        An `av.container.InputContainer`.

    Raises:
        OSError, ValueError: not a regular file, or its format is unknown or refused.
    """
    import av

    file = io.BytesIO(source) if isinstance(source, bytes) else path_of(source)
    options = {"format_whitelist": _allowed(), "protocol_whitelist": "file", "pattern_type": "none"}
    try:
        return av.open(file, options=options)
    except av.error.ArgumentError:  # FFmpeg's answer to a format that is not in the list
        raise ValueError("need a video or image, got text or a playlist") from None


def has_index(container: Any) -> bool:
    """Whether seeking is exact: FFmpeg reads an index of the frames, and does not guess.

    Args:
        container: from `open_container`; bytes count as without an index, as reading them is fast.
    """
    if container.file is not None:
        return False
    name = container.format.name
    return name == "matroska,webm" or (name.startswith("mov,") and not _fragmented(container.name))


def _fragmented(name: str) -> bool:
    """Whether an MP4 file has fragments, which have no common index."""
    at = 0
    with open(name, "rb") as file:
        while len(header := file.read(16)) == 16:
            size, kind, long_size = struct.unpack(">I4sQ", header)
            size = long_size if size == 1 else size
            if kind == b"moof" or size < 8:  # 0: up to the end of the file
                return bool(kind == b"moof")
            at += size
            file.seek(at)
    return False


@functools.cache
def _allowed() -> str:
    import av

    return ",".join(name for name in sorted(av.formats_available) if name not in REFUSED)


def video_stream(container: Any, index: int | None) -> Any:
    """A video stream that this FFmpeg can decode; the cover picture of a sound file is none.

    Args:
        container: from `open_container`.
        index: index of the stream; None: FFmpeg's best stream.

    Raises:
        ValueError: there is no such stream, or no decoder for its codec.
    """
    videos = {video.index: video for video in container.streams.video if not _is_cover(video)}
    if index is None:
        stream = container.streams.best("video")
        if stream is not None and stream.index not in videos:
            stream = next(iter(videos.values()), None)
        if stream is None:
            covers = len(container.streams.video) - len(videos)
            reason = f", only {covers} cover pictures" if covers else ""
            reason = f": no decoder for streams {sorted(videos)}" if videos else reason
            raise ValueError(f"no video stream{reason}")
    else:
        if index not in videos:
            raise ValueError(f"need a video stream among {sorted(videos)}, got {index}")
        stream = videos[index]
    if stream.codec_context is None:
        raise ValueError(f"no decoder for the codec of stream {stream.index}")
    stream.codec_context.thread_count = 1  # the workers of a loader already use all cores
    return stream


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the cover picture of a sound file."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)
