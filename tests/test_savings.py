"""Whole training steps: cells that disagree with the baseline get no time.

No test depends on a measured time.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidl import models
from vidl.bench.measure import energy
from vidl.bench.training import breakdown, loading, savings, steps, summary
from vidl.bench.training.baseline import SWAPS, baseline_of
from vidl.cli import main
from vidl.masking import Vocabulary
from vidl.nn import Bert
from vidl.objectives import masked

SMALL = dict(
    frames=2, image_size=32, patch_size=8, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    text_layers=1, embed_dim=16, vocabulary=Vocabulary(200, 103, (0, 100, 101, 102, 103)),
)  # fmt: skip
SMAUG = SMALL | dict(
    prune_layers=(0, 1), frames_kept=1, fusion_layers=1, decoder_width=64, decoder_depth=1,
    decoder_heads=2, mask_ratio=0.5,
)  # fmt: skip
BEIT = SMALL | dict(prune_layers=(0, 1), fusion_layers=1, mask_ratio=0.5, keep_rate=0.6)
VARIANTS = [
    ("smaug", SMAUG),
    ("smaug", SMAUG | {"fuse": "mean", "mask": "tube"}),
    ("smaug", SMAUG | {"fuse": None, "mvm": 0.0, "mlm": 0.0}),
    ("smaug", SMAUG | {"frames": 4, "tubelet_size": 2}),
    ("mac", SMALL | {"frames": 4, "tubelet_size": 2}),
    ("simvtp", SMALL | {"frames": 4, "tubelet_size": 2, "text_layers": 0, "embed_dim": 64,
                        "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}),
    *(("vlc", SMALL | {"frames": frames, "text_layers": 0, "decoder_width": 64,
                       "decoder_depth": 1, "decoder_heads": 2}) for frames in (1, 2)),
    ("alpro", SMALL | {"frames": 3, "merge_layers": 1, "entities": 4, "mask_ratio": 0.5}),
    ("omnivl", SMALL | {"fusion_layers": 1, "writer_layers": 1, "mask_ratio": 0.5}),
    ("singularity", BEIT | {"frames": 1}),
    ("singularity", BEIT | {"frames": 2, "frames_tested": 0, "time_layers": 1}),
    ("vindlu", BEIT), ("vindlu", BEIT | {"time": "first", "mask": "frame"}),
    ("svitt", BEIT | {"block": 4, "random_blocks": 1, "fusion_layers": 2}),
    ("svitt", BEIT | {"block": 0, "fusion_layers": 2}),
    *(("mac", SMALL | {"time": time, "mask": mask})
      for time, mask in (("slot", "frame"), ("position", "frame"), ("position", "tube"),
                         ("position", "clip"), ("joint", "clip"), ("joint", "frame"))),
    ("clipbert", dict(image_size=32, text_width=64, text_layers=1, text_heads=2, word_ratio=0.5,
                      vocabulary=SMALL["vocabulary"])),
]  # fmt: skip

read_clips = loading.clips_per_second  # other tests replace it


def cells(name="smaug", fields=SMAUG, batch=4):
    by_name = list(steps.cells(models.recipe(name, "tiny", **fields), batch, "cpu"))
    return {cell.name: cell for cell in by_name}


@pytest.mark.parametrize("name, fields", VARIANTS, ids=lambda v: str(v)[:5] if v else "")
def test_baseline_and_vidl_agree(name, fields):
    by_name = cells(name, fields)
    for row in ("dense", "sparse"):
        agreement = steps.agreement_of(by_name[f"{row}, pytorch"])(by_name[f"{row}, vidl"])
        assert agreement.ok, str(agreement)
        assert set(agreement.ours) == {
            "losses",
            *(f"gradients of {p}" for p in (*steps.PARTS, "others")),
        }


def test_the_baseline_does_not_call_our_ops():
    seen = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    by_name = cells()
    with Note():
        by_name["sparse, pytorch"].forward()["loss"].backward()
    assert seen == {"aten"}
    with Note():
        by_name["sparse, vidl"].forward()["loss"].backward()
    assert "vidl" in seen


def test_the_baseline_shares_the_parameters_and_leaves_the_model_as_it_was():
    model = models.create("smaug", "tiny", **SMAUG)
    kinds = [type(module) for module in model.modules()]
    baseline = baseline_of(model)
    assert [type(module) for module in model.modules()] == kinds
    assert not {type(module) for module in baseline.modules()} & set(SWAPS)
    for (name, p), (other, q) in zip(
        model.named_parameters(), baseline.named_parameters(), strict=True
    ):
        assert name == other and p is q


def test_the_baseline_says_what_it_does_not_have():
    bert = baseline_of(Bert(10, 8, 1, 1, 2))
    with pytest.raises(ValueError, match="in every clip, got cu_visual"):
        bert.fuse(torch.zeros(1, 2, 8), None, torch.zeros(2, 8), cu_visual=torch.tensor([0, 2]))


@pytest.mark.parametrize("column", ["pytorch", "vidl"])
@pytest.mark.parametrize(
    "name, fields",
    [
        pytest.param(name, fields, id=f"{name}{number}", marks=pytest.mark.slow if number else ())
        for number, (name, fields) in enumerate(VARIANTS)
        if not fields.get("random_blocks")  # drawn on the host at each step
    ],
)
def test_both_compile_without_graph_breaks(name, fields, column):
    cell = cells(name, fields)[f"sparse, {column}"]
    inputs = cell.inputs | {"step": torch.zeros((), dtype=torch.int64)}
    torch._dynamo.reset()
    run = torch.compile(cell.model, fullgraph=True, dynamic=False, backend="eager")
    with steps.without_dropout(cell.model):
        torch.testing.assert_close(run(**inputs), cell.model(**inputs))


def test_compiled_cells_come_after_those_that_they_compile(capsys):
    recipe = models.recipe("mac", "tiny", **SMALL)
    names = [cell.name for cell in steps.cells(recipe, 4, "cpu", compiled=True)]
    columns = ["pytorch", "torch.compile", "vidl", "vidl, torch.compile"]
    assert names == [f"{row}, {column}" for row in ("dense", "sparse") for column in columns]
    command = ["savings", "mac", "--preset", "tiny", "--device", "cpu", "--compile", "--dry-run"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines if "tokens per clip" in line] == names


def test_flops_of_both_are_alike_where_nothing_is_needless():
    recipe = models.recipe("mac", "tiny", **SMALL, mask_ratio=0.0)
    by_name = {cell.column: cell for cell in steps.cells(recipe, 4, "cpu")}
    counts = {}
    for column, cell in by_name.items():
        cell.inputs["attention_mask"].fill_(1)  # otherwise the baseline computes padding
        counts[column] = steps.flops(cell)
    assert counts["pytorch"] == counts["vidl"]


def test_flops_that_are_not_counted_are_noticed():
    savings.check_counts({"pytorch": 120, "vidl": 100})
    with pytest.raises(RuntimeError, match="at least as many FLOPs"):
        savings.check_counts({"pytorch": 80, "vidl": 100})


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as monkeypatch:
        _without_the_device(monkeypatch)
        yield


@pytest.fixture(scope="module")
def measured(quick):
    """What a run wrote, and what it returned."""
    written = []
    return written, savings.run(small_plan(), written.append)


def _without_the_device(monkeypatch):
    monkeypatch.setattr(savings.hardware, "matmul_rate", lambda *args: 1e12)
    monkeypatch.setattr(savings.hardware, "device_name", lambda device: "Some CPU, 2 cores")
    none = {"clips_per_s": None, "workers": 1, "reason": "not in this test"}
    monkeypatch.setattr(loading, "clips_per_second", lambda *args: none)


def small_plan(name="smaug", fields=SMAUG):
    return savings.plan(name, "tiny", fields, batch=4, device="cpu", steps=2)


def test_records_say_what_was_measured(measured):
    written, records = measured
    assert [len(r) for r in written] == [4, 4], "after the first step, and at the end"
    assert written[1] == records
    by_name = {r["candidate"]: r for r in records}
    assert list(by_name) == ["dense, pytorch", "dense, vidl", "sparse, pytorch", "sparse, vidl"]
    for r in records:
        assert r["status"] == "ok" and r["device"] == "Some CPU, 2 cores" and r["kind"]
        assert r["clips_per_s"] == pytest.approx(4e3 / r["median_ms"])
        assert r["tokens_per_s"] == pytest.approx(
            r["clips_per_s"] * r["tokens"]["encoder"], rel=0.3
        )
        assert r["mfu"] == pytest.approx(r["useful_flops"] / r["median_ms"] * 1e3 / 1e12)
        assert r["hours"] == pytest.approx(10 * 5_440_000 / r["clips_per_s"] / 3600)
        assert r["hours_status"] == "projected" and "10 epochs x 5,440,000" in r["hours_formula"]
        assert max(r["errors"].values()) <= r["allowed_error"] and r["repetitions"] == 2
        assert r["joules_per_step"] is None and r["breakdown_ms"]["attention"] > 0
        assert (r["breakdown_ms"]["decoder"] > 0) == (r["row"] == "sparse")
    dense, sparse = by_name["dense, pytorch"], by_name["sparse, vidl"]
    assert dense["speed_up"] == dense["realised_saving"] == 1
    fewer = dense["useful_flops"] / sparse["useful_flops"]
    faster = dense["median_ms"] / sparse["median_ms"]
    assert fewer > 1 and sparse["realised_saving"] == pytest.approx(faster / fewer)
    assert by_name["dense, vidl"]["loss"] == pytest.approx(dense["loss"], rel=1e-5)


def test_the_table_says_cpu_and_projects_nothing_for_a_gpu(measured):
    text = summary.table(measured[1])
    for part in ("CPU: Some CPU, 2 cores", "GPU-hours of a full schedule: not measured",
                 "realised of", "speedup over dense, pytorch", "does not pay:", "attention",
                 "waiting for data: not measured: not in this test"):  # fmt: skip
        assert part in text
    assert "projected" not in text


def test_a_planted_wrong_kernel_gets_no_time(quick, monkeypatch, capsys, tmp_path):
    right = masked.masked_patch_loss

    def planted(*args, backend, **options):
        factor = 1 if backend == "torch" else 1.001
        return factor * right(*args, backend=backend, **options)

    monkeypatch.setattr(masked, "masked_patch_loss", planted)
    records = {r["candidate"]: r for r in savings.run(small_plan())}
    bad = records.pop("sparse, vidl")
    assert bad["status"] == "wrong" and "gradients of vision" in bad["reason"]
    assert not {"median_ms", "clips_per_s", "hours", "realised_saving"} & set(bad)
    assert all(r["status"] == "ok" and "median_ms" in r for r in records.values())
    assert "sparse, vidl                 wrong: errors of" in summary.table([bad])


def test_a_cell_that_fails_leaves_the_others(quick, monkeypatch):
    all_cells = steps.cells

    def broken(*args):
        for cell in all_cells(*args):
            if cell.name == "dense, vidl":
                cell.update = lambda: (_ for _ in ()).throw(RuntimeError("out of memory\nmore"))
            yield cell

    monkeypatch.setattr(savings, "cells", broken)
    records = {r["candidate"]: r for r in savings.run(small_plan("mac", SMALL))}
    assert records["dense, vidl"]["reason"] == "RuntimeError: out of memory"
    assert "median_ms" not in records["dense, vidl"]
    assert "median_ms" in records["sparse, vidl"] and "median_ms" in records["dense, pytorch"]


def test_what_was_measured_survives_a_break(quick, monkeypatch):
    written = []

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(savings, "_look_inside", stop)
    with pytest.raises(KeyboardInterrupt):
        savings.run(small_plan("mac", SMALL), written.append)
    assert [r["repetitions"] for r in written[0]] == [1] * 4


def test_command(quick, capsys, tmp_path):
    command = ["savings", "mac", "depth=1", "frames=2", "text_layers=1", "width=64", "heads=2"]
    command += ["--preset", "tiny", "--batch", "2", "--steps", "1", "--device", "cpu"]
    command += ["--write", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["candidate"] for r in records][-1] == "sparse, vidl"
    assert "depth 1" in records[0]["shape"]
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.relative_to(tmp_path).as_posix() == "some-cpu-2-cores/savings.jsonl"
    assert len(file.read_text().splitlines()) == 8
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "dense, pytorch: tokens per clip: patches 128" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "need a model among smaug, mac"),
        (["mac", "--batch", "1"], "need batch >= 2"),
        (["mac", "mask_ratio=0"], "neither masks nor prunes"),
        (["mac", "mask_ratio"], "need FIELD=VALUE"),
        (["mac", "--device", "cuda"], "need a CUDA device"),
    ],
)
def test_errors_say_what_was_needed(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["savings", *arguments])
    assert message in capsys.readouterr().err


def test_marks_go_back_in_the_backward():
    clock = breakdown.Clock("cpu")
    x = torch.ones(2, requires_grad=True)
    clock.enter("other")
    for part in ("embed", "attention"):
        x = breakdown._Mark.apply(2 * x, clock, clock.enter(part))
    x.sum().backward()
    assert [part for part, _ in clock.marks] == ["other", "embed", "attention", "embed", "other"]


def test_parts_add_up_and_hooks_are_gone(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(breakdown, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    cell = cells()["sparse, vidl"]
    parts = breakdown.breakdown(cell, steps=1)
    marks = next(ticks)  # the clock ticks once per mark
    assert sum(parts.values()) == marks - 1
    assert parts["text"] > 0 and parts["selection"] > 0 and parts["fusion"] > 0
    cell.step()
    assert next(ticks) == marks + 1, "no mark is left"


class FakeCuda:
    """The part of torch.cuda that steps use; a step takes 10 ms."""

    def __init__(self):
        self.now, self.log, self.peak = 0.0, [], 0

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def synchronize(self):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self):
        self.log.append("reset")

    def memory_allocated(self):
        return 1000

    def max_memory_allocated(self):
        return 1700

    def step(self):
        self.now += 10.0
        self.log.append("step")


def test_cuda_times_end_when_the_device_is_done(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(savings, "torch", SimpleNamespace(cuda=fake))
    assert savings.seconds(fake.step, "cuda") >= 0
    assert fake.log == ["synchronize", "step", "synchronize"]


def test_cuda_memory_is_the_peak_of_a_step(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(savings, "torch", SimpleNamespace(cuda=fake))
    m = savings.Measured(SimpleNamespace(device="cuda", step=fake.step))
    savings._weigh(m)
    assert m.memory == 700
    assert fake.log == ["step", "step", "synchronize", "reset", "step", "synchronize"]


def test_cuda_parts_are_between_events(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(breakdown, "torch", SimpleNamespace(cuda=fake))
    clock = breakdown.Clock("cuda")
    for part in ("embed", "attention", "embed", "other"):
        clock.enter(part)
        fake.step()
    parts = clock.seconds()
    assert fake.log[-1] == "synchronize"
    assert (parts["embed"], parts["attention"]) == (pytest.approx(0.02), pytest.approx(0.01))


def test_energy_is_the_counter_over_many_steps(monkeypatch):
    fake, counter = FakeCuda(), iter([5000, 25000])
    clock = iter([0.0, 0.5, 1.0, 1.5, 2.5])
    monkeypatch.setattr(energy, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(energy, "_counter", lambda: lambda: next(counter))
    assert energy.joules(fake.step, "cuda") == pytest.approx(20 / 3)
    monkeypatch.setattr(energy, "_counter", lambda: None)
    assert energy.joules(fake.step, "cuda") is None
    assert energy.joules(fake.step, "cpu") is None


def test_energy_without_nvml_is_unknown(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(energy.importlib, "import_module", missing)
    assert energy._counter() is None


def test_the_loader_is_measured_or_says_why_not(monkeypatch, tmp_path):
    recipe = models.recipe("mac", "tiny")
    monkeypatch.setattr(loading, "CLIPS", tmp_path / "none.json")
    speed = read_clips(recipe, "mac", "tiny", 2)
    assert speed["clips_per_s"] is None and "only a clone" in speed["reason"]


def test_data_waits_are_told(measured):
    records = measured[1]
    reads = {"clips_per_s": records[0]["clips_per_s"] / 2, "workers": 2, "reason": None}
    text = summary.table([r | {"loading": reads} for r in records])
    assert "50% (dense, pytorch)" in text


def test_what_does_not_pay_is_named():
    cell = dict(
        row="dense", kind="baseline", median_ms=10.0, p20_ms=9.0, p80_ms=11.0, peak_bytes=100
    )
    baseline = cell | dict(column="pytorch", breakdown_ms={"MLP": 5.0, "text": 1.0})
    ours = cell | dict(column="vidl", median_ms=20.0, p20_ms=19.0, p80_ms=21.0, peak_bytes=200)
    ours |= dict(breakdown_ms={"MLP": 14.0, "text": 1.01})
    (_, line) = summary.does_not_pay([baseline, ours])
    assert "dense: a step has 0.50 x the speed of pytorch" in line and "2.00 x the memory" in line
    assert "MLP takes 14.0 ms, 5.0 in pytorch" in line and "text" not in line
    better = ours | dict(median_ms=5.0, p20_ms=4.0, p80_ms=6.0, peak_bytes=50, breakdown_ms={})
    assert "nothing found" in summary.does_not_pay([baseline, better])[1]
