"""The command line: `vidl info`, help, missing packages and error messages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vidl
from vidl import info
from vidl.cli import EXTRAS, SPINS, main
from vidl.data import video
from vidl.kernels import choices, library
from vidl.training import Config


def test_info_json_covers_every_op_backend_and_device(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {(row["op"], row["backend"], row["device"]): row for row in facts["ops"]}
    assert set(rows) == {
        (op, backend, device)
        for op in library.OPS
        if not op.endswith("_bwd")
        for backend in library.BACKENDS
        for device in ("cpu", "cuda")
    }
    for (op, backend, device), row in rows.items():
        assert bool(row["reason"]) != bool(row["dtypes"]), "a reason for every no, and only then"
        if device == "cpu":
            reasons = [library.why_not(backend, op, device, dtype) for dtype in library.DTYPES]
            assert (row["reason"] is None) == (None in reasons)
        elif not torch.cuda.is_available():
            assert row["reason"] == "no CUDA device"
    picked = [key for key, row in rows.items() if row["auto"]]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    assert len(picked) == len(info.op_names()) * len(devices)


def test_info_names_versions_build_devices_and_decoders():
    facts = info.collect()
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["vidl"]
    assert {"file", "error", "loads"} <= set(facts["build"])
    assert facts["cpu"]["model"] and facts["cpu"]["cores"] >= 1
    assert set(facts["decoders"]) == {"PyAV", "torchcodec"}
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_info_says_what_auto_takes_and_from_where(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "_tables", {})
    key = choices.Key("select_tokens", (("rows", 3),), "float32", (), False)
    choices.write("cpu", key, "reference")
    choices.write("cpu", key._replace(gradient=True), "native")
    facts = info.collect()
    rows = {row["op"]: row for row in facts["choices"]["ops"] if row["device"] == "cpu"}
    assert rows["select_tokens"]["tuned"] == {"reference": 1, "native": 1}
    assert rows["frame_difference"]["tuned"] == {} == rows["select_tokens"]["shipped"]
    assert all(row["rule"] in library.BACKENDS for row in rows.values())
    assert "tuned native x 1, tuned reference x 1" in info.render(facts)
    # an override that cannot run everywhere is shown, and is no error
    monkeypatch.setenv("VIDL_BACKEND", "triton")
    assert "VIDL_BACKEND=triton overrides it" in info.render(info.collect())


def test_info_says_what_the_launcher_of_triton_needs(tmp_path, monkeypatch):
    assert set(info.triton_needs()) == {"C compiler", "Python.h"}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(info.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert info.triton_needs() == {"C compiler": None, "Python.h": None}
    (tmp_path / "Python.h").touch()
    (tmp_path / "mycc").touch(mode=0o755)
    monkeypatch.setenv("CC", "mycc -O1")
    needs = info.triton_needs()
    assert needs == {"C compiler": str(tmp_path / "mycc"), "Python.h": str(tmp_path / "Python.h")}
    text = info.render(info.collect())
    assert "launcher of Triton" in text and str(tmp_path / "mycc") in text


def test_version(capsys):
    with pytest.raises(SystemExit) as status:
        main(["--version"])
    assert status.value.code == 0 and capsys.readouterr().out == f"vidl {vidl.__version__}\n"


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("versions", "build", "devices", "video decoders", "ops", torch.__version__):
        assert part in text
    for op in info.op_names():
        assert op in text
    assert "reference " in text and "yes: float32, float16, bfloat16" in text


def test_an_installed_decoder_runs():
    pytest.importorskip("av")
    assert info.decoders()["PyAV"] is None


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "x is not installed"),
        (
            RuntimeError("\nCould not load libav.\nMore.\n"),
            "RuntimeError: Could not load libav. More.",
        ),
    ],
)
def test_a_broken_decoder_gives_a_reason(monkeypatch, error, reason):
    def probe(clip):
        raise error

    monkeypatch.setattr(video, "_frames_by_torchcodec", probe)
    monkeypatch.setattr(video, "why_not", video.why_not.__wrapped__)  # without its cache
    assert info.decoders()["torchcodec"] == reason


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--help"], ["info", "bench"]),
        (["info", "--help"], ["--json", "backends of each op"]),
        (["data", "--help"], ["convert", "check", "preview"]),
        (["data", "convert", "--help"], ["webvid", "msrvtt", "--media", "share its pages"]),
        (["data", "check", "--help"], ["Decode every frame", "Exit status 1"]),
        (["data", "preview", "--help"], ["--mask-ratio", "random mask"]),
        (["bench", "--help"], ["--shapes", "--baselines", "--dry-run", "--write", "--threads"]),
    ],
)
def test_help(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["bench", "fly"], "need ops among frame_difference, masked_patch_embed"),
        (["bench", "--shapes", "nothing of the kind"], "no shape matches 'nothing of the kind'"),
        (["bench", "--dtype", "int8"], "need dtype among float32, float16, bfloat16; got int8"),
        (["bench", "--device", "cpu", "--threads", "0"], "need positive thread counts"),
        (["bench", "--device", "cpu", "--threads", "two"], "got 'two'"),
        (["bench", "--modes", "backward"], "need modes among forward, full; got backward"),
        (["data", "convert", "a.csv", "--format", "webvid", "--split", "test"], "not webvid"),
        (["data", "preview", "a.json", "--mask-ratio", "2"], "from 0 to 1, got 2.0"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "need a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80, 130])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (["pretrain", "--help"], ["finetune", "qa", "--help"]):
        with pytest.raises(SystemExit):
            main(command)
        text = capsys.readouterr().out
        widths = [len(line) for line in text.splitlines()]
        assert columns - 20 < max(widths) <= columns
        assert "bert-base-uncased" in text, "names are not broken at hyphens"
        assert "data.flip: " in text and "(default: true)" in " ".join(text.split())


def test_help_does_not_import_torch(tmp_path):
    """`python -m vidl --help` works without importing torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    answer = subprocess.run(
        [sys.executable, "-m", "vidl", "--help"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "COMMAND" in answer.stdout


# `vidl` where no package of an extra can be imported; prints the exit status of each command.
BARE = """
import ast, sys

from vidl.cli import EXTRAS, main

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *options):
        if name.partition(".")[0] not in (*EXTRAS, "torchcodec"):
            return self.finder.find_spec(name, *options)

sys.meta_path[:] = map(Finder, sys.meta_path)
for command in ast.literal_eval(sys.argv[1]):
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    print(command, status, file=sys.stderr)
"""
COMMANDS = [
    *(["info"], ["bench"], ["bench", "compare"], ["bench", "report"], ["bench", "summary"]),
    *(["savings"], ["summary"], ["pretrain"], ["finetune"], ["finetune", "retrieval"]),
    *(["finetune", "qa"], ["finetune", "caption"], ["eval"], ["export"], ["data"]),
    *(["data", "convert"], ["data", "check"], ["data", "preview"], ["data", "speed"]),
    *(["data", "shard"], ["init"], ["completion"], ["estimate"]),
]


def bare(commands):
    """Run the commands without the extras; returns the lines that they print to stderr."""
    process = subprocess.run(
        [sys.executable, "-c", BARE, repr(commands)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr.splitlines()


def test_help_needs_no_extra():
    commands = [[*command, "--help"] for command in COMMANDS]
    assert bare(commands) == [f"{command} 0" for command in commands]


def test_commands_name_the_extra_that_they_need(tmp_path):
    clips = str(tmp_path / "clips.json")
    Path(clips).write_text('[{"video": "a.mp4", "caption": "a"}]')
    run = tmp_path / "run"
    run.mkdir()
    Config.read(None, ["data.source=moving_shapes"]).save(run / "config.yaml")
    (run / "tokenizer.json").write_text("{}")
    weights = ["--weights", str(run)]
    folder = f"run.folder={tmp_path / 'new'}"
    needed = {
        ("info",): None,
        ("completion", "bash"): "shtab",
        ("bench", "--dry-run"): None,
        ("savings", "mac", "--preset", "tiny", "--dry-run"): None,
        ("savings", "mac", "--preset", "tiny", "--dry-run", "--quality", "1"): None,
        ("summary", "mac", "--preset", "tiny", "depth=1"): None,
        ("data", "convert", clips): "pyarrow",
        ("data", "check", clips): "pyarrow",
        ("data", "preview", clips): "pyarrow",
        ("data", "speed", clips): "pyarrow",
        ("pretrain", "data.source=moving_shapes", folder): "safetensors",
        ("finetune", "retrieval", *weights, folder): "safetensors",
        ("finetune", "qa", *weights, f"data.files={clips}", "data.source=clips"): "pyarrow",
        ("eval", "retrieval", *weights): "tokenizers",
        ("export", *weights, "--out", str(tmp_path / "out")): "tokenizers",
    }
    expected = []
    for command, package in needed.items():
        if package is not None:
            extra = {"safetensors": "train", "shtab": "completion"}.get(package, "data")
            install = f"pip install 'vidl-kernels[{extra}]'"
            expected.append(f'vidl {command[0]} needs {package} (extra "{extra}"): {install}')
        expected.append(f"{list(command)} {int(package is not None)}")
    assert bare([list(command) for command in needed]) == expected


def test_the_extras_are_those_of_pyproject():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for package, extra in EXTRAS.values():
        assert re.search(rf'^{extra} = \[.*"{package}[>"]', text, re.MULTILINE)


@pytest.mark.parametrize(
    "words", [["mask_ratio=0.9", "--batch", "2"], ["--batch", "2", "mask_ratio=0.9"]]
)
def test_fields_before_and_after_options(words, capsys):
    assert main(["savings", "mac", "--preset", "tiny", "--device", "cpu", "--dry-run", *words]) == 0
    assert "mac tiny, 2 clips, mask_ratio 0.9" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["summary", "savings"])
def test_fields_are_yaml_in_every_command(command, capsys):
    dry = ["--dry-run"] if command == "savings" else []
    fields = ["prune_layers=[1]", "mask_ratio=5e-1", "fuse=null", "image_size=32", "depth=2"]
    assert main([command, "smaug", "--preset", "tiny", "--device", "cpu", *dry, *fields]) == 0
    assert "after layer 1" in (shown := capsys.readouterr().out) and "after layer 2" not in shown
    with pytest.raises(SystemExit):
        main([command, "smaug", "mask_ration=0.5"])
    assert "did you mean 'mask_ratio'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["info", "more"], ["savings", "mac", "--nothing"]])
def test_unknown_arguments_are_an_error(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "pretrain --help"])
def test_a_closed_pipe_is_no_error(command):
    code = f"import sys; from vidl.cli import main; sys.exit(main({command.split()!r}))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize(
    "given, spins",
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["default", "count", "policy"],
)
def test_waiting_threads_sleep_early(given, spins):
    """As the OpenMP library of torch reports it; the user's own settings stay."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: x for name, x in os.environ.items() if name not in names} | given
    done = subprocess.run(
        [sys.executable, "-m", "vidl", "info"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    reported = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if reported is None:
        pytest.skip("this torch does not use libgomp")
    assert reported[1] == spins if spins else reported[1] != SPINS


def test_init_writes_every_field_with_its_meaning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", "model.mask_ratio=0.5", "schedule.steps=7"]) == 0
    assert "vidl pretrain --config mine.yaml" in capsys.readouterr().out
    text = Path("mine.yaml").read_text()
    given = ["data.files=[mine.json]", "run.folder=runs/mine"]
    config = Config.read("mine.yaml")
    assert config == Config.read(None, [*given, "model.mask_ratio=0.5", "schedule.steps=7"])
    for name in config.values():
        assert re.search(rf"  # .+\n  {name.partition('.')[2]}: ", text), name
    assert "  # keep_rate: " in text and "  mask_ratio: 0.5\n" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    for words, message in (
        (["mine"], "mine.yaml exists"),
        (["../mine"], "need NAME as a plain file name, got '../mine'"),
        (["other", "model.mask_ration=0.5"], "did you mean 'model.mask_ratio'?"),
    ):
        with pytest.raises(SystemExit):
            main(["init", *words])
        assert message in " ".join(capsys.readouterr().err.split())
    assert Path("mine.yaml").read_text() == text and not Path("other.yaml").exists()


def test_completion_is_a_script_of_the_shell(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = "COMP_WORDS=(vidl finetune retrieval --w); COMP_CWORD=3"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{words}; _shtab_vidl; echo ${{COMPREPLY[@]}}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["--weights"], done


@pytest.mark.parametrize(
    "words", [["init"], ["pretrain", "a=1"], ["bench", "fly"], ["eval", "--x"]]
)
def test_an_error_shows_the_usage_of_its_command(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.startswith(f"usage: vidl {words[0]} ")
