"""The backend "torch", compositions of PyTorch's operations, against the definitions in float64.

Its precision is PyTorch's own; in float64 every other error shows.
"""

import contextlib
import itertools
import random

import pytest
import torch
from grouped import GROUPS, fused, random_groups
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidl import ops
from vidl.kernels import library
from vidl.kernels.masked_patch_embed.op import embed_as_convolution
from vidl.kernels.space_time_attention import pytorch
from vidl.ops import Groups

ATTENTION = "space_time_attention"
NAN = float("nan")


def results(call, leaves, backend):
    """The floating-point results of a call, and their gradients; then the other results."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    outs = call(*leaves, backend=backend)
    outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x.numel() or x.ndim]
    rows = [x for x in outs if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in rows]
    wanted = [x for x in leaves if x.requires_grad]
    total = sum((x.nan_to_num(0, 0, 0) * y).sum() for x, y in zip(rows, weights, strict=True))
    grads = torch.autograd.grad(total, wanted, allow_unused=True) if rows else ()
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
    return [*outs, *zeros]


def assert_same(call, leaves):
    pairs = zip(results(call, leaves, "torch"), results(call, leaves, "reference"), strict=True)
    for ours, true in pairs:
        assert ours.dtype == true.dtype
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-10, equal_nan=True)


def attention(groups, scores, lse=True):
    def call(q, k, v, backend):
        options = {"return_scores": scores, "return_lse": lse, "backend": backend, "scale": 0.3}
        return ops.space_time_attention(q, k, v, groups, **options)

    return call


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("name", GROUPS)
def test_attention(name, scores):
    groups = GROUPS[name]()
    for lse in (True, False):
        assert_same(attention(groups, scores, lse), fused(groups, 2, 16, torch.float64, "cpu"))


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("name", GROUPS)
def test_narrow_values(name, scores):
    groups = GROUPS[name]()
    q, k, v = fused(groups, 2, 16, torch.float64, "cpu")
    for lse in (True, False):
        assert_same(attention(groups, scores, lse), [q, k, v[..., :5]])
    assert_same(
        lambda q, k, v, backend: ops.value_weighted_scores(q, k, v, groups, backend=backend),
        [q, k, v[..., :5]],
    )


def test_attention_of_any_groups():
    generator = random.Random(0)
    for _ in range(40):
        groups = random_groups(generator, 6, 33)
        leaves = fused(groups, generator.choice([1, 2]), 8, torch.float64, "cpu")
        assert_same(attention(groups, generator.choice([None, "cls", "mean"])), leaves)


@pytest.mark.parametrize("name", GROUPS)
def test_scores(name):
    groups = GROUPS[name]()
    q, k, v = fused(groups, 2, 16, torch.float64, "cpu")
    lse = ops.space_time_attention(q, k, v, groups, return_lse=True, backend="reference")[1]
    assert_same(
        lambda q, k, backend: ops.cls_attention_scores(q, k, groups, backend=backend), [q, k]
    )
    for given in (None, lse + 0.1):
        assert_same(
            lambda q, k, backend, given=given: ops.mean_attention_scores(
                q, k, groups, lse=given, backend=backend
            ),
            [q, k],
        )
    assert_same(
        lambda q, k, v, backend: ops.value_weighted_scores(q, k, v, groups, backend=backend),
        [q, k, v],
    )
    ours, true = (ops.key_similarity_scores(k, groups, backend=b) for b in ("torch", "reference"))
    torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("scores", [None, "cls", "mean"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_nan_stays_in_its_group(value, scores):
    """Groups of 1, 0, 4 and 2 rows; the third has a row of NaN, also in an unused key."""
    groups = Groups.joint(torch.tensor([0, 1, 1, 5, 7]).int(), 7, 4)
    q, k, v = torch.randn(3, 7, 2, 8, dtype=torch.float64)
    bad = [x.clone().index_fill_(0, torch.tensor([2]), value) for x in (q, k, v)]
    call = attention(groups, scores)
    fresh, spoilt = results(call, (q, k, v), "torch"), results(call, bad, "torch")
    others = [0, 5, 6]
    for one, two in zip(fresh, spoilt, strict=True):
        rows = one.ndim - 1 if one.shape == (2, 7) else 0
        index = torch.tensor(others)
        torch.testing.assert_close(one.index_select(rows, index), two.index_select(rows, index))


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("fuse", [None, "sum", "mean"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_select_tokens(prefix, fuse, order):
    """Ties, zeros of both signs, infinities and NaN rank as in the definition."""
    odd = torch.tensor([0.0, -0.0, 1.0, 1.0, NAN, float("inf"), -float("inf"), 0.5, NAN])
    scores = torch.stack([odd[torch.randperm(9)] for _ in range(4)]).double()
    x = torch.randn(4, prefix + 9, 5, dtype=torch.float64)
    x[0, prefix + 3] = NAN
    for keep in (1, 4, 9, 0.5):
        assert_same(
            lambda x, scores, backend, keep=keep: ops.select_tokens(
                x, scores, keep, order=order, fuse=fuse, prefix=prefix, backend=backend
            ),
            [x, scores],
        )
    packed = torch.tensor([0, prefix + 9, 4 * (prefix + 9)]).int()
    assert_same(
        lambda x, scores, backend: ops.select_tokens(
            x, scores, 5, order=order, fuse=fuse, prefix=prefix, cu_seqlens=packed, backend=backend
        ),
        [x.flatten(0, 1), torch.nn.functional.pad(scores, (prefix, 0)).flatten()],
    )


@pytest.mark.parametrize("clip", ["uint8", "float64"])
@pytest.mark.parametrize("position", [None, "table", "pair"])
@pytest.mark.parametrize("ids", [None, "batch", "packed"])
def test_masked_patch_embed(ids, position, clip):
    video = torch.randint(256, (2, 3, 4, 8, 6), dtype=torch.uint8)
    video = video if clip == "uint8" else video.double()
    weight, bias = torch.randn(5, 3, 2, 4, 2).double(), torch.randn(5).double()
    rows = {None: (), "table": (12,), "pair": (2, 6)}[position]
    keep, packed = None, None
    if ids is not None:
        keep = torch.randint(12, (2, 7))
        keep, packed = (keep, None) if ids == "batch" else (keep[0], torch.tensor([0, 2, 7]).int())

    def call(video, weight, bias, *position, backend):
        position = position if len(position) == 2 else next(iter(position), None)
        options = {"mean": [0.5] * 3, "std": [0.2, 0.3, 0.4]} if clip == "uint8" else {}
        return ops.masked_patch_embed(
            video, weight, bias, position, keep, packed, backend=backend, **options
        )

    assert_same(call, [video, weight, bias, *(torch.randn(n, 5).double() for n in rows)])


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("frames", [2, 4])
def test_a_convolution_in_place_of_masked_patch_embed(frames, tubelet):
    video = torch.randn(2, frames, 3, 8, 6).double().transpose(1, 2)
    weight, bias = torch.randn(5, 3, tubelet, 4, 2).double(), torch.randn(5).double()
    assert_same(embed_as_convolution, [video, weight, bias])


def test_more_groups_than_sdpa_takes(monkeypatch):
    """PyTorch's attention fails on CUDA beyond 65,535 groups, so they are cut into pieces."""
    monkeypatch.setattr(pytorch, "LARGEST_BATCH", 2)
    for name in ("eight rows", "ragged", "queries without keys"):
        groups = GROUPS[name]()
        assert_same(attention(groups, None), fused(groups, 2, 16, torch.float64, "cpu"))


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_groups_are_not_padded_to_those_of_global_queries(kind, monkeypatch):
    ids = torch.arange(12).expand(2, 12)
    groups = getattr(Groups, kind)(ids, (3, 2, 2)).with_global()
    sizes, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def note(q, k, v, mask=None, **options):
        sizes.append((q.shape[0], q.shape[2], k.shape[2], mask))
        return sdpa(q, k, v, mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    leaves = fused(groups, 2, 16, torch.float64, "cpu")
    assert_same(attention(groups, None, lse=False), leaves)
    size, count = (4, 6) if kind == "spatial" else (3, 8)
    assert sizes == [(count, size, 1 + size, None), (2, 1, 13, None)]
    assert groups.to("cpu").num_global == 2 and groups.max_keys == 13


def test_packed_attention_needs_the_function(monkeypatch):
    """FlashAttention 4 installs a package `flash_attn` without `flash_attn_varlen_func`."""
    assert pytorch.provides("math", "sqrt") and not pytorch.provides("math", "flash_attn")
    assert not pytorch.provides("vidl_is_not_installed", "call")
    assert pytorch.packed_attention(torch.zeros(1, 1, 64, dtype=torch.bfloat16)) is None  # a CPU


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["ragged", "frames", "cross", "frames and a global token"])
def test_packed_attention(name, device):
    """The attention of PyTorch or flash-attn for packed sequences, in bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    groups = GROUPS[name]().to(device)
    leaves = fused(groups, 2, 64, torch.bfloat16, device)
    call = attention(groups, None, lse=False)
    for ours, true in zip(
        results(call, leaves, "torch"), results(call, leaves, "reference"), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=3e-2, atol=3e-2)


def test_derivatives():
    """Forward mode, and twice in reverse mode by SDPA's plain kernel; its others refuse."""
    groups = GROUPS["queries without keys"]()
    leaves = [x.requires_grad_() for x in fused(groups, 1, 4, torch.float64, "cpu")]

    def call(*qkv):
        return ops.space_time_attention(*qkv, groups, return_scores="cls", backend="torch")

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    (grad,) = torch.autograd.grad(call(*leaves)[0].sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        grad.sum().backward()


def test_tangents_reach_the_result():
    groups = Groups.equal(2, 3)
    x, tangent = torch.randn(2, 6, 1, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        ours, true = (
            forward_ad.unpack_dual(ops.space_time_attention(dual, x, x, groups, backend=b)).tangent
            for b in ("torch", "reference")
        )
    torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("name", ["equal", "frames", "frames and a global token"])
def test_compiles_without_graph_breaks(name):
    groups = GROUPS[name]()
    q, k, v = fused(groups, 1, 32, torch.float32, "cpu")
    x = torch.randn(3, 9, 8)

    def call(q, k, v, x):
        out, scores = ops.space_time_attention(
            q, k, v, groups, return_scores="cls", backend="torch"
        )
        chosen = ops.select_tokens(x, x[..., 0], 4, fuse="sum", backend="torch")
        return out, scores, *chosen

    for ours, true in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, x),
        call(q, k, v, x),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


FACTS = {
    "head_size": (16, 32, 64, 128, 256),
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "device": ("cpu", "cuda", "mps", "xpu"),
}


@pytest.mark.parametrize("op", [n for n in library.OPS if not n.endswith("_bwd")])
def test_auto_never_chooses_the_definition(op):
    for values in itertools.product(*FACTS.values()):
        facts = dict(zip(FACTS, values, strict=True))
        if op not in (ATTENTION, "token_scores"):
            del facts["head_size"]
        chosen = library.choose("auto", op, **facts)
        assert chosen == "torch" or (chosen == "native" and facts["device"] == "cpu")


@pytest.mark.parametrize("op", ["masked_patch_embed", "masked_patch_loss", "frame_difference"])
def test_constants_survive_inference_mode(op):
    """Numbers are copied to the device once, whatever the mode of the first call is."""
    video, ids = torch.randint(256, (1, 3, 4, 4, 4), dtype=torch.uint8), torch.tensor([[0, 1]])
    std = [random.uniform(0.1, 1.0) for _ in range(3)]

    def call(weight):
        options = {"std": std, "backend": "torch"}
        if op == "masked_patch_embed":
            return ops.masked_patch_embed(video, weight.view(2, 3, 1, 2, 2), **options)
        if op == "masked_patch_loss":
            prediction = weight.view(1, 2, 12)
            return ops.masked_patch_loss(prediction, video, ids, patch_size=2, **options)
        return ops.frame_difference(video, (1, 2, 2), **options)

    with torch.inference_mode():
        first = call(torch.ones(24))
    weight = torch.ones(24, requires_grad=True)
    with contextlib.nullcontext() if op == "frame_difference" else torch.enable_grad():
        second = call(weight)
    assert torch.equal(first, second)
    if second.requires_grad:
        second.sum().backward()
