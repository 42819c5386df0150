"""Videos whose frames encode their number: frame n is grey with brightness 8 n."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy

STEP = 8
HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples" / "clips"


def write_video(file, count, *, ticks=None, rate=10, codec="libx264", size=(32, 16), rotate=0):
    """Write `count` frames at 10 fps, or at `ticks` with `rate` ticks per second."""
    import av

    ticks = list(ticks or range(0, count * rate // 10, rate // 10))
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 6, 2
        if rotate:
            stream.set_display_rotation(rotate)
        for number, tick in zip(range(count), ticks, strict=True):
            picture = numpy.full((size[1], size[0], 3), STEP * number, numpy.uint8)
            if rotate:
                picture[:, : size[0] // 2] = 255  # the left half is white
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def numbers(pictures):
    """The numbers of these frames of `write_video`."""
    return [round(value / STEP) for value in pictures.float().mean((1, 2, 3)).tolist()]


def shown_at(ticks, instant):
    """The number of the frame that is shown at an instant, by linear search."""
    return max(itertools.takewhile(lambda n: ticks[n] <= instant, range(len(ticks))), default=0)
