"""The examples that a newcomer runs, on one short clip."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def masked_clip():
    pytest.importorskip("av")
    Image = pytest.importorskip("PIL.Image")
    spec = importlib.util.spec_from_file_location("masked_clip", EXAMPLES / "masked_clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.open_image = Image.open
    return module


def test_masked_clip(masked_clip, tmp_path, capsys):
    clip = EXAMPLES / "clips" / "fruit_conveyor.mp4"
    options = ["--frames", "2", "--masks", "0.9", "--repetitions", "1", "--out", str(tmp_path)]
    assert masked_clip.main([str(clip), *options]) == 0
    report = capsys.readouterr().out
    difference = float(report.split("largest difference ")[1].split()[0])
    assert difference < 1e-5
    assert "forward + backward" in report and "on the CPU" in report

    (file,) = tmp_path.glob("*.png")
    image = masked_clip.open_image(file)
    assert image.size == (2 * 228, 2 * 228)  # two frames, and below them what is visible
    bottom = image.crop((0, 228, 2 * 228, 2 * 228)).convert("RGB")
    grey = sum(count for count, colour in bottom.getcolors(1 << 20) if colour == (127,) * 3)
    assert 0.88 < grey / (2 * 224 * 224) < 0.92
    page = (tmp_path / "index.html").read_text()
    assert (
        file.name in page and "fruit and vegetables ride past" in page and "conv + gather" in page
    )


def test_masked_clip_names_a_clip_that_cannot_be_decoded(masked_clip, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    for file in (broken, tmp_path / "missing.mp4"):
        assert masked_clip.main([str(file), "--out", str(tmp_path / "demo")]) == 1
        assert f"cannot decode {file}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_clips_have_captions_and_an_attribution():
    rows = json.loads((EXAMPLES / "clips.json").read_text())
    files = {file.name for file in (EXAMPLES / "clips").glob("*.mp4")}
    assert {row["video"] for row in rows} == files
    assert all(row["caption"] and all(map(str.strip, row["caption"])) for row in rows)
    readme = (EXAMPLES / "clips" / "README.md").read_text()
    assert "CC BY 4.0" in readme and all(file in readme for file in files)
