"""Second derivatives and forward mode: right with "reference", refused by every other backend."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import vidl
from vidl import ops
from vidl.kernels import library

IDS = torch.tensor([[1, 3]])
OFFSETS = torch.tensor([0, 4, 7], dtype=torch.int32)
CLIP = dict(patch_size=(2, 4), tubelet_size=2)


def groups(x):
    """Two groups of two and three tokens, on the device of x."""
    return ops.Groups.joint(torch.tensor([0, 2, 5], dtype=torch.int32), 5, 3).to(x.device)


def embed(video, weight, bias, time, space, backend):
    position = (time, space)
    ids = IDS.to(video.device)
    return ops.masked_patch_embed(video, weight, bias, position, ids, backend=backend)


def attend(q, k, v, backend, **options):
    results = ops.space_time_attention(q, k, v, groups(q), backend=backend, **options)
    return results if isinstance(results, Tensor) else torch.cat([r.flatten() for r in results])


def select(x, scores, backend, **options):
    return ops.select_tokens(x, scores, 3, backend=backend, **options).tokens


def select_packed(x, scores, backend):
    packed = dict(cu_seqlens=OFFSETS.to(x.device), prefix=1, fuse="sum", num_kept=4)
    return ops.select_tokens(x, scores, 2, backend=backend, **packed).tokens


def loss(prediction, target, backend):
    video = torch.linspace(0, 1, 3 * 2 * 4 * 8).view(1, 3, 2, 4, 8).sin().to(prediction)
    ids = IDS.to(video.device)
    return ops.masked_patch_loss(prediction, video, ids, target=target, backend=backend, **CLIP)


# The op, a function of tensors and a backend, and the shapes of the tensors.
QKV = [(5, 2, 32)] * 3
CASES = {
    "masked_patch_embed": (
        "masked_patch_embed",
        embed,
        [(1, 1, 4, 2, 4), (2, 1, 2, 2, 2), (2,), (2, 2), (2, 2)],
    ),
    "space_time_attention": ("space_time_attention", attend, QKV),
    "attention and its scores, cls": (
        "space_time_attention",
        lambda *x, backend: attend(*x, backend, return_scores="cls"),
        QKV,
    ),
    "attention and its scores, mean": (
        "space_time_attention",
        lambda *x, backend: attend(*x, backend, return_scores="mean"),
        QKV,
    ),
    "cls_attention_scores": (
        "token_scores",
        lambda q, k, backend: ops.cls_attention_scores(q, k, groups(q), backend=backend),
        QKV[:2],
    ),
    "mean_attention_scores": (
        "token_scores",
        lambda q, k, backend: ops.mean_attention_scores(q, k, groups(q), backend=backend),
        QKV[:2],
    ),
    "value_weighted_scores": (
        "token_scores",
        lambda q, k, v, backend: ops.value_weighted_scores(q, k, v, groups(q), backend=backend),
        QKV,
    ),
    "select_tokens": (  # without fuse, scores have no gradient
        "select_tokens",
        lambda x, backend: select(x, x[..., 0].detach(), backend),
        [(2, 5, 3)],
    ),
    "select_tokens, sum": (
        "select_tokens",
        lambda *x, backend: select(*x, backend, fuse="sum"),
        [(2, 5, 3), (2, 5)],
    ),
    "select_tokens, mean": (
        "select_tokens",
        lambda *x, backend: select(*x, backend, fuse="mean", order="score"),
        [(2, 5, 3), (2, 5)],
    ),
    "select_tokens, packed": ("select_tokens", select_packed, [(7, 3), (7,)]),
    "masked_patch_loss, mae": (
        "masked_patch_loss",
        lambda x, backend: loss(x, "mae", backend),
        [(1, 2, 48)],
    ),
    "masked_patch_loss, videomae": (
        "masked_patch_loss",
        lambda x, backend: loss(x, "videomae", backend),
        [(1, 2, 48)],
    ),
}


def tensors(shapes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    numbers = [0.5 + torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(device, dtype).requires_grad_() for x in numbers]


@pytest.fixture(params=CASES)
def case(request, where):
    """The function on the backend, and its tensors."""
    op, function, shapes = CASES[request.param]
    leaves = tensors(shapes, where.widest(op), where.device)
    return partial(function, backend=where.backend), leaves


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_both(name):
    _, function, shapes = CASES[name]
    # One narrow head keeps the check short.
    leaves = tensors([(5, 1, 2) if shape == QKV[0] else shape for shape in shapes])
    run = partial(function, backend="reference")
    assert gradcheck(run, leaves, check_forward_ad=True)
    assert gradgradcheck(run, leaves, check_fwd_over_rev=True)


def test_second_derivatives_are_refused(case):
    function, leaves = case
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    for grad, leaf in zip(grads, leaves, strict=True):
        with pytest.raises(RuntimeError, match="no second derivative: use backend='reference'"):
            torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


def test_a_graph_of_the_first_derivative_changes_nothing(case):
    function, leaves = case
    graph = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    assert all(map(torch.equal, graph, plain))


def test_forward_mode_is_refused(case):
    function, leaves = case
    for index, leaf in enumerate(leaves):
        for x in (leaf, leaf.detach()):
            inputs = [y.detach() for y in leaves]
            with forward_ad.dual_level():
                inputs[index] = forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(RuntimeError, match="no forward-mode derivative: use backend="):
                    function(*inputs)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, tuple(leaves), tuple(torch.ones_like(x) for x in leaves))


def test_forward_over_reverse_is_refused(case):
    function, leaves = case
    out = function(*leaves)
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(out, leaves, tangent)


@pytest.mark.slow_interpreted
def test_a_dual_level_alone_changes_nothing(case):
    function, leaves = case
    with forward_ad.dual_level():
        out = function(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    again = function(*leaves)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, torch.autograd.grad(again.sum(), leaves)))


def test_the_gradient_penalty_of_a_swapped_model_is_refused():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), images)[0]

    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative
        baseline = penalty()
    vidl.swap(model, backend="reference")
    torch.testing.assert_close(penalty(), baseline, rtol=1e-3, atol=1e-5)
    for backend in ("auto", "native"):
        vidl.unswap(model)
        if reason := library.why_not("native", "space_time_attention", "cpu", torch.float32):
            pytest.skip(reason)
        vidl.swap(model, backend=backend)
        with pytest.raises(RuntimeError, match="no second derivative: use backend='reference'"):
            penalty()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), forward_ad.dual_level():
        model(forward_ad.make_dual(images, torch.ones_like(images)))


def test_second_derivatives_of_the_attention_interface_are_refused():
    transformers = pytest.importorskip("transformers")
    if reason := library.why_not("native", "space_time_attention", "cpu", torch.float32):
        pytest.skip(reason)
    import vidl.swapping.huggingface.attention  # noqa: F401

    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).eval()
    model.set_attn_implementation("vidl")
    x = torch.randn(2, 5, 64, requires_grad=True)
    out = model(inputs_embeds=x).last_hidden_state
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), forward_ad.dual_level():
        model(inputs_embeds=forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(case, reentrant):
    function, leaves = case
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(map(torch.equal, [x.grad for x in leaves], plain))


@pytest.mark.slow_interpreted
@pytest.mark.filterwarnings("ignore")  # jit.trace is deprecated, and warns of every check of shapes
def test_a_traced_graph_has_the_op(case):
    function, leaves = case

    def call(*inputs):  # jit cannot trace a partial
        return function(*inputs)

    traced = torch.jit.trace(call, tuple(leaves), check_trace=False)
    assert " = vidl::" in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(traced(*leaves).square().sum(), leaves)
    assert all(map(torch.equal, plain, again))


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_compiled_autograd(case):
    function, leaves = case
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        function(*leaves).square().sum().backward()
    assert all(map(torch.equal, [x.grad for x in leaves], plain))
