"""Swapped models of transformers with tables of relative positions, against the unswapped ones."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import token_importance

pytest.importorskip("transformers")
from huggingface import CASES, RELATIVE, SHARED, VISION, Case, outputs, randn, results, simple  # noqa: E402

import vidl  # noqa: E402
from vidl.ops import kept_count  # noqa: E402

EVERY = pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("Beit", "Data2Vec"))])


def close(ours, theirs, allowed=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)


@EVERY
def test_float64(name):
    case = CASES[name]
    model = case.model()
    expected = results(model, case, torch.float64)
    vidl.swap(model)
    close(results(model, case, torch.float64), expected, 1e-10)


def test_without_relative_positions():
    images, model = randn(2, 3, 32, 32), simple("BeitModel", VISION)().eval()
    expected = model(images).last_hidden_state
    vidl.swap(model)
    close([model(images).last_hidden_state], [expected])
    vidl.prune(model, 0.5, [0])
    assert model(images).last_hidden_state.shape[1] == 9


@EVERY
@pytest.mark.parametrize(
    "size, options",
    [((40, 40), {}), ((32, 48), {}), ((32, 32), {"interpolate_pos_encoding": True})],
    ids=["larger", "wide", "interpolated"],
)
def test_other_sizes_keep_the_bias_of_transformers(name, size, options):
    model, images = CASES[name].model(), randn(2, 3, *size)
    if name.startswith("Data2Vec"):
        model.embeddings.patch_embeddings.image_size = size  # it refuses images of another size
    expected = model(images, **options).last_hidden_state
    vidl.swap(model)
    close([model(images, **options).last_hidden_state], [expected])
    vidl.prune(model, 0.5, [0])
    with pytest.raises(ValueError, match="layer 0 of a pruned model needs square images"):
        model(images, **options)


@pytest.mark.parametrize("kind", ["BeitModel", "Data2VecVisionModel"])
def test_tables_that_transformers_transposes(kind):
    case = Case(simple(kind, dict(SHARED, image_size=[32, 48])), list, ())
    model, images = case.model(), randn(2, 3, 32, 48)
    expected = model(images).last_hidden_state
    vidl.swap(model)
    close([model(images).last_hidden_state], [expected])


@EVERY
def test_dropout_of_weights_is_that_of_transformers(name):
    case = CASES[name]
    built = case.model()
    config = dict(built.config.to_dict(), attention_probs_dropout_prob=0.5)
    model = simple(type(built).__name__, config)().train()
    torch.manual_seed(5)
    expected = outputs(model, case, torch.float32)
    report = str(vidl.swap(model))
    assert "in training, because it drops out weights (0.5)" in report
    torch.manual_seed(5)
    close(outputs(model, case, torch.float32), expected)
    vidl.unswap(model)
    with pytest.raises(ValueError, match="attention_probs_dropout_prob=0.5"):
        vidl.prune(model, 0.5, [0])


@EVERY
def test_attention_weights_are_those_of_transformers(name):
    case = CASES[name]
    kind = type(case.model())
    config = kind.config_class(**case.model().config.to_dict(), attn_implementation="eager")
    model = kind(config).eval()
    model.load_state_dict(case.model().state_dict())
    inputs = case.inputs()
    expected = model(**inputs, output_attentions=True)
    vidl.swap(model)
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(expected.attentions) == 2 and len(out.hidden_states) == 3
    close(out.attentions, expected.attentions)
    vidl.prune(model, 0.5, [0])
    with pytest.raises(ValueError, match="does not support output_attentions=True"):
        model(**inputs, output_attentions=True)


def parts(model):
    """The layers; the bias of each; what attends; and what comes after attention and MLP."""
    if hasattr(model, "layers"):
        shared = model.shared_position_bias
        for layer in model.layers:
            attn = layer.attention
            qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
            yield layer, (layer.relative_position_bias, shared), qkv, attn.o_proj, layer.mlp
        return
    shared = getattr(model.encoder, "relative_position_bias", None)
    for layer in model.encoder.layer:
        attn = layer.attention.attention
        own = getattr(attn, "relative_position_bias", None)
        qkv = (attn.query, attn.key, attn.value)

        def mlp(x, layer=layer):
            return layer.output(layer.intermediate(x))

        yield layer, (own, shared), qkv, layer.attention.output.dense, mlp


def by_hand(model, images, rate, scores, pruned=(0, 1)):
    """Pruning after attention, with the N x N bias of transformers for the tokens that stay."""
    x = model.embeddings(images)
    x = x[0] if isinstance(x, tuple) else x
    ids = torch.arange(x.shape[1]).expand(x.shape[:2])
    for number, (layer, biases, projections, out, mlp) in enumerate(parts(model)):
        normed = layer.layernorm_before(x)
        q, k, v = (p(normed).unflatten(-1, (2, 32)).transpose(1, 2) for p in projections)
        logits = q @ k.mT / 32**0.5
        for bias in biases:
            if bias is not None:
                whole = bias((4, 4), dim_size=17)[0]
                logits = logits + whole[:, ids[:, :, None], ids[:, None]].transpose(0, 1)
        weights = logits.softmax(-1)
        x = x + layer.lambda_1 * out((weights @ v).transpose(1, 2).flatten(2))
        if number in pruned:
            importance = token_importance(scores, weights.detach(), k.detach(), v.detach())
            keep = importance[:, 1:].topk(kept_count(x.shape[1] - 1, rate)).indices.sort(1).values
            keep = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], 1)
            ids = ids.gather(1, keep)
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        x = x + layer.lambda_2 * mlp(layer.layernorm_after(x))
    return model.layernorm(x) if hasattr(model, "layernorm") else x


def deeper(name):
    """The case with a third layer, which needs the positions of tokens that were pruned twice."""
    built = CASES[name].model()
    config = dict(built.config.to_dict(), num_hidden_layers=3)
    return replace(CASES[name], make=simple(type(built).__name__, config))


def gradients(model, out):
    named = dict(model.named_parameters())
    numbers = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return torch.autograd.grad(out, named.values(), numbers, allow_unused=True)


@EVERY
@pytest.mark.parametrize("scores", ["cls", "mean", "value", "similarity"])
def test_prune(name, scores):
    case = deeper(name)
    model = case.model().double()
    for weights in model.parameters():
        if weights.shape[0] == 7 * 7 + 3:  # tables, large enough to change which tokens stay
            weights.data *= 20
    images = case.inputs()["pixel_values"].double()
    original = copy.deepcopy(model)
    before = original(images).last_hidden_state
    expected = by_hand(original, images, 0.6, scores)
    vidl.prune(model, 0.6, [0, 1], scores=scores)
    out = model(images).last_hidden_state
    close([out], [expected], 1e-10)
    ours, theirs = gradients(model, out), gradients(original, expected)
    assert [g is None for g in ours] == [g is None for g in theirs]
    close([g for g in ours if g is not None], [g for g in theirs if g is not None], 1e-9)

    model.train().activation_checkpointing_enable()
    again = model(images).last_hidden_state
    model(images.flip(0))  # keeps other tokens
    close(
        [g for g in gradients(model, again) if g is not None],
        [g for g in theirs if g is not None],
        1e-9,
    )
    vidl.unswap(model)
    assert str(model) == str(original)
    assert torch.equal(model.eval()(images).last_hidden_state, before)


@pytest.mark.parametrize("kind", ["BeitModel", "Data2VecVisionModel"])
@pytest.mark.parametrize(
    "config, options, why",
    [
        ({}, {"fuse": "sum"}, "a fused token has no position"),
        ({"use_mask_token": True}, {}, "it predicts masked patches"),
    ],
)
def test_what_cannot_be_pruned(kind, config, options, why):
    model = simple(kind, RELATIVE | config)()
    with pytest.raises(ValueError, match=why):
        vidl.prune(model, 0.5, [0], **options)
    assert not any(type(m).__module__.startswith("vidl") for m in model.modules())


DENSE = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "num_labels": 3}


@pytest.mark.parametrize(
    "kind", ["BeitForSemanticSegmentation", "BeitBackbone", "Data2VecVisionForSemanticSegmentation"]
)
def test_models_that_need_a_grid_cannot_be_pruned(kind):
    model = simple(kind, RELATIVE | DENSE)()
    with pytest.raises(ValueError, match=f"cannot prune .*: {kind} needs .* whole grid of patches"):
        vidl.prune(model, 0.5, [0])
    assert not any(type(m).__module__.startswith("vidl") for m in model.modules())


def test_the_report():
    report = str(vidl.swap(CASES["BeitShared"].model()))
    assert "layers.*.attention (2 x)" in report and "shared_position_bias" in report
    assert ", 0 left" in report
    report = str(vidl.swap(CASES["Data2VecVision"].model()))
    assert "encoder.layer.*.attention.attention (2 x)" in report and ", 0 left" in report


@pytest.mark.parametrize("name", ["Beit", "Data2VecVision"])
def test_a_pruned_model_compiles(name):
    if name == "Beit" and torch.__version__ < (2, 12):
        pytest.skip("under torch 2.11 transformers makes a mask in compiled code")
    case = CASES[name]
    model, images = case.model(), case.inputs()["pixel_values"]
    vidl.prune(model, 0.6, [0])
    expected = model(images).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(images).last_hidden_state
    close([out], [expected])
    grads = [gradients(model, x) for x in (out, expected)]
    close(*([g for g in own if g is not None] for own in grads))
