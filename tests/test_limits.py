"""Queries that see the first keys of their group: causal, prefix-LM, padded; against masks."""

from dataclasses import replace

import pytest
import torch
from compare import assert_as_accurate, random_like
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from where import Where

from vidl.kernels import library
from vidl.kernels.groups import NO_BIAS
from vidl.kernels.space_time_attention import pytorch
from vidl.ops import (
    Groups,
    ReplicatedGlobal,
    cls_attention_scores,
    key_similarity_scores,
    mean_attention_scores,
    space_time_attention,
    value_weighted_scores,
)

OP = "space_time_attention"
BACKENDS = ["native", "torch", "reference"]
PLACES = [
    Where("native", "cpu"),
    Where("emulated", "cpu"),
    pytest.param(Where("native", "cuda"), marks=pytest.mark.gpu),
]
SEPARATE = {"cls": cls_attention_scores, "mean": mean_attention_scores}
GRID = (3, 4, 5)


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def visible_ids():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(60, generator=generator)[:25] for _ in range(2)]
    return torch.stack(drawn).sort(1).values


def same(labels):
    labels = torch.as_tensor(labels)
    return labels[:, None] == labels


def lower(rows):
    return torch.ones(rows, rows).tril().bool()


def samples(*lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def with_first(seen, lengths):
    """A row more at the beginning of each sample, that sees its sample and is seen by it."""
    starts = [sum(lengths[:b]) + b for b in range(len(lengths))]
    sample = samples(*(n + 1 for n in lengths))
    old = torch.tensor([r for r in range(len(sample)) if r not in starts])
    result = torch.zeros(len(sample), len(sample), dtype=torch.bool)
    result[old[:, None], old] = seen
    result[starts] = result[:, starts] = False
    for b, start in enumerate(starts):
        result[start] = result[:, start] = sample == b
    return result


def frames():
    labels = visible_ids() // 20 + 3 * torch.arange(2)[:, None]
    return same(labels.flatten()) & lower(50)


def prefix(words_of_three=4):
    """Clips of 5, 0, 3 and 60 rows, with 3, 2, 4 and 20 words."""
    clips, words = (5, 0, 3, 60), (3, 2, 4, 20)
    seen, start = torch.zeros(96 + 1, 97, dtype=torch.bool), 0
    for V, L in zip(clips, words, strict=True):
        seen[start : start + V, start : start + V] = True
        for t in range(L):
            seen[start + V + t, start : start + V + t + 1] = True
        start += V + L
    groups = Groups.prefix(offsets(*clips), offsets(*words), 97, 85)
    return groups, seen


def padded_prefix():
    """Only two of the second words, and one of the third, are real."""
    groups, seen = prefix()
    lengths = torch.tensor([8, 2, 4, 70])
    place = torch.cat([torch.arange(n) for n in (8, 2, 7, 80)])
    return groups.padded(lengths), seen & (place < lengths[samples(8, 2, 7, 80)][:, None])


def drawn():
    """Any limits, among them 0 and 1; several blocks of queries; groups without some members."""
    queries, keys = (130, 7, 0, 5), (150, 9, 4, 0)
    limits = torch.randint(0, 151, (142,), generator=torch.Generator().manual_seed(2))
    limits = limits.minimum(torch.tensor([150] * 130 + [9] * 7 + [0] * 5)).int()
    limits[:3], limits[64:128], limits[130:133] = torch.tensor([0, 1, 2]).int(), 0, 1
    groups = Groups.cross(
        offsets(*queries),
        offsets(*keys),
        num_queries=142,
        num_keys=163,
        max_queries=140,
        max_keys=150,
    )
    place = torch.cat([torch.arange(n) for n in keys])
    together = samples(*queries)[:, None] == samples(*keys)
    groups = Groups(**vars(groups) | {"query_limits": limits})
    return groups, together & (place < limits[:, None])


CASES = {
    "causal": lambda: (Groups.equal(2, 70).causal(), same(samples(70, 70)) & lower(140)),
    "causal, ragged": lambda: (
        Groups.joint(offsets(5, 0, 30, 1), 36, 33).causal(),
        same(samples(5, 0, 30, 1)) & lower(36),
    ),
    "causal frames": lambda: (Groups.spatial(visible_ids(), GRID).causal(), frames()),
    "causal frames and a global token": lambda: (
        Groups.spatial(visible_ids(), GRID).causal().with_global(),
        with_first(frames(), (25, 25)),
    ),
    "more queries than keys": lambda: (
        Groups.equal(2, 9, keys=5).causal(),
        (samples(9, 9)[:, None] == samples(5, 5))
        & (torch.arange(5).repeat(2) <= torch.arange(9).repeat(2)[:, None]),
    ),
    "padded": lambda: (
        Groups.equal(3, 40).padded(torch.tensor([0, 1, 37])),
        same(samples(40, 40, 40))
        & (torch.arange(40).repeat(3) < torch.tensor([0, 1, 37])[samples(40, 40, 40)][:, None]),
    ),
    "prefix-LM": prefix,
    "prefix-LM, padded captions": padded_prefix,
    "drawn": drawn,
    "causal, long": lambda: (Groups.equal(1, 270).causal(), lower(270)),
    "no rows": lambda: (Groups.equal(3, 0).causal(), torch.zeros(0, 0, dtype=torch.bool)),
}


# Triton's interpreter takes seconds for a hundred rows. "drawn" has several blocks.
SOME = ["causal, ragged", "causal frames and a global token", "more queries than keys", "drawn"]


def definition(q, k, v, groups, seen, scores, scale=0.2):
    """By a mask of all rows: the output, the log-sum-exp, and the scores if they are asked for."""
    some = seen.any(1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    mask = (seen | ~some[:, None])[None].expand(q.shape[1], -1, -1)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1) * some[:, None]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, mask[None], scale=scale)[0].transpose(0, 1)
    out = out * some[:, None, None]
    lse = logits.masked_fill(~seen, -torch.inf).detach().logsumexp(-1)
    if not scores:
        return [out, lse]
    query_rows, key_rows = (
        torch.arange(count) if rows is None else rows.long()
        for rows, count in ((groups.query_rows, len(q)), (groups.key_rows, len(k)))
    )
    importance = [logits.sum((1, 2))[:0]]  # no groups give no scores
    queries, keys = groups.query_offsets.tolist(), groups.key_offsets.tolist()
    for g in range(groups.num_groups):
        i, j = query_rows[queries[g] : queries[g + 1]], key_rows[keys[g] : keys[g + 1]]
        i = i[:1] if scores == "cls" else i
        part = weights[:, i][:, :, j]
        importance.append(part.mean((0, 1)) if len(i) else q.new_zeros(len(j)))
    return [out, lse, torch.cat(importance)]


def inputs(groups, dtype, H=2, D=32):
    generator = torch.Generator().manual_seed(1)
    sizes = [groups.num_queries, groups.num_keys, groups.num_keys]
    return [torch.randn(n, H, D, generator=generator).to(dtype) for n in sizes]


def results(compute, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse, *importance = compute(*leaves)
    loss = sum((x * random_like(x)).sum() for x in (out, *importance))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [out, torch.where(lse == -torch.inf, -1e3, lse), *importance, *grads]


def ours(backend, given, groups, scores=None, device="cpu"):
    def compute(q, k, v):
        options = {"scale": 0.2, "return_lse": True, "return_scores": scores}
        return space_time_attention(q, k, v, groups.to(device), **options, backend=backend)

    return results(compute, [x.to(device) for x in given])


def true(given, groups, seen, scores=None):
    given = [x.double() for x in given]
    return results(lambda q, k, v: definition(q, k, v, groups, seen, scores), given)


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_masked_attention(backend, case, scores):
    """In float64, which the kernels do not compute in."""
    groups, seen = CASES[case]()
    given = inputs(groups.check(), torch.float64)
    for our, truth in zip(
        ours(backend, given, groups, scores), true(given, groups, seen, scores), strict=True
    ):
        torch.testing.assert_close(our, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_as_accurate_as_torch(place, case, scores, dtype):
    place.skip_unless_runs(OP, dtype)
    if place.backend == "emulated" and (dtype == torch.float16) != (scores == "cls"):
        pytest.skip("slow: one kind of scores in float16, the others in bfloat16")
    groups, seen = CASES[case]()
    given = inputs(groups, dtype)
    parts = (
        ours(place.backend, given, groups, scores, place.device),
        ours("reference", given, groups, scores),
        true(given, groups, seen, scores),
    )
    for of_one in zip(*parts, strict=True):
        assert_as_accurate(*of_one, dtype, order=0.5)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(
    "scores", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (None, "cls")), "mean"]
)
def test_triton_is_as_accurate_as_torch(scores, dtype, backend):
    Where(backend, "cpu").skip_unless_runs(OP, dtype)
    computed = []
    for case in SOME:
        groups, seen = CASES[case]()
        given = inputs(groups, dtype)
        computed.append(
            (
                ours(backend, given, groups, scores),
                ours("reference", given, groups, scores),
                true(given, groups, seen, scores),
            )
        )
    assert_pooled(computed, dtype, order=0.5)


def assert_pooled(computed, dtype, order=0.0):
    """Each result over all layouts together: PyTorch may be exact on one by luck."""
    for of_cases in zip(*(zip(*parts, strict=True) for parts in computed), strict=True):
        together = ([x.flatten() for x in parts] for parts in zip(*of_cases, strict=True))
        assert_as_accurate(*map(torch.cat, together), dtype, order)


def scored(backend, case, kind, dtype=torch.float32):
    """The scores of one op alone and their gradients; and the truth, in float64."""
    groups, seen = CASES[case]()
    q, k, v = inputs(groups, dtype)
    (kind, *given), options = kind.split(","), {"scale": 0.2}
    if given:
        attended = q, k, v, groups
        _, options["lse"] = space_time_attention(
            *attended, scale=0.2, return_lse=True, backend="reference"
        )

    def compute(q, k):
        scores = SEPARATE[kind](q, k, groups, **options, backend=backend)
        return [q.new_zeros(0, requires_grad=True), q.new_zeros(0), scores]

    def define(q, k):
        return [q.new_zeros(0), q.new_zeros(0), definition(q, k, k, groups, seen, kind)[2]]

    return results(compute, (q, k)), results(define, (q.double(), k.double()))


@pytest.mark.parametrize("kind", ["cls", "mean", "mean, given the log-sum-exp"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_separate_scores_are_those_of_the_attention(backend, case, kind):
    for our, truth in zip(*scored(backend, case, kind), strict=True):
        torch.testing.assert_close(our.double(), truth, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "emulated"])
@pytest.mark.parametrize(
    "kind",
    ["cls", *(pytest.param(f"mean{given}", marks=pytest.mark.slow) for given in ("", ", given"))],
)
def test_separate_scores_of_kernels_are_as_accurate_as_torch(kind, dtype, backend):
    Where(backend, "cpu").skip_unless_runs("token_scores", dtype)
    computed = []
    for case in SOME:
        our, truth = scored(backend, case, kind, dtype)
        computed.append((our, scored("reference", case, kind, dtype)[0], truth))
    assert_pooled(computed, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton", "emulated"])
def test_value_weighted_and_similarity_scores(backend):
    """The values count only of keys that the first query sees; similarity has no queries."""
    dtype = Where(backend, "cpu").widest("token_scores")
    groups = Groups.equal(2, 9)
    limited = replace(groups, query_limits=torch.tensor([4] * 9 + [0] * 9).int())
    q, k, v = inputs(groups, dtype)
    scores = value_weighted_scores(q, k, v, limited, backend=backend)
    part = Groups.equal(1, 1, keys=4)
    first = (x.float() for x in (q[:1], k[:4], v[:4]))
    expected = value_weighted_scores(*first, part, backend="reference")
    torch.testing.assert_close(scores[:4], expected)
    assert not scores[4:].any()
    assert torch.equal(
        key_similarity_scores(k, limited, backend=backend),
        key_similarity_scores(k, groups, backend=backend),
    )


@pytest.mark.parametrize("keys", [10, 60, 70])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_queries_without_keys_are_zero(backend, keys):
    """Even where the values of others are not finite."""
    Where(backend, "cpu").skip_unless_runs(OP)
    groups = Groups.equal(1, keys)
    groups = replace(groups, query_limits=torch.tensor([0, 1] * (keys // 2)).int())
    q, k, v = (x.requires_grad_() for x in inputs(groups, torch.float32))
    out, lse = space_time_attention(q, k, v, groups, return_lse=True, backend=backend)
    assert not out[::2].any() and bool((lse[:, ::2] == -torch.inf).all())
    torch.testing.assert_close(out[1::2], v[:1].expand(keys // 2, -1, -1))
    grads = torch.autograd.grad((out * random_like(out)).sum(), (q, k, v))
    assert not grads[0][::2].any() and not grads[2][1:].any() and grads[2][0].abs().min() > 0
    # The softmax of one key is constant: exactly so in our kernels.
    bound = 0.0 if backend in ("native", "triton") else 1e-5
    assert all(grad.abs().max() <= bound for grad in grads[:2])
    v = v.detach().clone()
    v[0] = torch.inf
    assert not space_time_attention(q, k, v, groups, backend=backend)[::2].any()


def test_causal_attention_needs_no_mask(monkeypatch):
    """SDPA is told so, where its causal mask is the same."""
    told = []

    def spy(q, k, v, mask=None, is_causal=False, **options):
        told.append((mask is None, is_causal))
        return attention(q, k, v, mask, is_causal=is_causal, **options)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(pytorch.F, "scaled_dot_product_attention", spy)
    limits = torch.arange(1, 6).repeat(2).int()
    key_bias = torch.zeros(10)
    for groups, options, expected in (
        (Groups.equal(2, 5).causal(), {}, True),
        (Groups.equal(2, 5).causal().to("cpu"), {"return_lse": True}, True),
        (Groups.joint(offsets(3, 7), 10, 7).causal(), {}, True),
        (Groups.equal(2, 5).causal().causal(), {}, False),
        (Groups.equal(2, 5).causal().padded(torch.tensor([5, 3])), {}, False),
        (replace(Groups.equal(2, 5), query_limits=limits), {}, False),
        (Groups.equal(2, 5).causal(), {"key_bias": key_bias}, False),
        (Groups.equal(2, 5).causal().with_global(), {}, False),
    ):
        told.clear()
        q, k, v = inputs(groups, torch.float32)
        if "key_bias" in options:
            options = {"key_bias": torch.zeros(len(k))}
        space_time_attention(q, k, v, groups, **options, backend="torch")
        assert set(told) == {(expected, expected)}


def test_limits_of_prefix_global_and_replicated_tokens():
    groups = Groups.prefix(offsets(2, 1), offsets(2, 0), 5, 4)
    assert groups.query_limits.tolist() == [2, 2, 3, 4, 1] and not groups.is_causal
    whole = groups.with_global()
    assert whole.check().query_limits.tolist() == [5, 3, 3, 4, 5, 2, 2]
    replicated = ReplicatedGlobal(groups).groups
    assert replicated.check().query_limits.tolist() == [5, 3, 3, 4, 5, 2, 2]
    assert whole.to("cpu").query_limits.tolist() == whole.query_limits.tolist()
    leaves, spec = torch.utils._pytree.tree_flatten(whole)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.query_limits, whole.query_limits)


def test_useful_work_counts_what_is_seen():
    """The pairs of a query and a key that it sees, not those of its group."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 20, 2, 32))

    def flops(groups, compute):
        with FlopCounterMode(display=False) as counter:
            compute(groups)
        return counter.get_total_flops()

    Where("native", "cpu").skip_unless_runs(OP)
    whole, causal = Groups.equal(2, 10), Groups.equal(2, 10).causal()
    for compute in (
        lambda groups: space_time_attention(q, k, v, groups).sum().backward(),
        lambda groups: mean_attention_scores(q, k, groups).sum().backward(),
    ):
        assert flops(causal, compute) * 200 == flops(whole, compute) * 110
    assert flops(causal, lambda groups: cls_attention_scores(q, k, groups)) == 2 * 2 * 2 * 32


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scores", [None, "mean"])
def test_derivatives(backend, scores):
    groups = replace(
        Groups.joint(offsets(3, 4), 7, 4), query_limits=torch.tensor([0, 1, 3, 4, 2, 0, 1]).int()
    )
    leaves = [x.requires_grad_() for x in inputs(groups, torch.float64, 1, 4)]

    def attend(q, k, v):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return space_time_attention(q, k, v, groups, return_scores=scores, backend=backend)

    assert torch.autograd.gradcheck(attend, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("case", ["causal", "prefix-LM", "causal frames and a global token"])
def test_the_same_bits_with_any_number_of_threads(case):
    Where("native", "cpu").skip_unless_runs(OP)
    groups, _ = CASES[case]()
    given, bits, threads = inputs(groups, torch.float32), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            bits.append(ours("native", given, groups, "mean"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*bits, strict=True))


@pytest.mark.parametrize("size", [9, 70, 140, 260])
@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_limits_that_hide_nothing_change_no_bit(backend, size):
    dtype = Where(backend, "cpu").widest(OP)
    groups = Groups.equal(2, size)
    given = inputs(groups, dtype, 1)
    all_keys = replace(groups, query_limits=torch.full((2 * size,), size, dtype=torch.int32))
    for one, other in zip(
        ours(backend, given, groups, "cls"), ours(backend, given, all_keys, "cls"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("D", [64, 80, 96, 128])
def test_head_sizes_of_the_cuda_kernels(D):
    Where("emulated", "cpu").skip_unless_runs(OP, torch.float16)
    for size in (9, 40, 130, 260):
        groups = Groups.equal(1, size).causal()
        given = inputs(groups, torch.float16, 1, D)
        parts = (
            ours("emulated", given, groups),
            ours("reference", given, groups),
            true(given, groups, lower(size)),
        )
        for of_one in zip(*parts, strict=True):
            assert_as_accurate(*of_one, torch.float16, order=0.5)


@pytest.mark.parametrize("scores", ["", "mean"])
def test_opcheck(scores):
    Where("native", "cpu").skip_unless_runs(OP)
    groups, _ = CASES["causal frames and a global token"]()
    q, k, v = (x.requires_grad_() for x in inputs(groups, torch.float32, 1))
    index = (*groups.arguments(), *NO_BIAS)
    forward = library.kernel(OP, "native")
    torch.library.opcheck(forward, (q, k, v, *index, 0.2, scores))
    out, lse, importance = (x.detach() for x in forward(q, k, v, *index, 0.2, scores))
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", "native"),
        (out, importance if scores else None, *plain, out, lse, *index, False, 0.2, scores),
    )
    if scores:
        forward = library.kernel("token_scores", "native")
        torch.library.opcheck(forward, (q, k, None, None, *index, 0.2, scores))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiles_once_for_all_limits(backend):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v, groups):
        out, scores = space_time_attention(q, k, v, groups, return_scores="cls", backend=backend)
        return out, scores, mean_attention_scores(q, k, groups, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    groups = Groups.equal(3, 20)
    given = inputs(groups, torch.float32)
    for lengths in ([3, 20, 0], [1, 2, 3], [20, 20, 20]):
        limited = groups.padded(torch.tensor(lengths))
        torch.testing.assert_close(compiled(*given, limited), attend(*given, limited))
    assert len(graphs) == 1


def test_limits_are_made_in_a_graph():
    def build(cu_video, cu_text):
        groups = Groups.prefix(cu_video, cu_text, 9, 6).padded(torch.tensor([6, 2]))
        return groups.query_limits, groups.with_global().query_limits, groups.causal().query_limits

    sizes = offsets(3, 1), offsets(3, 2)
    torch._dynamo.reset()
    compiled = torch.compile(build, fullgraph=True, backend="eager")
    for one, other in zip(compiled(*sizes), build(*sizes), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", [OP, "token_scores"])
def test_cuda_kernels_take_limits(op):
    options = {"device": "cuda", "dtype": torch.bfloat16, "query_limits": True}
    assert library.OPS[op].limits("native", **options) is None


@pytest.mark.parametrize("scores", ["", "mean"])
def test_triton_reads_no_key_beyond_the_limits_of_a_block(scores):
    """The loops over blocks of 64 keys end with what is seen; blocks of 128 keys have no query."""
    Where("triton", "cpu").skip_unless_runs(OP, torch.float16)
    groups = Groups.equal(1, 300).padded(torch.tensor([128]))
    q, k, v = inputs(groups, torch.float16)
    low, true = (
        space_time_attention(*(x.to(dtype) for x in (q, k, v)), groups, backend="reference")
        for dtype in (torch.float16, torch.float64)
    )
    k[128:] = v[128:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"return_scores": scores or None, "backend": "triton"}
    out = space_time_attention(*leaves, groups, **options)
    out = out[0] if scores else out
    assert_as_accurate(out, low, true, torch.float16)
    grads = torch.autograd.grad((out * random_like(out)).sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][128:].any() and not grads[2][128:].any() and grads[1][:128].any()


@pytest.mark.parametrize(
    "limits, error, message",
    [
        (torch.tensor([0, 1, 2, 4, 1, 1]).int(), ValueError, "need query_limits between 0 and"),
        (torch.tensor([0, 1, 2, -1, 1, 1]).int(), ValueError, "need query_limits between 0 and"),
        (torch.zeros(5).int(), ValueError, r"need query_limits \[6\], got \(5,\)"),
        (torch.zeros(6), TypeError, "need query_limits in int32, got torch.float32"),
        (torch.zeros(6, device="meta").int(), ValueError, "need query_limits on cpu, got meta"),
    ],
)
def test_wrong_limits(limits, error, message):
    groups = Groups.equal(2, 3)
    with pytest.raises(error, match=message):
        replace(groups, query_limits=limits)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((offsets(2, 1), offsets(1), 4, 3), r"need cu_text \[3\], got \(2,\)"),
        ((offsets(2, 1), offsets(2, -1), 4, 4), "need cu_text that ascend from 0"),
        ((offsets(2, 1), offsets(1, 0), 5, 3), "need cu_seqlens that ascend from 0 to 5"),
        ((offsets(2, 1), offsets(1, 0), 4, 2), "need groups of at most 2 rows"),
        ((torch.zeros(0).int(), torch.zeros(0).int(), 0, 0), r"need cu_seqlens \[B \+ 1\]"),
    ],
)
def test_wrong_prefixes(sizes, message):
    with pytest.raises(ValueError, match=message):
        Groups.prefix(*sizes)


def test_triton_checks_the_shape_of_limits():
    Where("triton", "cpu").skip_unless_runs(OP)
    q, k, v = torch.randn(3, 6, 2, 32)
    for limits in (torch.ones(5).int(), torch.ones(6)):
        wrong = replace(Groups.equal(2, 3), query_limits=limits, checked=True).arguments()
        for op, args in ((OP, (q, k, v)), ("token_scores", (q, k, None, None))):
            with pytest.raises(RuntimeError, match=r"need query_limits \[6\] in int32"):
                kind = "" if op == OP else "cls"
                library.kernel(op, "triton")(*args, *wrong, *NO_BIAS, 1.0, kind)


def test_the_registered_op_checks_limits():
    Where("native", "cpu").skip_unless_runs(OP)
    groups = Groups.equal(2, 3)
    q, k, v = torch.randn(3, 6, 2, 32)
    for limits, message in (
        ([0, 1, 2, 4, 1, 1], r"query_limits must lie in \[0, 3\], the keys of the group, got 4"),
        ([0, 1, 2, -1, 1, 1], "query_limits must lie in"),
        ([1] * 5, r"need query_limits \[6\] in int32"),
    ):
        wrong = replace(groups, query_limits=torch.tensor(limits).int(), checked=True)
        for call in (
            lambda groups: space_time_attention(q, k, v, groups, backend="native"),
            lambda groups: cls_attention_scores(q, k, groups, backend="native"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(wrong)
