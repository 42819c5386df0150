"""Attention with a table of relative positions and a number for each key, against plain PyTorch."""

import copy
import gc
import math
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from compare import assert_as_accurate, gradients, random_like
from torch import nn
from torch.nn import functional as F
from where import Where

from vidl.kernels import library
from vidl.kernels.groups import Bias, indices
from vidl.ops import (
    Groups,
    Positions,
    cls_attention_scores,
    mean_attention_scores,
    space_time_attention,
    value_weighted_scores,
)

OP = "space_time_attention"
GRID = (4, 6, 6)
WINDOW = (2, 3, 3)
BACKENDS = ["native", "torch", "reference"]
SEPARATE = {"cls": cls_attention_scores, "mean": mean_attention_scores}


PATCHES = math.prod(GRID)


def ids(batch=2, kept=PATCHES):
    generator = torch.Generator().manual_seed(kept)
    drawn = [torch.randperm(PATCHES, generator=generator)[:kept] for _ in range(batch)]
    return torch.stack(drawn).sort(1).values


def windows(kept):
    return (
        Groups.window(ids(kept=kept), GRID, WINDOW, (1, 1, 2)),
        Positions.grid(ids(kept=kept), GRID, reach=WINDOW),
    )


def frames():
    sizes = torch.tensor([0, 37, 74], dtype=torch.int32)
    patches = torch.arange(36).expand(2, -1)
    positions = Positions.grid(patches, (1, 6, 6)).with_global()
    return Groups.joint(sizes, 74, 40), positions  # padded to 40


def equal_frames():
    """Samples of equal length, for which the backend "torch" makes one mask."""
    patches = torch.arange(12)[None]
    return Groups.equal(3, 13), Positions.grid(patches, (1, 3, 4)).with_global().repeat(3)


def global_tokens():
    groups = Groups.spatial(ids(kept=20), GRID).with_global()
    return groups, Positions.grid(ids(kept=20), GRID).with_global()


def words():
    lengths = torch.tensor([0, 7, 8, 20, 20], dtype=torch.int32)
    return Groups.joint(lengths, 20, 12), Positions.sequence(lengths, 20, 3)


def causal_words():
    """The last sample has limits of 0 and 1 too."""
    lengths = torch.tensor([0, 70, 71, 80], dtype=torch.int32)
    groups = Groups.joint(lengths, 80, 70).causal()
    limits = torch.cat([groups.query_limits[:71], torch.tensor([0, 1, 9, 0, 2, 8, 9, 1, 0])])
    return replace(groups, query_limits=limits.int()), Positions.sequence(lengths, 80, 30)


def global_tokens_before_prefixes():
    """A row of the clip sees the clip, a word the words before it; all see a global token."""
    groups = Groups.prefix(torch.tensor([0, 4, 16]).int(), torch.tensor([0, 3, 8]).int(), 24, 17)
    lengths = torch.tensor([0, 7, 24], dtype=torch.int32)
    return groups.with_global(), Positions.sequence(lengths, 24, 5).with_global()


def two_grids():
    queries, keys = torch.arange(12).expand(2, -1), torch.arange(18).expand(2, -1)
    positions = Positions.cross(queries, (1, 3, 4), keys, (2, 3, 3))
    return Groups.equal(2, 12, keys=18), positions


def anywhere():
    """Codes of any value, and a table of one row."""
    codes = torch.tensor([0, 2**31 - 1, -(2**31), 5, -7, 1] * 20, dtype=torch.int32)
    return Groups.equal(24, 5), Positions(codes, codes.flip(0), 1)


def repeated_codes():
    """Keys of one query that share a row of the table, some of them within."""
    codes = torch.tensor([3, 0, 1, 3, 2, 1, 9, 3, 0], dtype=torch.int32).repeat(2)
    return Groups.equal(2, 9), Positions(codes, codes, 7, 2)


def clips():
    """More keys than kernels hold at a time."""
    patches = torch.arange(PATCHES)[None]
    positions = Positions.grid(patches, GRID).with_global().repeat(2)
    return Groups.equal(2, PATCHES + 1), positions


def long_clips():
    patches = torch.arange(256)[None]
    positions = Positions.grid(patches, (4, 8, 8)).with_global().repeat(2)
    return Groups.equal(2, 257), positions


def many_groups():
    """More groups than parts, in which the gradient of the table is added up."""
    patches = torch.arange(4).expand(150, -1)
    return Groups.equal(150, 4), Positions.grid(patches, (1, 2, 2))


CASES = {
    "windows": lambda: windows(PATCHES),
    "windows of some tokens": lambda: windows(50),
    "frames with CLS": frames,
    "equal frames with CLS": equal_frames,
    "a global token": global_tokens,
    "words": words,
    "causal words": causal_words,
    "prefixes with CLS": global_tokens_before_prefixes,
    "two grids": two_grids,
    "any codes": anywhere,
    "repeated codes": repeated_codes,
    "clips with CLS": clips,
    "long clips with CLS": long_clips,
    "many groups": many_groups,
}


def hiding(groups):
    """A bias of the keys that hides some, among them all of one group and the first of another."""
    generator = torch.Generator().manual_seed(0)
    key_bias = torch.randn(groups.num_keys, generator=generator)
    key_bias[torch.rand(groups.num_keys, generator=generator) < 0.2] = -math.inf
    first, end = groups.key_offsets[:2].tolist()
    rows = torch.arange(groups.num_keys) if groups.key_rows is None else groups.key_rows
    key_bias[rows[first:end]] = -math.inf
    key_bias[rows[end : end + 2]] = -math.inf
    return key_bias


def definition(q, k, v, table, groups, positions, key_bias=None, scale=0.2, scores=None):
    """Group by group: the output, the log-sum-exp, and the scores if they are asked for."""
    out, importance = q.new_zeros(*q.shape[:2], v.shape[2]), []
    lse = q.new_full(q.shape[1::-1], -math.inf)
    query_steps, key_steps = groups.query_offsets.tolist(), groups.key_offsets.tolist()
    query_rows, key_rows = (
        torch.arange(count) if rows is None else rows.long()
        for rows, count in ((groups.query_rows, len(q)), (groups.key_rows, len(k)))
    )
    for g in range(groups.num_groups):
        i = query_rows[query_steps[g] : query_steps[g + 1]]
        j = key_rows[key_steps[g] : key_steps[g + 1]]
        logits = torch.einsum("qhd,khd->hqk", q[i], k[j]) * scale
        rows = positions.query_codes[i].long()[:, None] - positions.key_codes[j].long()
        rows = rows.clamp(-positions.wrap, positions.rows - 1 - positions.wrap) % positions.rows
        logits = logits + table[rows].permute(2, 0, 1)
        seen = torch.ones(len(i), len(j), dtype=torch.bool)
        if groups.query_limits is not None:
            seen = torch.arange(len(j)) < groups.query_limits[i][:, None]
        if key_bias is not None:
            seen = seen & (key_bias[j] > -math.inf)
            logits = logits + key_bias[j].to(logits.dtype)
        importance.append(q.new_zeros(len(j)))
        if not seen.any():
            continue
        none = ~seen.any(1)[:, None]
        logits = logits.masked_fill(~seen, -math.inf)
        weights = logits.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
        out = out.index_put((i,), torch.einsum("hqk,khd->qhd", weights, v[j]))
        lse = lse.index_put((torch.arange(q.shape[1])[:, None], i), logits.logsumexp(-1))
        importance[-1] = weights[:, 0].mean(0) if scores == "cls" else weights.mean((0, 1))
    return [out, lse, *([torch.cat(importance)] if scores else [])]


def inputs(groups, positions, dtype, H=2, D=32, Dv=None):
    generator = torch.Generator().manual_seed(1)
    sizes = [groups.num_queries, groups.num_keys, groups.num_keys]
    rows = (torch.randn(n, H, D + 8, generator=generator).to(dtype) for n in sizes)
    q, k, v = (x[..., :width] for x, width in zip(rows, (D, D, Dv or D), strict=True))
    table = torch.randn(positions.rows, H, generator=generator).to(dtype)
    return q, k, v, table


def results(compute, q, k, v, table, scores):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, table)]
    out, lse, *importance = compute(*leaves)
    loss = (out * random_like(out)).sum()
    if importance:
        loss = loss + (importance[0] * random_like(importance[0])).sum()
    return [out, lse[torch.isfinite(lse)], *importance, *torch.autograd.grad(loss, leaves)]


def compared(case, dtype, backend, scores=None, hide=False, device="cpu", Dv=None):
    groups, positions = CASES[case]()
    given = inputs(groups, positions, dtype, Dv=Dv)
    key_bias = hiding(groups) if hide else None

    def ours(name, dtype, device="cpu"):
        def compute(q, k, v, table):
            return space_time_attention(
                *(q, k, v, groups.to(device)),
                bias=table,
                positions=positions.to(device),
                key_bias=key_bias if key_bias is None else key_bias.to(device),
                scale=0.2,
                return_lse=True,
                return_scores=scores,
                backend=name,
            )

        return results(compute, *(x.to(device, dtype) for x in given), scores)

    def define(q, k, v, table):
        return definition(q, k, v, table, groups, positions, key_bias, 0.2, scores)

    return (
        ours(backend, dtype, device),
        ours("reference", dtype),
        results(define, *(x.double() for x in given), scores),
    )


@pytest.mark.parametrize("hide", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_definition(backend, case, scores, hide):
    """In float64, which the kernels do not compute in."""
    ours, _, true = compared(case, torch.float64, backend, scores, hide)
    for our, truth in zip(ours, true, strict=True):
        torch.testing.assert_close(our, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_values(backend, scores):
    """With a bias, hidden keys and limits."""
    dtype = torch.float32 if backend == "native" else torch.float64
    for case in ("windows of some tokens", "prefixes with CLS"):
        ours, _, true = compared(case, dtype, backend, scores, hide=True, Dv=20)
        for our, truth in zip(ours, true, strict=True):
            near = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"atol": 2e-5}
            torch.testing.assert_close(our.double(), truth, **({"rtol": 2e-5} | near))


@pytest.mark.parametrize("hide", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("scores", [None, "cls", "mean"])
def test_as_accurate_as_torch(scores, hide, dtype):
    Where("native", "cpu").skip_unless_runs(OP, dtype)
    check_accuracy(CASES, dtype, "native", scores, hide)


@pytest.mark.parametrize(
    "place",
    [
        Where("emulated", "cpu"),
        pytest.param(Where("native", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("scores, hide", [("mean", True), (None, False), ("cls", True)])
def test_cuda_is_as_accurate_as_torch(scores, hide, dtype, place):
    place.skip_unless_runs(OP, dtype)
    check_accuracy(CASES, dtype, place.backend, scores, hide, place.device)


# Triton's interpreter takes seconds for thousands of rows or groups.
LEFT_OUT = ("windows", "many groups", "long clips with CLS")
SOME = [case for case in CASES if case not in LEFT_OUT]
FEW = ["frames with CLS", "a global token", "words", "repeated codes"]


def runs(cases, first, *others):
    """The first run on few layouts, on some as a slow test; the others on `cases`, slow too."""
    return [
        pytest.param(FEW, *first, id=f"few-{first}"),
        pytest.param(SOME, *first, id=f"some-{first}", marks=pytest.mark.slow),
        *(pytest.param(cases, *run, id=str(run), marks=pytest.mark.slow) for run in others),
    ]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(
    "cases, scores, hide", runs(FEW, ("mean", True), (None, False), ("cls", True))
)
def test_triton_is_as_accurate_as_torch(cases, scores, hide, dtype, backend):
    Where(backend, "cpu").skip_unless_runs(OP, dtype)
    check_accuracy(cases, dtype, backend, scores, hide)


def check_accuracy(cases, dtype, backend, scores, hide, device="cpu"):
    """Each result over all layouts together: PyTorch may be exact on one by luck."""
    computed = [compared(case, dtype, backend, scores, hide, device) for case in cases]
    for of_cases in zip(*(zip(*parts, strict=True) for parts in computed), strict=True):
        together = ([x.flatten() for x in parts] for parts in zip(*of_cases, strict=True))
        assert_as_accurate(*map(torch.cat, together), dtype, order=0.5)


@pytest.mark.parametrize("hide", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("kind", ["cls", "mean", "mean, given the log-sum-exp"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_separate_scores_equal_the_definition(backend, case, kind, hide):
    ours, _, true = scored(case, torch.float64, backend, kind, hide)
    for our, truth in zip(ours, true, strict=True):
        torch.testing.assert_close(our, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hide", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("kind", ["cls", "mean", "mean, given the log-sum-exp"])
def test_separate_scores_as_accurate_as_torch(kind, hide, dtype):
    Where("native", "cpu").skip_unless_runs("token_scores", dtype)
    check_scores(CASES, dtype, "native", kind, hide)


@pytest.mark.parametrize("backend", ["triton", "emulated"])
@pytest.mark.parametrize(
    "cases, kind, hide", runs(SOME, ("cls", True), ("mean", False), ("mean, given", True))
)
def test_separate_scores_of_kernels_are_as_accurate_as_torch(cases, kind, hide, dtype, backend):
    Where(backend, "cpu").skip_unless_runs("token_scores", dtype)
    check_scores(cases, dtype, backend, kind, hide)


def check_scores(cases, dtype, backend, kind, hide):
    computed = [scored(case, dtype, backend, kind, hide) for case in cases]
    for of_cases in zip(*(zip(*parts, strict=True) for parts in computed), strict=True):
        together = ([x.flatten() for x in parts] for parts in zip(*of_cases, strict=True))
        assert_as_accurate(*map(torch.cat, together), dtype)


def scored(case, dtype, backend, kind, hide):
    """The scores of one op alone and their gradients, as `compared` returns those of attention."""
    groups, positions = CASES[case]()
    q, k, _, table = inputs(groups, positions, dtype)
    kind, *given = kind.split(",")
    options = {"positions": positions, "key_bias": hiding(groups) if hide else None, "scale": 0.2}

    def compute(q, k, table, name):
        lse = {}
        if given:
            attended = (q, k, k, groups)
            _, lse["lse"] = space_time_attention(
                *attended, bias=table, **options, return_lse=True, backend="reference"
            )
        return SEPARATE[kind](q, k, groups, bias=table, **options, **lse, backend=name)

    def define(q, k, table, name):
        hidden = options["key_bias"]
        return definition(q, k, k, table, groups, positions, hidden, 0.2, kind)[2]

    def with_gradients(f, name, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q.detach(), k.detach(), table.detach())]
        return gradients(f(*leaves, name), leaves)

    return (
        with_gradients(compute, backend, dtype),
        with_gradients(compute, "reference", dtype),
        with_gradients(define, "", torch.float64),
    )


@pytest.mark.parametrize("hide", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_values_weigh_scores_with_a_bias(backend, hide):
    Where(backend, "cpu").skip_unless_runs("token_scores")
    for case in ("frames with CLS", "words", "causal words"):
        groups, positions = CASES[case]()
        given = inputs(groups, positions, torch.float32)
        key_bias = hiding(groups) if hide else None
        options = {"positions": positions, "key_bias": key_bias, "scale": 0.2}
        group = torch.arange(groups.num_groups).repeat_interleave(groups.key_offsets.diff())

        def compute(q, k, v, table, name, groups=groups, options=options):
            return value_weighted_scores(q, k, v, groups, bias=table, **options, backend=name)

        def define(q, k, v, table, name, groups=groups, options=options, group=group):
            added = table, groups, options["positions"], options["key_bias"]
            weighted = definition(q, k, k, *added, 0.2, "cls")[2] * v.norm(dim=(1, 2))
            total = weighted.new_zeros(groups.num_groups).index_add(0, group, weighted)
            total = total.detach() if name == "first terms" else total
            return weighted / torch.where(total == 0, 1, total)[group]

        runs = []
        for f, name, dtype in (
            *((compute, name, torch.float32) for name in (backend, "reference")),
            *((define, name, torch.float64) for name in ("", "first terms")),
        ):
            leaves = [x.detach().to(dtype).requires_grad_() for x in given]
            runs.append(gradients(f(*leaves, name), leaves))
        for ours, low, true, terms in zip(*runs, strict=True):
            # The gradient of a weight is a smaller difference of two terms.
            assert_as_accurate(ours, low, true, torch.float32, float(terms.abs().max()))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_keys_of_a_group_without_queries_reach_no_table(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    groups = Groups(
        torch.tensor([0, 0, 3]).int(), torch.tensor([0, 4, 7]).int(), None, None, max_queries=3,
        max_keys=4, num_queries=3, num_keys=7,
    )  # fmt: skip
    positions = Positions.cross(torch.arange(3)[None], (1, 1, 3), torch.arange(7)[None], (1, 1, 7))
    q, k, v, table = inputs(groups, positions, torch.float32)
    table = table.requires_grad_()
    grads = []
    for bad in (0.0, math.nan):
        keys = torch.cat([torch.full_like(k[:4], bad), k[4:]])
        out, scores = space_time_attention(
            *(q, keys, v, groups), bias=table, positions=positions, return_scores="mean",
            backend=backend,
        )  # fmt: skip
        more = mean_attention_scores(
            q, keys, groups, bias=table, positions=positions, backend=backend
        )
        loss = out.square().sum() + (scores[4:] + more[4:]).square().sum()
        grads += torch.autograd.grad(loss, table)
    assert grads[0].isfinite().all() and torch.equal(*grads)


@pytest.mark.parametrize("kind", SEPARATE)
def test_separate_scores_have_the_same_bits_with_any_number_of_threads(kind):
    Where("native", "cpu").skip_unless_runs("token_scores")
    threads, bits = torch.get_num_threads(), []
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            cases = ("windows", "a global token", "many groups", "causal words")
            bits.append(
                [x for c in cases for x in scored(c, torch.float32, "native", kind, True)[0]]
            )
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*bits, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_only_a_bias_of_the_keys():
    """ToMe: tokens that stand for several count as often."""
    groups, size = Groups.equal(2, 9), torch.randint(1, 6, (18,))
    q, k, v = torch.randn(3, 18, 2, 32)
    dense = [x.view(2, 9, 2, 32).transpose(1, 2) for x in (q, k, v)]
    mask = size.log().view(2, 1, 1, 9)
    expected = F.scaled_dot_product_attention(*dense, mask).transpose(1, 2).reshape(18, 2, 32)
    for backend in BACKENDS:
        out = space_time_attention(q, k, v, groups, key_bias=size.log(), backend=backend)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", ["frames with CLS", "repeated codes", "causal words"])
def test_triton_gives_the_same_bits_every_time(case):
    Where("triton", "cpu").skip_unless_runs(OP)
    for compute in (
        lambda: compared(case, torch.float16, "triton", "mean", hide=True)[0],
        lambda: scored(case, torch.float16, "triton", "cls", hide=True)[0],
        lambda: scored(case, torch.float16, "triton", "mean", hide=True)[0],
    ):
        for one, other in zip(compute(), compute(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["windows", "a global token", "many groups"])
def test_the_same_bits_with_any_number_of_threads(case):
    Where("native", "cpu").skip_unless_runs(OP)
    threads, bits = torch.get_num_threads(), []
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            bits.append(compared(case, torch.float32, "native")[0])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*bits, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_table_without_gradient_gets_none(backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    groups, positions = CASES["frames with CLS"]()
    q, k, v, table = inputs(groups, positions, torch.float32)
    q.requires_grad_()
    out = space_time_attention(q, k, v, groups, bias=table, positions=positions, backend=backend)
    (alone,) = torch.autograd.grad(out.sum(), q)
    table.requires_grad_()
    out = space_time_attention(q, k, v, groups, bias=table, positions=positions, backend=backend)
    both = torch.autograd.grad(out.sum(), (q, table))
    assert torch.equal(both[0], alone) and both[1].abs().max() > 0


def test_a_frozen_table_launches_nothing(tmp_path, monkeypatch):
    Where("emulated", "cpu").skip_unless_runs(OP, torch.float16)
    groups, positions = CASES["frames with CLS"]()
    q, k, v, table = inputs(groups, positions, torch.float16)
    options = {"positions": positions, "backend": "emulated"}
    counts = []
    for frozen in (True, False):
        table.requires_grad_(not frozen)
        out = space_time_attention(q.requires_grad_(), k, v, groups, bias=table, **options)
        notes = tmp_path / str(frozen)
        notes.touch()
        monkeypatch.setenv("CUDA_ON_CPU_LAUNCHES", str(notes))
        out.sum().backward()
        monkeypatch.delenv("CUDA_ON_CPU_LAUNCHES")
        counts.append(len(notes.read_text().splitlines()))
    assert counts == [1, 3]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_second_derivatives(backend):
    groups, positions = CASES["words"]()
    leaves = [x.double().requires_grad_() for x in inputs(groups, positions, torch.float32, 1, 4)]

    def attend(q, k, v, table):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return space_time_attention(
                q, k, v, groups, bias=table, positions=positions, backend=backend
            )

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def test_torch_makes_the_rows_of_the_table_once(monkeypatch):
    """Not again for another layer, a backward pass or the scores; but for codes that changed."""
    calls, rows_of = [], Bias.rows_of

    def spy(self, query_codes, key_codes):
        calls.append(query_codes.shape)
        return rows_of(self, query_codes, key_codes)

    monkeypatch.setattr(Bias, "rows_of", spy)
    groups, positions = windows(PATCHES)
    q, k, v, table = inputs(groups, positions, torch.float64)
    table.requires_grad_()

    def attend(positions, groups=groups):
        options = {"bias": table, "positions": positions, "backend": "torch"}
        out = space_time_attention(q, k, v, groups, **options)
        torch.autograd.grad(out.sum(), table)
        cls_attention_scores(q, k, groups, **options)
        return out

    with torch.inference_mode():
        space_time_attention(q, k, v, groups, bias=table, positions=positions, backend="torch")
    first = attend(positions)
    assert torch.equal(attend(positions), first) and len(calls) == 1
    for other in (
        positions.to("cpu"),
        copy.deepcopy(positions),
        pickle.loads(pickle.dumps(positions)),
    ):
        assert torch.equal(attend(other), first)
    moved = Groups.window(ids(), GRID, WINDOW)
    unshifted = attend(positions, moved)
    assert not torch.equal(unshifted, first) and torch.equal(attend(positions), first)
    calls.clear()
    positions.key_codes.add_(1)
    assert not torch.equal(attend(positions), first) and len(calls) == 1


def test_the_rows_of_the_table_are_freed_with_the_codes():
    groups, positions = equal_frames()
    q, k, v, table = inputs(groups, positions, torch.float32)
    space_time_attention(q, k, v, groups, bias=table, positions=positions, backend="torch")
    kept = weakref.ref(indices._kept[positions.query_codes][0].rows)
    del positions
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("table", [True, False])
def test_opcheck(table):
    Where("native", "cpu").skip_unless_runs(OP)
    groups, positions = CASES["windows of some tokens"]()
    q, k, v, rows = inputs(groups, positions, torch.float32, 1)
    rows = rows.t().contiguous()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = (rows.requires_grad_(), positions.query_codes, positions.key_codes, 74)
    bias = (*(given if table else (None, None, None, 0)), hiding(groups))
    forward = library.kernel(OP, "native")
    index = (*groups.arguments(), *bias)
    torch.library.opcheck(forward, (*leaves, *index, 0.2, "cls"))
    out, lse, scores = (x.detach() for x in forward(*leaves, *index, 0.2, "cls"))
    plain = [x.detach() for x in leaves]
    index = [x.detach() if isinstance(x, torch.Tensor) else x for x in index]
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", "native"),
        (out, scores, *plain, out, lse, *index, table, 0.2, "cls"),
    )
    for kind in SEPARATE:
        forward = library.kernel("token_scores", "native")
        torch.library.opcheck(forward, (*leaves[:2], None, None, *index, 0.2, kind))
        scores, weights, norms = forward(*plain[:2], None, None, *index, 0.2, kind)
        torch.library.opcheck(
            library.kernel("token_scores_bwd", "native"),
            (scores, weights, norms, *plain[:2], None, *index, table, 0.2, kind),
        )


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiles_without_graph_breaks(backend):
    groups, positions = CASES["windows of some tokens"]()
    q, k, v, table = inputs(groups, positions, torch.float32)
    table.requires_grad_()

    def attend(q, k, v, table, groups, positions):
        return space_time_attention(
            q, k, v, groups, bias=table, positions=positions, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for f in (attend, compiled):
        out = f(q, k, v, table, groups, positions)
        (grad,) = torch.autograd.grad(out.square().sum(), table)
        if f is attend:
            expected = out, grad
    torch.testing.assert_close((out, grad), expected)


def test_autocast_keeps_the_table():
    groups, positions = CASES["windows"]()
    q, k, v, table = inputs(groups, positions, torch.float32)
    table.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = space_time_attention(q, k, v, groups, bias=table, positions=positions)
    half = [x.bfloat16() for x in (q, k, v)]
    same = space_time_attention(*half, groups, bias=table, positions=positions)
    assert out.dtype == torch.bfloat16 and torch.equal(out, same)
    out.sum().backward()
    assert table.grad.dtype == torch.float32


def test_the_cuda_kernels_refuse_a_bias():
    """C++ on CUDA with other head sizes; a backend requested by name never falls back."""
    limits = library.OPS[OP].limits
    options = {"device": "cuda", "dtype": torch.bfloat16, "bias": True}
    reason = "its CUDA kernels take a bias and a key_bias for heads of 32 and 64, not 80"
    assert limits("native", **options, head_size=80) == reason
    assert limits("native", **options, head_size=32) is None
    assert limits("triton", **options, head_size=80) is None


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"positions": None}, ValueError, "need bias and positions, or neither"),
        ({"bias": None}, ValueError, "need bias and positions, or neither"),
        ({"bias": torch.zeros(5, 2)}, ValueError, r"need bias \[75, 2\], got \(5, 2\)"),
        ({"bias": torch.zeros(75, 2, dtype=torch.int64)}, TypeError, "need bias in a floating"),
        ({"positions": 3}, TypeError, "need positions made by vidl.ops.Positions, got int"),
        ({"key_bias": torch.zeros(5)}, ValueError, r"need key_bias \[288\]"),
        ({"key_bias": torch.zeros(288).double()}, TypeError, "need key_bias in float32"),
        ({"key_bias": [0.0]}, TypeError, "need key_bias as a tensor, got list"),
        ({"key_bias": torch.zeros(288).requires_grad_()}, ValueError, "not differentiable"),
        (
            {"positions": Positions.grid(torch.arange(36)[None], (1, 6, 6), reach=WINDOW)},
            ValueError,
            r"need positions.query_codes \[288\], got \(36,\)",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    groups, positions = CASES["windows"]()
    q, k, v, table = inputs(groups, positions, torch.float32)
    options = {"bias": table, "positions": positions} | change
    for backend in ("auto", *BACKENDS):
        with pytest.raises(error, match=message):
            space_time_attention(q, k, v, groups, **options, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(3, 75)}, r"need bias \[2, rows\] in float32"),
        ({0: torch.zeros(2, 75).double()}, r"need bias \[2, rows\] in float32"),
        ({1: None}, "need query_codes and key_codes with a bias"),
        ({2: torch.zeros(3, dtype=torch.int32)}, r"need key_codes \[288\] in int32"),
        ({3: 75}, "need 0 <= shift < 75, got 75"),
        ({4: torch.zeros(3)}, r"need key_bias \[288\] in float32"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_registered_op_checks_its_bias(backend, change, message):
    Where(backend, "cpu").skip_unless_runs(OP)
    groups, positions = CASES["windows"]()
    q, k, v, table = inputs(groups, positions, torch.float32)
    bias = [table.t().contiguous(), positions.query_codes, positions.key_codes, 74, None]
    for i, value in change.items():
        bias[i] = value
    with pytest.raises(RuntimeError, match=message):
        library.kernel(OP, backend)(q, k, v, *groups.arguments(), *bias, 1.0, "")
    with pytest.raises(RuntimeError, match=message):
        rest = (*groups.arguments(), *bias, 1.0, "mean")
        library.kernel("token_scores", backend)(q, k, None, None, *rest)
