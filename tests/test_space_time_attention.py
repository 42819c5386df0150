"""space_time_attention against its definition and other implementations; errors."""

import random

import pytest
import torch
from compare import assert_as_accurate, gradients
from grouped import GRID, GROUPS, fused, random_groups, visible
from torch.nn import functional as F
from where import Where

from vidl.kernels import library
from vidl.kernels.groups import NO_BIAS
from vidl.ops import Groups, ReplicatedGlobal, space_time_attention

OP = "space_time_attention"


def run(groups, H, D, dtype, device, backend, scores=None, compute=None, scale=None, Dv=None):
    """The results and the gradients of q, k and v in `dtype`, computed in `compute`."""
    q, k, v = (x.detach().to(compute or dtype) for x in fused(groups, H, D, dtype, device))
    leaves = [x.requires_grad_() for x in (q, k, v[..., :Dv])]
    options = {"scale": scale, "return_scores": scores, "backend": backend}
    out = space_time_attention(*leaves, groups, return_lse=True, **options)
    results = list(out) if scores else [out[0], out[1]]
    grad = gradients(out[0], leaves)[1:]
    if scores:  # the scores' own gradient beside the output's
        more = torch.autograd.grad(
            space_time_attention(*leaves, groups, **options)[1],
            leaves[:2],
            torch.linspace(-1, 1, out[2].numel(), device=device, dtype=out[2].dtype),
        )
        grad = [*grad, *more]
    return [*results, *grad]


def precisions(groups, H, D, dtype, where, scores=None, scale=None, Dv=None):
    """Ours, the reference in `dtype` and in float64, of each result and gradient, flattened."""
    placed = groups.to(where.device)
    ours = run(placed, H, D, dtype, where.device, where.backend, scores, None, scale, Dv)
    low = run(placed, H, D, dtype, where.device, "reference", scores, None, scale, Dv)
    true = run(groups, H, D, dtype, "cpu", "reference", scores, torch.float64, scale, Dv)
    for our, theirs, truth in zip(ours, low, true, strict=True):
        assert our.shape == truth.shape and our.dtype == theirs.dtype
        finite = torch.isfinite(truth)  # the log-sum-exp of no keys is -inf
        assert torch.equal(torch.isfinite(our).cpu(), finite)
        yield [x.detach().cpu()[finite] for x in (our, theirs, truth)]


def assert_right(dtype, *results):
    """Compare each result over several layouts together: PyTorch may be exact on one by luck."""
    longest = max(results, key=len)
    for i in range(len(longest)):
        parts = [r[i] for r in results if len(r) == len(longest)]
        # The gradient of a softmax is a difference of numbers of the size of one.
        assert_as_accurate(*map(torch.cat, zip(*parts, strict=True)), dtype, order=0.5)
    if rest := [r for r in results if len(r) < len(longest)]:
        assert_right(dtype, *rest)


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("name", GROUPS)
def test_as_accurate_as_torch(name, scores, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if where.backend == "emulated" and (dtype == torch.float16) != (scores is None):
        pytest.skip("slow: scores in bfloat16 and none in float16 are all kernels")
    H = 1 if where.device == "cpu" and where.backend != "native" else 2  # slow ones
    assert_right(dtype, list(precisions(GROUPS[name](), H, 64, dtype, where, scores)))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("D", [32, 80, 96, 128])
def test_head_sizes(D, dtype, where):
    where.skip_unless_runs(OP, dtype)
    names = ("frames", "eight rows", "frames and a global token")
    assert_right(
        dtype, *(list(precisions(GROUPS[name](), 1, D, dtype, where, "cls")) for name in names)
    )


NARROW = {
    "frames": GROUPS["frames"],
    "frames and a global token": GROUPS["frames and a global token"],
    "frames and replicas of a global token": lambda: ReplicatedGlobal(GROUPS["frames"]()).groups,
    "cross": GROUPS["cross"],
    "queries without keys": GROUPS["queries without keys"],
    "prefix": lambda: Groups.prefix(
        torch.tensor([0, 3, 40]).int(), torch.tensor([0, 5, 9]).int(), 49, 41
    ),
}


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("scores", [None, "cls", "mean"])
def test_narrow_values(scores, dtype, where):
    """Values of fewer channels than queries and keys."""
    where.skip_unless_runs(OP, dtype)
    if where.backend == "emulated" and (dtype == torch.float16) != (scores is None):
        pytest.skip("slow: the kernels are those of padded values")
    slow = where.device == "cpu" and where.backend != "native"
    names = ["frames and a global token"] if slow else NARROW
    for D, Dv in [(32, 16)] if slow else [(32, 16), (128, 96), (64, 33)]:
        layouts = [NARROW[name]() for name in names]
        results = (list(precisions(x, 1, D, dtype, where, scores, Dv=Dv)) for x in layouts)
        assert_right(dtype, *results)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
def test_head_sizes_of_long_groups(D, dtype, where):
    """More queries or keys than a block of threads holds at a time."""
    where.skip_unless_runs(OP, dtype)
    sizes = [(130, 20), (9, 150), (7, 260), (260, 9)]
    layouts = [Groups.equal(1, queries, keys=keys) for queries, keys in sizes]
    assert_right(dtype, *(list(precisions(x, 1, D, dtype, where, "mean")) for x in layouts))


@pytest.mark.parametrize(
    "D, sizes",
    [
        (64, [(128, 128), (160, 150), (20, 256), (256, 20)]),
        (96, [(112, 112), (128, 120), (17, 256), (256, 17)]),
        (32, [(128, 128), (256, 256), (300, 300)]),
        (80, [(128, 128), (17, 256), (256, 17)]),
    ],
)
def test_blocks_of_less_shared_memory(D, sizes, monkeypatch):
    """sm_86, 89 and 120 have 99 KB a block: a class of kernels that needs more is not chosen."""
    monkeypatch.setenv("CUDA_ON_CPU_MAX_SHARED", str(99 * 1024))
    where = Where("emulated", "cpu")
    where.skip_unless_runs(OP, torch.bfloat16)
    layouts = [Groups.equal(1, queries, keys=keys) for queries, keys in sizes]
    results = (list(precisions(x, 1, D, torch.bfloat16, where, "mean")) for x in layouts)
    assert_right(torch.bfloat16, *results)


def ragged(queries, keys, gathered=False):
    """Groups of these sizes, in order or with rows in a random order."""
    offsets = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
    rows = [torch.randperm(int(x[-1])).int() for x in offsets] if gathered else [None, None]
    sizes = {"max_queries": max(queries), "max_keys": max(keys)}
    totals = {"num_queries": sum(queries), "num_keys": sum(keys)}
    return Groups(*offsets, *rows, **sizes, **totals)


# Groups of 129 to 256 rows; of odd lengths, empty, gathered, and with a key that they share.
WIDE = {
    "frames": lambda: Groups.equal(2, 197),
    "longest": lambda: Groups.equal(1, 256),
    "more queries": lambda: ragged([225, 0, 31, 1], [7, 100, 0, 33]),
    "more keys": lambda: ragged([33, 64, 65], [255, 129, 2], gathered=True),
    "a shared key": lambda: Groups.equal(3, 150).with_global(),
}


@pytest.mark.parametrize(
    "dtype, capability", [(torch.float16, "90"), (torch.bfloat16, "90"), (torch.bfloat16, "80")]
)
def test_wide_groups_with_and_without_wgmma(dtype, capability, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
    monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", "2")
    where = Where("emulated", "cpu")
    where.skip_unless_runs(OP, dtype)
    layouts = [layout() for layout in WIDE.values()]
    results = (list(precisions(x, 2, 64, dtype, where, scale=0.2)) for x in layouts)
    assert_right(dtype, *results)


def test_wgmma_gives_the_same_bits_on_any_gpu(monkeypatch):
    """A block computes one head of a group, several, or all of them."""
    Where("emulated", "cpu").skip_unless_runs(OP, torch.bfloat16)
    groups, runs = WIDE["more keys"](), []
    for multiprocessors in ("1", "4", "132"):
        monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", multiprocessors)
        runs.append(run(groups, 2, 64, torch.bfloat16, "cpu", "emulated"))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize(
    "capability, size, options, kernel",
    [
        ("90", 129, {}, "hopper"),
        ("90", 256, {}, "hopper"),
        *((capability, 129, {}, "wide") for capability in ("80", "89", "100", "120")),
        ("90", 129, {"D": 32}, "wide"),
        ("90", 129, {"scores": "mean"}, "wide"),
        ("90", 129, {"causal": True}, "wide"),
        ("90", 128, {}, "whole"),
        ("90", 257, {}, "query"),
    ],
)
def test_where_wgmma_is_used(capability, size, options, kernel, monkeypatch):
    """By capability 9.0 for a head size of 64, without gradients of scores and limits."""
    from occupancy import launches

    Where("emulated", "cpu").skip_unless_runs(OP, torch.bfloat16)
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
    groups = Groups.equal(1, size)
    groups = groups.causal() if options.get("causal") else groups
    D, scores = options.get("D", 64), options.get("scores")
    inputs = [x.requires_grad_() for x in torch.randn(3, size, 1, D).bfloat16()]

    def example():
        results = space_time_attention(*inputs, groups, return_scores=scores, backend="emulated")
        sum(x.sum() for x in (results if scores else [results])).backward()

    names = {launch.kernel.split("<")[0] for launch in launches(example)}
    backward = {"hopper", "wide", "whole", "query"}
    assert {x for x in backward if f"{x}_backward_kernel" in names} == {kernel}


@pytest.mark.parametrize("size", [1, 17, 130, 260])
def test_more_groups_than_a_grid_has_rows(size, where):
    """66,000 groups, all with members, or only the last one."""
    if where.device == "cpu" and (where.backend == "triton" or size > 1):
        pytest.skip("would take minutes")
    dtype = where.widest(OP)
    sizes = torch.ones(66_000, dtype=torch.int32)
    sizes[:-1] = size == 1
    sizes[-1] = size
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).int()])
    total = int(offsets[-1])
    groups = Groups.joint(offsets, total, size)
    q, k, v = torch.randn(3, total, 1, 32, dtype=dtype, device=where.device)
    out = space_time_attention(q, k, v, groups.to(where.device), backend=where.backend)
    alone = Groups.equal(1, size).to(where.device)
    last = space_time_attention(*(x[-size:] for x in (q, k, v)), alone, backend=where.backend)
    torch.testing.assert_close(out[-size:], last)
    if size == 1:
        assert torch.equal(out, v)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("size", [2, 20, 140, 260])
def test_rows_farther_apart_than_32_bits_count(size, where, tmp_path):
    """2**31 elements between the first row and the last; on the CPU in a sparse file."""
    dtype = where.widest(OP)
    step = (2**31 // (size - 1) + 8) // 8 * 8
    length = (size - 1) * step + 32
    if where.device == "cuda":
        memory = torch.empty(length, dtype=dtype, device="cuda")
    else:
        file = str(tmp_path / "memory")
        memory = torch.from_file(file, shared=True, size=length, dtype=dtype)
    far = memory.as_strided((size, 1, 32), (step, 32, 1))
    far.copy_(torch.randn(size, 1, 32))
    groups = Groups.equal(1, size).to(where.device)

    def results(x):
        x = x.detach().requires_grad_()
        return gradients(space_time_attention(x, x, x, groups, backend=where.backend), [x])

    for one, two in zip(results(far), results(far.contiguous()), strict=True):
        assert torch.equal(one, two)


def fuzz(seed, count, dtype, where, most, longest):
    generator, results = random.Random(seed), []
    for _ in range(count):
        groups = random_groups(generator, most, longest)
        scores = generator.choice([None, "cls", "mean"])
        D, H = generator.choice([32, 64, 64, 80, 96, 128]), generator.choice([1, 2, 3])
        try:
            results.append(list(precisions(groups, H, D, dtype, where, scores)))
            for our, _, truth in results[-1]:  # coarsely, so that a failure names its layout
                largest = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
                torch.testing.assert_close(
                    our.double(), truth.double(), rtol=0, atol=0.05 * largest
                )
        except BaseException:
            sizes = (groups.query_offsets.diff().tolist(), groups.key_offsets.diff().tolist())
            print(f"seed {seed}: groups {sizes}, {scores=}, {D=}, {H=}")
            raise
    assert_right(dtype, *results)


@pytest.mark.parametrize("seed", range(4))
def test_any_groups(seed, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if where.backend == "triton" and where.device == "cpu":
        fuzz(seed, 2, dtype, where, most=3, longest=33)
    elif where.backend == "emulated":
        fuzz(seed, 3, dtype, where, most=3, longest=33)
    elif dtype == torch.float32 or where.device == "cuda":
        fuzz(seed, 10, dtype, where, most=6, longest=257)
    else:  # PyTorch multiplies half floats slowly on many CPUs
        fuzz(seed, 8, dtype, where, most=6, longest=129)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 8))
def test_any_groups_emulated(seed):
    where, dtype = Where("emulated", "cpu"), torch.bfloat16 if seed % 2 else torch.float16
    where.skip_unless_runs(OP, dtype)
    fuzz(seed, 4, dtype, where, most=3, longest=257)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_groups_with_wgmma(seed, monkeypatch):
    """Groups of 129 to 256 rows, in order, gathered or with shared keys; any scale."""
    where, dtype = Where("emulated", "cpu"), torch.bfloat16 if seed % 2 else torch.float16
    where.skip_unless_runs(OP, dtype)
    monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", str(seed % 4 + 1))
    generator, results = random.Random(seed), []
    while len(results) < 5:
        groups = random_groups(generator, 3, 200)
        if not 128 < max(groups.max_queries, groups.max_keys) <= 256:
            continue
        H, scale = generator.choice([1, 2, 3]), generator.choice([None, 0.0, -0.2, 0.5])
        results.append(list(precisions(groups, H, 64, dtype, where, scale=scale)))
    assert_right(dtype, *results)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_thousands_of_groups(seed):
    where = Where("native", "cpu")
    where.skip_unless_runs(OP)
    fuzz(seed, 200, torch.float32, where, most=5, longest=65)


@pytest.mark.parametrize("name", ["frames", "frames and a global token", "block-sparse", "cross"])
def test_equals_sdpa_with_a_dense_mask(name):
    groups = GROUPS[name]()
    q, k, v = (x.detach() for x in fused(groups, 2, 64, torch.float64, "cpu"))
    mask = torch.zeros(groups.num_queries, groups.num_keys, dtype=torch.bool)
    for g in range(groups.num_groups):
        (a, b), (c, d) = (o[g : g + 2].tolist() for o in (groups.query_offsets, groups.key_offsets))
        rows = torch.arange(a, b) if groups.query_rows is None else groups.query_rows[a:b].long()
        keys = torch.arange(c, d) if groups.key_rows is None else groups.key_rows[c:d].long()
        mask[rows[:, None], keys] = True
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    out = space_time_attention(q, k, v, groups, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_equals_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    groups = Groups.joint(torch.tensor([0, 40, 100, 128]).int(), 128, 60)
    q, k, v = (x.detach() for x in fused(groups, 2, 32, torch.float32, "cpu"))
    label = torch.searchsorted(groups.query_offsets[1:].contiguous(), torch.arange(128), right=True)
    mask = create_block_mask(
        lambda b, h, i, j: label[i] == label[j], None, None, 128, 128, device="cpu"
    )
    expected = flex_attention(
        *(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)), block_mask=mask
    )
    out = space_time_attention(q, k, v, groups, backend="reference")
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_any_scale(scale, where):
    """A scale of zero makes all weights equal; a negative scale prefers the smallest logit."""
    dtype = where.widest(OP)
    groups = Groups.joint(torch.tensor([0, 3, 40]).int(), 40, 37)
    assert_right(dtype, list(precisions(groups, 2, 64, dtype, where, "mean", scale)))


def test_gradcheck():
    for name in ("positions and a global token", "queries without keys"):
        groups = GROUPS[name]()
        q, k, v = (x.detach() for x in fused(groups, 1, 3, torch.float64, "cpu"))
        for scores in ("cls", "mean"):
            assert torch.autograd.gradcheck(
                lambda *x, g=groups, s=scores: space_time_attention(*x, g, return_scores=s),
                [x.requires_grad_() for x in (q, k, v)],
            )


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "begin, end, total, scores, poisoned",
    [
        (20, 55, 70, "cls", "qkv"),
        (40, 180, 190, "mean", "qkv"),
        # Several groups in one matrix.
        *((4, 10, 15, scores, name) for scores in ("cls", "mean") for name in "qkv"),
    ],
)
def test_what_is_not_a_number_stays_in_its_group(begin, end, total, scores, poisoned, dtype, where):
    where.skip_unless_runs(OP, dtype)
    offsets = torch.tensor([0, begin, end, total]).int()
    groups = Groups.joint(offsets, total, int(offsets.diff().max())).to(where.device)
    inputs = [x.detach().clone() for x in fused(groups, 2, 64, dtype, where.device)]
    options = {"groups": groups, "return_scores": scores, "backend": where.backend}
    clean = space_time_attention(*inputs, **options)
    for name, tensor in zip("qkv", inputs, strict=True):
        if name in poisoned:
            tensor[begin:end:7] = float("nan")
            tensor[begin + 1 : end : 7] = float("inf")
    leaves = [x.requires_grad_() for x in inputs]
    results = space_time_attention(*leaves, **options)
    for rows in (slice(0, begin), slice(end, total)):
        for result, same in zip(results, clean, strict=True):
            assert torch.equal(result[rows], same[rows])
            for grad in torch.autograd.grad(result[rows].sum(), leaves, retain_graph=True):
                assert grad[rows].isfinite().all()
    assert results[0][begin:end].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_stays_in_its_group(bad, dtype, where):
    """The gradient of a score of the second of three groups."""
    where.skip_unless_runs(OP, dtype)
    groups = Groups.joint(torch.tensor([0, 4, 10, 15]).int(), 15, 6).to(where.device)
    leaves = [x.requires_grad_() for x in fused(groups, 2, 64, dtype, where.device)]
    options = {"groups": groups, "return_scores": "mean", "backend": where.backend}
    out, scores = space_time_attention(*leaves, **options)
    given = torch.ones_like(out), torch.ones_like(scores)
    clean = torch.autograd.grad((out, scores), leaves, given, retain_graph=True)
    given[1][5] = bad
    for grad, same in zip(torch.autograd.grad((out, scores), leaves, given), clean, strict=True):
        for rows in (slice(0, 4), slice(10, 15)):
            assert torch.equal(grad[rows], same[rows])


def test_same_bits_every_time(where):
    dtype = where.widest(OP)
    groups = GROUPS["frames and a global token"]().to(where.device)
    slow = {"emulated": 3, "triton": 1} if where.device == "cpu" else {}
    repeats = slow.get(where.backend, 100)
    first = run(groups, 2, 64, dtype, where.device, where.backend, "mean")
    for _ in range(repeats):
        again = run(groups, 2, 64, dtype, where.device, where.backend, "mean")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_change_no_bit():
    Where("native", "cpu").skip_unless_runs(OP)
    groups, threads, results = GROUPS["frames and a global token"](), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            args = (groups, 5, 64, torch.float32, "cpu", "native", "mean")
            results.append([*run(*args), *run(*args, Dv=24)])
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("name", ["frames", "frames and a global token", "no rows"])
@pytest.mark.parametrize("scores", ["", "cls"])
def test_opcheck(name, scores, where):
    dtype = where.widest(OP)
    groups = GROUPS[name]().to(where.device)
    q, k, v = (
        (x.detach() if x.numel() else x.new_empty(x.shape)).requires_grad_()  # opcheck cannot clone
        for x in fused(groups, 1, 32, dtype, where.device)  # strided tensors of no rows
    )
    index = (*groups.arguments(), *NO_BIAS)
    forward = library.kernel(OP, where.backend)
    torch.library.opcheck(forward, (q, k, v, *index, 0.2, scores))
    out, lse, importance = (x.detach() for x in forward(q, k, v, *index, 0.2, scores))
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", where.backend),
        (out, importance if scores else None, *plain, out, lse, *index, False, 0.2, scores),
    )


def test_kernels_of_narrow_values(where):
    dtype = where.widest(OP)
    groups = GROUPS["frames and a global token"]().to(where.device)
    q, k, v = (x.detach().requires_grad_() for x in fused(groups, 1, 32, dtype, where.device))
    v = v.detach()[..., :13].requires_grad_()
    index = (*groups.arguments(), *NO_BIAS)
    forward = library.kernel(OP, where.backend)
    if (where.backend, where.device) != ("native", "cpu"):
        with pytest.raises(RuntimeError, match="need v as wide as"):
            forward(q, k, v, *index, 0.2, "")
        return
    torch.library.opcheck(forward, (q, k, v, *index, 0.2, "cls"))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, scores = forward(q, k, v, *index, 0.2, "cls")
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", "native"),
        (out, scores, q, k, v, out, lse, *index, False, 0.2, "cls"),
    )
    with pytest.raises(RuntimeError, match="v as k with at most 32 channels"):
        forward(q, k, torch.zeros(*v.shape[:2], 33), *index, 0.2, "")


@pytest.mark.parametrize("backend", ["native", "torch", "emulated"])
def test_narrow_values_compile(backend):
    Where(backend, "cpu").skip_unless_runs(OP, torch.bfloat16)
    groups = GROUPS["cross"]()
    leaves = [x.detach() for x in fused(groups, 2, 32, torch.bfloat16, "cpu")]
    leaves = [x.requires_grad_() for x in (*leaves[:2], leaves[2][..., :16])]

    def attend(q, k, v):
        return space_time_attention(q, k, v, groups, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = gradients(attend(*leaves), leaves)
    assert expected[0].is_contiguous() and expected[0].shape == (60, 2, 16)
    torch.testing.assert_close(gradients(compiled(*leaves), leaves), expected)


def test_compiles_once_for_all_lengths(where):
    where.skip_unless_runs(OP)
    if where.backend != "native":
        pytest.skip("the graph is the same for every kernel")
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v, groups):
        return space_time_attention(q, k, v, groups, return_scores="cls", backend=where.backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count, dynamic=True)
    for K in (20, 25, 31, 40):
        groups = Groups.spatial(visible(K=K), GRID).to(where.device)
        args = [x.detach() for x in fused(groups, 2, 32, torch.float32, where.device)]
        for ours, eager in zip(compiled(*args, groups), attend(*args, groups), strict=True):
            torch.testing.assert_close(ours, eager)
    assert len(graphs) <= 2  # the second has symbols for the numbers inside the groups


def test_autocast(where):
    where.skip_unless_runs(OP, torch.bfloat16)
    groups = GROUPS["frames"]().to(where.device)
    args = [x.detach().clone() for x in fused(groups, 2, 64, torch.float32, where.device)]
    with torch.autocast(where.device, torch.bfloat16):
        out, scores = space_time_attention(
            *args, groups, return_scores="cls", backend=where.backend
        )
        narrow = space_time_attention(*args[:2], args[2][..., :16], groups, backend=where.backend)
    assert out.dtype == narrow.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(narrow, out[..., :16])


def test_flops(where):
    where.skip_unless_runs(OP)
    groups = Groups.joint(torch.tensor([0, 3, 10]).int(), 10, 7).to(where.device)
    q, k, v = (
        x.detach().requires_grad_() for x in fused(groups, 2, 32, torch.float32, where.device)
    )
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        space_time_attention(q, k, v, groups, backend=where.backend).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (3 * 3 + 7 * 7) * 2 * 32
    if (where.backend, where.device) != ("native", "cpu"):
        return  # others compute as many channels of values as of keys
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        space_time_attention(q, k, v[..., :8], groups, backend=where.backend).sum().backward()
    assert counter.get_total_flops() == (4 * 32 + 3 * 8) * 2 * (3 * 3 + 7 * 7) * 2


SMALL = Groups.equal(2, 4)
ROWS = torch.zeros(8, 2, 32)


@pytest.mark.parametrize(
    "error, text, change",
    [
        (TypeError, "vidl.ops.Groups", {"groups": torch.zeros(3)}),
        (ValueError, r"\[num_queries, H, D\]", {"q": ROWS[0]}),
        (ValueError, r"Dv at most D, got .* \(8, 2, 33\)", {"v": torch.zeros(8, 2, 33)}),
        (ValueError, r"v \[num_keys, H, Dv\], .* \(8, 2\)", {"v": ROWS[:, :, 0]}),
        (ValueError, r"\[num_queries, H, D\]", {"q": ROWS[:, :1]}),
        (TypeError, "one floating dtype", {"k": ROWS.half()}),
        (TypeError, "one floating dtype", {x: ROWS.int() for x in "qkv"}),
        (ValueError, "q on cpu", {"q": ROWS.to("meta")}),
        (ValueError, "8 queries and 8 keys", {"q": ROWS[:7]}),
        (ValueError, "return_scores", {"return_scores": "max"}),
        (ValueError, "backend", {"backend": "flash"}),
        (
            RuntimeError,
            "32, 64, 80, 96, 128, not 24",
            {**{x: ROWS[:, :, :24] for x in "qkv"}, "backend": "native"},
        ),
        (
            RuntimeError,
            "not in float64",
            {**{x: ROWS.double() for x in "qkv"}, "backend": "native"},
        ),
    ],
)
def test_misuse_is_explained(error, text, change):
    with pytest.raises(error, match=text):
        space_time_attention(**({"q": ROWS, "k": ROWS, "v": ROWS, "groups": SMALL} | change))


@pytest.mark.parametrize(
    "text, change",
    [
        ("query_offsets must ascend from 0 to 8", {"query_offsets": torch.tensor([0, 9, 8]).int()}),
        ("key_offsets must ascend from 0 to 8", {"key_offsets": torch.tensor([0, 4, 7]).int()}),
        (r"query_rows must lie in \[0, 8\)", {"query_rows": torch.arange(1, 9).int()}),
        (r"key_rows must lie in \[0, 8\)", {"key_rows": torch.arange(-1, 7).int()}),
    ],
)
def test_groups_that_do_not_fit_are_caught(text, change):
    Where("native", "cpu").skip_unless_runs(OP)
    groups = Groups(**{**vars(SMALL), **change}, checked=True)
    with pytest.raises(RuntimeError, match=text):
        space_time_attention(ROWS, ROWS, ROWS, groups, backend="native")


@pytest.mark.parametrize("op", [OP, "token_scores"])
@pytest.mark.parametrize("name", ["query_offsets", "query_rows", "entry_offsets", "entries"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_registered_op_checks_its_lists(name, op, backend):
    Where(backend, "cpu").skip_unless_runs(op)
    groups = GROUPS["frames and a global token"]()
    q, k, v = (x.detach() for x in fused(groups, 1, 32, torch.float32, "cpu"))
    lists = groups.arguments()
    lists = lists._replace(**{name: getattr(lists, name)[:-1]})
    given = (*lists, *NO_BIAS, 1.0, "" if op == OP else "mean")
    given = (v, *given) if op == OP else (None, None, *given)
    with pytest.raises(RuntimeError, match=f"need {name} "):
        library.kernel(op, backend)(q, k, *given)


@pytest.mark.parametrize("size", [5, 40, 140, 270])  # of every class of kernels
def test_cuda_kernels_limit_what_is_out_of_range(size):
    """Rows of groups that nobody checked: the NaN around q, k and v is not read."""
    Where("emulated", "cpu").skip_unless_runs(OP, torch.bfloat16)
    rows = torch.arange(2 * size, dtype=torch.int32)
    rows[::3], rows[1::3] = -1, 2 * size
    offsets = torch.tensor([0, 3 * size, 2 * size]).int()
    sizes = {"max_queries": size, "max_keys": size, "num_queries": 2 * size, "num_keys": 2 * size}
    groups = Groups(offsets, offsets, rows, rows, **sizes, checked=True)
    leaves = [x.detach().requires_grad_() for x in fused(groups, 1, 64, torch.bfloat16, "cpu")]
    out, scores = space_time_attention(*leaves, groups, return_scores="mean", backend="emulated")
    written = rows[:size].clamp(0, 2 * size - 1).unique()  # the second group has no members left
    grads = torch.autograd.grad(out[written].float().sum() + scores[:size].sum(), leaves)
    assert (
        all(x[written].isfinite().all() for x in (out, *grads)) and scores[:size].isfinite().all()
    )


def test_debugging_checks_all_of_the_groups(monkeypatch):
    rows = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7]).int()
    groups = Groups(**{**vars(SMALL), "query_rows": rows}, checked=True)
    monkeypatch.setenv("VIDL_DEBUG", "1")
    with pytest.raises(ValueError, match=r"every query in exactly one group, got rows \[0, 1\]"):
        space_time_attention(ROWS, ROWS, ROWS, groups)
    space_time_attention(ROWS, ROWS, ROWS, SMALL)


@pytest.mark.parametrize("backend", ["auto", "native", "triton", "reference"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_the_scale_is_finite(scale, backend):
    with pytest.raises(ValueError, match="need a finite scale, got"):
        space_time_attention(ROWS, ROWS, ROWS, SMALL, scale=scale, backend=backend)
    with pytest.raises(TypeError, match="need scale as a number, got tensor"):
        space_time_attention(ROWS, ROWS, ROWS, SMALL, scale=torch.ones(()), backend=backend)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("scores", ["mean", "cls"])
@pytest.mark.parametrize("backend, queries, keys", [("native", 4096, 2736), ("triton", 512, 344)])
def test_many_queries_are_as_accurate_as_torch(backend, queries, keys, scores):
    """Numbers of one sign: rounding errors of long sums do not cancel."""
    Where(backend, "cpu").skip_unless_runs(OP)
    x = [torch.rand(rows, 1, 32) for rows in (queries, keys, keys)]

    def results(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        out, importance = space_time_attention(
            *leaves, Groups.equal(1, queries, keys=keys), return_scores=scores, backend=backend
        )
        grads = torch.autograd.grad((out, importance), leaves, (out.detach(), importance.detach()))
        return [out, importance, *grads]

    for ours, low, true in zip(
        results(torch.float32, backend),
        results(torch.float32, "reference"),
        results(torch.float64, "reference"),
        strict=True,
    ):
        assert_as_accurate(ours, low, true, torch.float32)


def test_the_interpreter_is_refused_in_bfloat16():
    Where("triton", "cpu").skip_unless_runs(OP)
    for op in library.OPS:
        assert "interpreter" in library.why_not("triton", op, "cpu", torch.bfloat16)
    x = ROWS.bfloat16()
    with pytest.raises(RuntimeError, match="triton: Triton's interpreter computes wrongly"):
        space_time_attention(x, x, x, SMALL, backend="triton")
