"""Orientation of pictures, and pictures that end too early."""

import io
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy

# Upright pictures [H, W, 3] for the orientations of EXIF.
UPRIGHT: dict[int, Callable[[numpy.ndarray], numpy.ndarray]] = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.transpose(1, 0, 2),
    6: lambda picture: picture.transpose(1, 0, 2)[:, ::-1],
    7: lambda picture: picture.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda picture: picture.transpose(1, 0, 2)[::-1],
}
MIRRORED = (2, 4, 5, 7)
# Orientation for a display matrix: axes exchanged, x mirrored, y mirrored.
ORIENTATIONS = {
    (False, False, False): 1, (False, True, False): 2, (False, True, True): 3,
    (False, False, True): 4, (True, False, False): 5, (True, True, False): 6,
    (True, True, True): 7, (True, False, True): 8,
}  # fmt: skip


def is_still(container: Any) -> bool:
    """Whether a container is the file of one picture."""
    name = container.format.name
    return name == "image2" or name.endswith("_pipe")


def orientation_of_still(data: bytes) -> int | None:
    """The orientation in the EXIF data of a picture, 1 to 8; None: there is none.

    Args:
        data: the file.
    """
    if not any(mark in data for mark in (b"Exif", b"eXIf", b"EXIF", b"II*\0", b"MM\0*")):
        return None  # as Pillow decodes the whole of a PNG to find it
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(0x112)
    except Exception:  # Pillow does not know the format: FFmpeg's rotation is used
        return None
    return orientation if orientation in UPRIGHT else None


def orientation_of(frame: Any) -> int:
    """The orientation of a frame of a video, 1 to 8, from its display matrix.

    Args:
        frame: an `av.VideoFrame`.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # this PyAV does not know the type of another side data
        matrix = None
    if matrix is None:
        return {0: 1, 1: 8, 2: 3, 3: 6}[round(frame.rotation / 90) % 4]
    # x' = a x + c y,  y' = b x + d y
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    exchanged = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c < 0, b < 0) if exchanged else (a < 0, d < 0)
    return ORIENTATIONS[exchanged, x, y]


def check_whole(container: Any, codec: str, packets: Sequence[Any]) -> None:
    """Raise an error for a JPEG or GIF whose end is missing: FFmpeg invents the rest.

    Args:
        container: the file.
        codec: name of the codec.
        packets: the packets of the video up to the end of the file.

    Raises:
        ValueError: the last picture is cut off.
    """
    jpeg = codec == "mjpeg" and is_still(container)
    if packets and (jpeg or codec == "gif"):
        whole = jpeg_is_whole if jpeg else gif_is_whole
        if not whole(bytes(packets[-1])):
            raise ValueError("the file is cut off: the end of its last picture is missing")


def jpeg_is_whole(data: bytes) -> bool:
    """Whether the main picture of a JPEG file has its end marker."""
    # a thumbnail in a segment has an end marker too, so segments are skipped by their lengths
    at = 2
    while marker := _MARKER.search(data, at):
        if marker[1] == b"\xd9":
            return True
        length = data[marker.end() : marker.end() + 2]
        at = marker.end() + max(2, int.from_bytes(length, "big"))
    return False


# A marker that is neither a stuffed zero nor a restart marker, which occur inside a scan.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])", re.DOTALL)


def gif_is_whole(packet: bytes) -> bool:
    """Whether the data of the last frame of a GIF file is followed by the file's end marker."""
    try:
        at = 13 + _table_size(packet[10]) if packet.startswith(b"GIF8") else 0
        while packet[at] != 0x3B:
            if packet[at] == 0x21:  # an extension
                at = _after_blocks(packet, at + 2)
            elif packet[at] == 0x2C:  # a picture
                at = _after_blocks(packet, at + 11 + _table_size(packet[at + 9]))
            else:
                return False
    except IndexError:
        return False
    return True


def _table_size(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(packet: bytes, at: int) -> int:
    while size := packet[at]:
        at += size + 1
    return at + 1
