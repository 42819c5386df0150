"""select_tokens against its definition, EViT and SViTT; errors."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from compare import assert_as_accurate, gradients, random_like
from where import Where

from vidl.kernels import library
from vidl.ops import kept_count, select_tokens

OP = "select_tokens"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """Samples of `lengths` tokens after a prefix; of equal length unless `packed`."""

    lengths: tuple[int, ...] = (13, 13)
    keep: int | float = 0.5
    C: int = 24
    prefix: int = 1
    order: str = "index"
    fuse: str | None = None
    packed: bool = False
    ties: bool = False
    strided: bool = False
    rounding: str = "ceil"

    def inputs(self, dtype, device):
        """x, scores and offsets."""
        seed = torch.Generator().manual_seed(len(repr(self)))
        B, longest = len(self.lengths), max(self.lengths, default=0)
        N = self.prefix + longest
        x = torch.randn(B, N, self.C, generator=seed).to(device, dtype)
        scores = torch.rand(B, N, generator=seed).to(device)
        if self.ties:
            scores = (scores * 4).round() / 4
        if self.packed:
            sizes = [self.prefix + n for n in self.lengths]
            offsets = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
            real = (torch.arange(N) < torch.tensor(sizes)[:, None]).to(device) if B else ...
            return x[real].reshape(-1, self.C), scores[real].reshape(-1), offsets
        if self.strided:  # every other channel of every other row, in the other order of memory
            wide = torch.full((2 * N, B, 2 * self.C), NAN, device=device, dtype=dtype)
            wide[::2, :, ::2] = x.transpose(0, 1)
            x = wide[::2, :, ::2].transpose(0, 1)
        return x, scores[:, self.prefix :], None

    def run(self, dtype, device, backend, compute=None):
        """The result, and the gradients of x and, with `fuse`, of the scores."""
        x, scores, offsets = self.inputs(dtype, device)
        if compute is not None:
            x, scores = x.to(compute), scores.to(compute)
        leaves = [x.requires_grad_(), scores.requires_grad_()]
        selected = select_tokens(
            x, scores, self.keep, order=self.order, fuse=self.fuse, cu_seqlens=offsets,
            prefix=self.prefix, rounding=self.rounding, backend=backend,
        )  # fmt: skip
        leaves = leaves if self.fuse else leaves[:1]
        grads = torch.autograd.grad(selected.tokens, leaves, random_like(selected.tokens))
        return selected, grads


CASES = {
    "by index": Case(),
    "by score": Case(order="score", keep=5),
    "EViT": Case(order="score", fuse="sum", keep=0.7),
    "mean": Case(fuse="mean", lengths=(40,) * 3, keep=11, C=37),
    "no prefix": Case(prefix=0, fuse="sum"),
    "long prefix": Case(prefix=5, order="score", fuse="mean"),
    "ties": Case(ties=True, order="score", fuse="sum", lengths=(50, 50)),
    "strided": Case(strided=True, fuse="sum", order="score"),
    "one channel": Case(C=1, fuse="mean", order="score"),
    "wide": Case(lengths=(3,), C=4200, keep=2, fuse="sum"),
    "all kept": Case(keep=1.0, fuse="mean", order="score"),
    "none kept": Case(keep=0.01, rounding="floor", fuse="sum"),
    "one token": Case(lengths=(1, 1), keep=1, fuse="sum"),
    "no tokens": Case(lengths=(0, 0), keep=0.5, fuse="sum"),
    "no samples": Case(lengths=(), keep=0.5, fuse="mean"),
    "packed": Case(packed=True, lengths=(7, 0, 40, 1)),
    "packed EViT": Case(packed=True, lengths=(9, 33, 2), order="score", fuse="sum", keep=0.7),
    "packed mean": Case(packed=True, lengths=(9, 33, 2), prefix=0, fuse="mean", ties=True),
    "packed count": Case(packed=True, lengths=(9, 3, 5), keep=3, order="score", fuse="sum"),
    "packed, no samples": Case(packed=True, lengths=(), fuse="sum"),
    "packed, no tokens": Case(packed=True, lengths=(0, 0), prefix=0, fuse="sum"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_torch(case, dtype, where):
    where.skip_unless_runs(OP, dtype)
    ours, our_grads = case.run(dtype, where.device, where.backend)
    low, low_grads = case.run(dtype, where.device, "reference")
    true, true_grads = case.run(dtype, "cpu", "reference", torch.float64)
    for our, theirs in zip(ours[1:], low[1:], strict=True):
        assert our.dtype == theirs.dtype and torch.equal(our, theirs)
    for our, theirs, truth, number in zip(
        (ours.tokens, *our_grads), (low.tokens, *low_grads), (true.tokens, *true_grads),
        (dtype, dtype, torch.float32), strict=False,
    ):  # fmt: skip
        assert our.dtype == theirs.dtype
        assert_as_accurate(our, theirs, truth, number)


def plain(scores, K, order):
    """ids_keep of a sample, by Python's sort."""
    best = sorted(range(len(scores)), key=lambda n: (math.isnan(scores[n]), -scores[n], n))
    best = [n for n in best if not math.isnan(scores[n])] + sorted(
        n for n in best if math.isnan(scores[n])
    )
    return best[:K] if order == "score" else sorted(best[:K])


def hard_scores(B, N):
    """Scores with many ties, and with NaN, infinities and signed zeros."""
    scores = torch.randint(-3, 4, (B, N)) / 2
    for value in (NAN, INF, -INF, -0.0, 1e-45, -1e-45, 3e38):
        scores[torch.rand(B, N) < random.choice((0, 0.05, 0.3))] = value
    return scores


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_the_order_is_total(backend):
    """Thousands of samples, with ties, NaN and infinities, against Python's sort."""
    Where(backend, "cpu").skip_unless_runs(OP)
    random.seed(0)
    few = {"triton": (1, 7, 33, 65, 130, 200), "emulated": (1, 7, 33, 65, 130, 200, 257, 300)}
    B, cases = {"native": (8, 500), "reference": (8, 200)}.get(backend, (4, 0))
    lengths = few.get(backend) or [random.randint(1, 300) for _ in range(cases)]
    for N in lengths:
        K = random.choice((1, N, random.randint(1, N)))
        scores, order = hard_scores(B, N), random.choice(("index", "score"))
        selected = select_tokens(torch.zeros(B, N, 1), scores, K, order=order, backend=backend)
        expected = [plain(sample, K, order) for sample in scores.tolist()]
        assert selected.ids_keep.tolist() == expected
        for ids, inverse in zip(expected, selected.inverse.tolist(), strict=True):
            assert [inverse[n] for n in ids] == list(range(K))
            assert sorted(inverse) == [-1] * (N - K) + list(range(K))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "N, order", [(1030, "index"), (1568, "score"), (5000, "index"), (12_000, "index")]
)
def test_long_samples(N, order, where):
    where.skip_unless_runs(OP)
    if where.backend == "triton" and where.device == "cpu" and N > 1030:
        pytest.skip("minutes in Triton's interpreter")
    scores = torch.randint(0, 200, (1, N)) / 7.0
    x = torch.arange(N, dtype=torch.float32).view(1, N, 1)
    selected = select_tokens(
        x.to(where.device), scores.to(where.device), 0.3, order=order, backend=where.backend
    )
    expected = plain(scores[0].tolist(), math.ceil(0.3 * N), order)
    assert selected.ids_keep[0].tolist() == expected
    assert selected.tokens.flatten().tolist() == expected


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_equals_evit(backend):
    """EViT: the tokens with the highest scores, then the weighted sum of the others."""
    Where(backend, "cpu").skip_unless_runs(OP)
    x, attention = torch.randn(3, 20, 8), torch.rand(3, 19).softmax(-1)
    selected = select_tokens(
        x, attention, 0.7, order="score", fuse="sum", prefix=1, backend=backend
    )
    K = math.ceil(0.7 * 19)
    ids = attention.topk(K).indices
    others = torch.ones_like(attention).scatter(1, ids, 0) * attention
    expected = torch.cat(
        [x[:, :1], x[torch.arange(3)[:, None], 1 + ids], others[:, None] @ x[:, 1:]], 1
    )
    assert torch.equal(selected.ids_keep, ids)
    assert torch.equal(selected.tokens[:, :-1], expected[:, :-1])
    torch.testing.assert_close(selected.tokens, expected)


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_equals_svitt(backend):
    """SViTT: the tokens with the highest scores, in their order."""
    Where(backend, "cpu").skip_unless_runs(OP)
    x, attention = torch.randn(3, 20, 8), torch.rand(3, 19).softmax(-1)
    selected = select_tokens(x, attention, 0.7, prefix=1, backend=backend)
    ids = attention.topk(math.ceil(0.7 * 19)).indices.sort().values
    kept = x[:, 1:].gather(1, ids[..., None].expand(-1, -1, 8))
    assert torch.equal(selected.ids_keep, ids)
    assert torch.equal(selected.tokens, torch.cat([x[:, :1], kept], 1))
    assert selected.cu_seqlens.tolist() == [0, 15, 30, 45]


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_whole_frames_and_tokens_of_frames(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    x = torch.randn(2, 5, 6, 4)
    frames = select_tokens(x, torch.rand(2, 5), 2, fuse="sum", backend=backend)
    assert frames.tokens.shape == (2, 3, 6, 4) and frames.ids_keep.shape == (2, 2)
    picked = x[torch.arange(2)[:, None], frames.ids_keep]
    assert torch.equal(frames.tokens[:, :2], picked)
    tokens = select_tokens(x, torch.rand(2, 5, 5), 2, prefix=1, backend=backend)
    assert tokens.tokens.shape == (2, 5, 3, 4) and tokens.ids_keep.shape == (2, 5, 2)
    assert tokens.inverse.shape == (2, 5, 5) and tokens.cu_seqlens.shape == (11,)
    ids = 1 + tokens.ids_keep[..., None].expand(-1, -1, -1, 4)
    assert torch.equal(tokens.tokens[:, :, 1:], x.gather(2, ids))
    assert torch.equal(tokens.tokens[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_packed_equals_each_sample_alone(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    case = CASES["packed EViT"]
    x, scores, offsets = case.inputs(torch.float32, "cpu")
    options = dict(order="score", fuse="sum", prefix=1, backend=backend)
    packed = select_tokens(x, scores, 0.7, cu_seqlens=offsets, **options)
    known = select_tokens(
        x, scores, 0.7, cu_seqlens=offsets, num_kept=len(packed.ids_keep), **options
    )
    assert all(map(torch.equal, packed, known))
    ends = packed.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        one = select_tokens(x[None, begin:end], scores[None, begin + 1 : end], 0.7, **options)
        assert torch.equal(packed.tokens[ends[b] : ends[b + 1]], one.tokens[0])
        assert torch.equal(packed.inverse[begin + 1 : end], one.inverse[0])
        assert packed.inverse[begin] == -1


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_what_is_not_finite_does_not_spread(backend):
    """Kept rows and rows without a finite score do not affect the fused token or its gradients."""
    Where(backend, "cpu").skip_unless_runs(OP)
    scores = torch.tensor([[NAN, -INF, 0.5, 3.0, 0.25]])
    x = torch.tensor([[[NAN], [INF], [2.0], [NAN], [4.0]]])
    for fuse, expected, total in (("sum", 2.0, 1.0), ("mean", 2.0 / 0.75, 0.75)):
        leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        selected = select_tokens(*leaves, 1, fuse=fuse, backend=backend)
        assert selected.ids_keep.tolist() == [[3]]
        torch.testing.assert_close(selected.tokens[0, 1, 0].item(), expected)
        grads = torch.autograd.grad(selected.tokens[0, 1].sum(), leaves)
        by_x = torch.tensor([[[0.0], [0.0], [0.5], [0.0], [0.25]]]) / total
        torch.testing.assert_close(grads[0], by_x)
        shift = expected if fuse == "mean" else 0.0
        by_score = torch.tensor([[0.0, 0.0, 2.0 - shift, 0.0, 4.0 - shift]]) / total
        torch.testing.assert_close(grads[1], by_score)


@pytest.mark.parametrize("backend", ["reference", "native", "triton", "emulated"])
def test_a_mean_of_nothing_is_zero(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    x = torch.randn(1, 4, 3, requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    selected = select_tokens(x, scores, 1, fuse="mean", backend=backend)
    assert torch.equal(selected.tokens[0, 1], torch.zeros(3))
    by_x, by_score = torch.autograd.grad(selected.tokens.sum(), (x, scores))
    assert by_x[0].tolist() == [[1.0] * 3] + [[0.0] * 3] * 3 and not by_score.any()


@pytest.mark.parametrize("name", ["EViT", "mean", "packed EViT", "packed mean", "long prefix"])
def test_gradcheck(name):
    case = CASES[name]
    x, scores, offsets = case.inputs(torch.float64, "cpu")
    leaves = x[..., :2].clone().requires_grad_(), scores.double().requires_grad_()

    def op(x, weights):
        return select_tokens(
            x,
            weights,
            case.keep,
            rank_by=scores,  # the steps of the check must not choose other tokens
            order=case.order,
            fuse=case.fuse,
            cu_seqlens=offsets,
            prefix=case.prefix,
        ).tokens

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("name", ["EViT", "packed mean", "by index"])
def test_same_bits_every_time(name, where):
    where.skip_unless_runs(OP)
    first, first_grads = CASES[name].run(torch.float32, where.device, where.backend)
    for _ in range(1 if where.device == "cpu" else 100):
        again, grads = CASES[name].run(torch.float32, where.device, where.backend)
        assert all(map(torch.equal, (*first, *first_grads), (*again, *grads)))


def test_threads_change_no_bit():
    if reason := library.why_not("native", OP, "cpu", torch.float32):
        pytest.skip(reason)
    threads, results = torch.get_num_threads(), []
    case = Case(lengths=(90, 90), C=700, order="score", fuse="mean")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            selected, grads = case.run(torch.float32, "cpu", "native")
            results.append((*selected, *grads))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("name", ["EViT", "packed mean", "by index", "packed, no tokens"])
def test_opcheck(name, where):
    where.skip_unless_runs(OP)
    case = CASES[name]
    x, scores, offsets = case.inputs(torch.float32, where.device)
    weights = scores.requires_grad_() if case.fuse else None
    kept = K = 7
    if case.packed:
        counts = [kept_count(n, case.keep) for n in case.lengths]
        kept = torch.tensor([0, *counts]).cumsum(0).int().to(where.device)
        K = int(kept[-1])
    order, fuse = case.order, case.fuse or ""
    args = (offsets, kept if case.packed else None, K, case.prefix, order, fuse)
    op = library.kernel(OP, where.backend)
    torch.library.opcheck(op, (x.requires_grad_(), scores.detach(), weights, *args))
    tokens, _, inverse, ends, means = (
        result.detach() for result in op(x, scores.detach(), weights, *args)
    )
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", where.backend),
        (
            tokens, x.detach(), None if weights is None else weights.detach(), inverse, offsets,
            ends, means if fuse == "mean" else None, case.prefix, fuse, True, bool(fuse),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_once_for_all_lengths(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def select(x, scores):
        return select_tokens(x, scores, 0.7, prefix=1, order="score", fuse="sum", backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(select, fullgraph=True, backend=count)
    for N in (19, 10, 30, 41):
        x, scores = torch.randn(2, N + 1, 8), torch.rand(2, N)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(scores, 1)
        for ours, eager in zip(compiled(x, scores), select(x, scores), strict=True):
            torch.testing.assert_close(ours, eager)
    assert len(graphs) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients(packed, where):
    where.skip_unless_runs(OP)
    case = CASES["packed EViT" if packed else "EViT"]
    x, scores, offsets = case.inputs(torch.float32, where.device)
    leaves = [x.requires_grad_(), scores.requires_grad_()]
    num_kept = sum(kept_count(n, 0.7) for n in case.lengths) if packed else None

    def select(x, scores):
        return select_tokens(
            x, scores, 0.7, order="score", fuse="sum", prefix=1, cu_seqlens=offsets,
            num_kept=num_kept, backend=where.backend,
        )  # fmt: skip

    torch._dynamo.reset()
    selected = torch.compile(select, fullgraph=True, backend="aot_eager")(*leaves)
    eager = select(*leaves)
    for ours, theirs in zip(selected, eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad(selected.tokens.square().sum(), leaves),
        torch.autograd.grad(eager.tokens.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_scores_of_another_dtype_get_a_gradient_in_it(where):
    where.skip_unless_runs(OP)
    x = torch.randn(2, 9, 4, device=where.device)
    scores = torch.rand(2, 9, device=where.device).half().requires_grad_()
    selected = select_tokens(x, scores, 3, fuse="sum", backend=where.backend)
    (grad,) = torch.autograd.grad(selected.tokens.sum(), scores)
    assert grad.dtype == torch.float16 and selected.tokens.dtype == torch.float32
    assert not selected.ids_keep.requires_grad and not selected.inverse.requires_grad
    alone = select_tokens(x.requires_grad_(), scores, 3, backend=where.backend)
    (grad,) = torch.autograd.grad(alone.tokens.sum(), scores, allow_unused=True)
    assert grad is None


def test_flops(where):
    where.skip_unless_runs(OP)
    x = torch.randn(2, 9, 4, device=where.device, requires_grad=True)
    scores = torch.rand(2, 9, device=where.device, requires_grad=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        select_tokens(x, scores, 3, fuse="sum", backend=where.backend).tokens.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 4 * (2 + 1 + 2)  # the sum; by x; by scores


def test_kept_count_is_that_of_the_sources():
    for percent in range(1, 100):
        rate = percent / 100
        for n in (0, 1, 2, 9, 10, 14, 49, 100, 196, 197, 784, 1568):
            drop = 1 - rate  # as a model that is given the ratio to mask has it
            assert kept_count(n, rate, "ceil") == math.ceil(rate * n)
            assert kept_count(n, drop, "floor") == int(n * (1 - rate))
            assert kept_count(n, rate, "floor_min_one") == min(n, max(1, int(n * rate)))
            assert kept_count(n, drop, "drop_floor") == n - int(rate * n)
    assert kept_count(10, 0.9, "drop_floor") == kept_count(10, 1 - 0.1, "drop_floor") == 9
    assert kept_count(50, 0.14) == 8  # 0.14 * 50 > 7 in floating point, in EViT too


@pytest.mark.parametrize("rounding", ["ceil", "floor", "floor_min_one", "drop_floor"])
def test_packed_samples_keep_what_kept_count_says(rounding):
    lengths = list(range(60))
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(offsets[-1])
    for percent in range(1, 101):
        selected = select_tokens(
            torch.zeros(total, 1), torch.rand(total), percent / 100, rounding=rounding,
            cu_seqlens=offsets,
        )  # fmt: skip
        counts = [kept_count(n, percent / 100, rounding) for n in lengths]
        assert selected.cu_seqlens.diff().tolist() == counts


@pytest.mark.parametrize("offsets", [[0, 5, 4, 10], [1, 4, 5, 10], [0, 4, 8, 9], [0, 1, 5, 12]])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_offsets_that_do_not_fit_are_caught(offsets, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises((RuntimeError, AssertionError), match="ascend"):
        select_tokens(
            torch.zeros(10, 2), torch.rand(10), 0.5, cu_seqlens=cu_seqlens, num_kept=4,
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("keep, num_kept", [(3, None), (0.5, 4), (0.5, 6), (0.5, 0)])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_counts_that_do_not_fit_are_caught(keep, num_kept, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    cu_seqlens = torch.tensor([0, 2, 10], dtype=torch.int32)
    with pytest.raises((RuntimeError, AssertionError), match="keep"):
        select_tokens(
            torch.zeros(10, 2), torch.rand(10), keep, cu_seqlens=cu_seqlens, num_kept=num_kept,
            backend=backend,
        )  # fmt: skip


X, SCORES = torch.zeros(2, 6, 3), torch.zeros(2, 6)
PACKED = {"x": X[0], "scores": SCORES[0], "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}
MISUSE = {
    "nothing kept": (ValueError, r"\[1, 6\]", {"keep": 0}),
    "more kept than there are": (ValueError, r"\[1, 6\]", {"keep": 7}),
    "a rate of zero": (ValueError, r"\(0, 1\]", {"keep": 0.0}),
    "a rate above one": (ValueError, r"\(0, 1\]", {"keep": 1.5}),
    "a rate that is no number": (ValueError, "finite keep", {"keep": NAN}),
    "keep as a bool": (TypeError, "count", {"keep": True}),
    "keep as a tensor": (TypeError, "count", {"keep": torch.tensor(3)}),
    "an unknown rounding": (ValueError, "rounding", {"rounding": "round"}),
    "an unknown order": (ValueError, "order", {"order": "random"}),
    "an unknown fusion": (ValueError, "fuse", {"fuse": "max"}),
    "integer tokens": (TypeError, "x in", {"x": X.int()}),
    "integer scores": (TypeError, "scores", {"scores": SCORES.int()}),
    "scores of other samples": (ValueError, "scores", {"scores": SCORES[:1]}),
    "scores of the prefix too": (ValueError, r"1 \+ N", {"prefix": 1}),
    "scores without a dimension": (ValueError, "scores", {"scores": torch.tensor(1.0)}),
    "a negative prefix": (ValueError, "prefix", {"prefix": -1}),
    "scores elsewhere": (ValueError, "on cpu", {"scores": SCORES.to("meta")}),
    "ranks of another shape": (ValueError, "rank_by", {"rank_by": SCORES[:, :5]}),
    "integer ranks": (TypeError, "rank_by", {"rank_by": SCORES.long()}),
    "offsets of uniform samples": (
        ValueError,
        r"\[total\]",
        {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
    ),
    "num_kept of uniform samples": (ValueError, "num_kept", {"num_kept": 6}),
    "int64 offsets": (TypeError, "int32", PACKED | {"cu_seqlens": torch.tensor([0, 6])}),
    "no offsets": (ValueError, r"\[B \+ 1\]", PACKED | {"cu_seqlens": torch.zeros(0).int()}),
    "offsets elsewhere": (
        ValueError,
        "on cpu",
        PACKED | {"cu_seqlens": torch.zeros(2, device="meta").int()},
    ),
    "a num_kept that keep contradicts": (ValueError, "num_kept", PACKED | {"num_kept": 4}),
    "a negative num_kept": (ValueError, "num_kept", PACKED | {"keep": 0.5, "num_kept": -1}),
    "packed, nothing kept": (ValueError, "keep", PACKED | {"keep": 0}),
    "packed, a rate above one": (ValueError, r"\(0, 1\]", PACKED | {"keep": 2.0}),
    "an unknown backend": (ValueError, "backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, text, change", MISUSE.values(), ids=MISUSE)
def test_misuse_is_explained(error, text, change):
    with pytest.raises(error, match=text):
        select_tokens(**({"x": X, "scores": SCORES, "keep": 3} | change))


@pytest.mark.parametrize("name", ["scores", "weights"])
def test_the_registered_op_checks_its_numbers(name, where):
    where.skip_unless_runs(OP)
    numbers = {"scores": SCORES, "weights": SCORES} | {name: SCORES[:, :5]}
    tensors = [x.to(where.device) for x in (X, *numbers.values())]
    with pytest.raises(RuntimeError, match=f"need {name} "):
        library.kernel(OP, where.backend)(*tensors, None, None, 3, 0, "index", "sum")


def test_a_backend_asked_for_never_falls_back():
    with pytest.raises(RuntimeError, match="native: .*\n  triton: .*\n  torch: can run"):
        select_tokens(X.double(), SCORES, 3, backend="native")
    assert select_tokens(X.double(), SCORES, 3).tokens.dtype == torch.float64


def test_kept_count_misuse():
    with pytest.raises(ValueError, match="n >= 0"):
        kept_count(-1, 0.5)
    with pytest.raises(ValueError, match="rounding"):
        kept_count(3, 0.5, "nearest")


@pytest.mark.parametrize("fuse", ["sum", "mean"])
def test_thousands_of_fused_tokens_are_as_accurate_as_torch(fuse, where):
    where.skip_unless_runs(OP)
    if (where.backend, where.device) == ("triton", "cpu"):
        pytest.skip("slow in Triton's interpreter")
    x, scores = torch.rand(1, 4096, 64), torch.rand(1, 4096)

    def results(dtype, device, backend):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, scores)]
        return gradients(select_tokens(*leaves, 1, fuse=fuse, backend=backend).tokens, leaves)

    for ours, low, true in zip(
        results(torch.float32, where.device, where.backend),
        results(torch.float32, where.device, "reference"),
        results(torch.float64, "cpu", "reference"),
        strict=True,
    ):
        assert_as_accurate(ours, low, true, torch.float32)
