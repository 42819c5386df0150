"""ALPRO: a whole step against plain PyTorch, the prompter, and its place in a run."""

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from test_systems import config

from vidl import models
from vidl.data.text import train_tokenizer
from vidl.masking import Vocabulary, mask_words, uniform
from vidl.models import prompting
from vidl.objectives import hard_negatives
from vidl.training import pretrain
from vidl.training.sources import vocabulary

SIZES = dict(
    frames=3, image_size=32, patch_size=8, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    text_layers=1, merge_layers=2, embed_dim=16, entities=5, threshold=0.9, dropout=0.0,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip
STEP = 3


def model_of(**fields):
    torch.manual_seed(0)
    model = models.create("alpro", "tiny", **(SIZES | fields))
    for name, parameter in model.named_parameters():  # they begin at zero
        if "temporal_fc" in name or name.endswith(("time_embed", "cls_token")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(model, B=6, words=7):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    inputs["attention_mask"][1, 4:] = 0
    inputs["attention_mask"][3, 6:] = 0
    return inputs


def merged(w, r, text, words, clips):
    """The words and patches after the merge layers, words first as in the authors' code."""
    seen = torch.cat([words, torch.ones(clips.shape[:2], dtype=torch.bool)], 1)
    x = torch.cat([text, clips], 1)
    for number in range(r.merge_layers):
        layer = w.of(f"text.encoder.layer.{r.text_layers + number}")
        x = plain.bert_layer(layer, x, r.text_heads, seen)
    return x.split([text.shape[1], clips.shape[1]], 1)


def region(r, sample):
    """The rectangle of a sample: top, left, height, width, in patches."""
    drawn = uniform(r.seed, STEP, torch.tensor([sample]), 4, stream=7 << 58)[0].double().tolist()
    side = r.image_size // r.patch_size
    area, aspect = (0.3 + 0.2 * drawn[0]) * side**2, 0.3 * (3.33 / 0.3) ** drawn[1]
    height = min(max(round(math.sqrt(area * aspect)), 1), side)
    width = min(max(round(math.sqrt(area / aspect)), 1), side)
    return (
        math.floor(drawn[2] * (side - height + 1)), math.floor(drawn[3] * (side - width + 1)),
        height, width,
    )  # fmt: skip


def entity_loss(w, r, pixels, mask, clips, counts):
    losses, side, size = [], r.image_size // r.patch_size, r.patch_size
    for b in range(len(pixels)):
        top, left, height, width = region(r, b)
        black = torch.tensor([-m / s for m, s in zip(r.mean, r.std, strict=True)]).double()
        shown = black[:, None, None, None].expand_as(pixels[b : b + 1]).clone()
        down, across = (slice(x * size, (x + n) * size) for x, n in ((top, height), (left, width)))
        shown[..., down, across] = pixels[b : b + 1, ..., down, across]
        x = plain.timesformer(w.of("prompter.vision"), r.heads, shown)
        v = plain.linear(w.of("prompter.project_clip"), x[:, 0])
        similar = F.normalize(v, dim=1) @ w["prompter.prompts"].T / w["prompter.temperature"]
        target = similar[0].softmax(0).detach()
        places = range(side * side)
        if mask is not None:
            places = [place for place in mask.ids_keep[b].tolist() if place < side * side]
        rows = [
            clips[b, 1 + at] for at, place in enumerate(places)
            if top <= place // side < top + height and left <= place % side < left + width
        ]  # fmt: skip
        counts.append(bool(rows) and bool(target.max() >= r.threshold))
        if counts[-1]:
            mean = torch.stack(rows).mean(0)
            hidden = F.gelu(plain.linear(w.of("entities.0"), mean))
            logits = plain.linear(w.of("entities.2"), hidden)
            losses.append(-(target * logits.log_softmax(0)).sum())
    return torch.stack(losses).mean()


def plain_losses(model, inputs, w, counts):
    r, ids = model.recipe, inputs["ids"]
    mask = r.visual_mask(inputs["samples"], STEP)
    words, own = inputs["attention_mask"] != 0, torch.arange(len(ids))
    pixels = plain.normalised(inputs["video"], r.mean, r.std)
    visible = None if mask is None else mask.ids_keep
    x = plain.timesformer(w.of("vision"), r.heads, pixels, visible)
    clips = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (r.frames, -1)).mean(1)], 1)
    text = plain.captions(w, r, ids, words)
    v = plain.linear(w.of("project_clip"), clips[:, 0])
    t = plain.linear(w.of("project_text"), text[:, 0])
    losses = {"vtc": plain.contrastive(v, t, w["contrast.temperature"])}
    similarity = F.normalize(v, dim=1) @ F.normalize(t, dim=1).T / w["contrast.temperature"]
    negatives = hard_negatives(r.seed, STEP, inputs["samples"], similarity)
    of_text = torch.cat([own, own, negatives.captions])
    of_clip = torch.cat([own, negatives.clips, own])
    pairs, patches = merged(w, r, text[of_text], words[of_text], clips[of_clip])
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    losses["vtm"] = F.cross_entropy(plain.linear(w.of("matches"), pairs[:, 0]), labels)
    hidden = mask_words(
        r.seed, STEP, inputs["samples"], ids, inputs["attention_mask"], r.word_ratio,
        vocabulary=r.vocabulary,
    )  # fmt: skip
    text, _ = merged(w, r, plain.captions(w, r, hidden.ids, words), words, clips)
    known = hidden.labels >= 0
    logits = plain.predict_words(w.of("text"), text.flatten(0, 1)[hidden.positions[known]])
    losses["mlm"] = F.cross_entropy(logits, hidden.labels[known])
    losses["pem"] = entity_loss(w, r, pixels, mask, patches[: len(own)], counts)
    return losses


@pytest.mark.parametrize("fields", [{}, dict(mask_ratio=0.0), dict(mask_ratio=0.75)], ids=str)
def test_a_step_equals_plain_pytorch(fields):
    model = model_of(word_ratio=0.3, **fields)
    inputs, counts = batch(model), []
    # A clip in float64: the op normalises bytes with float32 constants.
    clip = {"video": plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std)}
    plain.assert_same_step(
        model, inputs | clip | {"step": STEP}, lambda w: plain_losses(model, inputs, w, counts)
    )
    assert {True, False} <= set(counts), "some clips count, some do not"


def test_rectangles():
    inside = prompting.rectangles(0, 0, torch.arange(500), 14, 14)
    area = inside.flatten(1).float().mean(1)
    assert area.min() > 0.25 and area.max() < 0.55 and area.std() > 0.04
    assert (inside.any(2).sum(1) * inside.any(1).sum(1) == inside.flatten(1).sum(1)).all()
    assert (inside.float().mean(0) > 0.01).all(), "every place is shown"
    tall = inside.any(2).sum(1) / inside.any(1).sum(1)
    assert tall.min() < 0.5 and tall.max() > 2
    assert torch.equal(inside[7], prompting.rectangles(0, 0, torch.tensor([7]), 14, 14)[0])


def test_a_rectangle_of_bytes_is_that_of_normalised_pixels():
    model = model_of()
    inputs = batch(model)
    clip = plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std).float()
    with torch.no_grad():
        one, other = (model(**inputs | {"video": x}, step=STEP) for x in (inputs["video"], clip))
    torch.testing.assert_close(one["pem"], other["pem"])


def test_entities_are_frequent_words():
    captions = ["A dog and the red dog, 2 dogs", "the red ball is on the grass", "grass"]
    assert prompting.frequent_entities(captions, 3) == ["dog", "grass", "red"]
    with pytest.raises(ValueError, match="need entities <= 5, the distinct words .*, got 6"):
        prompting.frequent_entities(captions, 6)


def test_the_prompter_is_the_teacher():
    captions = ["a red ring", "a blue ring and a dog", "the red dog", "a blue ring"]
    tokenizer = train_tokenizer([*captions, *prompting.TEMPLATES])
    fields = dict(vocabulary=vocabulary(tokenizer), entities=4)
    teacher, model = model_of(**fields, pem=0.0), model_of(**fields)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert teacher.taught and not model.taught
    model.teach(teacher.state_dict(), tokenizer, captions)
    assert model.taught
    teacher.eval()
    prompts = []
    with torch.no_grad():
        for entity in ("ring", "blue", "dog", "red"):  # by frequency
            texts = [template.format(entity) for template in prompting.TEMPLATES]
            rows = [
                F.normalize(teacher.embed_text(*tokenizer([text], 12)), dim=1) for text in texts
            ]
            prompts.append(F.normalize(torch.cat(rows).mean(0), dim=0))
        video = batch(model)["video"]
        expected = teacher.similarity(teacher.embed_clips(video), torch.stack(prompts)).softmax(1)
        torch.testing.assert_close(model.prompter(video), expected, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in model.prompter.parameters())
    with pytest.raises(ValueError, match="missing: .*project_clip|missing: bias, weight"):
        model.teach({"vision." + n: x for n, x in teacher.vision.state_dict().items()}, tokenizer,
                    captions)  # fmt: skip


def test_a_run_needs_its_teacher(tmp_path):
    with pytest.raises(ValueError, match="need start.teacher, a run of alpro with model.pem=0"):
        pretrain(config("alpro", tmp_path / "run"))
    pretrain(config("mac", tmp_path / "mac"), lambda training: {})
    with pytest.raises(ValueError, match="need start.teacher as a run of alpro, .* one of mac"):
        pretrain(config("alpro", tmp_path / "run", f"start.teacher={tmp_path / 'mac'}"))
    with pytest.raises(ValueError, match="a frozen model for start.teacher: alpro; got Mac"):
        pretrain(config("mac", tmp_path / "other", f"start.teacher={tmp_path / 'mac'}"))
    alone = ("model.pem=0", "model.vtm=0", "model.mlm=0", "schedule.steps=1")
    pretrain(config("alpro", tmp_path / "teacher", *alone), lambda training: {})
    many = (f"start.teacher={tmp_path / 'teacher'}", "model.entities=99")
    with pytest.raises(ValueError, match="need entities <= .*, got 99"):
        pretrain(config("alpro", tmp_path / "run", *many))


def test_base_is_the_published_one():
    r = models.recipe("alpro")
    assert (r.frames, r.image_size, r.grid, r.mask_ratio) == (4, 224, (4, 14, 14), 0)
    assert (r.width, r.depth, r.heads, r.text_layers, r.merge_layers) == (768, 12, 12, 6, 6)
    assert (r.word_ratio, r.temperature, r.entities, r.threshold) == (0.15, 0.07, 1000, 0.2)
    assert (r.vtc, r.vtm, r.mlm, r.pem, r.embed_dim) == (1, 1, 1, 1, 256)
    assert len(set(prompting.TEMPLATES)) == 12


@pytest.mark.parametrize("fields, complaint", [
    (dict(text_width=32), "need text_width=64, the width"),
    (dict(mask="frame"), "need mask 'tube'"),
    (dict(merge_layers=0), "need merge_layers >= 1 for vtm, mlm and pem"),
    (dict(threshold=1.5), r"need threshold in \[0, 1\]"),
    (dict(entities=0), "need entities >= 1"),
])  # fmt: skip
def test_errors(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        model_of(**fields)
