"""The benchmark harness: wrong candidates get no time, limits add up, records are complete.

No test depends on a measured time.
"""

import contextlib
import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from vidl.bench.measure import cases, hardware, harness, record, timing
from vidl.bench.measure.cases import Candidate, Work
from vidl.bench.measure.check import check
from vidl.bench.ops import masked_patch_embed as description
from vidl.bench.ops import space_time_attention as attention
from vidl.bench.ops import token_scores
from vidl.bench.ops.layouts import layout_of
from vidl.cli import main
from vidl.kernels import library


def clip(B, T, image_size, tubelet_size):
    sizes = dict(T=T, image_size=image_size, tubelet_size=tubelet_size, patch_size=8)
    return sizes | dict(B={"cpu": B, "cuda": B})


TINY = {
    "one frame": clip(3, 2, 32, 1) | dict(C=24, kept=5),
    "tubelets": clip(2, 4, 16, 2) | dict(C=8, kept=1),
    "dense": clip(2, 2, 16, 1) | dict(C=8, kept=None),
}


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(description, "SHAPES", TINY)
    limits = hardware.Limits(copy=10e9, matmul=1e11, matmul_dtype=torch.float32)
    monkeypatch.setattr(hardware, "limits", lambda *args: limits)
    monkeypatch.setattr(hardware, "last_level_cache", lambda device: 1 << 14)
    monkeypatch.setattr(hardware, "device_name", lambda device: "Some CPU, 2 cores")
    record.commit.cache_clear()


def case(shape="one frame", dtype=torch.float32):
    (planned,) = harness.plan(shapes=shape, dtypes=[cases.short(dtype)], device="cpu").cases
    return planned


def off_by(amount):
    return lambda inputs: description.embed(inputs, backend="reference") * (1 + amount)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.short)
def test_baselines_are_right(shape, dtype):
    trials = check(case(shape, dtype))
    assert not [
        f"{t.candidate.name}: {t.reason}" for t in trials if t.status in ("wrong", "failed")
    ]
    assert sum(trial.status == "ok" for trial in trials) >= 3
    assert all(trial.reason for trial in trials if trial.status == "cannot run")


@pytest.mark.parametrize("kind", ["ours", "baseline", "given"])
@pytest.mark.parametrize(
    "run, reason",
    [
        (off_by(1e-3), "result is off by"),
        (off_by(float("nan")), "result is off by nan"),
        (lambda inputs: off_by(0)(inputs).flip(1), "result is off by"),
    ],
    ids=["by a little", "nan", "other order"],
)
def test_a_wrong_candidate_is_refused(run, reason, kind):
    (trial,) = check(case(), [Candidate("planted", kind, run)])
    assert trial.status == "wrong" and reason in trial.reason


def test_baselines_may_have_gradients_of_scores_in_the_dtype_of_the_case():
    sizes = dict(B=2, N=40, rate=0.5, C=64, fuse=True)
    small = cases.Case("select_tokens", "small", sizes, torch.bfloat16, "cpu")
    trials = check(small)
    baselines = [t for t in trials if t.candidate.kind == "baseline" and t.status != "cannot run"]
    assert len(baselines) == 10 and all(t.status == "ok" for t in baselines)
    assert max(t.errors["scores"] for t in baselines) > 1e-3  # which ours must not have
    coarse = next(t for t in baselines if t.errors["scores"] > 1e-3)
    ours = dataclasses.replace(coarse.candidate, kind="ours")
    assert check(small, [ours])[0].status == "wrong"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("run", [token_scores.two_flex, token_scores.one_flex])
def test_mean_scores_by_flex_attention(run):
    """Without torch.compile, which returns no log-sum-exp on CPUs; and a planted error is found."""
    sizes = dict(B=2, N=37, H=3, D=32, kind="mean")
    small = cases.Case("token_scores", "small", sizes, torch.float32, "cpu")
    planted = [
        Candidate("right", "baseline", run, forward_only="no backward on CPUs"),
        Candidate("wrong", "baseline", lambda i: 1.001 * run(i), forward_only="as above"),
    ]
    right, wrong = check(small, planted)
    assert right.status == "ok", right.reason
    assert wrong.status == "wrong"


@pytest.mark.parametrize("shape", ["A6 temporal*", "ragged*", "Frozen*"])
def test_optional_baselines_have_reasons(shape, monkeypatch):
    (small,) = harness.plan(["space_time_attention"], shapes=shape, device="cpu").cases
    reasons = {c.name.split(",")[0]: c.reason for c in small.candidates()}
    assert reasons["FlexAttention FLASH"] == reasons["cuDNN flex_attention"] == "needs CUDA"
    flex = ("cudnn.flex_attention", "flex_attn_func")
    missing = "cudnn.flex_attention.flex_attn_func is not installed"
    assert attention.why_not(*flex, torch.bfloat16) == missing
    monkeypatch.setattr(attention, "provides", lambda *names: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert attention.why_not(*flex, torch.float32) == "needs float16 or bfloat16"
    needed = "needs compute capability 9.0, 10.0, 10.3, this GPU has 8.0"
    assert attention.why_not(*flex, torch.bfloat16) == needed
    assert attention.why_not("flash_attn", "flash_attn_varlen_func", torch.float16) is None


@pytest.mark.parametrize("shape", ["A6 temporal*", "ragged*", "Frozen*"])
def test_visible_keys_are_those_of_the_group(shape):
    """What cuDNN's flex_attention is told of each query, in the order of the packed queries."""
    (planned,) = harness.plan(["space_time_attention"], shapes=shape, device="cpu").cases
    layout = layout_of(**{n: x for n, x in planned.sizes.items() if n not in "HD"}, device="cpu")
    ends = attention.visible_keys(layout)
    assert ends.dtype == torch.int32 and ends.shape == (1, 1, layout.rows)
    wanted = [k for q, k in zip(layout.queries, layout.keys, strict=True) for _ in range(q)]
    assert ends.flatten().tolist() == wanted


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def test_a_wrong_gradient_is_refused():
    planted = Candidate("planted", "ours", lambda inputs: WrongGradient.apply(off_by(0)(inputs)))
    (trial,) = check(case(), [planted])
    assert trial.status == "wrong"
    assert trial.reason.startswith("weight is off by") and "position is off by" in trial.reason


def test_an_exception_is_reported():
    def run(inputs):
        raise RuntimeError("out of memory\nand more")

    (trial,) = check(case(), [Candidate("planted", "baseline", run)])
    assert (trial.status, trial.reason) == ("failed", "RuntimeError: out of memory")


def test_a_result_of_another_shape_is_refused():
    (trial,) = check(case(), [Candidate("planted", "ours", lambda i: off_by(0)(i)[:, 1:])])
    assert trial.status == "failed" and "shape" in trial.reason


def test_a_failing_backend_of_vidl_is_an_error(monkeypatch, capsys):
    def run(inputs):
        raise RuntimeError("no")

    for kind, status in (("ours", 1), ("baseline", 0)):
        planted = [Candidate("planted", kind, run)]
        monkeypatch.setattr(description, "candidates", lambda *args, planted=planted: planted)
        assert main(["bench", "--shapes", "dense", "--modes", "forward", "--quick"]) == status
        assert "failed: RuntimeError: no" in capsys.readouterr().out


def test_a_wrong_candidate_gets_no_time(monkeypatch, capsys):
    planted = Candidate("planted", "baseline", off_by(1e-2))
    monkeypatch.setattr(description, "candidates", lambda *args: [planted])
    assert main(["bench", "--shapes", "dense", "--modes", "forward", "--quick", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "wrong" and "off by" in record["reason"]
    assert not [key for key in record if key in ("median_ms", "ratio_to", "share_of_limit")]
    assert main(["bench", "--shapes", "dense", "--modes", "forward", "--quick"]) == 1
    assert "wrong: result is off by" in capsys.readouterr().out


def test_limits_add_up():
    limits = hardware.Limits(copy=100.0, matmul=1000.0, matmul_dtype=torch.float32)
    assert limits.seconds(size=200, flops=1000) == 2  # bound by the copy
    assert limits.seconds(size=200, flops=5000) == 5  # bound by the multiplication
    assert record.limit_seconds(limits, [Work(200, 1000), Work(200, 5000)]) == 7


def test_work_counts_visible_patches_only():
    masked, dense = case("one frame").sizes, case("one frame").sizes | {"kept": None}
    rows, pixels, C, N = 3 * 2 * 5, 3 * 8 * 8, 24, 2 * 16
    work = description.work(**masked, dtype=torch.bfloat16)["forward"]
    assert work.flops == 2 * rows * pixels * C
    assert work.size == rows * pixels + 8 * rows + 2 * (C * pixels + C + N * C + rows * C)
    assert (
        description.work(**dense, dtype=torch.bfloat16)["forward"].flops == 2 * 3 * N * pixels * C
    )


def test_inputs_are_the_same_in_every_run():
    first, second = case().make(), case().make()
    assert torch.equal(first.video, second.video) and torch.equal(first.ids_keep, second.ids_keep)
    assert first.ids_keep.shape == (3, 10) and first.video.dtype == torch.uint8
    per_frame = first.ids_keep.view(3, 2, 5) // 16
    assert torch.equal(per_frame, torch.arange(2)[:, None].expand(3, 2, 5))


def test_records_say_what_was_measured(capsys):
    command = ["bench", "masked_patch_embed", "--shapes", "tubelets", "--quick", "--json"]
    assert main([*command, "--dtype", "bfloat16", "--threads", "1,2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(r["mode"], r["threads"]) for r in records} == {
        (mode, threads) for mode in ("forward", "full") for threads in (1, 2)
    }
    for r in records:
        assert r["op"] == "masked_patch_embed" and r["shape"] == "tubelets"
        assert r["dtype"] == "bfloat16" and r["sizes"]["B"] == 1
        assert r["device"] == "Some CPU, 2 cores" and r["device_type"] == "cpu"
        assert {"torch", "triton", "python", "vidl"} <= set(r["versions"])
        assert r["timestamp"] and "commit" in r and r["limit_ms"] > 0
        if r["status"] == "ok":
            assert r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
            assert r["share_of_limit"] == pytest.approx(r["limit_ms"] / r["median_ms"])
            assert (
                r["tflop_per_s"] > 0 and r["gb_per_s"] > 0 and r["candidate"] not in r["ratio_to"]
            )
        else:
            assert r["reason"] and "median_ms" not in r
    strongest = {r["strongest_baseline"] for r in records}
    baselines = {r["candidate"] for r in records if r["kind"] == "baseline" and r["status"] == "ok"}
    assert strongest <= baselines and len(baselines) >= 3


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=[pytest.mark.slow] if op == "swapped" else [])
        for op in cases.operations()
    ],
)
def test_every_op_is_timed_in_the_modes_that_it_has(op, monkeypatch, capsys):
    shapes = importlib.import_module(f"vidl.bench.ops.{op}").SHAPES
    first = next(iter(shapes))
    monkeypatch.setattr(f"vidl.bench.ops.{op}.SHAPES", {first: shapes[first]})
    assert main(["bench", op, "--quick", "--json", "--baselines", "none of them"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    modes = {r["mode"] for r in records if r["candidate"] == "vidl native" and "median_ms" in r}
    assert modes == ({"forward"} if op == "frame_difference" else {"forward", "full"})


def test_modes_that_an_op_lacks_are_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "frame_difference", "--modes", "full"])
    assert "frame_difference has no gradients" in capsys.readouterr().err


def test_the_table_shows_the_share_of_the_limit(capsys):
    assert main(["bench", "--shapes", "dense", "--modes", "full", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "CPU: Some CPU, 2 cores" in text and "of limit" in text and "%" in text
    assert "GEMM alone, float32 (floor)" in text and "conv2d + gather, float clip (given)" in text
    assert "cannot run: timed on CUDA only" in text


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    main(["bench", "--shapes", "dense", "--modes", "forward", "--quick", "--threads", "1"])
    assert torch.get_num_threads() == before


def test_write_appends(tmp_path, capsys):
    command = ["bench", "--shapes", "dense", "--modes", "forward", "--quick"]
    command += ["--baselines", "unfold*", "--write", str(tmp_path)]
    for _ in range(2):
        assert main(command) == 0
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.relative_to(tmp_path).as_posix() == "some-cpu-2-cores/masked_patch_embed.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    names = [r["candidate"] for r in records]
    assert names == ["vidl native", "unfold + linear + gather"] * 2  # not what cannot run here
    capsys.readouterr()


def test_dry_run_lists_candidates_with_reasons(capsys):
    assert (
        main(["bench", "masked_patch_embed", "--dry-run", "--json", "--dtype", "float32,bfloat16"])
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["shape"], row["dtype"]) for row in rows} == {
        (shape, dtype) for shape in TINY for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        if row["candidate"] == "vidl triton":
            assert "TRITON_INTERPRET" in row["reason"]  # set by conftest.py, or needed for a CPU
    assert {row["kind"] for row in rows} == {"ours", "baseline", "given", "floor"}
    assert main(["bench", "masked_patch_embed", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "would be timed" in text and "timed on CUDA only" in text


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(library, "interpreting", lambda: True)
    reasons = {
        c.name: c.reason for c in cases.ours("masked_patch_embed", print, "cpu", torch.float32)
    }
    assert "interpreter" in reasons["vidl triton"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("AMD EPYC, 2 cores", "amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 cores", "intel-xeon-cpu-2-20ghz-4-cores"),
        ("NVIDIA H200", "nvidia-h200"),
    ],
)
def test_slug(name, expected):
    assert hardware.slug(name) == expected


def test_quantiles():
    assert hardware.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert hardware.quantiles([float(n) for n in range(11)]) == (5.0, 2.0, 8.0)


def test_candidates_interleave():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in ("a", "b")}
    times = timing.interleave(calls, "cpu", quick=True)
    rounds = [sorted(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert rounds == [["a", "b"]] * (len(order) // 2)
    assert len(times["a"].cold) == len(times["b"].cold) == len(order) // 2 - 1  # the warm-up


class FakeCuda:
    """The part of torch.cuda that timing uses; a call takes a millisecond and is logged."""

    def __init__(self, captures=True):
        self.log, self.captures, self.now = [], captures, 0.0
        self.capturing = None

    def call(self, number):
        if self.capturing is not None:
            self.capturing.append(number)
        else:
            self.log.append(number)
            self.now += 1.0

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: (self.log.append("record"), setattr(event, "at", self.now))
        event.synchronize = lambda: self.log.append("synchronize")
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])
        graph.replay = lambda: [self.call(number) for number in graph.calls]
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.capturing = graph.calls
        yield
        self.capturing = None

    def stream(self, stream):
        return contextlib.nullcontext()

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def synchronize(self):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self):
        pass

    def memory_allocated(self):
        return 1000

    def max_memory_allocated(self):
        return 1500


def timed_on(fake, monkeypatch):
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake))
    calls = {"a": [lambda number=number: fake.call(number) for number in range(4)]}
    return timing.interleave(calls, "cuda", quick=True)["a"]


def test_cuda_times_graphs_cold_and_warm_and_eager_calls(monkeypatch):
    fake = FakeCuda()
    times = timed_on(fake, monkeypatch)
    for kind in (times.cold, times.warm, times.eager):
        assert kind and all(t == pytest.approx(1e-3) for t in kind)
    assert times.memory == 500 and times.note is None
    records = [at for at, what in enumerate(fake.log) if what == "record"]
    between = [fake.log[a + 1 : b] for a, b in zip(records[::2], records[1::2], strict=True)]
    assert all("synchronize" not in part for part in between)
    assert between[1] == [0, 1, 2, 3] * 3  # cold: never the same inputs twice in a row
    assert between[2] == [0] * 10  # warm


def test_cuda_falls_back_to_eager_calls_and_says_so(monkeypatch):
    times = timed_on(FakeCuda(captures=False), monkeypatch)
    assert times.cold and not times.warm and "no CUDA graph (operation not" in times.note
