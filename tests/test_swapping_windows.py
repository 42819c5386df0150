"""Swapped Swin of torchvision and timm, against the unswapped models."""

import copy
import pickle

import pytest
import torch
from compare import assert_model_as_accurate
from tiny import randomise

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
from timm.models.swin_transformer import SwinTransformer as TimmSwin  # noqa: E402
from torchvision.models import SwinTransformer  # noqa: E402
from torchvision.models.swin_transformer import (  # noqa: E402
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)
from torchvision.models.video.swin_transformer import (  # noqa: E402
    ShiftedWindowAttention3d,
    SwinTransformer3d,
)

import vidl  # noqa: E402

SIZES = dict(embed_dim=32, depths=[2, 2], num_heads=[1, 2], num_classes=5)


def images(*shape):
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))


def swin(window, **options):
    model = SwinTransformer(
        [4, 4], window_size=[window] * 2, stochastic_depth_prob=0.0, **SIZES, **options
    )
    return model, images(44, 32)  # maps of 11 x 8 and 6 x 4


def swin3d(frames, height=36):
    model = SwinTransformer3d([2, 4, 4], window_size=[8, 7, 7], stochastic_depth_prob=0.0, **SIZES)
    return model, images(frames, height, 32)  # maps of 9 x 8 and 5 x 4


def timm_swin(window, size=(36, 32), **options):
    options = {**SIZES, "img_size": size, "patch_size": 4, "drop_path_rate": 0.0} | options
    return TimmSwin(window_size=window, **options), images(*size)


MODELS = {
    "torchvision, windows divide": lambda: (swin(4)[0], images(32, 64)),
    "torchvision, padded": lambda: swin(4),
    "torchvision, one window": lambda: swin(7),
    "torchvision, window of 3 x 5": lambda: (
        SwinTransformer([4, 4], window_size=[3, 5], stochastic_depth_prob=0.0, **SIZES),
        images(44, 32),
    ),
    **{f"torchvision, {2 * T} frames": (lambda T=T: swin3d(2 * T)) for T in (4, 5, 8, 16)},
    "torchvision, two windows a side": lambda: swin3d(8, 64),
    "timm, windows divide": lambda: timm_swin(4, (32, 32)),
    "timm, padded": lambda: timm_swin(4, (36, 44)),
    "timm, one window": lambda: timm_swin(9),
    "timm, always in windows": lambda: timm_swin(
        4, (36, 44), always_partition=True, strict_img_size=False
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=torch.float32):
    model, x = MODELS[name]()
    model = randomise(model)
    for key, weights in model.named_parameters():
        if "bias_table" in key:
            weights.data *= 20  # so that errors of positions count
    return model.to(dtype), x.to(dtype).requires_grad_()


def results(model, x, forward=None):
    """The output, and the gradients of the input and of all parameters."""
    out = model(x) if forward is None else forward(x)
    numbers = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *model.parameters()], numbers)]


def close(ours, theirs, allowed):
    for a, b in zip(ours, theirs, strict=True):
        limit = allowed * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


@EVERY
def test_there_and_back(name):
    model, x = make(name, torch.float64)
    expected, weights = results(model, x), list(model.state_dict())
    text = str(model)
    report = vidl.swap(model)
    assert len([c for c in report.swapped if "WindowAttention" in c.was]) == 4
    assert {c.was.split(".")[-1] for c in report.left} <= {"PatchEmbed3d"}
    assert list(model.state_dict()) == weights
    ours = results(model, x)
    close(ours, expected, 1e-11)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), ours[0])
    vidl.unswap(model)
    assert str(model) == text
    assert all(torch.equal(a, b) for a, b in zip(results(model, x), expected, strict=True))


@EVERY
def test_float32(name):
    true = results(*make(name, torch.float64))
    model, x = make(name)
    low = results(model, x)
    vidl.swap(model)
    assert_model_as_accurate(results(model, x), low, true, torch.float32)


@pytest.mark.parametrize("name", ["torchvision, padded", "torchvision, 10 frames", "timm, padded"])
def test_compile(name):
    model, x = make(name)
    vidl.swap(model)
    expected = results(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(results(model, x, compiled), expected, 1e-5)


@pytest.mark.parametrize("name", ["torchvision, padded", "torchvision, 8 frames", "timm, padded"])
def test_dropout_of_weights_is_that_of_the_original(name):
    model, x = make(name)
    model.train()
    modules = [m for m in model.modules() if hasattr(m, "relative_position_bias_table")]
    vidl.swap(model)
    for module in modules:  # timm's blocks with dropout are not swapped
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.5
        else:
            module.attention_dropout = 0.5
    torch.manual_seed(3)
    ours = results(model, x)
    vidl.unswap(model)
    torch.manual_seed(3)
    close(ours, results(model, x), 1e-6)
    assert len(modules) == 4
    if name.startswith("timm"):
        report = vidl.swap(model)
        assert {c.note.split(":")[0] for c in report.left} == {"attn_drop=0.5"}
    else:
        assert "in training, because it drops out weights (0.5)" in str(vidl.swap(model))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("frames", [4, 5, 8, 16])
@pytest.mark.parametrize("height, width", [(14, 14), (4, 9), (3, 4)])
def test_attention_of_video_swin(frames, height, width, shift):
    torch.manual_seed(0)
    attention = ShiftedWindowAttention3d(32, [8, 7, 7], [4 * shift, 3 * shift, 3 * shift], 1)
    attention.relative_position_bias_table.data.normal_()
    attention.qkv.bias.data.normal_()  # the keys of padding
    attention.double()
    x = torch.randn(1, frames, height, width, 32, dtype=torch.float64, requires_grad=True)
    expected = results(attention, x)
    vidl.swap(attention)
    close(results(attention, x), expected, 1e-11)


def test_bfloat16_and_autocast():
    name = "torchvision, 10 frames"
    true = results(*make(name, torch.float64))
    model, x = make(name, torch.bfloat16)
    low = results(model, x)
    vidl.swap(model)
    assert_model_as_accurate(results(model, x), low, true, torch.bfloat16)
    model, x = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        low = results(model, x)
        vidl.swap(model)
        ours = results(model, x)
    assert ours[0].dtype == low[0].dtype
    assert_model_as_accurate(ours, low, true, torch.bfloat16)


def test_another_size_of_timm():
    model, _ = make("timm, padded")
    model.set_input_size((40, 32), window_size=(5, 4))
    x = images(40, 32).requires_grad_()
    expected = results(model, x)
    vidl.swap(model)
    close(results(model, x), expected, 1e-5)
    model.set_input_size((44, 32))  # of a swapped model
    x = images(44, 32).requires_grad_()
    ours = results(model, x)
    vidl.unswap(model)
    close(ours, results(model, x), 1e-5)


def test_hooks_of_timm():
    model, x = make("timm, padded")
    vidl.swap(model)
    expected, rows = results(model, x), []
    model.layers[0].blocks[1].attn.register_forward_hook(lambda m, a, out: rows.append(out.shape))
    close(results(model, x), expected, 1e-5)
    assert rows == [(2 * 3 * 3, 4 * 4, 32)]


def test_what_is_left():
    torch.manual_seed(0)
    model = torch.nn.ModuleList(
        [
            ShiftedWindowAttention(32, [4, 4], [2, 2], 1),
            ShiftedWindowAttentionV2(32, [4, 4], [2, 2], 1),
        ]
    )
    report = vidl.swap(model)
    assert [c.name for c in report.swapped] == ["0"]
    assert "may compute something else" in report.left[0].note
    assert "torchvision.swin.ShiftedWindowAttention" in str(report)


def test_pruning_is_refused():
    with pytest.raises(ValueError, match="need a vision transformer that vidl can prune"):
        vidl.prune(make("torchvision, padded")[0], 0.5, [0])
