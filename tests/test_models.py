"""The systems: outputs, gradients and costs, with the kernels and the reference."""

import dataclasses

import pytest
import torch
from tiny import fitting

from vidl import models
from vidl.cli import main
from vidl.models.summary import Skipping, count, flop_counter, saved_bytes
from vidl.nn import Bert, ViT

SMALL = dict(image_size=32, width=64, heads=2, text_width=64, text_heads=2, dropout=0.0)
WORDS = models.recipe("mac").vocabulary
TINY = dict(SMALL, vocabulary=dataclasses.replace(WORDS, size=200))


OWN = {
    "simvtp": dict(embed_dim=64),
    "vlc": dict(frames=2, word_ratio=0.3),
    "alpro": dict(word_ratio=0.3),
    "svitt": dict(block=8, random_blocks=1),
    "clipbert": dict(word_ratio=0.3),
}


def tiny(name, **overrides):
    torch.manual_seed(0)
    fields = fitting(name, TINY | OWN.get(name, {}) | overrides)
    return models.create(name, "tiny", **fields)


def batch(model, B=4, words=9):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["attention_mask"][1, 5:] = 0  # captions differ in length
    return inputs


@pytest.mark.parametrize(
    "name, tubelet_size",
    [*((name, 1) for name in models.MODELS), ("smaug", 2), ("mac", 2), ("simvtp", 2)],
)
def test_every_parameter_learns(name, tubelet_size):
    model = tiny(name, tubelet_size=tubelet_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Temporal attention of `Mac` starts at zero, so its norm has no gradient in the first step.
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(model), step=step)["loss"].backward()
        optimizer.step()
        if name == "omnivl":  # images have a patch embedding of their own
            images = batch(model)
            images["video"] = images["video"][:, :, :1]
            model(**images, step=step)["loss"].backward()
            optimizer.step()
    fixed = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    if name == "alpro":  # its frozen model learns nothing
        frozen = [key for key in fixed if key.startswith("prompter.")]
        assert frozen == [key for key, _ in model.prompter.named_parameters(prefix="prompter")]
        fixed = [key for key in fixed if key not in frozen]
    assert fixed == ["decoder.decoder_pos_embed"] * (
        name in ("smaug", "simvtp", "vlc")
    )  # fixed sine-cosine embedding of MAE
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert not [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()]
    still = [key for key, grad in grads.items() if grad.abs().max() < 1e-7]  # up to rounding
    assert all(key.endswith(".key.bias") for key in still), still  # softmax is invariant to it


def test_losses_of_smaug():
    model = tiny("smaug")
    losses = model(**batch(model))
    assert list(losses) == ["loss", "vtc", "vtm", "mlm", "mvm"]
    losses = {key: loss.item() for key, loss in losses.items()}
    assert losses["loss"] == pytest.approx(sum(list(losses.values())[1:]))
    # At initialisation the loss is the log of the number of choices.
    assert losses["mlm"] == pytest.approx(5.3, abs=0.5)  # ln 200
    assert losses["vtm"] == pytest.approx(0.69, abs=0.2)  # ln 2

    without = tiny("smaug", mask_ratio=0.0, vtm=0.0)
    assert list(without(**batch(without))) == ["loss", "vtc", "mlm"]
    double = tiny("smaug", mvm=2.0)(**batch(model))["loss"].item()
    assert double - losses["loss"] == pytest.approx(losses["mvm"], rel=1e-4)


def test_a_resumed_run_draws_the_same_masks():
    model = tiny("smaug").eval()
    inputs = batch(model)
    losses = model(**inputs, step=7)
    assert model(**inputs, step=7) == losses
    assert model(**inputs, step=8)["mvm"] != losses["mvm"]
    # Masks depend on the sample: another order of the batch only changes rounding.
    order = torch.tensor([2, 0, 3, 1])
    other = model(**{key: value[order] for key, value in inputs.items()}, step=7)
    for key in ("vtc", "mvm", "mlm"):
        torch.testing.assert_close(other[key], losses[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_native_equals_reference(name):
    """The losses of one step and the gradients of all parameters."""
    results = []
    for backend in ("reference", "native"):
        model = tiny(name, backend=backend)
        losses = model(**batch(model), step=1)
        losses["loss"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses.values(), *grads])
    for truth, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


# The others, in `make test-slow`, run the same ops.
FIRST = ("smaug", "mac")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in models.MODELS],
)
def test_kernels_and_reference_learn_the_same(name):
    """Fifty steps on noise with equal weights, masks and optimizer."""
    curves = []
    for backend in ("reference", "auto"):
        model = tiny(name, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs, curve = batch(model), []
        for step in range(50):
            optimizer.zero_grad()
            loss = model(**inputs, step=step)["loss"]
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    reference, ours = curves
    assert reference[-10:].mean() < 0.8 * reference[:5].mean()  # it memorises the noise
    torch.testing.assert_close(ours[:10], reference[:10], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tubelet_size", [1, 2])
def test_token_counts_of_the_recipe(tubelet_size):
    model = tiny("smaug", prune_layers=(0, 2), tubelet_size=tubelet_size)
    recipe, inputs = model.recipe, batch(model)
    mask = model.recipe.visual_mask(inputs["samples"], 0)
    frames = model.vision(inputs["video"], mask.ids_keep)
    tokens, T = recipe.tokens(), recipe.frames // tubelet_size
    assert tokens["encoder"] == mask.ids_keep.shape[1] + T
    assert tokens["after layer 0"] == T * (1 + frames.kept[0].shape[1])
    assert tokens["after layer 2"] == T * frames.tokens.shape[1]
    assert tokens["fusion"] == recipe.frames_kept * frames.tokens.shape[1]

    for kind, time in (("frame", "slot"), ("tube", "position"), ("clip", "joint")):
        model = tiny("mac", mask=kind, time=time, tubelet_size=tubelet_size)
        seen = model.vision(
            inputs["video"], model.recipe.visual_mask(inputs["samples"], 0).ids_keep
        )
        assert seen.shape[1] == model.recipe.tokens()["encoder"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_only_time_before_the_encoder_depends_on_frame_order(when):
    model = tiny("smaug", frame_time=when, keep_rate=1.0).eval()
    torch.nn.init.normal_(model.time)
    video = batch(model)["video"]
    forth, back = (model.embed_clips(clip).mean(1) for clip in (video, video.flip(2)))
    # After the encoder the sum over frames does not depend on their order.
    assert torch.allclose(forth, back, atol=1e-5) == (when == "after")


@pytest.mark.parametrize("name, fields", [("smaug", dict(frames_kept=1)), ("mac", {})])
def test_a_tubelet_depends_on_the_order_of_its_frames(name, fields):
    model = tiny(name, tubelet_size=4, **fields).eval()
    video = batch(model)["video"]
    forth, back = (model.embed_clips(clip) for clip in (video, video.flip(2)))
    assert not torch.allclose(forth, back, atol=1e-3)


@pytest.mark.parametrize("width", [64, 768])
def test_initial_features_of_similar_captions_differ(width):
    """At any width: the contrastive loss cannot separate almost equal features."""
    torch.manual_seed(0)
    text = Bert(200, width, 2, 0, width // 32).eval()
    ids = torch.randint(200, (1, 8)).expand(190, 8).clone()
    ids[:, 5] = torch.arange(190)
    cls = text.encode(ids)[:, 0]
    assert (cls - cls.mean(0)).norm(dim=1).mean() / cls.norm(dim=1).mean() > 0.01


@pytest.mark.parametrize("name", ["smaug", "svitt", "vlc", "alpro", "clipbert", "omnivl"])
def test_a_count_without_arithmetic_is_that_of_a_step(name):
    model = tiny(name)
    torch.manual_seed(3)
    cost = count(model, 3, 8)
    torch.manual_seed(3)
    inputs = model.recipe.example(3, 8)
    with flop_counter() as flops, saved_bytes(model) as sizes:
        model(**inputs)["loss"].backward()
    assert cost.forward_flops + cost.backward_flops == pytest.approx(
        flops.get_total_flops() / 3, abs=2
    )
    assert cost.activations == sum(sizes.values()) // 3
    assert cost.tokens == model.recipe.tokens()


def test_operations_that_are_counted_are_skipped():
    x = torch.ones(2, 3, requires_grad=True)
    counter = flop_counter()
    with Skipping(counter), counter:
        y = x @ torch.ones(3, 4)
        z = (y + 1).sum()
        z.backward()
        out = torch.ones(2, 4)
        torch.mm(torch.ones(2, 3), torch.ones(3, 4), out=out)  # the given tensor is written
    assert not y.any() and z == 8 and not x.grad.any() and (out == 3).all()
    assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 4
    assert ((torch.ones(2, 3) @ torch.ones(3, 4)) == 3).all()  # as before


def test_summary():
    text = str(models.summarize(tiny("smaug"), words=8, steps=1))
    for expected in ("masked and pruned", "after layer 1", "GFLOP", "realised saving", "selector"):
        assert expected in text
    costs = models.summarize(tiny("mac"), words=8).costs
    assert costs["masked"].forward_flops < costs["dense"].forward_flops
    assert costs["masked"].activations < costs["dense"].activations


def test_flops_of_vit_b_as_published():
    """17.6 GFLOP (multiply-adds) an image of 224 x 224: DeiT, arXiv 2012.12877, table 5."""
    model = ViT()
    assert sum(p.numel() for p in model.parameters()) == 85_798_656  # timm, without head
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.zeros(1, 3, 1, 224, 224))
    assert flops.get_total_flops() / 2 == pytest.approx(17.6e9, rel=0.005)


def test_attention_of_pytorch_is_counted_on_the_cpu():
    B, H, N, D = 2, 4, 32, 64
    q = torch.randn(B, H, N, D, requires_grad=True)
    with flop_counter() as flops:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert flops.get_total_flops() == (2 + 5) * 2 * B * H * N * N * D  # matmuls: 2 and 5


def test_parameters_of_bert_base_as_published():
    """110 M (BERT, arXiv 1810.04805, 3): including the pooler, which we do not have."""
    with torch.device("meta"):
        text = Bert(text_layers=12, fusion_layers=0)
    assert sum(p.numel() for p in text.parameters()) == 109_482_240 - (768 + 1) * 768


@pytest.mark.parametrize(
    "name, overrides, complaint",
    [
        ("smaug", dict(frames_kept=5), r"need frames_kept in \[1, 4\].*lower it"),
        ("smaug", dict(prune_layers=(12,)), r"need prune_layers in \[0, 12\)"),
        ("smaug", dict(mask="block"), "need mask 'frame' or 'tube'"),
        ("smaug", dict(fusion_layers=0), "need fusion_layers >= 1 for vtm and mlm"),
        ("smaug", dict(width=100), "need width as a multiple of heads=12"),
        ("smaug", dict(image_size=230), "need image_size as a multiple of patch_size=16"),
        ("smaug", dict(frames=5, tubelet_size=2), "need frames as a multiple of tubelet_size=2"),
        ("smaug", dict(frames_kept=3, tubelet_size=2), r"need frames_kept in \[1, 2\]"),
        ("smaug", dict(mask_ratio=1.0), "need mask_ratio in"),
        ("smaug", dict(keep_rate=0.0), "need keep_rate in"),
        ("smaug", dict(layers=3), "smaug has no field 'layers'"),
        ("smaug", dict(mask_ration=0.5), "no field 'mask_ration'; did you mean 'mask_ratio'?"),
        ("mac", dict(depth="deep"), "need depth as int, got 'deep'"),
        ("mac", dict(mask="clip"), "need mask 'frame' or 'tube' with time 'slot'"),
        ("mac", dict(word_ratio=1.5), "need word_ratio in"),
    ],
)
def test_invalid_recipes(name, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        models.create(name, **overrides)


def test_unknown_names():
    with pytest.raises(ValueError, match="need a model among smaug, mac, .*, got 'violet'"):
        models.create("violet")
    with pytest.raises(ValueError, match="need a preset among tiny, small, base, got 'huge'"):
        models.create("mac", "huge")


def test_summary_on_the_command_line(capsys):
    small = [f"{name}={value}" for name, value in SMALL.items()]
    assert main(["summary", "mac", *small, "--preset", "tiny", "--words", "6"]) == 0
    assert "forward" in capsys.readouterr().out
    for wrong in (["violet"], ["mac", "width"], ["mac", "wide=3"], ["mac", "--batch", "1"]):
        with pytest.raises(SystemExit):
            main(["summary", *wrong])
        assert "need" in (error := capsys.readouterr().err) or "has no" in error
