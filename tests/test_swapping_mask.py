"""vidl.mask: timm's patch dropout without embedding the dropped patches."""

import copy
from functools import partial

import pytest
from torch import nn

pytest.importorskip("timm")

from test_swapping_timm import MODELS, VIT, assert_equal, images, make, results  # noqa: E402
from timm.layers import PatchDropout  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

import vidl  # noqa: E402
from vidl.swapping.timm import vit  # noqa: E402

SAME = {
    "class token": {},
    "positions without it": dict(no_embed_class=True, reg_tokens=2),
    "registers": dict(reg_tokens=2),
    "no class token": dict(class_token=False, global_pool="avg"),
    "no positions": dict(pos_embed="none"),
    "CLIP": dict(pre_norm=True),
}


@pytest.fixture
def embedded(monkeypatch):
    """The number of patches embedded by each call of the op."""
    counts, embed = [], vit.masked_patch_embed

    def count(*args, **options):
        tokens = embed(*args, **options)
        counts.append(tokens.shape[1])
        return tokens

    monkeypatch.setattr(vit, "masked_patch_embed", count)
    return counts


@pytest.mark.parametrize("options", SAME.values(), ids=SAME.keys())
@pytest.mark.parametrize("by", ["swap", "mask"])
def test_what_timm_drops_is_not_embedded(options, by, embedded):
    baseline, x = make(partial(VIT, **options, patch_drop_rate=0.6)).train(), images()
    names = list(baseline.state_dict())
    model = copy.deepcopy(baseline) if by == "swap" else make(partial(VIT, **options)).train()
    report = vidl.swap(model) if by == "swap" else vidl.mask(model, 0.6)
    assert list(model.state_dict()) == names and "" in {change.name for change in report.swapped}
    assert_equal(results(model, x), results(baseline, x))
    assert embedded == [6]
    model.set_grad_checkpointing()
    assert_equal(results(model, x), results(baseline, x))
    assert_equal(results(model.eval(), x), results(baseline.eval(), x))
    assert embedded == [6, 6]


def test_again_and_back():
    model = make("ViT").train()
    vidl.mask(model, 0.5)
    assert model.forward_features(images()).shape[1] == 1 + 8
    assert_equal(results(copy.deepcopy(model), images()), results(model, images()))
    report = vidl.mask(model, 0.75)
    assert model.forward_features(images()).shape[1] == 1 + 4
    assert "masks 0.75 of its patches in training" in str(report)
    model.eval()
    vidl.unswap(model)
    assert type(model) is VisionTransformer and type(model.patch_drop) is nn.Identity
    assert not model.patch_drop.training


def test_with_pruning(embedded):
    model = make("ViT").train()
    vidl.prune(model, 0.5, [0])
    vidl.mask(model, 0.5)
    assert model.forward_features(images()).shape[1] == 1 + 4 and embedded == [8]
    with pytest.raises(ValueError, match="no grid of tokens"):
        model.forward_intermediates(images())
    vidl.unswap(model)
    assert model.forward_features(images()).shape[1] == 1 + 16


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(pos_drop_rate=0.1), "pos_drop_rate=0.1"),
        (dict(dynamic_img_size=True), "images of any size"),
        (dict(embed_norm_layer="layernorm"), "has a norm"),
    ],
)
def test_where_timm_embeds_all(options, reason, embedded):
    model = make(partial(VIT, **options, patch_drop_rate=0.5)).train()
    baseline = results(model, images())
    report = vidl.swap(model)
    assert reason in {change.name: change.note for change in report.left}[""]
    assert_equal(results(model, images()), baseline)
    vidl.unswap(model)
    with pytest.raises(ValueError, match=reason):
        vidl.mask(model, 0.5)
    assert type(model) is VisionTransformer and type(model.patch_drop) is PatchDropout
    assert not any(type(part).__module__.startswith("vidl") for part in model.modules())


def test_wrong_calls():
    with pytest.raises(ValueError, match=r"a ratio in \[0, 1\), got 1"):
        vidl.mask(make("ViT"), 1)
    with pytest.raises(ValueError, match="need a VisionTransformer of timm, .* found none in .*E"):
        vidl.mask(MODELS["EVA"](), 0.5)
