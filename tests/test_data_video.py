"""Reading frames from valid and broken files, and crops."""

import contextlib
import io
import os
import pickle
import random
import struct

import pytest
import torch
from clips import EXAMPLES, HERE, STEP, numbers, shown_at, write_video

from vidl.data import crops, pictures, video
from vidl.data.sampling import instants
from vidl.data.video import BrokenClip, as_clip, inspect, read_clip

av = pytest.importorskip("av")
numpy = pytest.importorskip("numpy")
pytest.importorskip("PIL")
from PIL import Image, ImageOps  # noqa: E402

av.logging.set_level(None)

HARD = HERE / "videos"
DECODERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            video.why_not(name) is not None, reason=f"{name}: {video.why_not(name)}"
        ),
    )
    for name in video.DECODERS
]
decoders = pytest.mark.parametrize("decoder", DECODERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def even(folder):
    return write_video(folder / "even.mp4", 20)  # 10 fps, key frames 0, 6, 12, 18


def test_instants_by_hand():
    assert instants(0, 8, 4) == [1, 3, 5, 7]
    assert instants(2, 3, 1) == [2.5]
    drawn = instants(0, 8, 4, random.Random(0))
    assert all(2 * i <= instant < 2 * i + 2 for i, instant in enumerate(drawn))
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        instants(0, 8, 0)


@decoders
@pytest.mark.parametrize(
    "frames, wanted",
    [
        (1, [10]),
        (4, [2, 7, 12, 17]),
        (5, [2, 6, 10, 14, 18]),
        (20, list(range(20))),
        (40, sorted([*range(20), *range(20)])),
    ],
)
def test_the_middle_of_equal_parts(even, decoder, frames, wanted):
    pictures = read_clip(even, frames, decoder=decoder)
    assert pictures.dtype == torch.uint8 and pictures.shape == (frames, 16, 32, 3)
    assert numbers(pictures) == wanted
    assert as_clip(pictures).shape == (3, frames, 16, 32)
    assert as_clip(pictures).data_ptr() == pictures.data_ptr()


def test_same_frames_as_decoding_everything():
    """Skipping packets must not change the frames."""
    for file in sorted(EXAMPLES.glob("*.mp4"))[::6] + sorted(HARD.glob("h26*.mp4")):
        with av.open(str(file)) as container:
            decoded = list(container.decode(container.streams.best("video")))
            plain = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded]
        for rng in (None, random.Random(1)):
            drawn = instants(0, len(plain), 5, random.Random(1) if rng else None)
            wanted = torch.stack([plain[int(instant)] for instant in drawn])
            assert torch.equal(read_clip(file, 5, rng=rng), wanted), file


def test_no_frames(even):
    with pytest.raises(ValueError, match="need at least 1 frame, got 0"):
        read_clip(even, 0)


def test_random_instants_repeat(even):
    draws = [
        numbers(read_clip(even, 5, rng=video.generator(*key)))
        for key in [(0, 0, 3), (0, 0, 3), (1, 0, 3), (0, 1, 3), (0, 0, 4)]
    ]
    assert draws[0] == draws[1]
    assert len(set(map(tuple, draws))) == 4
    assert all(n // 4 == i for draw in draws for i, n in enumerate(draw))


@decoders
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_variable_frame_rate(folder, container, decoder):
    ticks = [0, 4, 8, 12, 16, 20, 100, 104, 108, 200, 300, 308]
    file = write_video(folder / f"variable.{container}", len(ticks), ticks=ticks, rate=100)
    got = numbers(read_clip(file, 6, end=3.0, decoder=decoder))
    assert got == [shown_at(ticks, instant) for instant in instants(0, 300, 6)]
    assert got == [5, 5, 8, 8, 9, 9]


@decoders
def test_a_part(even, decoder):
    assert numbers(read_clip(even, 2, start=1.0, end=1.4, decoder=decoder)) == [11, 13]
    assert numbers(read_clip(even, 2, start=1.6, decoder=decoder)) == [17, 19]
    assert numbers(read_clip(even, 2, end=0.4, decoder=decoder)) == [1, 3]
    with pytest.raises(BrokenClip, match=r"even.mp4: need frames from 3 s to 4 s, got a video fr"):
        read_clip(even, 2, start=3, end=4, decoder=decoder)


def test_seeking_in_a_long_video(folder):
    ticks = range(0, 1200, 40)
    file = write_video(folder / "long.mp4", 30, ticks=ticks, rate=100)
    assert numbers(read_clip(file, 2, start=8.0, end=8.8)) == [20, 21]


@decoders
def test_several_streams(decoder):
    file = HARD / "nasa_13013.mp4"
    assert read_clip(file, 1, decoder=decoder).shape == (1, 270, 480, 3)
    assert read_clip(file, 1, stream=0, decoder=decoder).shape == (1, 180, 320, 3)
    with pytest.raises(BrokenClip, match="nasa_13013.mp4: "):
        read_clip(file, 1, stream=1, decoder=decoder)  # sound


def test_a_stream_without_video():
    with pytest.raises(BrokenClip, match=r"need a video stream among \[0, 3\], got 1"):
        read_clip(HARD / "nasa_13013.mp4", 1, stream=1)


@decoders
@pytest.mark.parametrize(
    "name, shape", [("av1_video.mkv", (360, 640)), ("h264_10bits.mp4", (200, 200))]
)
def test_unusual_files(name, shape, decoder):
    pictures = read_clip(HARD / name, 3, decoder=decoder)
    assert pictures.shape == (3, *shape, 3) and pictures.float().std() > 10


def test_inspect():
    facts = inspect(HARD / "nasa_13013.mp4")
    assert (facts.frames, facts.width, facts.height) == (390, 480, 270)
    assert facts.seconds == pytest.approx(13.013) and not facts.truncated
    assert inspect(HARD / "av1_video.mkv").frames == 125
    assert inspect(HARD / "nasa_13013.mp4", stream=0).frames == 325


@pytest.mark.parametrize("name, codec", [("times.avi", "mpeg4"), ("times.h264", "libx264")])
def test_frames_without_times_are_counted(folder, name, codec):
    file = write_video(folder / name, 20, codec=codec)
    assert inspect(file).frames == 20
    assert numbers(read_clip(file, 4)) == [2, 7, 12, 17]
    assert numbers(read_clip(file, 20)) == list(range(20))
    tenth = 0.1 if name.endswith("avi") else 0.04  # a raw stream has no rate: FFmpeg assumes 25
    assert numbers(read_clip(file, 2, start=14 * tenth, end=18 * tenth)) == [15, 17]


def test_hidden_frames(even, monkeypatch):
    """Hidden frames of VP8 have times at which no frame is shown."""
    times = video._times
    monkeypatch.setattr(video, "_times", lambda packets: sorted([*times(packets), 7 * 1024 + 512]))
    assert numbers(read_clip(even, 4)) == [2, 7, 12, 17]


@decoders
@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation_metadata(folder, decoder, turn):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write such a file")
    file = write_video(folder / f"turned{turn}.mp4", 2, rotate=turn)
    picture = read_clip(file, 1, decoder=decoder)[0, :, :, 0]
    white = torch.zeros(16, 32, dtype=torch.bool)
    white[:, :16] = True
    assert torch.equal(picture > 128, white.rot90(turn // 90))


def test_images(folder):
    for name in ("still.png", "still.jpg"):
        frame = av.VideoFrame.from_ndarray(torch.full((6, 10, 3), 80, dtype=torch.uint8).numpy())
        frame.save(str(folder / name))
        pictures = read_clip(folder / name, 2)
        assert pictures.shape == (2, 6, 10, 3) and (pictures.int() - 80).abs().max() <= 2


def test_bytes(even):
    assert torch.equal(read_clip(even.read_bytes(), 3), read_clip(even, 3))
    with pytest.raises(BrokenClip, match="4 bytes: Invalid data"):
        read_clip(b"junk", 3)


def test_a_truncated_file_is_read_up_to_its_end(folder):
    whole = EXAMPLES / "bottles.mp4"
    fast = folder / "fast.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(fast), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = fast.read_bytes()
    half = folder / "half.mp4"
    half.write_bytes(data[: len(data) // 2])
    facts = inspect(half)
    assert facts.truncated and 3 < facts.seconds < 5 and facts.declared == pytest.approx(7.98, 0.01)
    pictures = read_clip(half, 4)
    seconds = [instant for instant in instants(0, facts.seconds, 4)]
    for picture, second in zip(pictures, seconds, strict=True):
        same = read_clip(fast, 1, start=second, end=second + 1e-3)[0]
        assert torch.equal(picture, same)


@pytest.mark.parametrize("name", ["missing.mp4", "empty.mp4", "junk.mp4", "no_index.mp4", "folder"])
@decoders
def test_broken_files_are_named(folder, even, name, decoder):
    file = folder / name
    if name == "folder":
        file.mkdir(exist_ok=True)
    elif name != "missing.mp4":
        whole = (EXAMPLES / "worker.mp4").read_bytes()
        parts = {
            "empty.mp4": b"",
            "junk.mp4": b"junk" * 99,
            "no_index.mp4": whole[: len(whole) // 2],
        }
        file.write_bytes(parts[name])
    with pytest.raises(BrokenClip) as caught:
        read_clip(file, 2, decoder=decoder)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.name == str(file)


def test_errors_of_any_class_are_broken_clips(even, monkeypatch):
    """PyAV's errors have no base class in common but Exception."""
    classes = [av.error.EOFError, av.error.ExternalError, av.error.PatchWelcomeError]
    classes += [av.error.UnknownError, av.error.LookupError, av.error.MemoryError]
    for kind in classes:

        def fail(*args, kind=kind):
            raise kind(1, "the decoder failed")

        monkeypatch.setattr(video, "_packets", fail)
        for read in (inspect, lambda file: read_clip(file, 2, decoder="pyav")):
            with pytest.raises(BrokenClip, match="even.mp4: the decoder failed"):
                read(even)


def test_a_codec_without_decoder(even):
    data = even.read_bytes()
    assert data.count(b"avc1") == 2
    at = data.rindex(b"avc1")
    for read in (inspect, lambda source, stream: read_clip(source, 2, stream=stream)):
        for stream in (None, 0):
            with pytest.raises(BrokenClip, match="no decoder"):
                read(data[:at] + b"zzzz" + data[at + 4 :], stream=stream)


def test_only_regular_files_are_opened(folder, even, monkeypatch):
    """A FIFO blocks, and a protocol of FFmpeg reads other files or the network."""
    fifo = folder / "fifo.mp4"
    os.mkfifo(fifo)
    monkeypatch.chdir(folder)
    cases = {
        str(fifo): "need a regular file, got a FIFO",
        "/dev/zero": "need a regular file, got a device",
        "tcp://127.0.0.1:9?listen=1": "No such file",
        "http://127.0.0.1:9/a.mp4": "No such file",
        "pipe:0": "No such file",
        f"concat:{even}|{even}": "No such file",
        f"subfile,,start,0,end,9,,:{even}": "No such file",
        f"file:{even}": "No such file",
        "a\0b": "null",
    }
    for name, reason in cases.items():
        for read in (inspect, lambda file: read_clip(file, 2)):
            with pytest.raises(BrokenClip) as caught:
                read(name)
            assert reason in caught.value.reason, name
    strange = folder / "concat:a%d.mp4"
    strange.write_bytes(even.read_bytes())
    assert numbers(read_clip(strange.name, 2)) == numbers(read_clip(even, 2))


def test_arguments_of_read_clip(even):
    with pytest.raises(TypeError, match="need source as a file name or bytes, got int"):
        read_clip(3, 1)
    for name in ("start", "end"):
        with pytest.raises(TypeError, match=f"need {name} in seconds, got '1'"):
            read_clip(even, 1, **{name: "1"})
        with pytest.raises(ValueError, match=f"need {name} in finite seconds, got nan"):
            read_clip(even, 1, **{name: float("nan")})


def test_damaged_frames_are_detected(folder):
    data = bytearray((EXAMPLES / "sign_eat.mp4").read_bytes())
    rng = random.Random(0)
    begin = data.index(b"mdat") + 100
    size = struct.unpack(">I", data[begin - 104 : begin - 100])[0] - 200
    for _ in range(200):
        at = begin + rng.randrange(size)
        data[at : at + 4] = rng.randbytes(4)
    file = folder / "damaged.mp4"
    file.write_bytes(data)
    with pytest.raises(BrokenClip, match="damaged.mp4: "):
        inspect(file)
    with pytest.raises(BrokenClip, match="damaged|Invalid data|missing"):
        read_clip(file, 16)


FUZZED = {
    "mp4": "libx264", "mkv": "libx264", "ts": "libx264", "flv": "flv", "avi": "mpeg4",
    "mpg": "mpeg2video", "webm": "libvpx", "ogg": "libvpx", "wmv": "wmv2", "mov": "mjpeg",
    "m4v": "mpeg4", "h264": "libx264", "mjpeg": "mjpeg", "apng": "apng", "gif": "gif",
    "png": "png", "jpg": "mjpeg", "webp": "libwebp", "bmp": "bmp", "tiff": "tiff", "nut": "ffv1",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FUZZED)
def test_damaged_files_are_broken_clips(folder, suffix):
    """Whatever is damaged, a file is read or is a BrokenClip."""
    file = folder / f"fuzzed.{suffix}"
    try:
        write_fuzzed(file, FUZZED[suffix])
    except (ValueError, OSError) as error:  # of PyAV: an encoder is missing
        pytest.skip(f"this FFmpeg cannot write {suffix}: {error}")
    data, rng, read = file.read_bytes(), random.Random(suffix), 0
    assert inspect(data).frames > 0
    for number in range(250):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4, 30))):
            # half of the damage is in the first bytes, where the header is
            at = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))
            damaged[at : at + rng.choice((1, 4))] = rng.randbytes(rng.choice((0, 1, 4)))
        if number % 5 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for call in (inspect, lambda source: read_clip(source, 2, start=rng.choice((None, 0.5)))):
            with contextlib.suppress(BrokenClip):
                call(bytes(damaged))
                read += 1
    assert read or suffix in ("apng", "png")  # checksums reject any damage


def write_fuzzed(file, codec):
    still = file.suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff")
    options = {"movflags": "faststart"} if file.suffix in (".mp4", ".mov") else {}
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 48, 32
        stream.pix_fmt = av.Codec(codec, "w").video_formats[0].name
        for number in range(1 if still else 12):
            picture = numpy.full((32, 48, 3), 16 * number, numpy.uint8)
            picture[::3] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_long(file, codec, gop=120, count=300, first=0, **options):
    """Frame n of `write_video` has the brightness of first + n modulo 32."""
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, 2
        if codec == "libx264":
            stream.codec_context.options = {"sc_threshold": "0"}
        for number in range(count):
            picture = numpy.full((16, 32, 3), STEP * ((first + number) % 32), numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return file


@pytest.mark.parametrize(
    "suffix, codec",
    [
        ("ts", "libx264"), ("ts", "mpeg2video"), ("m2ts", "libx264"), ("flv", "libx264"),
        ("mkv", "libx264"), ("mp4", "libx264"), ("webm", "libvpx"), ("m2v", "mpeg2video"),
        ("nut", "libx264"), ("ogg", "libvpx"),
    ],
)  # fmt: skip
def test_parts_with_distant_key_frames(folder, suffix, codec):
    """Formats without an index seek to any frame, and the next key frame may be late."""
    file = write_long(folder / f"{codec}.{suffix}", codec)
    for number in range(20):
        start, end = 0.6 * number, 0.6 * (number + 1)
        wanted = [int(instant * 25) % 32 for instant in instants(start, end, 4)]
        assert numbers(read_clip(file, 4, start=start, end=end)) == wanted, number


def test_parts_of_a_program_stream(folder):
    """They are those of the whole file, whose times FFmpeg guesses as the frames are tiny."""
    file = write_long(folder / "parts.mpg", "mpeg2video")
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        shown = {
            float((f.pts - stream.start_time) * f.time_base): f for f in container.decode(stream)
        }
    for number in range(19):
        start, end = 0.6 * number, 0.6 * (number + 1)
        for instant, picture in zip(
            instants(start, end, 4), read_clip(file, 4, start=start, end=end), strict=True
        ):
            frame = shown[max(time for time in shown if time <= instant + 1e-9)]
            assert numpy.array_equal(picture.numpy(), frame.to_ndarray(format="rgb24")), number


def write_joined(folder, suffix, codec, counts, **options):
    """Two recordings that differ at every time, and their bytes one after the other."""
    parts = [
        write_long(folder / f"part{n}.{suffix}", codec, 20, count, 16 * n, **options)
        for n, count in enumerate(counts)
    ]
    joined = folder / f"joined.{suffix}"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    return parts[0], joined


@decoders
@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_joined_recordings_are_broken(folder, suffix, decoder):
    codec = "libx264" if suffix == "ts" else "mpeg2video"
    _, joined = write_joined(folder, suffix, codec, (25, 26))
    for read in (inspect, lambda file: read_clip(file, 10, decoder=decoder)):
        with pytest.raises(BrokenClip, match="joined recordings: times go back by 1.0 s in the f"):
            read(joined)


@decoders
@pytest.mark.parametrize(
    "suffix, codec, options",
    [
        ("ts", "libx264", {}),
        ("mpg", "mpeg2video", {}),
        ("nut", "libx264", {}),
        ("mkv", "libx264", {}),
        ("ogg", "libvpx", {}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ],
)
def test_parts_of_joined_recordings(folder, suffix, codec, options, decoder):
    """They are parts of the first recording, or broken; torchcodec needs all times of a file."""
    first, joined = write_joined(folder, suffix, codec, (1000, 1250), **options)
    read = 0
    for number in range(45):
        part = {"start": 2.0 * number, "end": 2.0 * number + 0.5, "decoder": decoder}
        with contextlib.suppress(BrokenClip):
            shown = read_clip(joined, 2, **part)
            assert torch.equal(shown, read_clip(first, 2, **part)), number
            read += 1
    assert read >= 15 or decoder == "torchcodec"
    with pytest.raises(BrokenClip, match="joined recordings: times go back by"):
        inspect(joined)


def test_parts_of_a_file_without_an_index_take_little_memory(folder):
    """The packets before the part are not kept."""
    file = write_long(folder / "long.ts", "libx264", 20)
    with video.open_container(file) as container:
        stream = video.video_stream(container, None)
        packets = video._packets(container, stream, 8, 9)
    assert packets[0].is_keyframe and len(packets) <= 20 + 2 * 25


def quadrants(size=(96, 48)):
    """A picture with a red, a green, a blue and a yellow quadrant."""
    W, H = size
    picture = numpy.zeros((H, W, 3), numpy.uint8)
    picture[: H // 2, : W // 2, 0] = picture[H // 2 :, W // 2 :, 0] = 230
    picture[: H // 2, W // 2 :, 1] = picture[H // 2 :, W // 2 :, 1] = 230
    picture[H // 2 :, : W // 2, 2] = 230
    return picture


def same(picture, wanted):
    return picture.shape == wanted.shape and numpy.abs(picture - wanted.astype(int)).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_orientations_of_pictures(folder, suffix, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    file = folder / f"{orientation}.{suffix}"
    Image.fromarray(quadrants()).save(file, exif=exif, quality=95)
    with Image.open(file) as image:
        wanted = numpy.array(ImageOps.exif_transpose(image).convert("RGB"))
    for source in (file, file.read_bytes()):
        assert same(read_clip(source, 1)[0].numpy(), wanted)
    if orientation != 1:
        with pytest.raises(ValueError, match="need decoder='pyav'"):
            video._check_for_torchcodec(file, None)


@pytest.mark.parametrize(
    "matrix, upright",
    [
        ((1, 0, 0, 1), lambda picture: picture),
        ((0, 1, -1, 0), lambda picture: numpy.rot90(picture, -1)),
        ((-1, 0, 0, -1), lambda picture: numpy.rot90(picture, 2)),
        ((0, -1, 1, 0), lambda picture: numpy.rot90(picture)),
        ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
        ((1, 0, 0, -1), lambda picture: picture[::-1]),
        ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda picture: numpy.rot90(picture, 2).transpose(1, 0, 2)),
    ],
)
def test_display_matrices(folder, matrix, upright):
    file = folder / "matrix.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants())))
        container.mux(stream.encode())
    data = bytearray(file.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    assert same(read_clip(bytes(data), 1)[0].numpy(), upright(quadrants()))


@pytest.mark.parametrize("rotation", [0, 90, 180, -90, -180, 270])
def test_rotation_without_side_data(rotation):
    """Some versions of PyAV do not know the type of other side data."""

    class Frame:
        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    frame = Frame()
    frame.rotation = rotation
    got = pictures.UPRIGHT[pictures.orientation_of(frame)](quadrants())
    assert numpy.array_equal(got, numpy.rot90(quadrants(), rotation // 90))


@pytest.mark.parametrize(
    "suffix, options",
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("jpg", {"restart_marker_blocks": 2}),
        ("gif", {}),
        ("gif", {"save_all": True}),
        ("png", {}),
        ("webp", {}),
    ],
)
def test_truncated_pictures_are_broken(folder, suffix, options):
    """FFmpeg invents the rows that are missing."""
    noise = numpy.random.default_rng(0).integers(0, 255, (2, 40, 60, 3)).astype(numpy.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    if "save_all" in options:
        options = options | {"append_images": images[1:]}
    if suffix == "jpg":  # the end marker of a thumbnail is not that of the picture
        thumbnail = io.BytesIO()
        images[1].save(thumbnail, format="jpeg", quality=20)
        options = options | {"exif": b"Exif\0\0" + thumbnail.getvalue()}
    file = folder / f"whole.{suffix}"
    images[0].save(file, **options)
    data = file.read_bytes()
    whole = read_clip(file, 4)
    assert torch.equal(read_clip(data, 4), whole)
    if suffix in ("jpg", "gif"):
        assert torch.equal(read_clip(data + b"\0" * 9, 4), whole)
    assert torch.equal(read_clip(file, 1, end=0.01), whole[:1])
    cut = folder / f"cut.{suffix}"
    for share in range(5, 100, 5):
        cut.write_bytes(data[: len(data) * share // 100])
        for source in (cut, cut.read_bytes()):
            with pytest.raises(BrokenClip):
                read_clip(source, 4)
            with pytest.raises(BrokenClip):
                inspect(source)


def test_a_cover_picture_is_no_video(folder):
    file = folder / "sound.flac"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("flac", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(numpy.zeros((1, 8000), numpy.int16), "s16", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    picture = io.BytesIO()
    Image.fromarray(quadrants()).save(picture, format="png")
    cover = struct.pack(">II", 3, 9) + b"image/png" + struct.pack(">IIIII", 0, 96, 48, 24, 0)
    cover += struct.pack(">I", len(picture.getvalue())) + picture.getvalue()
    data = file.read_bytes()  # fLaC, then blocks: type, three bytes of length, content
    block = struct.pack(">I", 6 << 24 | len(cover)) + cover
    data = data[:42] + block + data[42:]
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams.video) == 1
    for stream in (None, 0, 1):
        for read in (inspect, lambda source, stream: read_clip(source, 2, stream=stream)):
            with pytest.raises(BrokenClip, match="no video stream, only 1 cover|among \\[\\], got"):
                read(data, stream=stream)


def test_text_and_playlists_are_no_video(folder, even):
    texts = {
        "a.txt": "one line\n" * 99,
        "a.mp4": "<html><body>404 Not Found</body></html>\n" * 9,
        "a.nfo": "\x1b[31m text of a terminal",
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\neven.mp4\n#EXT-X-ENDLIST\n",
        "a.ffconcat": "ffconcat version 1.0\nfile even.mp4\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        for source in (folder / name, text.encode()):
            with pytest.raises(BrokenClip):
                read_clip(source, 2)
            with pytest.raises(BrokenClip):
                inspect(source)


def test_nothing_leaks(even):
    """Neither file handles nor memory, as some other decoders do."""
    for _ in range(20):
        read_clip(even, 4)
    before, pages = len(os.listdir("/proc/self/fd")), resident()
    for _ in range(200):
        read_clip(even, 4)
        with pytest.raises(BrokenClip):
            read_clip(b"junk", 1)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert resident() - pages < 8 << 20


def resident():
    with open("/proc/self/statm") as text:
        return int(text.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_choose_decoder(monkeypatch):
    assert video.choose_decoder("pyav") == "pyav"
    with pytest.raises(ValueError, match="among pyav, torchcodec or auto, got 'decord'"):
        video.choose_decoder("decord")
    monkeypatch.setattr(video, "why_not", {"pyav": "no wheel", "torchcodec": None}.get)
    assert video.choose_decoder() == "torchcodec"
    with pytest.raises(RuntimeError, match="'pyav' cannot run here: pyav: no wheel; torchcodec: c"):
        video.choose_decoder("pyav")


def gradient(T, H, W):
    """Frames whose pixels encode frame and position."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    frame = torch.stack([x * 255 // W, y * 255 // H, torch.zeros_like(x)], dim=-1)
    return (frame + torch.tensor([0, 0, 1]) * torch.arange(T).view(T, 1, 1, 1)).to(torch.uint8)


def test_a_crop_is_the_same_in_every_frame():
    pictures = gradient(5, 48, 64)
    corners = set()
    for seed in range(20):
        out = crops.random_crop(pictures, 32, random.Random(seed))
        assert out.shape == (5, 32, 32, 3) and out.dtype == torch.uint8
        assert all(torch.equal(frame[..., :2], out[0, ..., :2]) for frame in out)
        assert out[:, 0, 0, 2].tolist() == [0, 1, 2, 3, 4]  # the order of frames is kept
        corners.add(tuple(out[0, 0, 0, :2].tolist()))
        same = crops.random_crop(pictures, 32, random.Random(seed))
        assert torch.equal(out, same)
    assert len(corners) > 10


def test_scale_and_ratio_of_crops():
    for seed in range(200):
        top, left, h, w = crops._window(48, 64, random.Random(seed), (0.5, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= 48 - h and 0 <= left <= 64 - w
        assert 0.49 <= h * w / (48 * 64) <= 1.0 and 0.7 < w / h < 1.4
    narrow = crops._window(10, 1000, random.Random(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert narrow == (0, 493, 10, 13)  # nothing fits: the largest window in the centre


def test_half_of_the_clips_are_flipped():
    pictures = gradient(2, 48, 64)
    out = [crops.random_crop(pictures, 32, random.Random(seed)) for seed in range(200)]
    mirrored = sum(bool(clip[0, 16, 0, 0] > clip[0, 16, -1, 0]) for clip in out)
    assert 70 < mirrored < 130
    for seed in range(20):
        out = crops.random_crop(pictures, 32, random.Random(seed), flip=False)
        assert out[0, 16, 0, 0] < out[0, 16, -1, 0]


@pytest.mark.parametrize("height, width", [(48, 96), (96, 48), (33, 77), (16, 16), (32, 32)])
def test_centre_crop(height, width):
    out = crops.centre_crop(gradient(2, height, width), 32)
    assert out.shape == (2, 32, 32, 3)
    centre = out[0, 15:17, 15:17, :2].float().mean((0, 1))
    assert (centre - 127).abs().max() < 10
    exact = gradient(2, height, width)[:, :32, :32] if (height, width) == (32, 32) else out
    assert torch.equal(out, exact)


def test_invalid_input_of_crops():
    for wrong in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)):
        with pytest.raises(ValueError, match=r"need pictures as uint8 \[T, H, W, 3\], got torch"):
            crops.centre_crop(wrong, 4)
