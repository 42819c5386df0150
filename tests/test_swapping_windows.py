"""Swapped Swin of torchvision and timm, and MViT of torchvision, against the unswapped models."""

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
from torchvision.models.video.mvit import (  # noqa: E402
    MSBlockConfig,
    MultiscaleAttention,
    MViT,
)
from torchvision.models.video.swin_transformer import (  # noqa: E402
    ShiftedWindowAttention3d,
    SwinTransformer3d,
)

import vidl  # noqa: E402
from vidl.kernels import library  # noqa: E402

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
    return randomised(*MODELS[name](), "bias_table", dtype)


def randomised(model, x, table, dtype):
    model = randomise(model)
    for key, weights in model.named_parameters():
        if table in key:
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


CUBE = [3, 3, 3]
# Kernel and stride of q, and stride of k and v: queries on finer and coarser grids than keys.
STAGES = [(CUBE, [1, 1, 1], [1, 4, 4]), (CUBE, [1, 2, 2], [1, 1, 1]), (CUBE, [1, 1, 1], [1, 2, 2])]
FIRST = [([], [], [1, 4, 4]), (CUBE, [1, 2, 2], [1, 2, 2]), ([], [], [1, 1, 1])]


def mvit(stages=STAGES, **options):
    """Three layers of 1, 2 and 2 heads of 16 channels, for clips of 8 frames of 32 x 48."""
    widths = [(16, 16), (16, 32), (32, 32)]
    blocks = [
        MSBlockConfig(C // 16, width, C, kernel, CUBE, stride, stride_kv)
        for (width, C), (kernel, stride, stride_kv) in zip(widths, stages, strict=True)
    ]
    second = stages is STAGES
    flags = dict(residual_pool=second, residual_with_cls_embed=False, rel_pos_embed=second)
    flags |= dict(proj_after_attn=True, dropout=0.0, num_classes=5) | options
    clips = torch.randn(2, 3, 8, 32, 48, generator=torch.Generator().manual_seed(1))
    return MViT((32, 48), 8, blocks, **flags), clips


MVITS = {
    "MViTv2": mvit,
    "MViTv2, class token in the residual": lambda: mvit(residual_with_cls_embed=True),
    "MViT": lambda: mvit(FIRST),
    "MViT, projection after the MLP": lambda: mvit(STAGES, proj_after_attn=False),
}


def make_mvit(name, dtype=torch.float32):
    return randomised(*MVITS[name](), "rel_pos", dtype)


@pytest.mark.parametrize("name", MVITS)
def test_mvit_there_and_back(name):
    model, x = make_mvit(name, torch.float64)
    expected, weights, text = results(model, x), list(model.state_dict()), str(model)
    report = vidl.swap(model)
    assert [c.name for c in report.swapped] == [f"blocks.{i}.attn" for i in range(3)]
    assert not report.left and list(model.state_dict()) == weights
    ours = results(model, x)
    close(ours, expected, 1e-11)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), ours[0])
    vidl.unswap(model)
    assert str(model) == text
    assert all(torch.equal(a, b) for a, b in zip(results(model, x), expected, strict=True))


@pytest.mark.parametrize("name", ["MViTv2", "MViT"])
@pytest.mark.parametrize("case", ["float32", "bfloat16", "autocast"])
def test_mvit_in_low_precision(case, name):
    true = results(*make_mvit(name, torch.float64))
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    model, x = make_mvit(name, torch.bfloat16 if case == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        low = results(model, x)
        vidl.swap(model)
        ours = results(model, x)
    assert [a.dtype for a in ours] == [a.dtype for a in low]
    assert_model_as_accurate(ours, low, true, dtype)


def test_attention_of_mvit_compiles():
    model, _ = make_mvit("MViTv2")
    vidl.swap(model)
    attention, size = model.blocks[1].attn, (2, 4, 6)
    x = torch.randn(2, 49, 16, requires_grad=True)
    expected = results(attention, x, lambda x: attention(x, size)[0])
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    close(results(attention, x, lambda x: compiled(x, size)[0]), expected, 1e-5)


@pytest.mark.parametrize("stride_q, stride_kv", [((1, 1, 1), (1, 3, 3)), ((2, 2, 1), (1, 1, 2))])
@pytest.mark.parametrize("size", [(4, 9, 9), (3, 7, 10), (1, 5, 4)])
def test_attention_of_mvit_at_other_sizes(size, stride_q, stride_kv):
    """Tables are interpolated, and grids of queries and keys do not divide each other."""
    torch.manual_seed(0)
    strides = (list(stride_q), list(stride_kv))
    attention = MultiscaleAttention([4, 9, 9], 24, 48, 3, CUBE, CUBE, *strides, True, False, True)
    for table in (attention.rel_pos_h, attention.rel_pos_w, attention.rel_pos_t):
        table.data.normal_()
    attention.double()
    T, H, W = size
    x = torch.randn(2, 1 + T * H * W, 24, dtype=torch.float64, requires_grad=True)
    grid = attention(x, size)[1]
    expected = results(attention, x, lambda x: attention(x, size)[0])
    vidl.swap(attention)
    assert attention(x, size)[1] == grid
    close(results(attention, x, lambda x: attention(x, size)[0]), expected, 1e-11)


def test_mvit_with_more_channels_than_kernels_take():
    """The kernels take 128: 96 of a head and 22 of keys on a grid of 8 x 7 x 7, but not 36."""
    if reason := library.why_not("native", "space_time_attention", "cpu", torch.float32):
        pytest.skip(reason)
    for stride, note in ((2, ""), (1, "head sizes are 32, 64, 80, 96, 128, not 136")):
        strides = ([1, 1, 1], [1, stride, stride])
        options = (96, 96, 1, CUBE, CUBE, *strides, True, False, True)
        (change,) = vidl.swap(MultiscaleAttention([8, 14, 14], *options)).swapped
        assert change.note.endswith(note) and bool(change.note) == bool(note)


def test_pruning_and_masking_of_mvit_are_refused():
    model = make_mvit("MViTv2")[0]
    with pytest.raises(ValueError, match="need a vision transformer that vidl can prune"):
        vidl.prune(model, 0.5, [0])
    with pytest.raises(ValueError, match="MViT"):
        vidl.mask(model, 0.5)
