"""token_scores against its definition, against the papers' own rules, and against misuse."""

import random

import pytest
import torch
from compare import assert_as_accurate, random_like
from grouped import GRID, GROUPS, fused, random_groups, visible
from where import Where

from vidl.kernels import library
from vidl.ops import Groups, space_time_attention, token_scores

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


def options(kind, v, lse=None):
    return ({"v": v} if kind == "value" else {}) | ({"lse": lse} if lse is not None else {})


def log_sum_exp(q, k, v, groups):
    """As precise as its dtype lets it be, whoever computed it."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    return space_time_attention(q, k, v, groups, return_lse=True, backend="reference")[1]


def high_of(x):
    return torch.promote_types(x.dtype, torch.float32)


def run(groups, H, D, dtype, device, backend, kind, compute=None, given=False):
    """The scores, and the gradients of q, k and v, of `dtype` inputs computed in `compute`."""
    inputs = [x.detach().to(compute or dtype) for x in fused(groups, H, D, dtype, device)]
    q, k, v = (x.requires_grad_() for x in inputs)
    lse = log_sum_exp(q, k, v, groups).to(high_of(q)) if given else None
    scores = token_scores(q, k, groups, kind, **options(kind, v, lse), backend=backend)
    if kind == "similarity":
        assert not scores.requires_grad
        return [scores]
    leaves = [q, k, v] if kind == "value" else [q, k]
    # Sums to one are what scores are: so are their gradients' sizes.
    return [scores.detach(), *torch.autograd.grad(scores, leaves, random_like(scores))]


def three_ways(groups, H, D, dtype, where, kind, given=False):
    """(ours, PyTorch's, the truth), flat and finite, of the scores and every gradient."""
    placed = groups.to(where.device)
    ours = run(placed, H, D, dtype, where.device, where.backend, kind, given=given)
    low = run(placed, H, D, dtype, where.device, "reference", kind, given=given)
    true = run(groups, H, D, dtype, "cpu", "reference", kind, torch.float64, given=given)
    for our, theirs, truth in zip(ours, low, true, strict=True):
        assert our.shape == truth.shape and our.dtype == theirs.dtype
        finite = torch.isfinite(truth)  # what ToMe never merges is +inf
        assert torch.equal(our.cpu()[~finite].double(), truth[~finite])
        yield [x.detach().cpu()[finite] for x in (our, theirs, truth)]


def assert_right(dtype, *results, order=0.01):
    """Judge several layouts together, result by result: one alone may be exact by luck."""
    for parts in zip(*results, strict=True):
        ours, low, true = map(torch.cat, zip(*parts, strict=True))
        # A gradient is a difference of numbers of the order of a weight, 1 / keys.
        assert_as_accurate(ours, low, true, dtype, order=order)


def interpreted(where):
    return where.backend == "triton" and where.device == "cpu"


def heads(where):
    return 1 if interpreted(where) else 3


# What Triton's interpreter, which is slow, is tested with.
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
    kind, given = kind.split(",")[0], "given" in kind
    groups = GROUPS[name]()
    assert_right(dtype, list(three_ways(groups, heads(where), 64, dtype, where, kind, given)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [3, 24, 80, 128])
def test_head_sizes(D, kind, dtype, where):
    where.skip_unless_runs(OP, dtype)
    names = ("cross", "queries without keys")
    if not interpreted(where):
        names += ("frames and a global token", "frames")
    assert_right(
        dtype,
        *(list(three_ways(GROUPS[name](), heads(where), D, dtype, where, kind)) for name in names),
    )


def fuzz(seed, count, dtype, where, most, longest):
    generator = random.Random(seed)
    results = {kind: [] for kind in KINDS}
    for _ in range(count):
        groups = random_groups(generator, most, longest)
        D, H = generator.choice([8, 32, 64, 80, 128]), generator.choice([1, 2, 5])
        for kind in KINDS:
            results[kind].append(list(three_ways(groups, H, D, dtype, where, kind)))
    for found in results.values():
        assert_right(dtype, *found)


@pytest.mark.parametrize("seed", range(3))
def test_any_groups(seed, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if interpreted(where):
        fuzz(seed, 2, dtype, where, most=2, longest=17)
    else:
        fuzz(seed, 8, dtype, where, most=6, longest=129 if dtype == torch.float32 else 65)


@pytest.mark.parametrize("kind", KINDS)
def test_long_groups(kind, where):
    """Sums of many terms: of VideoMAE's tokens without a mask."""
    where.skip_unless_runs(OP)
    if interpreted(where):
        pytest.skip("slow in Triton's interpreter")
    assert_right(
        torch.float32,
        list(three_ways(Groups.equal(1, 1568), 2, 64, torch.float32, where, kind)),
        order=0.0,
    )


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
        scores = token_scores(q, k, groups, kind, **more)
        torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-14)


def attention_of(q, k):
    """[B, H, N, N], as a model without a fused kernel computes it."""
    q, k = (x.transpose(1, 2) for x in (q, k))
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)


def test_equals_the_rules_of_the_papers():
    """EViT's, SViTT's and ATS's scores from a whole attention matrix; ToMe's from the keys."""
    B, N, H, D = 2, 21, 3, 16
    q, k, v = torch.randn(3, B, N, H, D, dtype=torch.float64)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    groups = Groups.equal(B, N)
    attention = attention_of(q, k)

    evit = attention[:, :, 0].mean(1)
    torch.testing.assert_close(token_scores(*flat[:2], groups).view(B, N), evit)

    words = attention_of(q[:, :5], k).mean((1, 2))
    cross = Groups.equal(B, 5, keys=N)
    scores = token_scores(q[:, :5].flatten(0, 1), flat[1], cross, "mean")
    torch.testing.assert_close(scores.view(B, N), words)

    ats = attention[:, :, 0].sum(1)[:, 1:] * v.flatten(2).norm(dim=2)[:, 1:]
    scores = token_scores(*flat[:2], groups, "value", v=flat[2]).view(B, N)
    torch.testing.assert_close(scores.sum(1), torch.ones(B, dtype=torch.float64))
    patches = scores[:, 1:] / scores[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(patches, ats / ats.sum(1, keepdim=True))

    keys = k.mean(2)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    tome = (keys[:, ::2] @ keys[:, 1::2].mT).amax(-1)
    scores = token_scores(None, flat[1], groups, "similarity").view(B, N)
    torch.testing.assert_close(-scores[:, ::2], tome)
    assert (scores[:, 1::2] == float("inf")).all()


@pytest.mark.parametrize("kind", ["cls", "mean", "value"])
def test_gradcheck(kind):
    for name in ("block-sparse", "queries without keys"):
        groups = GROUPS[name]()
        q, k, v = (x.detach() for x in fused(groups, 2, 3, torch.float64, "cpu"))
        q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
        assert torch.autograd.gradcheck(
            lambda q, k, v, g=groups: token_scores(q, k, g, kind, **options(kind, v)), (q, k, v)
        )


def test_the_log_sum_exp_does_not_change_the_gradient():
    args = (GROUPS["frames and a global token"](), 2, 16, torch.float64, "cpu", "reference", "mean")
    for without, given in zip(run(*args), run(*args, given=True), strict=True):
        torch.testing.assert_close(without, given, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_values_and_keys_give_no_nan(kind, where):
    where.skip_unless_runs(OP)
    groups = GROUPS["queries without keys"]().to(where.device)
    zeros = [
        torch.zeros(rows, 2, 32, device=where.device, requires_grad=True) for rows in (9, 20, 20)
    ]
    q, k, v = zeros
    scores = token_scores(q, k, groups, kind, **options(kind, v), backend=where.backend)
    expected = token_scores(q, k, groups, kind, **options(kind, v), backend="reference")
    torch.testing.assert_close(scores, expected)
    if kind != "similarity":
        found = torch.autograd.grad(scores.sum(), zeros, allow_unused=True)
        assert all(x is None or not x.isnan().any() for x in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_what_is_not_a_number_stays_in_its_group(bad, kind, where):
    where.skip_unless_runs(OP)
    groups = Groups.joint(torch.tensor([0, 10, 27, 35]).int(), 35, 17).to(where.device)
    q, k, v = (x.detach().clone() for x in fused(groups, 2, 64, torch.float32, where.device))
    clean = token_scores(q, k, groups, kind, **options(kind, v), backend=where.backend)
    for tensor in (q, k, v):
        tensor[10:27:4] = float(bad)
    q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = token_scores(q, k, groups, kind, **options(kind, v), backend=where.backend)
    assert scores[10:27].isnan().any()
    for rows in (slice(0, 10), slice(27, 35)):
        assert torch.equal(scores[rows], clean[rows])
        if kind == "similarity":
            continue
        found = torch.autograd.grad(
            scores[rows].sum(), leaves, retain_graph=True, allow_unused=True
        )
        assert all(grad is None or grad[rows].isfinite().all() for grad in found)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time(kind, where):
    where.skip_unless_runs(OP)
    groups = SMALL_GROUPS["two frames and a global token"]().to(where.device)
    repeats = 1 if interpreted(where) else 50
    first = run(groups, 2, 64, torch.float32, where.device, where.backend, kind)
    for _ in range(repeats):
        again = run(groups, 2, 64, torch.float32, where.device, where.backend, kind)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_negative_scale(where):
    where.skip_unless_runs(OP)
    groups = Groups.equal(2, 9).to(where.device)
    q, k, v = fused(groups, 2, 32, torch.float32, where.device)
    for kind in KINDS[:3]:
        results = []
        for backend in (where.backend, "reference"):
            leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
            scores = token_scores(
                *leaves, groups, kind, **options(kind, v), scale=-0.3, backend=backend
            )
            grads = torch.autograd.grad(scores, leaves, random_like(scores))
            results.append([scores.detach(), *grads])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_any_stride(where):
    """Heads before rows, as many models keep them, and a projection of all three."""
    where.skip_unless_runs(OP)
    groups = Groups.equal(2, 10).to(where.device)
    q, k, v = (x.detach() for x in fused(groups, 2, 32, torch.float32, where.device))
    for kind in KINDS:
        scores = [
            token_scores(
                *(move(x) for x in (q, k)),
                groups,
                kind,
                **options(kind, move(v)),
                backend=where.backend,
            )
            for move in (
                torch.clone,
                lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
                lambda x: x,
                lambda x: x.mT.contiguous().mT,
            )
        ]
        for each in scores[1:]:
            torch.testing.assert_close(each, scores[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*SMALL_GROUPS, "no rows"])
@pytest.mark.parametrize("kind", [*KINDS, "mean, given the log-sum-exp"])
def test_opcheck(name, kind, where):
    where.skip_unless_runs(OP)
    if interpreted(where) and name == "two frames":
        pytest.skip("slow in Triton's interpreter")
    kind, given = kind.split(",")[0], "given" in kind
    groups = (GROUPS | SMALL_GROUPS)[name]().to(where.device)
    q, k, v = (
        (x.detach() if x.numel() else x.new_empty(x.shape)).requires_grad_()  # opcheck cannot clone
        for x in fused(groups, 1, 32, torch.float32, where.device)  # strided tensors of no rows
    )
    lse = log_sum_exp(q, k, v, groups).to(high_of(q)) if given else None
    index = (groups.query_offsets, groups.key_offsets, groups.query_rows, groups.key_rows)
    index += (groups.entry_offsets, groups.entries, groups.max_queries, groups.max_keys, 0.2, kind)
    if kind == "similarity":
        q, k = None, k.detach()
    value = v if kind == "value" else None
    forward = library.kernel(OP, where.backend)
    torch.library.opcheck(forward, (q, k, value, lse, *index))
    if kind == "similarity":
        return
    scores, weights, norms = (x.detach() for x in forward(q, k, value, lse, *index))
    q, k, value = (x if x is None else x.detach() for x in (q, k, value))
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", where.backend),
        (scores, weights if lse is None else lse, norms, q, k, value, *index),
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

    def score(q, k, v, groups):
        return token_scores(q, k, groups, kind, **options(kind, v), backend=where.backend)

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, backend=count, dynamic=True)
    for K in (20, 25, 31, 40):
        groups = Groups.spatial(visible(K=K), GRID).to(where.device)
        args = [x.detach() for x in fused(groups, 2, 32, torch.float32, where.device)]
        torch.testing.assert_close(compiled(*args, groups), score(*args, groups))
    assert len(graphs) <= 2  # the second has symbols for the numbers inside the groups


def test_autocast(where):
    where.skip_unless_runs(OP, torch.bfloat16)
    groups = GROUPS["frames"]().to(where.device)
    q, k, _ = (x.detach().clone() for x in fused(groups, 2, 64, torch.float32, where.device))
    with torch.autocast(where.device, torch.bfloat16):
        scores = token_scores(q.requires_grad_(), k, groups, backend=where.backend)
    low = token_scores(q.bfloat16(), k.bfloat16(), groups, backend=where.backend)
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
    where.skip_unless_runs(OP)
    groups = Groups.joint(torch.tensor([0, 3, 10]).int(), 10, 7).to(where.device)
    q, k, _ = (
        x.detach().requires_grad_() for x in fused(groups, 2, 32, torch.float32, where.device)
    )
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        scores = token_scores(q, k, groups, kind, backend=where.backend)
        if kind != "similarity":
            scores.sum().backward()
    assert counter.get_total_flops() == flops


SMALL = Groups.equal(2, 4)
ROWS = torch.zeros(8, 2, 32)


@pytest.mark.parametrize(
    "error, text, change",
    [
        (TypeError, "vidl.ops.Groups", {"groups": torch.zeros(3)}),
        (ValueError, "kind 'cls', 'mean', 'value', 'similarity', got 'max'", {"kind": "max"}),
        (ValueError, "need q for kind 'cls', got None", {"q": None}),
        (ValueError, "need v for kind 'value', got None", {"kind": "value"}),
        (ValueError, "need no v for kind 'cls'", {"v": ROWS}),
        (ValueError, "need no lse for kind 'cls'", {"lse": torch.zeros(2, 8)}),
        (ValueError, r"lse \[2, 8\]", {"kind": "mean", "lse": torch.zeros(8, 2)}),
        (TypeError, "lse in float32", {"kind": "mean", "lse": torch.zeros(2, 8).half()}),
        (ValueError, r"\[queries, H, D\]", {"q": ROWS[0]}),
        (ValueError, r"\[queries, H, D\]", {"kind": "value", "v": ROWS[:, :, :16]}),
        (ValueError, r"\[queries, H, D\]", {"q": ROWS[:, :1]}),
        (TypeError, "one floating dtype", {"k": ROWS.half()}),
        (TypeError, "one floating dtype", {x: ROWS.int() for x in "qk"}),
        (ValueError, "q on cpu", {"q": ROWS.to("meta")}),
        (ValueError, "q of 8 rows", {"q": ROWS[:7]}),
        (ValueError, "k of 8 rows", {"k": ROWS[:7]}),
        (ValueError, "backend", {"backend": "flash"}),
        (
            RuntimeError,
            "not in float64",
            {**{x: ROWS.double() for x in "qk"}, "backend": "native"},
        ),
    ],
)
def test_misuse_is_explained(error, text, change):
    with pytest.raises(error, match=text):
        token_scores(**({"q": ROWS, "k": ROWS, "groups": SMALL} | change))


def test_long_heads():
    assert "at most 128 channels, not 129" in library.OPS[OP].limits(
        "triton", device="cuda", dtype=torch.float32, head_size=129
    )


@pytest.mark.parametrize(
    "text, change",
    [
        ("offsets must ascend from 0 to 8", {"query_offsets": torch.tensor([0, 9, 8]).int()}),
        ("offsets must ascend from 0 to 8", {"key_offsets": torch.tensor([0, 4, 7]).int()}),
        (r"rows must lie in \[0, 8\)", {"query_rows": torch.arange(1, 9).int()}),
        (r"rows must lie in \[0, 8\)", {"key_rows": torch.arange(-1, 7).int()}),
    ],
)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_groups_that_do_not_fit_are_caught(text, change, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    groups = Groups(**{**vars(SMALL), **change})
    with pytest.raises(RuntimeError, match=text):
        token_scores(ROWS, ROWS, groups, backend=backend)
