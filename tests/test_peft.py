"""LoRA adapters of peft on swapped models, wrapped before and after the swap."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import vidl
from vidl.nn.patch_embed import MaskedPatchEmbed

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

import huggingface  # noqa: E402
import test_swapping_timm as timm_models  # noqa: E402
from timm.models.beit import Beit  # noqa: E402

TIMM = [name for name in timm_models.MODELS if "drop" not in name]


def wrap(model):
    """Adapters on all projections, with weights that are not zero."""
    names = []
    for name, module in model.named_modules():
        # timm's attention of BEiT, which vidl leaves, reads the weight of qkv: no adapter works.
        beit = name.endswith("qkv") and isinstance(model, Beit)
        # nn.MultiheadAttention reads the weight of its output projection.
        read = beit or isinstance(module, NonDynamicallyQuantizableLinear)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and not read:
            names.append(name)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter, std=0.05)
    return model


def adapters(model):
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert named
    return named


def base(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def check(make, forward, order):
    """Swapped and wrapped in this order, against merged weights without vidl."""
    baseline = wrap(make())
    if order == "swap, wrap":
        model = make()
        vidl.swap(model)
        model = wrap(model)
    else:
        model = wrap(make())
        vidl.swap(model)
    model.eval(), baseline.eval()
    out, wanted = forward(base(model)), forward(base(baseline))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = adapters(model), adapters(baseline)
    options = dict(allow_unused=True)
    grads = torch.autograd.grad(out, list(ours.values()), cotangent, **options)
    baselines = torch.autograd.grad(wanted, list(theirs.values()), cotangent, **options)
    # EVA of timm reads the weight of qkv and ignores its adapter, which also changes the others.
    works = all(grad is not None for n, grad in zip(theirs, baselines, strict=True) if "qkv" in n)
    # A gradient that is zero, such as that of a bias of keys, has the rounding errors of others.
    largest = max(float(grad.abs().max()) for grad in baselines if grad is not None)
    for name, grad, baseline_grad in zip(ours, grads, baselines, strict=True):
        assert baseline_grad is None or grad is not None, f"the adapter {name} is ignored"
        assert "qkv" not in name or grad is not None, f"the adapter {name} is ignored"
        if works and grad is not None:
            atol = 1e-6 + 1e-7 * largest + 1e-4 * float(baseline_grad.abs().max())
            torch.testing.assert_close(grad, baseline_grad, rtol=1e-3, atol=atol)
    merged = copy.deepcopy(baseline).merge_and_unload()
    torch.testing.assert_close(out, forward(merged), rtol=1e-3, atol=1e-4)


ORDERS = pytest.mark.parametrize("order", ["swap, wrap", "wrap, swap"])


@ORDERS
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, order):
    images = timm_models.images().detach()
    check(lambda: timm_models.make(name).eval(), lambda model: model(images), order)


@ORDERS
@pytest.mark.parametrize("name", huggingface.CASES)
def test_transformers(name, order):
    case = huggingface.CASES[name]

    def forward(model):
        outputs = huggingface.outputs(model, case, torch.float32)
        return torch.cat([x.flatten() for x in outputs])

    check(case.model, forward, order)


@pytest.mark.parametrize("name", ["ViT", "Vivit", "CLIP", "Siglip"])
def test_masked_patches_of_transformers(name):
    """With one patch in four masked, the adapter of the embedding is trained."""
    case = huggingface.CASES[name]
    model = case.model()
    vidl.mask(model, 0.25)
    model = wrap(model).train()

    def forward(model):
        torch.manual_seed(0)  # of the mask
        outputs = huggingface.outputs(model, case, torch.float32)
        return torch.cat([x.flatten() for x in outputs])

    out = forward(base(model))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    embedding = {n: p for n, p in adapters(model).items() if "patch" in n or "projection" in n}
    grads = torch.autograd.grad(out, list(embedding.values()), cotangent)
    assert len(grads) >= 2 and all(grad.abs().max() > 0 for grad in grads)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(out, forward(merged), rtol=1e-3, atol=1e-4)


def test_masked_patches_of_timm():
    model = timm_models.make("ViT")
    vidl.mask(model, 0.5)
    model = wrap(model).train()
    images = timm_models.images().detach()

    def forward(model):
        torch.manual_seed(0)  # of the mask
        return model(images)

    out = forward(base(model))
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in adapters(model).items())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(out, forward(merged), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tubelet_size", [None, 2])
def test_the_patch_embedding_of_vidl(tubelet_size):
    torch.manual_seed(0)
    options = dict(mean=(0.5,) * 3, std=(0.2, 0.3, 0.4))
    module = MaskedPatchEmbed(8, embed_dim=16, tubelet_size=tubelet_size, **options)
    model = wrap(nn.ModuleDict({"embed": module}))
    merged = copy.deepcopy(model).merge_and_unload()["embed"]
    module = base(model)["embed"]
    clip = torch.randint(0, 256, (2, 3, 2, 16, 24), dtype=torch.uint8)
    frames = 2 // (tubelet_size or 1)
    position = (torch.randn(frames, 16), torch.randn(6, 16))
    packed = (torch.tensor([0, 5, 2]), torch.tensor([0, 1, 3], dtype=torch.int32))
    for ids in ((None, None), (torch.tensor([[5, 0], [1, 3]]), None), packed):
        for places in (None, position, torch.randn(6 * frames, 16)):
            out = module(clip, *ids, places)
            torch.testing.assert_close(out, merged(clip, *ids, places), rtol=1e-4, atol=1e-4)
            assert out.requires_grad
    if tubelet_size is None:
        image = clip[:, :, 0]
        torch.testing.assert_close(module(image), merged(image), rtol=1e-4, atol=1e-4)
