"""MaskedPatchEmbed: loads the weights of timm and Hugging Face, and has the same outputs."""

import pytest
import torch
from torch import nn

from vidl.nn import MaskedPatchEmbed


def timm_embed():
    layers = pytest.importorskip("timm.layers")
    baseline = layers.PatchEmbed(img_size=32, patch_size=8, in_chans=3, embed_dim=24)
    return baseline, MaskedPatchEmbed(8, 3, 24), torch.randn(2, 3, 32, 32), lambda x: x


def vit_embed():
    transformers = pytest.importorskip("transformers")
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

    config = transformers.ViTConfig(hidden_size=24, image_size=32, patch_size=8)
    baseline = ViTPatchEmbeddings(config)
    return baseline, MaskedPatchEmbed(8, 3, 24), torch.randn(2, 3, 32, 32), lambda x: x


def videomae_embed():
    transformers = pytest.importorskip("transformers")
    from transformers.models.videomae.modeling_videomae import VideoMAEPatchEmbeddings

    config = transformers.VideoMAEConfig(
        hidden_size=24, image_size=32, patch_size=8, num_frames=4, tubelet_size=2
    )
    clip = torch.randn(2, 4, 3, 32, 32)  # [B, T, C_in, H, W]
    ours = MaskedPatchEmbed(8, 3, 24, tubelet_size=2)
    return VideoMAEPatchEmbeddings(config), ours, clip, lambda x: x.transpose(1, 2)


@pytest.fixture(params=[timm_embed, vit_embed, videomae_embed], ids=lambda make: make.__name__)
def pair(request):
    torch.manual_seed(0)
    return request.param()


def assert_near(ours, baseline):
    assert ours.shape == baseline.shape
    assert (ours - baseline).abs().max() <= 1e-5 * baseline.abs().max()


def test_loads_strictly_with_the_same_outputs(pair):
    baseline, ours, pixels, permute = pair
    ours.load_state_dict(baseline.state_dict(), strict=True)

    expected, tokens = baseline(pixels), ours(permute(pixels))
    grad = torch.randn_like(expected)
    expected.backward(grad)
    tokens.backward(grad)

    assert_near(tokens, expected)
    conv = baseline.proj if hasattr(baseline, "proj") else baseline.projection
    assert_near(ours.proj.weight.grad, conv.weight.grad)
    assert_near(ours.proj.bias.grad, conv.bias.grad)


def test_visible_patches_equal_the_baseline(pair):
    baseline, ours, pixels, permute = pair
    ours.load_state_dict(baseline.state_dict())
    dense = baseline(pixels)
    B, N, C = dense.shape
    position = torch.randn(N, C)
    ids = torch.stack([torch.randperm(N)[: N // 4] for _ in range(B)])

    tokens = ours(permute(pixels), ids, position=position)
    expected = (dense + position).gather(1, ids[..., None].expand(-1, -1, C))
    assert_near(tokens, expected)

    offsets = torch.tensor([0, 1, N // 4 + 1], dtype=torch.int32)
    packed = torch.cat([ids[0, :1], ids[1]])
    assert_near(
        ours(permute(pixels), packed, offsets, position),
        torch.cat([expected[0, :1], expected[1]]),
    )


def test_renames_inside_a_larger_model(pair):
    baseline, ours, _, _ = pair
    model = nn.ModuleDict({"embed": ours, "head": nn.Linear(2, 2)})
    state = {f"embed.{name}": value for name, value in baseline.state_dict().items()}
    before = dict(state)
    model.load_state_dict(state | model["head"].state_dict(prefix="head."), strict=True)
    assert torch.equal(ours.proj.bias, next(v for k, v in before.items() if k.endswith("bias")))


@pytest.mark.parametrize("tubelet_size", [None, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(tubelet_size, bias):
    first, second = (
        MaskedPatchEmbed((4, 8), 2, 12, tubelet_size=tubelet_size, bias=bias) for _ in range(2)
    )
    state = first.state_dict()
    assert list(state) == (["proj.weight", "proj.bias"] if bias else ["proj.weight"])
    second.load_state_dict(state)
    clip = torch.randn(2, 2, 2, 8, 16)
    assert torch.equal(first(clip), second(clip))


def test_from_conv_shares_the_parameters():
    conv = nn.Conv3d(3, 12, (2, 8, 8), (2, 8, 8)).eval()
    ours = MaskedPatchEmbed.from_conv(conv)
    assert ours.proj is conv and not ours.training
    clip = torch.randn(1, 3, 4, 16, 16)
    assert_near(ours(clip), conv(clip).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 4},
        {"stride": 8, "padding": 1},
        {"stride": 8, "dilation": 2},
        {"stride": 8, "groups": 3},
    ],
)
def test_from_conv_refuses_other_convolutions(options):
    with pytest.raises(ValueError, match="stride is its kernel_size"):
        MaskedPatchEmbed.from_conv(nn.Conv2d(3, 12, 8, **options))


def test_from_conv_refuses_other_modules():
    with pytest.raises(TypeError, match="got Linear"):
        MaskedPatchEmbed.from_conv(nn.Linear(2, 2))


def test_uint8_is_normalised_and_float_is_not():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ours = MaskedPatchEmbed(8, 3, 12, mean=mean, std=std)
    clip = torch.randint(0, 256, (2, 3, 2, 16, 16), dtype=torch.uint8)
    per_channel = (3, 1, 1, 1)
    normalised = (clip / 255 - torch.tensor(mean).view(per_channel)) / torch.tensor(std).view(
        per_channel
    )
    assert_near(ours(clip), ours(normalised))


def test_images_need_a_conv2d():
    with pytest.raises(ValueError, match=r"need video \[B, C, T, H, W\]"):
        MaskedPatchEmbed(8, 3, 12, tubelet_size=1)(torch.randn(1, 3, 16, 16))


def test_repr_has_the_options():
    text = repr(MaskedPatchEmbed(8, mean=(0.5,) * 3, std=(0.5,) * 3, backend="reference"))
    assert "mean=(0.5, 0.5, 0.5)" in text and "backend='reference'" in text and "Conv2d" in text
