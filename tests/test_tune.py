"""Tuning: faulty backends are refused with a reason, the others are timed, `auto` follows."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vidl
from vidl import cli, ops
from vidl.bench import commands as bench_commands
from vidl.bench.measure import hardware
from vidl.bench.training import savings
from vidl.bench.tuning import commands, sources, tune, worker
from vidl.bench.tuning.calls import Recorded, recorded
from vidl.bench.tuning.process import Measured, Worker
from vidl.kernels import choices, library
from vidl.training import Config, frozen

OP = "select_tokens"
TESTS = Path(__file__).parent


def select(rows=9):
    x, scores = torch.randn(2, rows, 16, requires_grad=True), torch.rand(2, rows - 1)
    return ops.select_tokens(x, scores, 4, fuse="sum", prefix=1).tokens


def calls_of(call):
    calls: dict = {}
    with recorded(calls):
        call()
    return list(calls.values())


def taken(call):
    return library.automatic(call.key.op, call.device, call.dtype, call.key, **call.facts)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_tables", {})


@pytest.fixture
def measured(monkeypatch):
    """The calls that would be measured; the reference is the fastest."""
    calls = []

    def measure(self, call):
        calls.append(call)
        seconds = {"native": {"eager": 2.0}, call.candidates()[0][0]: {"eager": 1.0}}
        return Measured(seconds, refused={"triton": "wrong: out is off"})

    monkeypatch.setattr(Worker, "measure", measure)
    return calls


def test_faulty_backends_are_refused(monkeypatch):
    """A wrong, crashing or hanging backend is out, with its reason; the others are measured."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    (call,) = calls_of(select)
    (outcome,) = tune.tune_calls([call], timeout=6, seconds=0.01, modules=["planted"])
    assert outcome.status == "tuned", outcome.measured.failed
    assert {"native", call.candidates()[0][0]} == outcome.measured.seconds.keys()
    assert all(times["eager"] > 0 for times in outcome.measured.seconds.values())
    reasons = {
        "wrong": "wrong: tokens is off by .*",
        "other_ids": "wrong: ids_keep differs",
        "unwritten": "wrong: tokens is off by nan.*",
        "raises": "fails: RuntimeError: invalid argument",
        "crash": "its process ended with SIGABRT: the last words",
        "hang": "no answer within 6 s",
        "wrong_gradient": "wrong: gradient of x is off by .*",
    }
    refused = outcome.measured.refused
    for backend, reason in reasons.items():
        assert re.fullmatch(reason, refused[backend]), (backend, refused[backend])
    assert f"hang: {reasons['hang']}" in tune.table([outcome])
    entry = json.loads(choices.file_of("cpu", call.key).read_text())
    assert entry["backend"] == outcome.chosen["eager"] and entry["refused"] == refused
    assert "crash" not in library.BACKENDS  # of this process


def test_a_process_that_cannot_start_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    (outcome,) = tune.tune_calls(calls_of(select))
    assert outcome.status == "failed" and not outcome.chosen
    assert outcome.measured.failed == "start: its process ended with status 1"
    assert "status 1" in tune.table([outcome])


def test_the_usual_backend_stays_unless_another_is_clearly_faster():
    assert tune.fastest({"a": 1.0, "b": 1.04}, "b") == "b"
    assert tune.fastest({"a": 1.0, "b": 1.06}, "b") == "a"
    assert tune.fastest({"a": 1.0, "c": 0.5}, "b") == "c"  # the usual one was wrong


def test_auto_follows_and_entries_are_kept(measured, monkeypatch):
    (call,) = calls_of(select)
    baseline = call.candidates()[0][0]
    assert taken(call) == ("native", "rule")
    (outcome,) = tune.tune_calls([call])
    assert (outcome.status, outcome.chosen) == ("tuned", {"eager": baseline})
    assert outcome.speedup == {"eager": 1.0} and taken(call) == (baseline, "tuned")
    assert "triton: wrong: out is off" not in tune.table([outcome])  # it cannot run here anyway
    monkeypatch.setattr(choices, "_tables", {})  # another process
    assert taken(call) == (baseline, "tuned")
    (outcome,) = tune.tune_calls([call])
    assert (outcome.status, outcome.chosen) == ("kept", {"eager": baseline}) and len(measured) == 1
    assert "(kept)" in tune.table([outcome])
    tune.tune_calls([call], again=True)
    assert len(measured) == 2
    (outcome,) = tune.tune_calls([call], again=True, budget=-1.0)
    assert outcome.status == "left" and "time is over" in tune.table([outcome])
    assert len(measured) == 2


def test_a_full_disk_does_not_stop_it(measured, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    calls = calls_of(lambda: [select(), select(40)])
    monkeypatch.setattr(Path, "write_text", full)
    outcomes = tune.tune_calls(calls)
    assert [outcome.status for outcome in outcomes] == ["tuned", "tuned"]
    assert all(taken(call)[1] == "tuned" for call in calls)
    said = capsys.readouterr().err
    assert said.count("cannot store a choice, which holds for this process only") == 2
    assert f"No space left on device: '{choices.folder('cpu')}" in said


def test_arguments_are_drawn_like_the_recorded_ones(tmp_path):
    groups = ops.Groups.spatial(torch.tensor([[0, 1, 4, 6], [1, 2, 3, 7]]), (2, 2, 2))
    qkv = (torch.randn(8, 3, 2, 32) * 3 + 1).requires_grad_()

    def attend():
        ops.space_time_attention(*qkv.unbind(1), groups, return_scores="mean")

    (call,) = calls_of(attend)
    torch.save(call.as_values(), tmp_path / "call.pt")
    call = Recorded.from_values(torch.load(tmp_path / "call.pt", weights_only=True))
    assert call.key == calls_of(attend)[0].key and call.key.gradient
    q, *_, scores = call.draw()
    assert q.stride() == (192, 32, 1) and q.is_leaf and q.requires_grad and scores == "mean"
    assert 2 < q.std() < 4 and 0 < q.mean() < 2 and not torch.equal(q, qkv[:, 0])
    assert torch.equal(q, call.draw()[0]) and not torch.equal(q, call.draw(1)[0])
    for drawn, own in zip(call.draw()[3:], groups.arguments(), strict=False):
        assert drawn is own is None or not isinstance(own, torch.Tensor) or drawn.equal(own)


def test_a_log_sum_exp_is_computed_again():
    q, k, groups = torch.randn(8, 2, 32), torch.randn(8, 2, 32), ops.Groups.equal(2, 4)
    (call,) = calls_of(lambda: ops.mean_attention_scores(q, k, groups, lse=torch.zeros(2, 8)))
    assert call.arguments[3] is None


def test_what_the_host_knows_of_the_groups_is_recorded():
    groups = ops.Groups.spatial(torch.arange(12).expand(2, 12), (3, 2, 2)).with_global()
    q, k, v = torch.randn(3, 26, 2, 32)
    (call,) = calls_of(lambda: ops.space_time_attention(q, k, v, groups))
    assert call.hints == {"lse": False, "num_global": 2, "max_local_keys": 5}
    assert Recorded.from_values(call.as_values()).hints == call.hints


def test_calls_by_name_are_not_recorded():
    x, scores = torch.randn(2, 9, 16), torch.rand(2, 9)
    assert not calls_of(lambda: ops.select_tokens(x, scores, 4, backend="native"))


def test_calls_of_a_captured_graph_are_not_recorded(monkeypatch):
    monkeypatch.setattr(choices, "_policy", lambda kind: "graph")
    assert not calls_of(select)


def test_calls_of_a_recipe():
    calls = sources.of_recipe("smaug", "tiny", {"mask_ratio": 0.5}, batch=2, device="cpu")
    recorded_ops = {"masked_patch_embed", "masked_patch_loss", "select_tokens"}
    assert {key.op for key in calls} >= recorded_ops
    assert all(call.key.gradient and call.label == "smaug" for call in calls.values())
    low = sources.of_recipe("mac", "tiny", batch=2, device="cpu", dtype=torch.bfloat16)
    assert {key.dtype for key in low} == {"bfloat16"}


def test_the_limit_of_the_hardware(monkeypatch):
    calls = sources.of_benchmarks(["frame_difference"], device="cpu", quick=True)
    call = next(iter(calls.values()))
    size, flops = call.work[0]
    rates = hardware.Limits(copy=size, matmul=flops or 1, matmul_dtype=torch.float32)
    monkeypatch.setattr(hardware, "limits", lambda *arguments: rates)
    assert worker._share(call, {"native": {"eager": 4.0}, "x": {"eager": 5.0}}) == 0.25


def test_the_command(measured, capsys):
    words = ["tune", "smaug", "--preset", "tiny", "--batch", "2", "--ops", OP, "--device", "cpu"]
    assert cli.main([*words, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert planned and all(line.startswith(OP) and "native     (rule)" in line for line in planned)
    assert cli.main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(planned) and {row["status"] for row in rows} == {"tuned"}
    for row in rows:
        assert row["chosen"]["eager"] in row["seconds"] and row["speedup"]["eager"] > 0
        assert choices.table("cpu").tuned[choices.key_from_json(row["key"])]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("(kept)") == len(rows)
    assert cli.main([*words, "--dry-run", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["source"] for row in rows} == {"tuned"}


def test_the_command_takes_a_configuration_and_shapes(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: mac, preset: tiny}\ndata: {source: moving_shapes}\n")
    assert cli.main(["tune", str(file), "data.batch_size=2", "--device", "cpu", "--dry-run"]) == 0
    assert "mac: " in capsys.readouterr().out
    words = ["tune", "--ops", "frame_difference", "--quick", "--dry-run", "--device", "cpu"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("frame_difference")


@pytest.mark.parametrize(
    "words, message",
    [
        (["clip"], "need a model among smaug, mac, .*, or a configuration file, got clip"),
        (["--ops", "attention"], "need ops among .*; got attention"),
        (["mac", "--preset", "tiny", "--ops", OP, "--device", "cpu"], "need ops that mac calls"),
        (["--dtype", "int8"], "need --dtype among float32, float16, bfloat16, got int8"),
        (["smaug", "mask_ration=0.5"], "mask_ration"),
    ],
)
def test_the_command_names_mistakes(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["tune", *words])
    assert error.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_an_override_and_tuning_exclude_each_other(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VIDL_BACKEND", "native")
    with pytest.raises(SystemExit):
        cli.main(["tune", "mac", "--preset", "tiny"])
    assert "unset VIDL_BACKEND=native: it overrides what is measured" in capsys.readouterr().err
    commands.before_training(configuration(tmp_path / "run"), True)
    assert not measured


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) * self.weight
        tokens = ops.select_tokens(nn.functional.dropout(x), x.mean(-1), 4).tokens
        return {"tokens": tokens, "ids": x.argmax(-1)}


def test_tune_a_model_and_put_its_state_back(measured):
    model, x = Model().train(), torch.randn(2, 8, 16)
    model.weight.grad = torch.full((16,), 3.0)
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    outcomes = vidl.tune(model, x)
    assert [outcome.call.key.gradient for outcome in outcomes] == [True, False]
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert model.weight.grad.eq(3).all() and model.norm.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert {outcome.status for outcome in vidl.tune(model, x)} == {"kept"} and len(measured) == 2


def test_tuning_a_block(measured):
    with vidl.tuning() as outcomes:
        select()
        select()
        assert not outcomes and not measured  # nothing is measured inside
    assert [outcome.status for outcome in outcomes] == ["tuned"]
    with pytest.raises(ZeroDivisionError), vidl.tuning():
        select(40)
        raise ZeroDivisionError
    assert len(measured) == 1
    assert choices.recorder is None


def test_ranks_do_not_tune(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="need one process for tuning, got 2 ranks"):
        vidl.tune(Model(), torch.randn(2, 8, 16))


def configuration(folder):
    fields = ["model.name=mac", "model.preset=tiny", "data.source=moving_shapes"]
    return Config.read(None, [*fields, "data.batch_size=2", f"run.folder={folder}"])


def test_a_run_tunes_what_it_needs_once(measured, tmp_path, monkeypatch, capsys):
    config = configuration(tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted in (None, False):  # on a CPU only if asked
        commands.before_training(config, wanted)
    assert not measured
    commands.before_training(config, True)
    said = capsys.readouterr().err
    assert f"vidl: measuring {len(measured)} calls of this model, for at most two minutes" in said
    assert "(--no-tune skips it)" in said and measured
    count = len(measured)
    commands.before_training(config, True)
    assert len(measured) == count and not capsys.readouterr().err
    monkeypatch.setattr(choices, "_tables", {})
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("RANK", "1")  # waits for the first
    commands.before_training(config, True)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(frozen, "resumes", lambda folder: True)  # keeps its choices
    commands.before_training(config, True)
    assert len(measured) == count


def test_savings_tune_the_sparse_model(measured, capsys):
    plan = savings.plan("mac", "tiny", batch=2, device="cpu")
    bench_commands._before(plan, None)
    assert not measured
    bench_commands._before(plan, True)
    assert {call.label for call in measured} == {"mac"} and "--no-tune" in capsys.readouterr().err


def test_commands_offer_it():
    parser = cli.build_parser()
    for words in (["pretrain"], ["savings", "mac"], ["finetune", "retrieval", "--weights", "x"]):
        assert parser.parse_args(words).tune is None
        assert parser.parse_args([*words, "--no-tune"]).tune is False
        assert parser.parse_args([*words, "--tune"]).tune is True


def test_a_swapped_model_is_tuned_and_follows(measured, monkeypatch):
    """Where the rule keeps PyTorch's convolution, tuning measures the kernels all the same."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(library, "RULE", {"cpu": library.RULE_ELSEWHERE})  # as on a GPU
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=64, num_heads=2
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    vidl.swap(model)

    def backends():
        used = {}
        run = library.run

        def note(name, backend, *arguments, **hints):
            used[name] = backend
            return run(name, backend, *arguments, **hints)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(library, "run", note)
            model(x)
        return used

    assert backends() == {"space_time_attention": "torch"}  # and the model's own convolution
    outcomes = vidl.tune(model, x)
    tuned = {(outcome.call.key.op, outcome.call.key.gradient) for outcome in outcomes}
    ops_of_model = ("masked_patch_embed", "space_time_attention")
    assert tuned == {(op, gradient) for op in ops_of_model for gradient in (True, False)}
    for outcome in outcomes:
        choices.write("cpu", outcome.call.key, "native")
    assert backends() == dict.fromkeys(ops_of_model, "native")
    for outcome in outcomes:
        choices.write("cpu", outcome.call.key, "torch")
    assert backends() == {"space_time_attention": "torch"}


def test_a_swapped_convolution_is_measured_as_such(measured, monkeypatch):
    """Where a model has a convolution, "torch" is that convolution, not a gather and a matmul."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    vidl.swap(model)
    calls = {}
    with recorded(calls), torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    (call,) = (c for c in calls.values() if c.key.op == "masked_patch_embed")
    assert call.hints == {"convolution": True} and "convolution True" in str(call.key)
    call = Recorded.from_values(call.as_values())
    weights, conv2d = [], torch.nn.functional.conv2d

    def note(x, weight, *rest):
        weights.append(weight.shape)
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", note)
    worker._timed(call, "torch", call.draw())()
    assert weights == [(192, 3, 16, 16)]
    (outcome,) = tune.tune_calls([call])
    assert outcome.chosen and "convolution where the call names it" in tune.table([outcome])
