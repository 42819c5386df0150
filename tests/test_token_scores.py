"""The scores of tokens against their definition, the rules of the papers, and misuse."""

import random

import pytest
import torch
from compare import assert_as_accurate, random_like
from grouped import GRID, GROUPS, fused, random_groups, visible
from where import Where

from vidl.kernels import gpu, library
from vidl.kernels.groups import NO_BIAS
from vidl.ops import (
    Groups,
    cls_attention_scores,
    key_similarity_scores,
    mean_attention_scores,
    space_time_attention,
    value_weighted_scores,
)

OP = "token_scores"
KINDS = ("cls", "mean", "value", "similarity")
NAMES = (
    "equal",
    "one row each",
    "frames",
    "frames and a global token",
    "block-sparse",
    "ragged",
    "cross",
    "queries without keys",
    "keys without queries",
    "long",
    "no rows",
    "no groups",
)


SMALL_GROUPS = {
    "two frames": lambda: Groups.spatial(torch.tensor([[3, 7, 19, 25, 30]]), GRID),
    "two frames and a global token": lambda: SMALL_GROUPS["two frames"]().with_global(),
}


def score(kind, q, k, v, groups, **options):
    """The scores of a kind, by the function of that kind."""
    if kind == "similarity":
        return key_similarity_scores(k, groups, **options)
    if kind == "value":
        return value_weighted_scores(q, k, v, groups, **options)
    return {"cls": cls_attention_scores, "mean": mean_attention_scores}[kind](
        q, k, groups, **options
    )


def log_sum_exp(q, k, v, groups):
    """The log-sum-exp in float64."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    return space_time_attention(q, k, v, groups, return_lse=True, backend="reference")[1]


def high_of(x):
    return torch.promote_types(x.dtype, torch.float32)


def run(groups, H, D, dtype, device, backend, kind, compute=None, given=False):
    """The scores, and the gradients of q, k and v, of `dtype` inputs computed in `compute`."""
    inputs = [x.detach().to(compute or dtype) for x in fused(groups, H, D, dtype, device)]
    q, k, v = (x.requires_grad_() for x in inputs)
    lse = log_sum_exp(q, k, v, groups).to(high_of(q)) if given else None
    options = {"lse": lse} if given else {}
    scores = score(kind, q, k, v, groups, **options, backend=backend)
    if kind == "similarity":
        assert not scores.requires_grad
        return [scores]
    leaves = [q, k, v] if kind == "value" else [q, k]
    # Scores sum to one, so their gradients have the size of one, too.
    return [scores.detach(), *torch.autograd.grad(scores, leaves, random_like(scores))]


def precisions(groups, H, D, dtype, where, kind, given=False):
    """Ours, the reference in `dtype` and in float64, of the scores and each gradient, flattened."""
    placed = groups.to(where.device)
    ours = run(placed, H, D, dtype, where.device, where.backend, kind, given=given)
    low = run(placed, H, D, dtype, where.device, "reference", kind, given=given)
    true = run(groups, H, D, dtype, "cpu", "reference", kind, torch.float64, given=given)
    for our, theirs, truth in zip(ours, low, true, strict=True):
        assert our.shape == truth.shape and our.dtype == theirs.dtype
        finite = torch.isfinite(truth)  # +inf is for tokens that ToMe never merges
        assert torch.equal(our.cpu()[~finite].double(), truth[~finite])
        yield [x.detach().cpu()[finite] for x in (our, theirs, truth)]


def assert_right(dtype, *results, order=0.01):
    """Compare each result over several layouts together: PyTorch may be exact on one by luck."""
    for parts in zip(*results, strict=True):
        ours, low, true = map(torch.cat, zip(*parts, strict=True))
        # A gradient is a difference of numbers of the size of a weight, 1 / keys.
        assert_as_accurate(ours, low, true, dtype, order=order)


def interpreted(where):
    return where.backend == "triton" and where.device == "cpu"


def heads(where):
    return 1 if interpreted(where) else 3


# The layouts for Triton's interpreter, which is slow.
FEW = (
    "one row each",
    "frames and a global token",
    "queries without keys",
    "keys without queries",
    "no groups",
)


@pytest.mark.parametrize("kind", [*KINDS, "mean, given the log-sum-exp"])
@pytest.mark.parametrize("name", NAMES)
def test_as_accurate_as_torch(name, kind, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if interpreted(where) and name not in FEW:
        pytest.skip("slow in Triton's interpreter")
    if where.backend == "emulated" and (dtype == torch.float16) != (kind in ("mean", "value")):
        pytest.skip("slow: two kinds of scores in float16, the others in bfloat16")
    kind, given = kind.split(",")[0], "given" in kind
    groups = GROUPS[name]()
    assert_right(dtype, list(precisions(groups, heads(where), 64, dtype, where, kind, given)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [3, 24, 80, 128])
def test_head_sizes(D, kind, dtype, where):
    where.skip_unless_runs(OP, dtype)
    names = ("cross", "queries without keys")
    if not interpreted(where):
        names += ("frames and a global token", "frames")
    assert_right(
        dtype,
        *(list(precisions(GROUPS[name](), heads(where), D, dtype, where, kind)) for name in names),
    )


def fuzz(seed, count, dtype, where, most, longest):
    generator = random.Random(seed)
    results = {kind: [] for kind in KINDS}
    for _ in range(count):
        groups = random_groups(generator, most, longest)
        D, H = generator.choice([8, 32, 64, 80, 128]), generator.choice([1, 2, 5])
        for kind in KINDS:
            results[kind].append(list(precisions(groups, H, D, dtype, where, kind)))
    for layouts in results.values():
        assert_right(dtype, *layouts)


@pytest.mark.parametrize("seed", range(3))
def test_any_groups(seed, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if interpreted(where):
        fuzz(seed, 2, dtype, where, most=2, longest=17)
    elif where.backend == "emulated":
        fuzz(seed, 4, dtype, where, most=4, longest=129)
    else:
        fuzz(seed, 8, dtype, where, most=6, longest=129 if dtype == torch.float32 else 65)


@pytest.mark.parametrize("kind", KINDS)
def test_long_groups(kind, where):
    """Sums of many terms: all tokens of VideoMAE."""
    where.skip_unless_runs(OP)
    if interpreted(where):
        pytest.skip("slow in Triton's interpreter")
    assert_right(
        torch.float32,
        list(precisions(Groups.equal(1, 1568), 2, 64, torch.float32, where, kind)),
        order=0.0,
    )


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, queries, keys", [("native", 4096, 2736), ("triton", 512, 344)])
def test_many_queries_are_as_accurate_as_torch(kind, backend, queries, keys):
    """Numbers of one sign: rounding errors of long sums do not cancel."""
    Where(backend, "cpu").skip_unless_runs(OP)
    x = [torch.rand(rows, 1, 32) for rows in (queries, keys, keys)]
    groups, grad = Groups.equal(1, queries, keys=keys), torch.rand(keys)

    def results(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        scores = score(kind, *leaves, groups, backend=backend)
        if kind == "similarity":
            return [scores[::2]]
        leaves = leaves if kind == "value" else leaves[:2]
        return [scores, *torch.autograd.grad(scores, leaves, grad.to(dtype))]

    for parts in zip(
        results(torch.float32, backend),
        results(torch.float32, "reference"),
        results(torch.float64, "reference"),
        strict=True,
    ):
        assert_as_accurate(*parts, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_hundreds_of_groups(seed):
    where = Where("native", "cpu")
    where.skip_unless_runs(OP)
    fuzz(seed, 150, torch.float32, where, most=6, longest=129)


@pytest.mark.parametrize("kind", ["cls", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_scores_of_space_time_attention(name, kind):
    groups = GROUPS[name]()
    q, k, v = (x.detach() for x in fused(groups, 2, 64, torch.float64, "cpu"))
    _, lse, expected = space_time_attention(
        q, k, v, groups, return_lse=True, return_scores=kind, backend="reference"
    )
    for more in ({}, {"lse": lse}) if kind == "mean" else ({},):
        scores = score(kind, q, k, v, groups, **more)
        torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-14)


def attention_of(q, k):
    """[B, H, N, N], as a model without a fused kernel computes it."""
    q, k = (x.transpose(1, 2) for x in (q, k))
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)


def test_equals_the_rules_of_the_papers():
    """EViT's, SViTT's and ATS's scores from the attention weights; ToMe's from the keys."""
    B, N, H, D = 2, 21, 3, 16
    q, k, v = torch.randn(3, B, N, H, D, dtype=torch.float64)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    groups = Groups.equal(B, N)
    attention = attention_of(q, k)

    evit = attention[:, :, 0].mean(1)
    torch.testing.assert_close(cls_attention_scores(*flat[:2], groups).view(B, N), evit)

    words = attention_of(q[:, :5], k).mean((1, 2))
    cross = Groups.equal(B, 5, keys=N)
    scores = mean_attention_scores(q[:, :5].flatten(0, 1), flat[1], cross)
    torch.testing.assert_close(scores.view(B, N), words)

    ats = attention[:, :, 0].sum(1)[:, 1:] * v.flatten(2).norm(dim=2)[:, 1:]
    scores = value_weighted_scores(*flat, groups).view(B, N)
    torch.testing.assert_close(scores.sum(1), torch.ones(B, dtype=torch.float64))
    patches = scores[:, 1:] / scores[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(patches, ats / ats.sum(1, keepdim=True))

    keys = k.mean(2)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    tome = (keys[:, ::2] @ keys[:, 1::2].mT).amax(-1)
    scores = key_similarity_scores(flat[1], groups).view(B, N)
    torch.testing.assert_close(-scores[:, ::2], tome)
    assert (scores[:, 1::2] == float("inf")).all()


@pytest.mark.parametrize("kind", ["cls", "mean", "value"])
def test_gradcheck(kind):
    for name in ("block-sparse", "queries without keys"):
        groups = GROUPS[name]()
        q, k, v = (x.detach() for x in fused(groups, 2, 3, torch.float64, "cpu"))
        q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
        assert torch.autograd.gradcheck(
            lambda q, k, v, g=groups: score(kind, q, k, v, g), (q, k, v)
        )


def test_the_log_sum_exp_does_not_change_the_gradient():
    args = (GROUPS["frames and a global token"](), 2, 16, torch.float64, "cpu", "reference", "mean")
    for without, given in zip(run(*args), run(*args, given=True), strict=True):
        torch.testing.assert_close(without, given, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_values_and_keys_give_no_nan(kind, where):
    options = {"device": where.device, "dtype": where.widest(OP), "requires_grad": True}
    groups = GROUPS["queries without keys"]().to(where.device)
    zeros = [torch.zeros(rows, 2, 32, **options) for rows in (9, 20, 20)]
    q, k, v = zeros
    scores = score(kind, q, k, v, groups, backend=where.backend)
    expected = score(kind, q, k, v, groups, backend="reference")
    torch.testing.assert_close(scores, expected)
    if kind != "similarity":
        grads = torch.autograd.grad(scores.sum(), zeros, allow_unused=True)
        assert all(grad is None or not grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nan_and_infinity_stay_in_their_group(bad, kind, where):
    dtype = where.widest(OP)
    groups = Groups.joint(torch.tensor([0, 10, 27, 35]).int(), 35, 17).to(where.device)
    q, k, v = (x.detach().clone() for x in fused(groups, 2, 64, dtype, where.device))
    clean = score(kind, q, k, v, groups, backend=where.backend)
    for tensor in (q, k, v):
        tensor[10:27:4] = float(bad)
    q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = score(kind, q, k, v, groups, backend=where.backend)
    assert scores[10:27].isnan().any()
    for rows in (slice(0, 10), slice(27, 35)):
        assert torch.equal(scores[rows], clean[rows])
        if kind == "similarity":
            continue
        grads = torch.autograd.grad(
            scores[rows].sum(), leaves, retain_graph=True, allow_unused=True
        )
        assert all(grad is None or grad[rows].isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time(kind, where):
    dtype = where.widest(OP)
    groups = SMALL_GROUPS["two frames and a global token"]().to(where.device)
    slow = {"triton": 1, "emulated": 3} if where.device == "cpu" else {}
    first = run(groups, 2, 64, dtype, where.device, where.backend, kind)
    for _ in range(slow.get(where.backend, 50)):
        again = run(groups, 2, 64, dtype, where.device, where.backend, kind)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_negative_scale(where):
    dtype = where.widest(OP)
    groups = Groups.equal(2, 9).to(where.device)
    q, k, v = fused(groups, 2, 32, dtype, where.device)
    for kind in KINDS[:3]:
        results = []
        for backend, compute in (
            (where.backend, dtype),
            ("reference", dtype),
            ("reference", torch.float64),
        ):
            leaves = [x.detach().to(compute).requires_grad_() for x in (q, k)]
            scores = score(kind, *leaves, v.to(compute), groups, scale=-0.3, backend=backend)
            grads = torch.autograd.grad(scores, leaves, random_like(scores))
            results.append([scores.detach(), *grads])
        for of_one in zip(*results, strict=True):
            assert_as_accurate(*of_one, dtype, order=0.01)


def test_any_stride(where):
    """[H, rows, D] in memory, slices of a fused buffer, and channels that are not contiguous."""
    dtype = where.widest(OP)
    groups = Groups.equal(2, 10).to(where.device)
    q, k, v = (x.detach() for x in fused(groups, 2, 32, dtype, where.device))
    for kind in KINDS:
        scores = [
            score(kind, *map(move, (q, k, v)), groups, backend=where.backend)
            for move in (
                torch.clone,
                lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
                lambda x: x,
                lambda x: x.mT.contiguous().mT,
            )
        ]
        for other in scores[1:]:
            torch.testing.assert_close(other, scores[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*SMALL_GROUPS, "no rows"])
@pytest.mark.parametrize("kind", [*KINDS, "mean, given the log-sum-exp"])
def test_opcheck(name, kind, where):
    dtype = where.widest(OP)
    if interpreted(where) and name == "two frames":
        pytest.skip("slow in Triton's interpreter")
    kind, given = kind.split(",")[0], "given" in kind
    groups = (GROUPS | SMALL_GROUPS)[name]().to(where.device)
    q, k, v = (
        (x.detach() if x.numel() else x.new_empty(x.shape)).requires_grad_()  # opcheck cannot clone
        for x in fused(groups, 1, 32, dtype, where.device)  # strided tensors of no rows
    )
    lse = log_sum_exp(q, k, v, groups).to(high_of(q)) if given else None
    index = (*groups.arguments(), *NO_BIAS)
    if kind == "similarity":
        q, k = None, k.detach()
    value = v if kind == "value" else None
    forward = library.kernel(OP, where.backend)
    torch.library.opcheck(forward, (q, k, value, lse, *index, 0.2, kind))
    if kind == "similarity":
        return
    scores, weights, norms = (x.detach() for x in forward(q, k, value, lse, *index, 0.2, kind))
    q, k, value = (x if x is None else x.detach() for x in (q, k, value))
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", where.backend),
        (scores, weights if lse is None else lse, norms, q, k, value, *index, False, 0.2, kind),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_all_lengths(kind, where):
    where.skip_unless_runs(OP)
    if where.backend != "native":
        pytest.skip("the graph is the same for every kernel")
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def run_kind(q, k, v, groups):
        return score(kind, q, k, v, groups, backend=where.backend)

    torch._dynamo.reset()
    compiled = torch.compile(run_kind, fullgraph=True, backend=count, dynamic=True)
    for K in (20, 25, 31, 40):
        groups = Groups.spatial(visible(K=K), GRID).to(where.device)
        args = [x.detach() for x in fused(groups, 2, 32, torch.float32, where.device)]
        torch.testing.assert_close(compiled(*args, groups), run_kind(*args, groups))
    assert len(graphs) <= 2  # the second has symbols for the numbers inside the groups


def test_autocast(where):
    where.skip_unless_runs(OP, torch.bfloat16)
    groups = GROUPS["frames"]().to(where.device)
    q, k, _ = (x.detach().clone() for x in fused(groups, 2, 64, torch.float32, where.device))
    with torch.autocast(where.device, torch.bfloat16):
        scores = cls_attention_scores(q.requires_grad_(), k, groups, backend=where.backend)
    low = cls_attention_scores(q.bfloat16(), k.bfloat16(), groups, backend=where.backend)
    assert scores.dtype == torch.float32 and torch.equal(scores, low)
    assert torch.autograd.grad(scores.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("cls", (1 + 2) * 2 * (3 + 7) * 2 * 32),
        ("mean", (1 + 3) * 2 * (3 * 3 + 7 * 7) * 2 * 32),
        ("similarity", 2 * (2 * 1 + 4 * 3) * 32),
    ],
)
def test_flops(kind, flops, where):
    dtype = where.widest(OP)
    groups = Groups.joint(torch.tensor([0, 3, 10]).int(), 10, 7).to(where.device)
    q, k, _ = (x.detach().requires_grad_() for x in fused(groups, 2, 32, dtype, where.device))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        scores = score(kind, q, k, None, groups, backend=where.backend)
        if kind != "similarity":
            scores.sum().backward()
    assert counter.get_total_flops() == flops


SMALL = Groups.equal(2, 4)
ROWS = torch.zeros(8, 2, 32)


@pytest.mark.parametrize(
    "error, text, kind, change",
    [
        (TypeError, "vidl.ops.Groups", "cls", {"groups": torch.zeros(3)}),
        (ValueError, r"lse \[2, 8\]", "mean", {"lse": torch.zeros(8, 2)}),
        (TypeError, "lse in float32", "mean", {"lse": torch.zeros(2, 8).half()}),
        (ValueError, r"\[num_queries, H, D\]", "cls", {"q": ROWS[0]}),
        (
            ValueError,
            r"H, at most D\], got .* v \(8, 2, 33\)",
            "value",
            {"v": torch.zeros(8, 2, 33)},
        ),
        (ValueError, r"\[num_queries, H, D\]", "cls", {"q": ROWS[:, :1]}),
        (TypeError, "one floating dtype", "cls", {"k": ROWS.half()}),
        (TypeError, "one floating dtype", "similarity", {"k": ROWS.int()}),
        (ValueError, "q on cpu", "mean", {"q": ROWS.to("meta")}),
        (ValueError, "q of 8 rows", "cls", {"q": ROWS[:7]}),
        (ValueError, "k of 8 rows", "similarity", {"k": ROWS[:7]}),
        (ValueError, "v of 8 rows", "value", {"v": ROWS[:7]}),
        (ValueError, "backend", "cls", {"backend": "flash"}),
        (
            RuntimeError,
            "not in float64",
            "cls",
            {**{x: ROWS.double() for x in "qk"}, "backend": "native"},
        ),
    ],
)
def test_misuse_is_explained(error, text, kind, change):
    arguments = {"q": ROWS, "k": ROWS, "v": ROWS, "groups": SMALL} | change
    with pytest.raises(error, match=text):
        score(kind, **arguments)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_long_heads(backend):
    options = {"device": "cuda", "dtype": torch.float16}
    reason = library.OPS[OP].limits(backend, head_size=129, **options)
    assert "at most 128, not 129" in reason
    assert library.OPS[OP].limits(backend, head_size=128, **options) is None


def test_shared_memory_of_a_gpu(monkeypatch):
    """An RTX 3090 has 99 KB for a block: too little for the tiles of long heads' similarities."""
    monkeypatch.setattr(gpu, "shared_memory", lambda: 99 * 1024)
    options = {"device": "cuda", "dtype": torch.float16, "head_size": 128}
    reason = library.OPS[OP].limits("native", kind="similarity", **options)
    assert '"similarity" with heads of 128 needs 104448 bytes' in reason and "101376" in reason
    for kind in ("cls", "mean", "value"):
        assert library.OPS[OP].limits("native", kind=kind, bias=True, **options) is None


@pytest.mark.parametrize(
    "text, change",
    [
        ("offsets must ascend from 0 to 8", {"query_offsets": torch.tensor([0, 9, 8]).int()}),
        ("offsets must ascend from 0 to 8", {"key_offsets": torch.tensor([0, 4, 7]).int()}),
        (r"rows must lie in \[0, 8\)", {"query_rows": torch.arange(1, 9).int()}),
        (r"rows must lie in \[0, 8\)", {"key_rows": torch.arange(-1, 7).int()}),
    ],
)
def test_groups_that_do_not_fit_are_caught(text, change):
    Where("native", "cpu").skip_unless_runs(OP)
    groups = Groups(**{**vars(SMALL), **change}, checked=True)
    with pytest.raises(RuntimeError, match=text):
        cls_attention_scores(ROWS, ROWS, groups, backend="native")


@pytest.mark.parametrize("kind", ["cls", "mean", "value"])
@pytest.mark.parametrize("backend", ["auto", "native", "triton", "reference"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_the_scale_is_finite(kind, scale, backend):
    with pytest.raises(ValueError, match="need a finite scale, got"):
        score(kind, ROWS, ROWS, ROWS, SMALL, scale=scale, backend=backend)
    with pytest.raises(TypeError, match="need scale as a number, got tensor"):
        score(kind, ROWS, ROWS, ROWS, SMALL, scale=torch.ones(()), backend=backend)
