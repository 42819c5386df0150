"""Writing webdataset shards: the same clips and captions, continued after an interruption."""

import json
import socket
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("webdataset")
Image = pytest.importorskip("PIL.Image")

from clips import numbers, write_video  # noqa: E402

from vidl import cli  # noqa: E402
from vidl.data import annotations, sharding, video  # noqa: E402
from vidl.data.dataset import Clips  # noqa: E402
from vidl.data.sharding import Sharding, write_shards  # noqa: E402
from vidl.data.shards import ShardStream  # noqa: E402
from vidl.data.video import BrokenClip  # noqa: E402

TICKS = [0, 1, 2, 5, 9, 10, 11, 18, 20, 21, 22, 30, 31, 33]


@pytest.fixture
def folder(tmp_path):
    """Four videos, of which one is broken, a part of one, and two images."""
    entries = []
    for n in range(4):
        file = write_video(tmp_path / f"{n}.mp4", 14, ticks=TICKS, size=(64, 32))
        entries.append({"video": file.name, "caption": [f"clip {n}", f"again {n}"], "id": f"v{n}"})
    (tmp_path / "2.mp4").write_bytes(b"no video")
    entries.append({"video": "3.mp4", "caption": "a part", "start": 1.0, "end": 2.2})
    for n in range(2):
        Image.new("RGB", (80, 48), (60, 120, 200 * n)).save(tmp_path / f"{n}.png")
        entries.append({"image": f"{n}.png", "caption": f"image {n} é"})
    (tmp_path / "clips.json").write_text(json.dumps(entries))
    return tmp_path


def members(shard):
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def read(shards, kind, number, frames=4):
    clips = Clips([], frames=frames, size=16, train=False)
    stream = ShardStream([str(shard) for shard in shards], clips, number, kind=kind, buffer=1)
    return next(iter(stream))


@pytest.mark.parametrize("start, end", [(None, None), (0.95, 2.0), (1.0, 1.05), (2.5, 2.9)])
def test_frames_of_a_part(tmp_path, start, end):
    """Every frame of the part, at its time; the first is the one shown when the part begins."""
    file = write_video(tmp_path / "a.mp4", 14, ticks=TICKS)
    times, pictures = zip(*video.frames(file, start=start, end=end), strict=True)
    begin, stop = start or 0, 9 if end is None else end
    first = max(n for n, tick in enumerate(TICKS) if tick / 10 <= begin)
    wanted = [n for n, tick in enumerate(TICKS) if n >= first and tick / 10 < stop]
    assert numbers(torch.stack([torch.from_numpy(p.copy()) for p in pictures])) == wanted
    expected = [max(0.0, TICKS[n] / 10 - begin) for n in wanted]
    assert times == pytest.approx(expected)


def test_frames_of_nothing(tmp_path):
    file = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(BrokenClip, match="need frames from 5 s to 6 s, got .* 0 s to 0.3"):
        list(video.frames(file, start=5, end=6))


def test_written_clips_are_read(folder):
    """Sizes, times, captions and pictures of all that is not broken."""
    rows = annotations.load(folder / "clips.json")
    written = write_shards(rows, folder / "out", Sharding(short=16, per_shard=3))
    assert (written.shards, written.samples) == (3, 6)
    ((name, reason),) = written.broken
    assert name.endswith("2.mp4") and "Invalid data" in reason
    shards = sorted((folder / "out").glob("video-*.tar"))
    batch = read(shards, "video", 4)
    assert not batch.broken and batch.video.shape[-2:] == (16, 16)
    shown = {row.captions: batch.video[i].permute(1, 2, 3, 0) for i, row in enumerate(batch.rows)}
    for row in (rows[n] for n in (0, 1, 3, 4)):
        pictures = video.read_clip(row.media, 4, start=row.start, end=row.end)
        assert numbers(shown[row.captions]) == numbers(pictures)
    images = read([folder / "out/image-000000.tar"], "image", 2)
    assert sorted(images.text) == ["image 0 é", "image 1 é"]
    blue = images.video[:, 2].float().mean((1, 2, 3)).tolist()
    assert sorted(blue) == pytest.approx([0, 200], abs=3)


def test_an_interrupted_run_continues(folder, monkeypatch):
    """Only missing shards are written, with the same bytes; leftovers are removed."""
    rows = annotations.load(folder / "clips.json")
    options, out = Sharding(short=16, per_shard=2), folder / "out"
    before = write_shards(rows, out, options)
    content = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "video-000001.tar").unlink()
    (out / "image-000000.json").unlink()
    (out / ".video-000001.tar.17").write_bytes(b"half of it")
    called = []
    monkeypatch.setattr(sharding, "_add", lambda tar, name, *rest: called.append(name))
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_facts", lambda row: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_shards(rows, out, options)
    assert not (out / "video-000001.tar").exists() and len(called) == 1
    monkeypatch.undo()
    assert write_shards(rows, out, options, workers=2) == before
    assert {file.name: file.read_bytes() for file in out.iterdir()} == content
    with pytest.raises(ValueError, match=r"has shards with {'short': 16}, got {'short': 32}"):
        write_shards(rows, out, Sharding(short=32, per_shard=2))
    with pytest.raises(ValueError, match="digest"):
        write_shards([*list(rows)[:-1], rows[0]], out, options)
    (out / "shards.json").write_text("{")
    with pytest.raises(ValueError, match=r"shards\.json: .* remove the folder"):
        write_shards(rows, out, options)


def test_files_are_copied(folder, capsys):
    """Bytes stay as they are; a part is cut out at its size."""
    out = folder / "out"
    assert cli.main(["data", "shard", str(folder / "clips.json"), str(out), "--copy",
                     "--workers", "1"]) == 1  # fmt: skip
    text = capsys.readouterr().out
    assert "6 samples in 2 shards" in text and "1 broken" in text and "2.mp4: " in text
    files = members(out / "video-000000.tar") | members(out / "image-000000.tar")
    assert files["000000000.mp4"] == (folder / "0.mp4").read_bytes()
    assert files["000000005.png"] == (folder / "0.png").read_bytes()
    facts = json.loads(files["000000004.json"])
    assert facts == {"caption": ["a part"], "file": "3.mp4", "start": 1.0, "end": 2.2}
    (folder / "part.mp4").write_bytes(files["000000004.mp4"])
    facts = video.inspect(folder / "part.mp4")
    assert (facts.width, facts.height) == (64, 32) and 1.0 < facts.seconds < 1.3


@pytest.mark.parametrize(
    "options, error",
    [
        (["--short", "8"], "need short >= 16"),
        (["--per-shard", "0"], "need per_shard >= 1"),
        (["--workers", "0"], "need workers >= 1"),
    ],
)
def test_bad_options(folder, options, error, capsys):
    command = ["data", "shard", str(folder / "clips.json"), str(folder / "out"), *options]
    assert cli.main(command) == 1
    assert error in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_shards_of_other_programs(folder):
    """The names that img2dataset and video2dataset use: a text, and JSON with facts of the file."""
    shard = folder / "00000.tar"
    facts = {"key": "000000000", "url": "https://x", "status": "success", "error_message": None}
    video_facts = facts | {"caption": "a clip", "clips": [[0.0, 1.4]], "yt_meta_dict": None}
    with tarfile.open(shard, "w") as tar:
        for name, content in (
            ("000000000.mp4", (folder / "0.mp4").read_bytes()),
            ("000000000.txt", b"a clip"),
            ("000000000.json", json.dumps(video_facts).encode()),
            ("000000001.mp4", (folder / "1.mp4").read_bytes()),
            ("000000001.txt", b"only a text"),
            ("000000001.json", json.dumps(facts).encode()),
        ):
            sharding._add(tar, name, content)
    batch = read([shard], "video", 2)
    assert sorted(batch.text) == ["a clip", "only a text"] and not batch.broken


@pytest.mark.slow
def test_a_cluster_writes_what_a_process_writes(folder, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the nodes
    monkeypatch.chdir(folder)  # relative names, in the tasks too
    options = ["--short", "16", "--per-shard", "2"]
    assert cli.main(["data", "shard", "clips.json", "one", *options, "--workers", "1"]) == 1
    with pytest.raises(ValueError, match="need ray .* Ray cluster, got 'auto': Could not find"):
        write_shards(annotations.load("clips.json"), folder / "none", ray="auto")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert cli.main(["data", "shard", "clips.json", "two", *options, "--ray", "auto"]) == 1
        (folder / "two/video-000001.tar").unlink()
        assert cli.main(["data", "shard", "clips.json", "two", *options, "--ray", "auto"]) == 1
        assert "2.mp4" in capsys.readouterr().out
        one, two = ({f.name: f for f in (folder / name).iterdir()} for name in ("one", "two"))
        assert one.keys() == two.keys() and len(one) == 9
        for name, file in one.items():
            if name.startswith("video") and name.endswith("json"):
                assert (
                    json.loads(file.read_text())["samples"]
                    == json.loads(two[name].read_text())["samples"]
                )
            else:
                assert file.read_bytes() == two[name].read_bytes()
        rows = annotations.load("clips.json")
        monkeypatch.setattr(sharding, "_report", lambda shard: None)
        with pytest.raises(OSError, match="video-000000 is missing: need a folder that all nodes"):
            write_shards(rows, folder / "two", Sharding(short=16, per_shard=2), ray="auto")
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address, complaint", [
    ("127.0.0.1:{port}", "nothing answers at port .* of 127.0.0.1 .*refused"),
    ("ray://localhost:{port}", "nothing answers at port .* of localhost .*refused"),
    ("ray://host.invalid", "nothing answers at port 10001 of host.invalid"),
    ("127.0.0.1", "need ray .* as auto, local, HOST:PORT or ray://HOST, got '127.0.0.1'"),
    ("host:many", "need ray .* as auto, local, HOST:PORT or ray://HOST, got 'host:many'"),
    ("", "need ray .* as auto, local, HOST:PORT or ray://HOST, got ''"),
])  # fmt: skip
def test_a_cluster_that_does_not_answer_is_named_at_once(folder, address, complaint, monkeypatch):
    """Before Ray is imported, and before anything is written."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.socket() as free:  # bound, not listening
        free.bind(("127.0.0.1", 0))
        address = address.format(port=free.getsockname()[1])
        with pytest.raises(ValueError, match=complaint):
            write_shards(annotations.load(folder / "clips.json"), folder / "out", ray=address)
    assert not (folder / "out").exists()


def test_a_cluster_that_answers_is_asked(folder, monkeypatch):
    asked = []

    def init(address, **options):
        asked.append(address)
        raise ConnectionError("no\n Ray")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=bool, init=init))
    rows = annotations.load(folder / "clips.json")
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = f"ray://127.0.0.1:{server.getsockname()[1]}", "auto", "local", "other://cluster"
        for address in given:
            with pytest.raises(ValueError, match=f"Ray cluster, got '{address}': no Ray"):
                write_shards(rows, folder / "out", ray=address)
    assert asked == list(given)


def test_ray_that_is_not_installed_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["data", "shard", str(folder / "clips.json"), str(folder / "out"),
                     "--ray", "auto"]) == 1  # fmt: skip
    assert 'needs ray (extra "ray"): pip install' in capsys.readouterr().err
