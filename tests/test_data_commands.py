"""`vidl data check`, `preview` and `speed` on real clips."""

import errno
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from clips import EXAMPLES

from vidl.cli import main
from vidl.data import parsing, video
from vidl.progress import progress

av = pytest.importorskip("av")
commands = pytest.importorskip("vidl.data.commands")
Image = pytest.importorskip("PIL.Image")
av.logging.set_level(None)


@pytest.fixture
def annotated(tmp_path, monkeypatch):
    """Three clips, one of them broken."""
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "clips").mkdir()
    for name in ("worker.mp4", "sign_eat.mp4"):
        shutil.copy(EXAMPLES / name, tmp_path / "clips")
    (tmp_path / "clips" / "junk.mp4").write_bytes(b"junk")
    rows = [
        {"video": "worker.mp4", "caption": ["a man", "a worker"]},
        {"video": "junk.mp4", "caption": "nothing"},
        {"video": "sign_eat.mp4", "caption": "to eat"},
        {"video": "worker.mp4", "question": "who?", "answer": "a man"},
    ]
    file = tmp_path / "clips.json"
    file.write_text(json.dumps(rows))
    return file


def test_check(annotated, capsys):
    assert main(["data", "check", str(annotated), "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert f"broken     {annotated.parent / 'clips' / 'junk.mp4'}: Invalid data" in out
    assert "3 clips in 4 rows" in out and "1 broken, 0 truncated" in out

    annotated.write_text(json.dumps([{"video": "worker.mp4", "caption": "a"}]))
    assert main(["data", "check", str(annotated)]) == 0
    assert "1 clips in 1 rows, 71 frames" in capsys.readouterr().out


def test_check_of_folders_and_globs(annotated, capsys):
    folder = annotated.parent / "clips"
    table = "file_name,text\nworker.mp4,a man\nsign_eat.mp4,to eat\n"
    (folder / "metadata.csv").write_text(table)
    for names in (folder, folder / "metadata.csv", folder / "*.csv"):
        assert main(["data", "check", str(names)]) == 0
        assert "2 clips in 2 rows" in capsys.readouterr().out
    (folder / "metadata.csv").unlink()
    assert main(["data", "check", str(folder)]) == 1
    assert "junk.mp4: need its caption in junk.txt beside it" in capsys.readouterr().err


def test_check_names_truncated_clips(annotated, capsys, monkeypatch):
    facts = video.Facts(frames=10, seconds=1.0, declared=4.0, width=8, height=8)
    monkeypatch.setattr(video, "inspect", lambda name: facts)
    assert main(["data", "check", str(annotated)]) == 0
    assert "worker.mp4: 1.0 s of 4.0 s" in capsys.readouterr().out


def test_check_needs_annotations(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[{}]")
    assert main(["data", "check", str(tmp_path / "a.json")]) == 1
    assert "vidl data: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "preview", "speed", "convert"])
def test_bad_annotations_are_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    for suffix in ("json", "jsonl", "csv", "arrow", "xml"):
        (tmp_path / f"empty.{suffix}").touch()
        (tmp_path / f"noise.{suffix}").write_bytes(random.Random(0).randbytes(3000))
        (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / "denied.json").touch()

    def denied(name, *args, **options):
        if str(name).endswith("denied.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return open(name, *args, **options)

    monkeypatch.setattr(parsing, "open", denied, raising=False)  # root reads any file
    names = [
        f"{stem}.{s}" for stem in ("empty", "noise", "folder", "no") for s in ("json", "jsonl")
    ]
    names += [f"{stem}.{s}" for stem in ("empty", "noise", "folder", "no") for s in ("csv", "xml")]
    names += ["empty.arrow", "noise.arrow", "folder.arrow", "no.arrow", "denied.json"]
    for name in names:
        assert main(["data", command, str(tmp_path / name)]) == 1, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vidl data: ") and str(tmp_path / name) in line
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["check", "preview", "speed"])
def test_without_a_decoder(annotated, monkeypatch, capsys, command):
    monkeypatch.setattr(video, "why_not", lambda decoder: "libavcodec is missing")
    assert main(["data", command, str(annotated)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vidl data: decoder ") and "pyav: libavcodec is missing" in line


def test_a_picture_on_a_full_disk(annotated, monkeypatch, capsys):
    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    out = annotated.parent / "out" / "preview.png"
    out.parent.mkdir()
    assert main(["data", "preview", str(annotated), "--out", str(out)]) == 1
    assert f"No space left on device: '{out}'" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert main(["data", "preview", str(annotated), "--out", "preview.txt"]) == 1
    assert "need a picture such as preview.png, got preview.txt" in capsys.readouterr().err


@pytest.mark.parametrize("options, strips", [([], 1), (["--mask-ratio", "0.75"], 2)])
def test_preview(annotated, tmp_path, capsys, options, strips):
    out = tmp_path / "picture.png"
    sizes = ["--frames", "3", "--size", "64", "--out", str(out)]
    assert main(["data", "preview", str(annotated), *sizes, *options]) == 1  # one is broken
    assert "junk.mp4" in capsys.readouterr().out
    picture = Image.open(out)
    assert picture.size == (3 * 68, 3 * (16 + strips * 68))
    assert len(picture.getcolors(1 << 20)) > 1000


def test_preview_errors(annotated, capsys):
    assert main(["data", "preview", str(annotated), "--size", "60", "--out", "no.png"]) == 1
    assert "multiple of the patch size, got 60 and 16" in capsys.readouterr().err


@pytest.mark.parametrize("ratio, hidden", [(0, 0), (0.5, 8), (0.75, 12), (1, 16)])
def test_number_of_hidden_patches_in_each_frame(ratio, hidden):
    pictures = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    out = commands.hide(pictures, ratio, 8, torch.Generator().manual_seed(0))
    grey = (out == 127).view(5, 4, 8, 4, 8, 3).float().mean((2, 4, 5))
    assert set(grey.unique().tolist()) <= {0.0, 1.0}
    assert grey.sum((1, 2)).tolist() == [hidden] * 5


def test_speed(annotated, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path))
    options = ["--clips", "8", "--size", "32"]
    assert main(["data", "speed", str(annotated), *options]) == 1
    out = capsys.readouterr().out
    assert f"broken     {annotated.parent / 'clips' / 'junk.mp4'}: Invalid data" in out
    for name in (*video.DECODERS, "cached"):
        line = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        reason = None if name == "cached" else video.why_not(name)
        assert "clips/s, median" in line if reason is None else reason in line

    annotated.write_text(json.dumps([{"video": "junk.mp4", "caption": "a"}]))
    assert main(["data", "speed", str(annotated), *options]) == 1
    assert "none of 8 clips" in capsys.readouterr().err


def test_progress_is_shown_on_terminals_only(capsys, monkeypatch):
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress([1, 2], "counting")) == [1, 2]
    shown = capsys.readouterr().err
    assert "ETA 0:00:00" in shown and "counting 2/2" in shown
