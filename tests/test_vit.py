"""ViT: timm's forward with the same weights, MAE's masking, pruning, published weights."""

import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import assert_model_as_accurate
from tiny import GRID, PATCHES, SIZE, WIDTH, B, T, clip, randomise, results
from torch import nn

from vidl.masking import visual_mask
from vidl.nn import Pruning, ViT

NORM = partial(nn.LayerNorm, eps=1e-5)  # CLIP's


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def mask(ratio=0.5):
    return visual_mask(0, 0, torch.arange(B), GRID, ratio).ids_keep


def as_images(video):
    return video.transpose(1, 2).flatten(0, 1)


def assert_same(ours, baseline, ours_of, baseline_of):
    """Output and all gradients are as accurate as the baseline model's."""
    mine = results(ours, ours_of, torch.float32, clip())
    low, true = (
        results(baseline, baseline_of, dtype, clip()) for dtype in (torch.float32, torch.float64)
    )
    assert_model_as_accurate(mine, low, true, torch.float32)


VARIANTS = {
    "ViT": ({}, {}),
    "DeiT-III": (dict(init_values=0.1), dict(init_values=0.1)),
    "CLIP": (
        dict(pre_norm=True, act_layer=QuickGELU, norm_layer=NORM),
        dict(pre_norm=True, act_layer=QuickGELU, norm_layer=NORM),
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_that_of_timm(variant, backend):
    timm = pytest.importorskip("timm.models.vision_transformer")
    options, baseline_options = VARIANTS[variant]
    baseline = randomise(timm.VisionTransformer(**SIZE, num_classes=0, **baseline_options))
    ours = ViT(**SIZE, **options, backend=backend)
    assert ours.load_pretrained(baseline.state_dict()) == []
    assert_same(
        ours,
        baseline,
        lambda model, video: model(video).tokens,
        lambda model, video: model.forward_features(as_images(video)),
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_masked_encoder_is_that_of_mae(backend):
    timm = pytest.importorskip("timm.models.vision_transformer")
    baseline = randomise(timm.VisionTransformer(**SIZE, num_classes=0))
    ours = ViT(**SIZE, backend=backend)
    ours.load_pretrained(baseline.state_dict())
    ids_keep = mask()

    def mae(model, video):
        """Embed all patches, then drop the masked ones."""
        x = model.patch_embed(as_images(video)) + model.pos_embed[:, 1:]
        in_frame = (ids_keep % PATCHES).view(B * T, -1)
        x = x.gather(1, in_frame[..., None].expand(-1, -1, WIDTH))
        cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        return model.norm(model.blocks(torch.cat([cls, x], 1)))

    assert_same(ours, baseline, lambda model, video: model(video, ids_keep).tokens, mae)
    frames = ours(clip(), ids_keep)
    assert torch.equal(frames.ids, (ids_keep % PATCHES).view(B * T, -1)) and frames.kept == {}


@pytest.mark.parametrize("fuse", [None, "sum"])
def test_pruning_returns_the_kept_patches(fuse):
    ours = randomise(ViT(**SIZE, prune_layers=(0, 2), pruning=Pruning(0.6, fuse=fuse)))
    ids_keep, video = mask(), clip()
    frames = ours(video, ids_keep)

    ids = (ids_keep % PATCHES).view(B * T, -1)
    position = ours.pos_embed[0, 1:].repeat(T, 1)
    x = ours.patch_embed(video, ids_keep, position=position).view(B * T, -1, WIDTH)
    x = torch.cat([(ours.cls_token + ours.pos_embed[:, :1]).expand(B * T, -1, -1), x], 1)
    kept = {}
    for layer, block in enumerate(ours.blocks):
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(B * T, -1, 3, 2, WIDTH // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(WIDTH // 2)).softmax(-1)
        x = x + attention.proj((weights @ v).transpose(1, 2).flatten(2))
        if layer in (0, 2):
            scores = weights[:, :, 0, 1:].mean(1)
            K = math.ceil(0.6 * scores.shape[1])
            order = scores.argsort(1, descending=True)
            pick = lambda some: x[:, 1:].gather(1, some[..., None].expand(-1, -1, WIDTH))  # noqa: E731, B023
            parts = [x[:, :1], pick(order[:, :K])]
            ids = ids.gather(1, order[:, :K])
            if fuse:
                rest = order[:, K:]
                fused = (scores.gather(1, rest)[..., None] * pick(rest)).sum(1, keepdim=True)
                parts, ids = [*parts, fused], F.pad(ids, (0, 1), value=-1)
            x, kept[layer] = torch.cat(parts, 1), ids
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(frames.tokens, ours.norm(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(frames.ids, ids) and frames.kept.keys() == kept.keys() == {0, 2}
    assert all(torch.equal(frames.kept[layer], kept[layer]) for layer in kept)
    assert (frames.ids == -1).any() == bool(fuse)


def test_every_parameter_learns():
    ours = ViT(**SIZE, prune_layers=(1,), pruning=Pruning(0.7, fuse="sum"))
    ours(clip(), mask()).tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_images_uint8_and_nothing_visible():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ours = ViT(**SIZE, mean=mean, std=std)
    video = torch.randint(0, 256, (B, 3, T, 32, 32), dtype=torch.uint8)
    normalised = (video / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(
        3, 1, 1, 1
    )
    torch.testing.assert_close(ours(video).tokens, ours(normalised).tokens, rtol=1e-4, atol=1e-4)
    image = normalised[:, :, 1]
    torch.testing.assert_close(ours(image).tokens, ours(normalised).tokens[1::T])
    nothing = ours(video, torch.empty(B, 0, dtype=torch.int64))
    assert nothing.tokens.shape == (B * T, 1, WIDTH) and nothing.ids.shape == (B * T, 0)


def test_base_is_as_large_as_published():
    with torch.device("meta"):
        ours = ViT()
    assert sum(p.numel() for p in ours.parameters()) == 85_798_656  # ViT-B/16 without a classifier


def test_autocast():
    ours = randomise(ViT(**SIZE, prune_layers=(1,), pruning=Pruning(0.7, fuse="sum")))
    with torch.autocast("cpu", torch.bfloat16):
        frames = ours(clip(), mask())
    assert frames.tokens.dtype == torch.float32
    expected = ours(clip(), mask())
    assert (frames.tokens[:, 0] - expected.tokens[:, 0]).abs().mean() < 0.1
    frames.tokens.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_compiles():
    torch._dynamo.reset()
    ours = ViT(**SIZE, prune_layers=(1,), pruning=Pruning(0.7, fuse="sum"))

    def run(video, ids):
        frames = ours(video, ids)
        return frames.tokens, frames.ids

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours_, theirs in zip(compiled(clip(), mask()), run(clip(), mask()), strict=True):
        torch.testing.assert_close(ours_, theirs)


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(config(transformers.ViTConfig))
    return model, model.state_dict(), lambda x: model(x).last_hidden_state, {}


def transformers_mae():
    transformers = pytest.importorskip("transformers")
    decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1)
    decoder |= dict(decoder_num_attention_heads=1, decoder_intermediate_size=32)
    model = transformers.ViTMAEForPreTraining(config(transformers.ViTMAEConfig, **decoder))
    model.config.mask_ratio = 0.0
    order = torch.arange(PATCHES)[None] / PATCHES  # ascending noise: the order stays
    forward = lambda x: model.vit(x, noise=order.expand(len(x), -1)).last_hidden_state  # noqa: E731
    return model, model.state_dict(), forward, {}


def transformers_clip():
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(config(transformers.CLIPVisionConfig))
    state = {f"vision_model.{name}": value for name, value in model.state_dict().items()}
    state |= {"text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    post = dict(model.named_modules())["post_layernorm"]
    options = dict(pre_norm=True, act_layer=QuickGELU, norm_layer=NORM)
    return model, state, lambda x: post(model(x).last_hidden_state), options


class Residual(nn.Module):
    """A block of OpenAI's CLIP."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    """The visual tower of OpenAI's CLIP."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + PATCHES, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.proj = nn.Parameter(torch.zeros(WIDTH, 32))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer.resblocks(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x)


def openai_clip():
    model = nn.ModuleDict({"visual": Visual(), "token_embedding": nn.Embedding(5, 3)})
    options = dict(pre_norm=True, act_layer=QuickGELU, norm_layer=NORM)
    return model, model.state_dict(), model["visual"], options


def config(kind, **options):
    return kind(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-5 if "CLIP" in kind.__name__ else 1e-6,
        **options,
    )


TOWERS = [transformers_vit, transformers_mae, transformers_clip, openai_clip]


@pytest.mark.parametrize("make", TOWERS, ids=lambda make: make.__name__)
def test_loads_the_weights_of(make):
    torch.manual_seed(0)
    model, _, _, _ = make()
    randomise(model).eval()
    torch.manual_seed(0)
    same, state, forward, options = make()
    same.load_state_dict(model.state_dict())
    same.eval()
    ours = ViT(**SIZE, **options)
    left = ours.load_pretrained(state)
    images = as_images(clip())
    with torch.no_grad():
        torch.testing.assert_close(ours(images).tokens, forward(images), rtol=1e-4, atol=1e-4)
    kinds = ("pooler", "decoder", "text_model", "logit_scale", "proj", "token_embedding")
    assert all(any(kind in name for kind in kinds) for name in left), left


def test_loads_hugging_face_names_of_old():
    _, state, _, _ = transformers_vit()
    first, second = ViT(**SIZE), ViT(**SIZE)
    first.load_pretrained(state)
    renames = {
        r"^layers\.": "encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    old = {}
    for name, value in state.items():
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        old[f"vit.{name}"] = value
    old["classifier.weight"] = torch.zeros(2, WIDTH)
    assert "classifier.weight" in second.load_pretrained(old)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_loads_mae_with_its_decoder_and_a_classifier():
    state = ViT(**SIZE).state_dict()
    others = dict(mask_token=torch.zeros(1, 1, 32), decoder_pos_embed=torch.zeros(1, 17, 32))
    others |= {"head.weight": torch.zeros(5, WIDTH)}
    assert sorted(ViT(**SIZE).load_pretrained({**state, **others})) == sorted(others)


def test_tubelets_begin_as_an_image_model():
    """Of frames that are all the same they see what patches of one frame see."""
    image, ours = randomise(ViT(**SIZE)), ViT(**SIZE, tubelet_size=3)
    assert ours.load_pretrained(image.state_dict()) == []
    frame, still = clip()[:, :, :1], clip()[:, :, :1].repeat(1, 1, 2 * 3, 1, 1)
    tokens = image(frame).tokens.repeat_interleave(2, 0)
    torch.testing.assert_close(ours(still).tokens, tokens)
    ours.load_pretrained(ours.state_dict())  # its own are tubelets already
    torch.testing.assert_close(ours(still).tokens, tokens)


@pytest.mark.parametrize("size", [(64, 48), (16, 32)])
def test_positions_are_resampled_as_timm_does(size):
    layers = pytest.importorskip("timm.layers")
    state = randomise(ViT(**SIZE)).state_dict()
    ours = ViT(**(SIZE | dict(img_size=size)))
    ours.load_pretrained(state)
    expected = layers.resample_abs_pos_embed(state["pos_embed"], [n // 8 for n in size])
    torch.testing.assert_close(ours.pos_embed.data, expected)
    assert ours(torch.randn(1, 3, 2, *size)).tokens.shape[1] == 1 + size[0] * size[1] // 64


def test_weights_that_do_not_fit_are_named():
    ours, state = ViT(**SIZE), ViT(**(SIZE | dict(depth=4))).state_dict()
    before = copy.deepcopy(ours.state_dict())
    del state["cls_token"], state["blocks.1.mlp.fc1.bias"]
    state["norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        ours.load_pretrained(state)
    message = str(error.value)
    for part in (
        "missing: blocks.1.mlp.fc1.bias, cls_token",
        "unexpected: blocks.3.attn.proj.bias",
    ):
        assert part in message
    assert "norm.weight [3], not [64]" in message
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="unexpected: norm_pre.bias, norm_pre.weight"):
        ours.load_pretrained(ViT(**SIZE, pre_norm=True).state_dict())
    with pytest.raises(ValueError, match="square"):
        state["pos_embed"] = torch.zeros(1, 15, WIDTH)
        ours.load_pretrained(state)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match=r"prune_layers in \[0, 3\).*got \[3\]"):
        ViT(**SIZE, prune_layers=(0, 3))
    with pytest.raises(ValueError, match="need pruning=Pruning"):
        ViT(**SIZE, prune_layers=(0,))
    with pytest.raises(ValueError, match="rate"):
        ViT(**SIZE, prune_layers=(0,), pruning=Pruning(0.5)).set_keep_rate(0.0)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        ViT(**(SIZE | dict(num_heads=3)))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        ViT(**(SIZE | dict(img_size=30)))
    ours = ViT(**SIZE)
    with pytest.raises(ValueError, match=r"T, 32, 32\]"):
        ours(torch.zeros(1, 3, 2, 64, 32))
    with pytest.raises(ValueError, match=r"ids_keep \[2, K\]"):
        ours(clip(), torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="each of 3 frames"):
        ours(clip(), torch.zeros(B, 4, dtype=torch.int64))
    uneven = torch.arange(2 * T).expand(B, -1)
    with pytest.raises(RuntimeError, match="same number of visible patches in each frame"):
        ours(clip(), uneven)
    with pytest.raises(ValueError, match="whole tubelets of 2 frames, got 3 frames"):
        ViT(**SIZE, tubelet_size=2)(clip())
