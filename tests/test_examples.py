"""The examples on one short clip."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from vidl.bench.training import quality
from vidl.training import Config, pretrain

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_STEP = [
    "data.clips=200", "data.batch_size=4", "data.workers=0", "schedule.steps=1",
    "schedule.warmup=0", "evaluation.pairs=4",
]  # fmt: skip


def load(name, monkeypatch):
    pytest.importorskip("av")
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script: examples import one another
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.open_image = Image.open
    return module


@pytest.fixture
def masked_clip(monkeypatch):
    return load("masked_clip", monkeypatch)


@pytest.fixture
def run_length(monkeypatch):
    return load("run_length", monkeypatch)


def test_masked_clip(masked_clip, tmp_path, capsys):
    clip = EXAMPLES / "clips" / "fruit_conveyor.mp4"
    options = ["--frames", "2", "--masks", "0.9", "--repetitions", "1", "--out", str(tmp_path)]
    assert masked_clip.main([str(clip), *options]) == 0
    report = capsys.readouterr().out
    difference = float(report.split("largest difference ")[1].split()[0])
    assert difference < 1e-5
    assert "forward + backward" in report and "float32, CPU, " in report

    (file,) = tmp_path.glob("*.png")
    image = masked_clip.open_image(file)
    assert image.size == (2 * 228, 2 * 228)  # two frames, and below them the visible patches
    bottom = image.crop((0, 228, 2 * 228, 2 * 228)).convert("RGB")
    grey = sum(count for count, colour in bottom.getcolors(1 << 20) if colour == (127,) * 3)
    assert 0.88 < grey / (2 * 224 * 224) < 0.92
    page = (tmp_path / "index.html").read_text()
    assert (
        file.name in page and "fruit and vegetables ride past" in page and "conv + gather" in page
    )


def test_masked_clip_names_a_broken_clip(masked_clip, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    for file in (broken, tmp_path / "missing.mp4"):
        assert masked_clip.main([str(file), "--out", str(tmp_path / "demo")]) == 1
        assert f"cannot decode {file}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_run_length(run_length, tmp_path, capsys):
    clip = EXAMPLES / "clips" / "fruit_conveyor.mp4"
    options = ["--frames", "4", "--out", str(tmp_path)]
    kept = []
    for threshold in ("0", "0.1", "1e9"):
        assert run_length.main([str(clip), *options, "--threshold", threshold]) == 0
        report = capsys.readouterr().out
        kept.append(int(report.split("fruit_conveyor.mp4: ")[1].split()[0]))
        assert f"of 392 tokens ({kept[-1] / 392:.0%})" in report
        assert f"embedded [{kept[-1]}, 768] instead of [392, 768]" in report
    assert 392 >= kept[0] >= kept[1] >= kept[2] == 196  # the first slice is always kept

    (file,) = tmp_path.glob("*.png")
    image = run_length.open_image(file)
    assert image.size == (4 * 228, 2 * 228)  # four frames, and below them the kept patches
    bottom = image.crop((0, 228, 4 * 228, 2 * 228)).convert("RGB")
    grey = sum(count for count, colour in bottom.getcolors(1 << 20) if colour == (127,) * 3)
    assert 0.5 <= grey / (4 * 224 * 224) < 0.51  # the second slice


@pytest.mark.parametrize("frames", ["0", "3"])
def test_run_length_needs_whole_tubelets(frames, run_length, capsys):
    with pytest.raises(SystemExit):
        run_length.main(["--frames", frames])
    assert f"need an even number of frames, got {frames}" in capsys.readouterr().err


def test_run_length_names_a_broken_clip(run_length, tmp_path, capsys):
    assert run_length.main([str(tmp_path / "missing.mp4"), "--out", str(tmp_path / "demo")]) == 1
    assert "cannot decode" in capsys.readouterr().err


def test_clips_have_captions_and_an_attribution():
    rows = json.loads((EXAMPLES / "clips.json").read_text())
    files = {file.name for file in (EXAMPLES / "clips").glob("*.mp4")}
    assert {row["video"] for row in rows} == files
    assert all(row["caption"] and all(map(str.strip, row["caption"])) for row in rows)
    readme = (EXAMPLES / "clips" / "README.md").read_text()
    assert "CC BY 4.0" in readme and all(file in readme for file in files)


def test_questions_and_choices_are_about_the_clips(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path))
    from vidl.data import annotations

    clips = [row["video"] for row in json.loads((EXAMPLES / "clips.json").read_text())]
    questions, choices = (
        list(annotations.load(EXAMPLES / name)) for name in ("questions.json", "choices.json")
    )
    for rows in (questions, choices):
        assert {row.media for row in rows} == {str(EXAMPLES / "clips" / clip) for clip in clips}
    assert len(questions) >= 70 and len(choices) == len(clips)
    asked = {(row.media, row.question) for row in questions}
    assert len(asked) == len(questions)  # a question has one answer
    for row in questions:
        assert re.fullmatch(r"[a-z0-9][a-z0-9 -]*\?", row.question), row
        # Answers are compared letter by letter.
        assert re.fullmatch(r"[a-z0-9-]+( [a-z0-9-]+){0,2}", row.answer), row
        signed = re.search(r"sign_(\w+)\.mp4", row.media)
        if signed and "which word" in row.question:
            assert row.answer == signed[1]
    for row in choices:
        assert len(row.options) in (4, 5) and len(set(row.options)) == len(row.options), row
        assert all(re.fullmatch(r"[a-z][a-z ,-]*[a-z]", option) for option in row.options), row
        signed = re.search(r"sign_(\w+)\.mp4", row.media)
        assert not signed or row.options[row.correct].endswith(f" signs the word {signed[1]}")
    places = [row.correct for row in choices]
    assert max(map(places.count, places)) <= len(places) / 3  # a constant answer is no good


def test_sparse_clip(monkeypatch, tmp_path, capsys):
    sparse_clip = load("sparse_clip", monkeypatch)
    clip = EXAMPLES / "clips" / "fruit_conveyor.mp4"
    assert sparse_clip.main([str(clip), "--preset", "tiny", "--out", str(tmp_path)]) == 0
    report = capsys.readouterr().out
    assert "patches:   784 tokens" in report and "fusion:" in report
    (file,) = tmp_path.glob("*.png")
    # Four frames; rows: the clip, the mask, two pruning layers, the selected frames.
    assert sparse_clip.open_image(file).size == (4 * 228, 5 * 228)
    for wrong in (["--mask-ratio", "2"], ["--preset", "huge"]):
        assert sparse_clip.main([str(clip), *wrong, "--out", str(tmp_path)]) == 1
        assert "need" in capsys.readouterr().err


def test_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(EXAMPLES.parent)  # its configuration has paths relative to the root
    demo = load("demo", monkeypatch)
    options = ["schedule.steps=4", "run.log_every=1", "data.workers=0", "model.depth=3"]
    options += ["evaluation.rerank=4"]
    options += ["--repetitions", "1", "--timed", "tiny", "--out", str(tmp_path)]
    assert demo.main(options) == 0
    shown = capsys.readouterr()
    assert "4/4  loss" in shown.err and "33 clips, 66 captions" in shown.out
    page = (tmp_path / "index.html").read_text()
    assert page.count("<polyline") == 4 and page.count("<img") == 4
    assert "video to text, re-ranked" in page and "<th>reference</th>" in page
    for name in ("worker", "sign_eat"):
        # Four frames; rows: the clip, the mask, two pruning layers, the selected frames.
        assert demo.open_image(tmp_path / f"{name}.png").size == (4 * 228, 5 * 228)
    assert demo.main(["schedule.stops=4", "--out", str(tmp_path)]) == 1
    assert "schedule.steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted(EXAMPLES.glob("moving_shapes_*.yaml")), ids=lambda file: file.stem
)
def test_moving_shapes(file, tmp_path):
    """A step of each configuration, dense and sparse; clips of a batch differ in their motion."""
    for row in ("dense", "sparse"):
        given = [*ONE_STEP, f"run.folder={tmp_path / row}"]
        config = Config.read(file, given)
        assert file.stem == f"moving_shapes_{config.model.name}" and config.data.looks == 1
        given += [f"model.{name}={value}" for name, value in quality.rows(config)[row].items()]
        result = pretrain(Config.read(file, given))
        assert result["finished"] and "t2v R@1" in result["evaluation"]


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    """From a folder of clips to the savings table, in a kernel of Jupyter."""
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    (tmp_path / "clips").mkdir()
    for name in ("bolts", "sign_eat", "sign_no", "worker"):
        shutil.copy(EXAMPLES / f"clips/{name}.mp4", tmp_path / "clips")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "VIDL_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(EXAMPLES / "savings.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "clear its outputs"

    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert "4 clips in 4 rows" in shown and "0 broken" in shown
    assert [o["data"]["text/plain"] for o in outputs if "data" in o] == ["True"]  # finished
    assert (tmp_path / "demo/savings/run").is_dir()
    table = shown.split("speedup over dense, pytorch")[1]
    assert re.search(r"dense +1\.00 x +\d\.\d\d x\n +sparse +\d\.\d\d x +\d\.\d\d x", table)
