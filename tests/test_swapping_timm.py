"""Swapped models of timm have the outputs and gradients of timm's own."""

import copy
import io
from functools import partial

import pytest
import torch
from compare import assert_model_as_accurate
from tiny import randomise
from torch import nn

import vidl
from vidl.swapping.registry import state_of

timm = pytest.importorskip("timm")
from timm.layers import LayerNorm, SwiGLUPacked  # noqa: E402
from timm.layers.attention import Attention  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.eva import Eva, EvaAttention  # noqa: E402
from timm.models.naflexvit import NaFlexVit  # noqa: E402
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer  # noqa: E402

SIZE = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)
VIT, EVA = partial(VisionTransformer, **SIZE), partial(Eva, **SIZE)
ROPE = dict(use_rot_pos_emb=True, use_abs_pos_emb=False)


def with_attention(model, kind, **options):
    """A model with attention options that its constructor does not pass on."""

    def build():
        changed = model()
        for block in changed.blocks:
            block.attn = kind(64, num_heads=2, norm_layer=nn.LayerNorm, **options)
        return changed

    return build


MODELS = {
    "ViT": VIT,
    "mean of patches": partial(VIT, global_pool="avg", class_token=False),
    "DeiT, distilled": partial(VisionTransformerDistilled, **SIZE),
    "DeiT-III": partial(VIT, no_embed_class=True, init_values=0.1, qkv_bias=True),
    "DINOv2": partial(
        VIT, init_values=0.1, reg_tokens=4, no_embed_class=True, mlp_layer=SwiGLUPacked
    ),
    "CLIP": partial(VIT, pre_norm=True, act_layer="quick_gelu", norm_layer=nn.LayerNorm),
    "SigLIP": partial(VIT, class_token=False, global_pool="map"),
    "norms of q, k and heads": partial(VIT, qk_norm=True, scale_attn_norm=True),
    "no biases": partial(VIT, qkv_bias=False, proj_bias=False),
    "wide heads": with_attention(VIT, Attention, attn_head_dim=64),
    "gates": with_attention(VIT, Attention, gated=True, qkv_bias=True),
    "dropout": partial(VIT, drop_path_rate=0.5, proj_drop_rate=0.2, pos_drop_rate=0.2),
    "patch dropout": partial(VIT, patch_drop_rate=0.5),
    "any size": partial(VIT, dynamic_img_size=True),
    "EVA-02": partial(EVA, **ROPE, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "EVA": partial(EVA, qkv_bias=True, init_values=0.1),
    "EVA, norms of q, k and heads": partial(EVA, **ROPE, qk_norm=True, scale_attn_inner=True),
    "EVA, gates": with_attention(EVA, EvaAttention, gated=True, qkv_bias_separate=True),
    "EVA, norms after": partial(EVA, **ROPE, use_post_norm=True),
    "EVA, patch dropout": partial(EVA, **ROPE, patch_drop_rate=0.5),
    "RoPE, mixed": partial(EVA, **ROPE, attn_type="rope", rope_type="mixed"),
    "RoPE, mixed, patch dropout": partial(
        EVA, **ROPE, attn_type="rope", rope_type="mixed", patch_drop_rate=0.5
    ),
    "RoPE, shared keys": partial(EVA, **ROPE, attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "DINOv3": partial(
        EVA,
        **ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        dynamic_img_size=True,
        init_values=0.1,
        norm_layer=partial(LayerNorm, eps=1e-5),
    ),
    "BEiT": partial(Beit, **SIZE, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "NaFlexVit": partial(NaFlexVit, **{**SIZE, "class_token": True, "global_pool": "token"}),
}


def make(name_or_model, dtype=torch.float32):
    model = MODELS.get(name_or_model, name_or_model)
    return randomise(model()).to(dtype)


def images(dtype=torch.float32, size=(32, 32)):
    numbers = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    return numbers.to(dtype).requires_grad_()


def results(model, x, forward=None):
    """The output, and the gradients of the images and of all parameters."""
    torch.manual_seed(0)  # of dropout
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    out = (forward or (lambda m, x: m(x)))(model, x)
    leaves = [x, *(named[n] for n in sorted(named))]
    grads = torch.autograd.grad(
        out, leaves, torch.randn(out.shape, dtype=torch.float64).to(out.dtype), allow_unused=True
    )
    return [
        out,
        *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)),
    ]


def assert_equal(ours, baseline):
    """Equal up to 1e-5 of the largest number of each result, or of 1."""
    for our, their in zip(ours, baseline, strict=True):
        allowed = 1e-5 * max(1.0, float(their.detach().abs().max()))
        torch.testing.assert_close(our, their, atol=allowed, rtol=0)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_float32(name, train):
    model = make(name).train(train)
    x = images(size=(24, 40) if getattr(model, "dynamic_img_size", False) else (32, 32))
    baseline, names = results(model, x), list(model.state_dict())
    report = vidl.swap(model)
    assert len(report.swapped) >= 1 and list(model.state_dict()) == names
    assert sum("Attention" in change.was for change in report.swapped) == 2
    assert_equal(results(model, x), baseline)
    vidl.unswap(model)
    for our, their in zip(results(model, x), baseline, strict=True):
        assert torch.equal(our, their)
    assert not any(type(module).__module__.startswith("vidl") for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    model, x = make(name), images()
    true = results(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    model, x = model.bfloat16(), images(torch.bfloat16)
    low = results(model, x)
    vidl.swap(model)
    assert_model_as_accurate(results(model, x), low, true, torch.bfloat16)


@pytest.mark.parametrize("name", ["EVA-02", "norms of q, k and heads", "EVA, gates"])
def test_autocast(name):
    model, x = make(name), images()

    def forward(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    true = results(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    low = results(model, x, forward)
    vidl.swap(model)
    for block in model.blocks:  # on CUDA autocast lets norms return float32
        for norm in (block.attn.q_norm, block.attn.k_norm):
            norm.register_forward_hook(lambda module, args, out: out.float())
    assert_model_as_accurate(results(model, x, forward), low, true, torch.bfloat16)


@pytest.mark.parametrize("name", ["ViT", "EVA-02", "RoPE, mixed"])
@pytest.mark.parametrize("mask", ["bool", "float", "causal"])
def test_masks_stay_with_timm(name, mask):
    model, x = make(name), images()
    allowed = torch.rand(1, 1, 17, 17) < 0.7
    allowed[..., 0] = True
    if mask == "causal":
        options = {"is_causal": True}
    else:
        scores = torch.zeros(1, 1, 17, 17).masked_fill(~allowed, -1e9)
        options = {"attn_mask": allowed if mask == "bool" else scores}

    def forward(model, x):
        return model(x, **options)

    baseline, unmasked = results(model, x, forward), model(x)
    vidl.swap(model)
    ours = results(model, x, forward)
    assert_equal(ours, baseline)
    assert not torch.allclose(ours[0], unmasked, atol=1e-3)


@pytest.mark.parametrize("name", ["ViT", "DINOv3"])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates(name, output_fmt):
    model, x = make(name), images()

    def forward(model, x):
        intermediates = model.forward_intermediates(
            x, return_prefix_tokens=True, norm=True, output_fmt=output_fmt, intermediates_only=True
        )
        return torch.cat([part.flatten() for pair in intermediates for part in pair])

    baseline = results(model, x, forward)
    vidl.swap(model)
    assert_equal(results(model, x, forward), baseline)


@pytest.mark.parametrize("name", ["dropout", "RoPE, mixed, patch dropout"])
def test_checkpointing(name):
    model, x = make(name).train(), images()
    baseline = results(model, x)
    vidl.swap(model)
    model.set_grad_checkpointing()
    assert_equal(results(model, x), baseline)


def test_copies_and_saved_weights():
    model, x = make("EVA-02"), images()
    baseline = results(model, x)
    vidl.swap(model)
    assert_equal(results(copy.deepcopy(model), x), baseline)
    for saved in (model, model.state_dict()):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=not isinstance(saved, nn.Module))
        if isinstance(saved, nn.Module):
            assert_equal(results(loaded, x), baseline)
        else:
            untouched = MODELS["EVA-02"]()
            untouched.load_state_dict(loaded)
            assert torch.equal(results(untouched, x)[0], baseline[0])


@pytest.mark.parametrize("name", ["ViT", "EVA-02"])
def test_compile(name):
    model, x = make(name), images()
    baseline = results(model, x)
    vidl.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(results(model, x, lambda _, x: compiled(x)), baseline)


def test_distributed(tmp_path):
    model, x = make("ViT"), images()
    baseline = results(model, x)
    vidl.swap(model)
    options = dict(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.distributed.init_process_group("gloo", **options)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        out = wrapped(x)
        torch.manual_seed(0)
        out.backward(torch.randn(out.shape, dtype=torch.float64).float())
    finally:
        torch.distributed.destroy_process_group()
    named = dict(model.named_parameters())
    assert_equal([out, x.grad, *(named[n].grad for n in sorted(named))], baseline)


def test_training_after_inference():
    # Cached groups must not be inference tensors.
    model, x = make("ViT"), images(size=(32, 32))[:2].detach().requires_grad_()
    vidl.swap(model)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


def test_dropout_of_attention_is_left():
    model = make(partial(VIT, attn_drop_rate=0.1))
    report = vidl.swap(model)
    reasons = {change.name: change.note for change in report.left}
    assert "attn_drop=0.1" in reasons["blocks.0.attn"] and "attn_drop=0.1" in str(report)
    assert type(model.blocks[0].attn) is Attention
    vidl.unswap(model)

    model, x = make("ViT").train(), images()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    baseline = results(model, x)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.0
    vidl.swap(model)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5  # set after the swap: falls back to timm's attention
    assert_equal(results(model, x), baseline)


def test_what_is_left_has_its_reason():
    report = vidl.swap(make(partial(MODELS["BEiT"], attn_drop_rate=0.1)))
    assert {c.name for c in report.swapped} == {"patch_embed"}
    assert all("attn_drop=0.1" in change.note for change in report.left)
    assert len(report.left) == 2
    with pytest.raises(ValueError, match="no module of .*ParallelScalingBlock"):
        vidl.swap(ParallelScalingBlock(64, 2))
    report = vidl.swap(make("SigLIP"))
    assert [(c.name, c.note) for c in report.left] == [("attn_pool", "vidl does not support it")]


def test_narrow_heads_are_no_faster_and_the_report_says_so():
    model, x = make(partial(VIT, num_heads=4)), images()
    baseline = results(model, x)
    report = vidl.swap(model)
    assert "not faster" in str(report) and "32, 64, 80, 96, 128, not 16" in str(report)
    assert_equal(results(model, x), baseline)


@pytest.mark.parametrize(
    "options, size",
    [
        (dict(strict_img_size=False, dynamic_img_pad=True), (30, 21)),
        (dict(strict_img_size=False), (24, 40)),
        (dict(img_size=None), (35, 21)),
        (dict(output_fmt="NHWC", norm_layer=nn.LayerNorm), (32, 32)),
        (dict(patch_size=(8, 4), bias=False), (32, 32)),
    ],
)
def test_patch_embed(options, size):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64} | options
    embed, x = randomise(timm.layers.PatchEmbed(**options)), images(size=size)
    baseline = results(embed, x)
    vidl.swap(embed)
    assert_equal(results(embed, x), baseline)


def test_patch_embed_refuses_what_timm_refuses():
    embed = timm.layers.PatchEmbed(img_size=32, patch_size=8)
    vidl.swap(embed, backend="native")
    with pytest.raises(ValueError, match=r"need images of \(32, 32\), got \(32, 40\)"):
        embed(torch.zeros(1, 3, 32, 40))
    embed.strict_img_size = False
    with pytest.raises(ValueError, match="whole patches"):
        embed(torch.zeros(1, 3, 32, 41))
    left = timm.layers.PatchEmbed(output_fmt="NCHW")
    with pytest.raises(ValueError, match="its output format is NCHW"):
        vidl.swap(left)


@pytest.mark.parametrize("rope", ["", "axial", "mixed"])
@pytest.mark.parametrize("key_only", [False, True])
def test_naflex_needs_no_mask(rope, key_only, monkeypatch):
    options = dict(class_token=True, reg_tokens=1, pos_embed_grid_size=(4, 4), rope_type=rope)
    model = make(partial(NaFlexVit, **{**SIZE, **options}, use_key_only_attn_mask=key_only))
    grids = [(4, 3), (2, 5), (3, 3)]
    N = 14
    coordinates, valid = torch.zeros(3, N, 2, dtype=torch.long), torch.zeros(3, N, dtype=torch.bool)
    for sample, (h, w) in enumerate(grids):
        places = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        coordinates[sample, : h * w], valid[sample, : h * w] = places, True
    x = torch.randn(3, N, 8 * 8 * 3, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def forward(model, x):
        features = model.forward_features(x, coordinates, valid)["patches"]
        kept = torch.cat([torch.ones(3, 2, dtype=torch.bool), valid], 1)
        pooled = model.forward_head(features, patch_valid=valid)
        return torch.cat([features[kept].flatten(), pooled.flatten()])

    baseline = results(model, x, forward)
    report = vidl.swap(model)
    masks = []
    mask = timm.models.naflexvit.create_attention_mask
    monkeypatch.setattr(
        timm.models.naflexvit,
        "create_attention_mask",
        lambda *args, **options: masks.append(mask(*args, **options)) or masks[-1],
    )
    assert_equal(results(model, x, forward), baseline)
    assert [change.name for change in report.left] == ["attn_pool"]
    assert not [m for m in masks if m is not None and m.shape[-2] > 1], "an N x N mask was built"


def test_naflex_with_an_attention_that_takes_no_groups_keeps_its_mask():
    model = make(partial(NaFlexVit, **SIZE, attn_drop_rate=0.1))
    model.blocks[1].attn.attn_drop.p = 0.0
    report = vidl.swap(model)
    assert {c.name: c.note for c in report.left}[""].startswith("blocks.0.attn cannot take groups")
    assert [c.name for c in report.swapped] == ["blocks.1.attn"]


def test_a_tower_inside_another_model():
    # As in open_clip's models with a timm tower.
    tower = nn.ModuleDict(
        {"visual": nn.ModuleDict({"trunk": make("CLIP")}), "text": nn.Linear(2, 2)}
    )
    report = vidl.swap(tower)
    assert {c.name for c in report.swapped} >= {"visual.trunk.blocks.0.attn"}


def test_backend_by_name():
    model, x = make("ViT"), images()
    baseline = results(model, x)
    report = vidl.swap(model, backend="reference")
    assert state_of(model.blocks[0].attn).backend == "reference" and "not faster" not in str(report)
    assert_equal(results(model, x), baseline)
