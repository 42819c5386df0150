"""Runs: configuration and exact resumption, on one and two processes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from vidl import cli, models
from vidl.data import annotations
from vidl.data.cache import CachedClips
from vidl.data.sampler import Key
from vidl.data.text import load_tokenizer, train_tokenizer
from vidl.files import replaced
from vidl.kernels import choices
from vidl.kernels.choices import Table
from vidl.training import Config, Diverged, checkpoints, optimizer, pretrain
from vidl.training.config import Schedule, explain, explain_recipe
from vidl.training.finetune import configuration, finetune
from vidl.training.lock import locked
from vidl.training.muon import Muon, orthogonalise
from vidl.training.parallel import Ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = dict(
    image_size=32, patch_size=16, frames=2, width=32, depth=2, heads=2, text_width=32,
    text_layers=1, text_heads=2, embed_dim=16,
)  # fmt: skip
TINY = [
    *(f"model.{name}={value}" for name, value in MODEL.items()),
    "data.source=moving_shapes", "data.clips=20", "data.words=12", "data.batch_size=4",
    "data.workers=0", "evaluation.pairs=5", "schedule.steps=8", "schedule.warmup=2",
    "optimizer.lr=1e-3", "run.log_every=1", "run.threads=1", "run.device=cpu",
]  # fmt: skip
MAC = [*TINY, "model.name=mac"]
SMAUG = [
    *TINY, "model.name=smaug", "model.prune_layers=[0]", "model.mask_ratio=0.4",
    "model.fusion_layers=1", "model.decoder_width=16", "model.decoder_depth=1",
    "model.decoder_heads=1", "schedule.prune_over=6",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(folder, options, *more, evaluate=None):
    return pretrain(Config.read(None, [*options, f"run.folder={folder}", *more]), evaluate)


def records(folder):
    """The log without times."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    timed = ("seconds_per_step", "clips_per_second", "tokens_per_second", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def same_weights(a, b):
    one, other = (checkpoints.weights_of(x) for x in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_config_reads_files_and_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: mac, mask_ratio: 0.5}\ndata: {files: a.json}\n")
    config = Config.read(file, ["model.mask_ratio=0.25", "optimizer.lr=3e-4", "data.scale=[0.2,1]"])
    assert config.model.recipe == {"mask_ratio": 0.25} and config.recipe().mask_ratio == 0.25
    assert config.optimizer.lr == 3e-4 and config.data.files == ["a.json"]
    assert config.data.scale == (0.2, 1.0) and isinstance(config.recipe(), models.MacRecipe)
    config.save(tmp_path / "saved.yaml")
    assert Config.read(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.mask_ration=0.5", "did you mean 'model.mask_ratio'?"),
        ("run.steps=5", "did you mean 'schedule.steps'?"),
        ("optimizer.lr=fast", "need optimizer.lr as float, got 'fast'"),
        ("schedule.steps=2.5", "need schedule.steps as int, got 2.5; did you mean 2?"),
        (
            "schedule.steps=.inf",
            "need schedule.steps as int, got inf; did you mean a finite number",
        ),
        (
            "schedule.steps=.nan",
            "need schedule.steps as int, got nan; did you mean a finite number",
        ),
        ("optimizer.lr=.inf", "need optimizer.lr as float, got inf; did you mean a finite number"),
        ("data.batch_size=true", "need data.batch_size as int, got True; did you mean 1?"),
        ("optimizer.lr=true", "need optimizer.lr as float, got True; did you mean 1.0?"),
        ("run.folder=true", "need run.folder as str, got True"),
        ("data.words=0", "need data.words >= 3, got 0"),
        ("data.broken=2", "need data.broken from 0 to 1, got 2.0"),
        ("data.scale=[0.5,0.2]", "need data.scale as two ascending shares"),
        (
            "run.device=tpu",
            "need run.device as Literal['auto', 'cpu', 'cuda'], got 'tpu'; did you mean 'cpu'?",
        ),
        ("run.parallel=dp", "need run.parallel as Literal['ddp', 'fsdp'], got 'dp'"),
        ("model.time=slot", "the configuration has no field 'model.time'"),  # MAC's
        ("model.name=clip", "need a model among smaug, mac, singularity"),
        ("model.mask_ratio=2", "need mask_ratio in [0, 1), got 2.0"),
        ("schedule.steps=0", "need schedule.steps >= 1, got 0"),
        ("schedule.shape=square", "got 'square'; did you mean 'linear'?"),
        ("schedule.power=0", "need schedule.power > 0, got 0.0"),
        ("optimizer.factors={text: -1}", "need optimizer.factors >= 0, got -1.0 for text"),
        ("optimizer.factors={text: fast}", "need optimizer.factors as dict"),
        ("optimizer.factors=2", "need optimizer.factors as dict"),
        ("data.source=clips", "need data.files"),
        ("run", "need section.field=value, got 'run'"),
    ],
)
def test_config_errors(override, message):
    with pytest.raises(ValueError) as error:
        Config.read(None, ["data.source=moving_shapes", override])
    assert message in str(error.value)


def test_a_whole_number_is_exact():
    seed = 2**53 + 1
    assert Config.read(None, [*MAC, f"run.seed={seed}"]).run.seed == seed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_line(tmp_path, capsys):
    assert cli.main(["pretrain", *MAC, "run.device=cuda", f"run.folder={tmp_path}"]) == 1
    shown = capsys.readouterr().err
    assert "need a GPU for device cuda" in shown and "cpu or auto" in shown
    with pytest.raises(SystemExit):
        cli.main(["summary", "mac", "--preset", "tiny", "--device", "cuda"])
    assert "choose --device cpu" in capsys.readouterr().err


def test_an_error_in_a_worker_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    rows = [{"video": f"{n}.mp4", "caption": f"clip {n}"} for n in range(40)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    options = [*MAC, "data.source=clips", f"data.files={tmp_path / 'mine.json'}", "data.workers=1"]
    assert cli.main(["pretrain", *options, f"run.folder={tmp_path / 'run'}"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vidl pretrain: 20 clips in a row cannot be read; the last is ")


def test_help_explains_every_field(capsys):
    text = explain() + "\n".join(explain_recipe(models.recipe("mac")))
    for name in Config.read(None, MAC).values():
        assert f"{name}: " in text, name
    with pytest.raises(SystemExit) as status:
        cli.main(["pretrain", "--help"])
    assert status.value.code == 0 and "schedule.warmup: " in capsys.readouterr().out


def test_the_neutral_example_names_no_data():
    file = EXAMPLES / "own.yaml"
    with pytest.raises(ValueError, match="need data.files"):
        Config.read(file)
    config = Config.read(file, ["data.files=[mine.json]"])
    assert config.data.files == ["mine.json"] and config.evaluation.files == []


def test_command_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["pretrain", "data.fils=x"])
    assert status.value.code == 2 and "'data.files'" in capsys.readouterr().err
    missing = tmp_path / "missing.json"
    assert cli.main(["pretrain", f"data.files={missing}", f"run.folder={tmp_path}"]) == 1
    assert str(missing) in capsys.readouterr().err
    # a command that fails before its first file leaves no folder
    with pytest.raises(KeyError), locked(tmp_path / "new", Ranks(0, 1, torch.device("cpu"))):
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_parameters_with_weight_decay():
    for name in models.MODELS:
        model = models.create(name, "tiny")
        decayed, others = optimizer.make(model, Config.read(None, MAC).optimizer).param_groups
        names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        decayed, others = ({names[id(p)] for p in g["params"]} for g in (decayed, others))
        assert len(decayed) + len(others) == len(names)
        assert all(".norm" not in n and "LayerNorm" not in n and "bias" not in n for n in decayed)
        assert not [n for n in decayed if "pos" in n.lower() or "token_type" in n or "cls_tok" in n]
        assert "text.embeddings.word_embeddings.weight" in decayed
        assert ("project_clip.weight" in decayed) == hasattr(model, "project_clip")
        positions = {"smaug": ["vision.pos_embed", "time"], "mac": ["vision.pos_embed"]}
        assert set(positions.get(name, [])) <= others and "time" not in decayed


def test_parameters_of_muon():
    for name in models.MODELS:
        model = models.create(name, "tiny")
        optimized = optimizer.make(
            model, Config.read(None, [*MAC, "optimizer.name=muon"]).optimizer
        )
        words, others, matrices = optimized.param_groups
        own = [model.text, *([model.decoder] if name == "omnivl" else [])]
        tables = {id(part.embeddings.word_embeddings.weight) for part in own}
        assert {id(parameter) for parameter in words["params"]} == tables
        assert [group["orthogonal"] for group in optimized.param_groups] == [False, False, True]
        assert others["weight_decay"] == 0 < matrices["weight_decay"]
        assert all(p.ndim >= 2 for p in matrices["params"])
        count = sum(len(group["params"]) for group in optimized.param_groups)
        assert count == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="need run.parallel=ddp with optimizer.name=muon"):
        Config.read(None, [*MAC, "optimizer.name=muon", "run.parallel=fsdp"])
    with pytest.raises(ValueError, match="got a vector"):
        Muon([{"params": [torch.zeros(3)], "orthogonal": True}])


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 8, 40), (1, 40, 8)])
def test_orthogonal_updates(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices[0, :4] *= 100  # the scale of rows does not matter
    orthogonal = orthogonalise(matrices)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    kept = torch.linalg.svdvals(orthogonal)[values > 0.02 * values.amax(-1, keepdim=True)]
    assert kept.min() > 0.6 and kept.max() < 1.25
    # the singular vectors do not change
    inside = u.mT @ orthogonal @ v.mT
    torch.testing.assert_close(
        inside - inside * torch.eye(len(inside[0])), 0 * inside, atol=1e-3, rtol=0
    )
    assert not orthogonalise(torch.zeros(shape)).any()


def test_a_step_of_muon():
    """Against a plain computation: weight decay, then the update of a matrix and a convolution."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*size, generator=generator) for size in ((6, 10), (6, 2, 5), (7,))]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    muon = Muon(
        [{"params": parameters[:2], "orthogonal": True}, {"params": parameters[2:]}],
        lr=0.1, weight_decay=0.5,
    )  # fmt: skip
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    muon.step()
    for weight, parameter, gradient in zip(weights[:2], parameters, gradients, strict=False):
        update = orthogonalise(gradient.flatten(1)[None])[0].view_as(weight)
        wanted = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * update
        torch.testing.assert_close(parameter.detach(), wanted)
        torch.testing.assert_close(parameter.grad, gradient)
    same = torch.nn.Parameter(weights[2].clone())
    same.grad = gradients[2]
    torch.optim.AdamW([same], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameters[2], same)
    # Nesterov momentum of both gradients in the second step
    before, second = parameters[0].detach().clone(), torch.randn(6, 10, generator=generator)
    parameters[0].grad = second
    muon.step()
    mean = 0.95 * 0.05 * gradients[0] + 0.05 * second
    update = orthogonalise((0.05 * second + 0.95 * mean)[None])[0]
    wanted = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * update
    torch.testing.assert_close(parameters[0].detach(), wanted)


def test_schedules():
    schedule = Schedule(steps=110, warmup=10, final=0.1, prune_over=50)
    rates = [optimizer.learning_rate(step, 2.0, schedule) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2
    assert rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    kept = [optimizer.keep_rate(step, 0.5, schedule) for step in (0, 25, 50, 99)]
    assert kept == pytest.approx([1, 0.75, 0.5, 0.5])


@pytest.mark.parametrize("shape, power, half", [
    ("linear", 2.0, 0.5), ("poly", 1.0, 0.5), ("poly", 2.0, 0.25), ("poly", 0.5, 0.5**0.5),
])  # fmt: skip
def test_shapes_of_schedules(shape, power, half):
    schedule = Schedule(steps=110, warmup=10, final=0.2, shape=shape, power=power)
    rates = [optimizer.learning_rate(step, 2.0, schedule) for step in range(150)]
    assert rates[:11] == pytest.approx([0.2 * step for step in range(1, 11)] + [2.0])
    assert rates[60] == pytest.approx(2.0 * (0.2 + 0.8 * half))
    assert rates[110:] == pytest.approx([0.4] * 40)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_factors_of_learning_rates(tmp_path):
    """A part with factor 0 stays, one with 0.1 gets a tenth of the rate, also after resumption."""
    options = [*MAC, "optimizer.weight_decay=0.3", "schedule.steps=4", "run.save_every=1",
               "optimizer.factors={vision: 0, text: 0.5, text.encoder.layer.0.output: 0.1}",
               "run.keep=9"]  # fmt: skip
    rates = {}

    def keep(training):
        for group in training.optimizer.param_groups:
            for parameter in group["params"]:
                name = next(n for n, p in training.model.named_parameters() if p is parameter)
                rates[name] = group["lr"] / training.rate
        if training.step == 2 and not stopped:
            stopped.append(True)
            raise RuntimeError("stop")
        return {}

    stopped: list[bool] = []
    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path / "run", options, "evaluation.every=1", evaluate=keep)
    result = train(tmp_path / "run", options, "evaluation.every=1", evaluate=keep)
    lowest = 1e-3 * 0.01
    assert result["lr"] == pytest.approx(lowest + (1e-3 - lowest) * (1 + math.cos(math.pi / 2)) / 2)
    for name, rate in rates.items():
        assert not name.startswith("vision.")
        expected = 0.1 if name.startswith("text.encoder.layer.0.output.") else 0.5
        assert rate == pytest.approx(expected if name.startswith("text.") else 1.0), name
    assert {0.1, 0.5, 1.0} == {round(rate, 6) for rate in rates.values()}
    saved = list(checkpoints.steps(tmp_path / "run").values())
    first, last = (checkpoints.weights_of(path) for path in (saved[0], saved[-1]))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed and not any(name.startswith("vision.") for name in changed)
    assert any(name.startswith("text.") for name in changed)
    with pytest.raises(ValueError, match="optimizer.factors of parts that learn, .*, got 'visio'"):
        train(tmp_path / "other", [*MAC, "optimizer.factors={visio: 0.1}"])


def test_factors_are_those_of_the_longest_name():
    factors = {"text": 2.0, "text.cls": 3.0}
    names = ("text.encoder.weight", "text.cls.bias", "text.clsx.bias", "module.text.a", "texts.a")
    assert [optimizer.factor_of(n, factors) for n in names] == [2.0, 3.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [MAC, SMAUG, [*MAC, "optimizer.name=muon"], [*MAC, "optimizer.chunk=2"]],
    ids=["mac", "smaug", "muon", "chunks"],
)
def test_a_run_resumes_exactly(options, tmp_path):
    """Five steps per epoch, two batches per step; stopped in the middle of the second epoch."""
    more = ["optimizer.accumulate=2", "run.save_every=3", "evaluation.every=4"]
    whole = train(tmp_path / "whole", options, *more)
    assert whole["finished"] and whole["step"] == 8 and math.isfinite(whole["loss"])

    def broken(training):
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path / "broken", options, *more, evaluate=broken)
    assert records(tmp_path / "broken")[-1]["step"] == 4  # the checkpoint has step 3
    train(tmp_path / "broken", options, *more, "data.workers=1")
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    assert same_weights(tmp_path / "broken", tmp_path / "whole")
    with pytest.raises(ValueError, match="another optimizer.lr"):
        train(tmp_path / "broken", options, *more, "optimizer.lr=1")


def test_a_resumed_run_keeps_its_choices(tmp_path, monkeypatch):
    """Backends differ in the last bits: what is tuned later must not change a run."""
    monkeypatch.setattr(choices, "_tables", {})
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    keys = []
    with choices.recording(lambda key, *call: keys.append(key)):
        train(tmp_path / "whole", SMAUG)
    ops_of_run = {key.op for key in keys}
    assert {"space_time_attention", "select_tokens", "masked_patch_embed"} <= ops_of_run

    def stop(training):
        if training.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    folder = tmp_path / "resumed"
    train(folder, SMAUG, "evaluation.every=4", evaluate=stop)
    assert Table.from_json(json.loads((folder / "choices.json").read_text())) == Table()
    for key in set(keys):
        choices.write("cpu", key, "reference")
    train(folder, SMAUG, "evaluation.every=4", evaluate=stop)
    assert same_weights(tmp_path / "whole", folder)
    assert Table.from_json(json.loads((folder / "choices.json").read_text())) == Table()
    train(tmp_path / "later", SMAUG)
    assert not same_weights(tmp_path / "whole", tmp_path / "later")  # the entries matter
    kept = Table.from_json(json.loads((tmp_path / "later/choices.json").read_text()))
    assert kept.tuned == dict.fromkeys(keys, "reference")

    (folder / "choices.json").write_text("{}")
    with pytest.raises(ValueError, match="choices.json is damaged"):
        train(folder, SMAUG, "evaluation.every=4", evaluate=stop)


def test_files_of_a_run(tmp_path, capsys):
    seen = []

    def evaluate(training):
        assert not training.model.training and not torch.is_grad_enabled()
        seen.append(training.step)
        return {"R@1": 0.5}

    more = ["run.save_every=2", "run.keep=2", "evaluation.every=3"]
    train(tmp_path, MAC, *more, evaluate=evaluate)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000006", "step-00000008"] and seen == [3, 6, 8]
    assert [r["evaluation/R@1"] for r in records(tmp_path) if "evaluation/R@1" in r] == [0.5] * 3
    shown = capsys.readouterr().err
    assert "8/8  loss" in shown and "data wait" in shown and "ETA 0:00:00" in shown
    assert "step 3: R@1 0.5" in shown

    config = Config.read(tmp_path / "config.yaml")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    from vidl.training import sources

    recipe = config.recipe(vocabulary=sources.vocabulary(tokenizer))
    model = models.Mac(recipe)
    model.load_state_dict(checkpoints.weights_of(tmp_path))
    # A run can start from these weights.
    more = [f"start.model={tmp_path}", "schedule.steps=1", "optimizer.lr=0"]
    begun = train(tmp_path / "next", MAC, *more)
    assert begun["step"] == 1 and same_weights(tmp_path, tmp_path / "next")


def test_activation_checkpointing_computes_the_same(tmp_path):
    """Also the falling keep rate, with names that a run without it resumes from."""
    options = [*SMAUG, "model.keep_rate=0.3"]
    train(tmp_path / "kept", options)
    train(tmp_path / "again", options, "run.save_every=3", "run.checkpoint_activations=true")
    assert records(tmp_path / "kept") == records(tmp_path / "again")
    train(tmp_path / "again", options, "run.resume=3")
    assert records(tmp_path / "kept") == records(tmp_path / "again")
    assert same_weights(tmp_path / "kept", tmp_path / "again")


def test_bfloat16_is_close(tmp_path):
    full = train(tmp_path / "full", SMAUG, "schedule.steps=2")
    half = train(tmp_path / "half", SMAUG, "schedule.steps=2", "run.precision=bfloat16")
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and half["loss"] != full["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at step"):
        train(tmp_path, MAC, "optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup=0")


def test_a_checkpoint_that_is_not_finite_replaces_no_good_one(tmp_path):
    """The loss is logged at the last step only; NaN begins before the second checkpoint."""
    more = ["run.save_every=2", "run.log_every=8", "run.keep=1"]
    train(tmp_path, MAC, *more, "schedule.steps=2")
    good = (tmp_path / "checkpoints/step-00000002/model.safetensors").read_bytes()

    def poison(training):
        training.model.text.embeddings.LayerNorm.bias.data[0] = math.nan
        return {}

    # a weight that becomes NaN after the loss; and large weights, of which the next loss is NaN
    for rate, every, message, evaluate in (
        ("1e-3", 3, "a weight is not finite after step 3", poison),
        ("1e38", 4, "the loss is nan at step 4", lambda training: {}),
    ):
        folder = tmp_path / rate
        shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
        shutil.copy(tmp_path / "tokenizer.json", folder)
        bad = [f"optimizer.lr={rate}", "optimizer.clip=0", "schedule.steps=8"]
        bad += ["schedule.warmup=0", f"run.save_every={every}", "run.log_every=8", "run.keep=1"]
        with pytest.raises(Diverged, match=f"{message}; the last checkpoint is .*step-00000002"):
            train(folder, MAC, *bad, f"evaluation.every={every}", evaluate=evaluate)
        kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert kept == ["step-00000002"]
        assert (folder / "checkpoints/step-00000002/model.safetensors").read_bytes() == good


def test_retention_removes_only_what_the_run_wrote(tmp_path):
    others = ["step-00000001-mine", "step-1", "step-00000001.bak", ".step-mine", "best", "step-x"]
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "notes").write_text("mine")
    for name in (".step-00000003", ".step-00000004.old"):  # left by a run that was killed
        (tmp_path / "checkpoints" / name).mkdir()
    train(tmp_path, MAC, "run.save_every=1", "run.keep=2", "schedule.steps=4")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {*others, "step-00000003", "step-00000004"}
    assert all((tmp_path / "checkpoints" / name / "notes").exists() for name in others)


def test_a_second_process_in_the_folder_is_refused(tmp_path, capsys):
    process = start(tmp_path / "run", [*MAC, "schedule.steps=2000"])
    wait_for(tmp_path / "run", 1, process)
    try:
        begin = (tmp_path / "run/config.yaml").read_bytes()
        options = [*MAC, "schedule.steps=2000", f"run.folder={tmp_path / 'run'}"]
        assert cli.main(["pretrain", *options]) == 1
        shown = capsys.readouterr().err
        assert f"run is in use by process {process.pid} on " in shown and "run.folder" in shown
        assert (tmp_path / "run/config.yaml").read_bytes() == begin and process.poll() is None
    finally:
        process.kill()
        process.communicate()
    # kill -9 gives the folder back
    assert train(tmp_path / "run", [*MAC, "schedule.steps=1"])["step"] >= 1


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "removed", "cut before 1.0"])
def test_a_damaged_checkpoint_is_named(tmp_path, capsys, file, fault):
    more = ["run.save_every=2", "schedule.steps=6"]
    train(tmp_path / "whole", MAC, *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-00000006"
    content = bytearray((newest / file).read_bytes())
    if fault == "flipped":  # in the middle: in the values of a tensor
        content[len(content) // 2] ^= 1
    elif fault == "removed":
        (newest / file).unlink()
    else:
        content = content[: len(content) // 2]
    if fault != "removed":
        (newest / file).write_bytes(content)
    if fault.endswith("1.0"):  # a checkpoint without checksums
        (newest / "checksums.json").unlink()
    options = [*MAC, *more, f"run.folder={tmp_path / 'run'}"]
    assert cli.main(["pretrain", *options]) == 1
    shown = capsys.readouterr().err
    assert f"{newest} is damaged" in shown and "run.resume=4 resumes the one before" in shown
    assert file in shown
    if file == "model.safetensors":
        assert cli.main(["export", "--weights", str(tmp_path / "run"), "--out", str(tmp_path)]) == 1
        assert file in capsys.readouterr().err
    assert cli.main(["pretrain", *options, "run.resume=5"]) == 1
    assert "need run.resume as the step of a checkpoint" in capsys.readouterr().err
    assert cli.main(["pretrain", *options, "run.resume=4"]) == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert newest.with_name("step-00000006-abandoned").is_dir()
    assert Config.read(tmp_path / "run/config.yaml").run.resume is None


@pytest.mark.parametrize("share", [0.5, 1.2])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, capsys, share):
    """Files that may not grow further: of the weights, or of the optimizer's state."""
    resource = pytest.importorskip("resource")
    train(tmp_path, MAC, "schedule.steps=1")
    checkpoint = tmp_path / "checkpoints/step-00000001"
    limit = int(share * (checkpoint / "model.safetensors").stat().st_size)
    shutil.rmtree(checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert cli.main(["pretrain", *MAC, "schedule.steps=1", f"run.folder={tmp_path}"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shown = capsys.readouterr().err
    assert ("model.safetensors" if share < 1 else "state.pt") in shown and "Traceback" not in shown
    assert not list((tmp_path / "checkpoints").iterdir())
    file = tmp_path / "kept"
    file.write_text("before")
    with pytest.raises(OSError, match="kept"), replaced(file) as unfinished:
        unfinished.write_text("after")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "before" and not list(tmp_path.glob(".kept*"))


def test_a_full_disk_leaves_no_rest_in_the_cache(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    rows = annotations.load(EXAMPLES / "clips.json")
    clips = CachedClips(rows, frames=2, size=32, train=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cache/clips/\w+.npy"):
            clips.read(Key(0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache/clips").iterdir())
    assert clips.read(Key(0, 0)).pictures.shape == (2, 32, 32, 3)


def start(folder, options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-m", "vidl", "pretrain", *options, f"run.folder={folder}"]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(folder, lines, process):
    """Wait until the run has logged this step."""
    log = Path(folder) / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_killed_and_terminated(tmp_path):
    """After SIGKILL, Ctrl-C and SIGTERM, resumed: the log equals that of an uninterrupted run."""
    options = [*SMAUG, "data.workers=1", "schedule.steps=300", "schedule.prune_over=20"]
    options += ["run.save_every=2"]
    killed_at = 0
    while killed_at % 5 == 0:  # until it is in the middle of an epoch
        process = start(tmp_path / "killed", options)
        wait_for(tmp_path / "killed", killed_at + 6, process)
        process.kill()
        process.communicate()
        killed_at = records(tmp_path / "killed")[-1]["step"]

    process = start(tmp_path / "killed", options)
    wait_for(tmp_path / "killed", killed_at + 3, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the loader processes too
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to resume" in shown
    assert shown.count("Ctrl-C: finishing this step, then saving") == 1 and "Error" not in shown
    assert "from step " in shown and "from step 0 " not in shown
    stopped_at = records(tmp_path / "killed")[-1]["step"]
    assert checkpoints.newest(tmp_path / "killed").name == f"step-{stopped_at:08}"

    def stop(training):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    last = stopped_at + 3
    for folder in ("killed", "whole"):
        more = [f"evaluation.every={last}", "run.save_every=1000"]
        assert not train(tmp_path / folder, options, *more, evaluate=stop)["finished"]
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_a_record_has_the_mean_of_the_losses_since_the_last(tmp_path):
    """With a record every third step, also if the run is stopped in between, or at its end."""

    def stop(training):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    train(tmp_path / "all", MAC, evaluate=lambda training: {})
    options = [*MAC, "run.log_every=3"]
    train(tmp_path / "whole", options, evaluate=lambda training: {})
    assert train(tmp_path / "stopped", options, "evaluation.every=5", evaluate=stop)["step"] == 5
    train(tmp_path / "stopped", options, evaluate=lambda training: {})
    steps = [r["loss"] for r in records(tmp_path / "all") if "loss" in r]
    for folder in ("whole", "stopped"):
        shown = {r["step"]: r["loss"] for r in records(tmp_path / folder) if "loss" in r}
        assert list(shown) == [3, 6, 8]
        for step, begin in ((3, 0), (6, 3), (8, 6)):
            assert shown[step] == pytest.approx(sum(steps[begin:step]) / (step - begin), rel=1e-6)


def test_a_tracker_that_cannot_write_does_not_stop_a_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("not a folder")
    assert train(tmp_path, MAC, "schedule.steps=1", "run.trackers=tensorboard")["finished"]
    shown = capsys.readouterr().err
    assert shown.count("warning: tensorboard cannot write") == 1
    assert f"start.model={tmp_path} run.folder={tmp_path}-2" in shown, "how to train longer"


def test_a_missing_tracker_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vidl.training.trackers.find_spec", lambda name: None)
    assert (
        cli.main(["pretrain", *MAC, "run.trackers=[mlflow]", f"run.folder={tmp_path / 'run'}"]) == 1
    )
    assert 'needs mlflow-skinny (extra "trackers"): pip install' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _rank(rank, runs):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for port, options in runs:
        os.environ["MASTER_PORT"] = str(port)
        pretrain(
            Config.read(None, options), _stop_once if "evaluation.every=2" in options else None
        )


def _stop_once(training):
    """SIGTERM on one rank, as sent by a scheduler."""
    if training.step == 2 and training.ranks.first:
        os.kill(os.getpid(), signal.SIGTERM)
    return {}


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path):
    """For VTC over all ranks and MVM, whose mean over ranks is exact. Resumes with FSDP2."""
    more = ["model.dropout=0", "schedule.steps=4"]
    runs = {
        "mac": [*MAC, *more, "optimizer.accumulate=2"],
        "smaug": [*SMAUG, *more, "model.vtm=0", "model.mlm=0"],
    }
    ranks = []
    for name, options in runs.items():
        train(tmp_path / name, options, "data.batch_size=8")
        ranks.append([*options, f"run.folder={tmp_path / name}-2"])
    ranks += [[*ranks[1], "run.parallel=fsdp"]]
    ranks[1] = [*ranks[1], "evaluation.every=2"]
    mp.spawn(_rank, ([(free_port(), options) for options in ranks],), nprocs=2)
    for name in runs:
        one, two = records(tmp_path / name), records(f"{tmp_path / name}-2")
        assert one.pop().keys() == two.pop().keys()  # the evaluation
        two = [record for record in two if "loss" in record]
        assert len(one) == len(two) == 4
        for a, b in zip(one, two, strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), (name, key)
        one, two = (checkpoints.weights_of(x) for x in (tmp_path / name, f"{tmp_path / name}-2"))
        assert one.keys() == two.keys()
        for key in one:
            # Adam divides by the size of the gradient: rounding noise gives steps of full size.
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=4e-3)


def _caption_rank(rank, port, weights, options):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    finetune("caption", configuration(weights, None, options, task="caption"), layers=1)


@pytest.mark.slow
def test_two_ranks_write_captions_as_one_with_twice_the_batch(tmp_path):
    """All captions have the same number of words: the mean over ranks is that over words."""
    rows = json.loads((EXAMPLES / "clips.json").read_text())[:16]
    texts = [f"{one} {other}" for one in ("red", "blue", "green", "grey")
             for other in ("dog", "ring", "ball", "hat")]  # fmt: skip
    for row, text in zip(rows, texts, strict=True):
        row.update(video=str(EXAMPLES / "clips" / row["video"]), caption=[text])
    file = tmp_path / "clips.json"
    file.write_text(json.dumps(rows))
    data = ["data.source=clips", f"data.files={file}", "data.outside=true"]
    train(tmp_path / "start", SMAUG, *data, "schedule.steps=1", evaluate=lambda training: {})
    tokenizer = load_tokenizer(tmp_path / "start")
    assert len(set(tokenizer(texts, 12)[1].sum(1).tolist())) == 1
    options = [*data, "model.dropout=0", "model.mask_ratio=0.4", "schedule.steps=4"]
    start = tmp_path / "start"
    two = [*options, "data.batch_size=4", f"run.folder={tmp_path / 'two'}"]
    mp.spawn(_caption_rank, (free_port(), start, two), nprocs=2)
    one = [*options, "data.batch_size=8", f"run.folder={tmp_path / 'one'}"]
    finetune("caption", configuration(start, None, one, task="caption"), layers=1)
    logs = [[r for r in records(tmp_path / n) if "loss" in r] for n in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "caption", "grad_norm", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key


@pytest.mark.slow
def test_two_ranks_train_alpro_as_one_with_twice_the_batch(tmp_path):
    """For VTC over all ranks and PEM in which all clips count: their means over ranks are exact."""
    alpro = [*TINY, "model.name=alpro", "model.merge_layers=1", "model.entities=4",
             "model.vtm=0", "model.mlm=0", "model.dropout=0", "schedule.steps=4"]  # fmt: skip
    train(tmp_path / "teacher", alpro, "model.pem=0", evaluate=lambda training: {})
    taught = [f"start.teacher={tmp_path / 'teacher'}", "model.threshold=0", "model.mask_ratio=0"]
    train(tmp_path / "one", alpro, *taught, "data.batch_size=8", evaluate=lambda training: {})
    for kind in ("ddp", "fsdp"):
        options = [*alpro, *taught, f"run.parallel={kind}", f"run.folder={tmp_path / kind}"]
        mp.spawn(_rank, ([(free_port(), options)],), nprocs=2)
        logs = [[r for r in records(tmp_path / n) if "loss" in r] for n in ("one", kind)]
        assert len(logs[0]) == len(logs[1]) == 4
        for a, b in zip(*logs, strict=True):
            for key in ("loss", "vtc", "pem", "grad_norm", "lr"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), (kind, key)


def test_a_run_resumes_on_another_number_of_ranks(tmp_path):
    """Two ranks, one, two, with the same global batch: the losses of one rank throughout."""
    options = [*MAC, "model.dropout=0"]
    train(tmp_path / "whole", options, "data.batch_size=8", evaluate=lambda training: {})
    folder = f"run.folder={tmp_path / 'moved'}"
    mp.spawn(_rank, ([(free_port(), [*options, folder, "evaluation.every=2"])],), nprocs=2)

    def stop(training):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = (tmp_path / "moved/config.yaml").read_bytes()
    with pytest.raises(ValueError, match="need the same data, seed and global batch"):
        train(tmp_path / "moved", options, "data.batch_size=4")
    assert (tmp_path / "moved/config.yaml").read_bytes() == before
    more = ["data.batch_size=8", "evaluation.every=5"]
    assert train(tmp_path / "moved", options, *more, evaluate=stop)["step"] == 5
    mp.spawn(_rank, ([(free_port(), [*options, folder])],), nprocs=2)
    one, moved = (
        {r["step"]: r for r in records(tmp_path / name) if "loss" in r}
        for name in ("whole", "moved")
    )
    assert list(one) == list(moved) == list(range(1, 9))
    for step in one:
        for key in ("loss", "grad_norm", "lr"):
            assert moved[step][key] == pytest.approx(one[step][key], rel=1e-4), (step, key)


def test_broken_clips_are_dropped_with_their_captions(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    rows = json.loads((EXAMPLES / "clips.json").read_text())[:10]
    for number, row in enumerate(rows):
        name = f"{number}.mp4"
        if number % 10 < 3:
            (tmp_path / name).write_bytes(b"no video")
        else:
            (tmp_path / name).symlink_to(EXAMPLES / "clips" / row["video"])
        row["video"], row["caption"] = name, f"number{number}"
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    options = [*MAC, "data.source=clips", f"data.files={tmp_path / 'clips.json'}"]
    options += ["data.cache=true", "data.batch_size=3", "schedule.steps=6", "data.broken=0.6"]

    pairs = []
    from vidl.training import inputs, loop

    def arguments(batch, *args, **kwargs):
        pairs.extend(zip([row.media for row in batch.rows], batch.text, strict=True))
        return inputs.arguments(batch, *args, **kwargs)

    monkeypatch.setattr(loop, "arguments", arguments)
    assert train(tmp_path / "run", options)["finished"]
    assert len(pairs) == 18
    assert all(f"number{Path(media).stem}" == text for media, text in pairs)
    shown = capsys.readouterr().err
    assert all(f"{tmp_path / f'{n}.mp4'}: " in shown for n in range(3)) and "3.mp4" not in shown
    assert "times a clip could not be read" in shown
    assert len(list((tmp_path / "cache" / "clips").glob("*.npy"))) == 7  # each clip is decoded once


def test_images_and_videos_in_one_run(tmp_path, monkeypatch):
    from vidl.training import inputs, loop

    file = stills_and_clips(tmp_path, 3)
    shown = []

    def arguments(batch, *args, **kwargs):
        arguments = inputs.arguments(batch, *args, **kwargs)
        kinds = {text.startswith("colour") for text in batch.text}
        assert len(kinds) == 1 and arguments["video"].shape[2] == MODEL["frames"]
        shown.append(kinds.pop())
        return arguments

    monkeypatch.setattr(loop, "arguments", arguments)
    options = [*SMAUG, "data.source=clips", f"data.files={file}"]
    options += ["data.batch_size=3", "data.outside=true"]
    assert train(tmp_path / "run", options)["finished"]
    assert shown.count(True) == shown.count(False) == 4


def stills_and_clips(folder, count):
    """Annotations of real clips and of pictures."""
    from PIL import Image

    rows = json.loads((EXAMPLES / "clips.json").read_text())[:count]
    rows = [{**row, "video": str(EXAMPLES / "clips" / row["video"])} for row in rows]
    for number in range(count):
        Image.new("RGB", (40, 50), (40 * number, 90, 30)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"colour {number}"})
    (folder / "clips.json").write_text(json.dumps(rows))
    return folder / "clips.json"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name, fields", [
    ("vindlu", ["model.prune_layers=[0]", "model.mask_ratio=0.4", "model.fusion_layers=1"]),
    ("vlc", ["model.text_layers=0", "model.decoder_depth=1"]),
    ("omnivl", ["model.fusion_layers=1", "model.writer_layers=1", "model.queue=6"]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_stills_beside_clips_on_two_ranks(name, fields, kind, tmp_path):
    """Stills leave parameters of time unused: no rank waits for gradients that never come."""
    file = stills_and_clips(tmp_path, 4)
    options = [
        *TINY, f"model.name={name}", *fields, "data.source=clips",
        f"data.files={file}", "data.outside=true",
        "data.batch_size=2", "schedule.steps=4", f"run.parallel={kind}",
        f"run.folder={tmp_path / 'run'}",
    ]  # fmt: skip
    mp.spawn(_rank, ([(free_port(), options)],), nprocs=2)
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == [1, 2, 3, 4]


def test_a_run_resumes_in_its_shards(tmp_path):
    pytest.importorskip("webdataset")
    rows = json.loads((EXAMPLES / "clips.json").read_text())[:8]
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    files = [tmp_path / f"{shard}.tar" for shard in range(2)]
    for number, row in enumerate(rows):
        with tarfile.open(files[number % 2], "a") as tar:
            (tmp_path / "caption").write_text(row["caption"][0])
            tar.add(tmp_path / "caption", f"{number}.txt")
            tar.add(EXAMPLES / "clips" / row["video"], f"{number}.mp4")
    options = [*MAC, "data.source=shards", f"data.files=[{files[0]},{files[1]}]"]
    options += ["data.batch_size=3", "run.save_every=2", "evaluation.every=5"]
    with pytest.raises(ValueError, match=r"need data.tokenizer with data.source 'shards'"):
        train(tmp_path / "none", options)
    captions = [text for row in rows for text in row["caption"]]
    train_tokenizer(captions).save(tmp_path / "tokenizer.json")
    options += [f"data.tokenizer={tmp_path / 'tokenizer.json'}"]

    def broken(training):
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path / "broken", options, evaluate=broken)
    for folder in ("broken", "whole"):
        train(tmp_path / folder, options, evaluate=lambda training: {})
    losses = [
        [r["loss"] for r in records(tmp_path / x) if "loss" in r] for x in ("broken", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[1]) == 8
    assert same_weights(tmp_path / "broken", tmp_path / "whole")
