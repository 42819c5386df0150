"""ClipBERT: its CNN against torchvision's, a whole step against plain PyTorch, views, errors."""

import dataclasses

import plain
import pytest
import torch
import torch.nn.functional as F

from vidl import models
from vidl.masking import Vocabulary, mask_words
from vidl.models.learning import swap_half
from vidl.models.summary import flop_counter
from vidl.models.system import Inputs
from vidl.nn import GridFeatures

torchvision = pytest.importorskip("torchvision")

SIZES = dict(
    cnn="resnet18", stride=32, image_size=128, frames=2, views=2, views_tested=3, mask_ratio=0.25,
    text_width=64, text_layers=2, text_heads=2, dropout=0.0, aggregate="lse", word_ratio=0.4,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip
STEP = 3


def randomise(module):
    """No statistics of 0 and 1, and no weights of 0: residual branches count."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "bn" in name or "downsample.1" in name or "norm" in name:
            if name.endswith(("var", "weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return module


def model_of(**fields):
    torch.manual_seed(0)
    return randomise(models.create("clipbert", "tiny", **(SIZES | fields)))


def batch(model, B=5, words=7):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    inputs["attention_mask"][1, 4:] = 0
    inputs["attention_mask"][2, 6:] = 0
    return inputs


def cnn(w, name, frames):
    """The last feature map of torchvision's network with these weights."""
    network = getattr(torchvision.models, name)(weights=None).eval()
    network.avgpool = network.fc = torch.nn.Identity()
    flat = torch.func.functional_call(network, dict(w), (frames,))
    side = frames.shape[-1] // 32
    return flat.unflatten(1, (-1, side, side))


def grid(w, r, pixels, views, ids_keep=None):
    """The places of each view, one view after the other: [B, views, n, C]."""
    rows = []
    for clip in pixels:
        for number, view in enumerate(clip.transpose(0, 1).chunk(views)):
            maps = F.conv2d(cnn(w.of("cnn"), r.cnn, view), w["conv.weight"], padding=1)
            mean = F.max_pool2d(maps, 2).clamp(min=0).mean(0)
            places = [
                mean[:, i, j] + w["row_pos_embed"][i] + w["col_pos_embed"][j]
                + w["token_type_embeddings.weight"][0]
                for i in range(mean.shape[1]) for j in range(mean.shape[2])
            ]  # fmt: skip
            if ids_keep is not None:
                first = number * len(places)
                places = [
                    places[i - first] for i in ids_keep.tolist() if 0 <= i - first < len(places)
                ]
            rows.append(plain.norm(w.of("norm"), torch.stack(places), 1e-12))
    return torch.stack(rows).unflatten(0, (len(pixels), views))


def merged(w, r, text, words, clips):
    """The words after BERT; words first, as in the authors' code."""
    seen = torch.cat([words, torch.ones(clips.shape[:2], dtype=torch.bool)], 1)
    x = torch.cat([text, clips], 1)
    for number in range(r.text_layers):
        x = plain.bert_layer(w.of(f"text.encoder.layer.{number}"), x, r.text_heads, seen)
    return x[:, : text.shape[1]]


def swap_of(model, inputs):
    names = ("video", "ids", "attention_mask", "samples")
    return swap_half(model.recipe, Inputs(*(inputs[name] for name in names), STEP))


def plain_losses(model, inputs, w):
    r, ids, words = model.recipe, inputs["ids"], inputs["attention_mask"] != 0
    views = max(inputs["video"].shape[2] // r.frames, 1)
    mask = r.visual_mask(inputs["samples"], STEP, inputs["video"].shape[2])
    keep = None if mask is None else mask.ids_keep[0]
    clips = grid(w.of("vision"), r, plain.normalised(inputs["video"], r.mean, r.std), views, keep)
    partner, swapped = swap_of(model, inputs)
    assert swapped.any() and not swapped.all()
    hidden = mask_words(
        r.seed, STEP, inputs["samples"], ids, inputs["attention_mask"], r.word_ratio,
        vocabulary=r.vocabulary,
    )  # fmt: skip
    text = plain.bert_embeddings(w.of("text.embeddings"), hidden.ids)
    rows = [merged(w, r, text, words, clips[partner, view]) for view in range(views)]
    logits, average = [], sum(rows) / views
    for x in rows:
        pooled = plain.linear(w.of("pooler"), x[:, 0]).tanh()
        logits.append(plain.linear(w.of("matches"), pooled))
    logits, labels = torch.stack(logits, 1), 1 - swapped.long()  # [B, views, 2]
    if r.aggregate == "lse":  # as in the paper
        own = logits[torch.arange(len(ids)), :, labels]
        vtm = (logits.flatten(1).exp().sum(1).log() - own.exp().sum(1).log()).mean()
    else:
        scores = logits.mean(1) if r.aggregate == "mean" else logits.max(1).values
        vtm = F.cross_entropy(scores, labels)
    wanted = [
        (position, label)
        for position, label in zip(hidden.positions.tolist(), hidden.labels.tolist(), strict=True)
        if label >= 0 and not swapped[position // ids.shape[1]]
    ]
    positions, labels = map(torch.tensor, zip(*wanted, strict=True))
    words_at = plain.predict_words(w.of("text"), average.flatten(0, 1)[positions])
    return {"mlm": F.cross_entropy(words_at, labels), "vtm": vtm}


@pytest.mark.parametrize("fields", [
    {}, dict(views=1, frames=1, aggregate="max", mask_ratio=0.5),
    dict(aggregate="mean", mask_ratio=0.0, frames=1),
    pytest.param(dict(aggregate="max", mask="tube"), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_step_equals_plain_pytorch(fields):
    model = model_of(**fields)
    inputs = batch(model, 3)
    # A clip in float64: buffers of the model are rounded to float32.
    clip = {"video": plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std)}
    plain.assert_same_step(
        model, inputs | clip | {"step": STEP}, lambda w: plain_losses(model, inputs, w)
    )


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_weights_of_torchvision_load(name):
    theirs = randomise(getattr(torchvision.models, name)(weights=None).eval())
    state = theirs.state_dict()
    ours = GridFeatures(name, 32, mean=[0.5] * 3, std=[0.25] * 3)
    assert ours.load_pretrained(state) == ["fc.weight", "fc.bias"]
    frames = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = cnn({n: x for n, x in state.items() if not n.startswith("fc.")}, name, frames)
        torch.testing.assert_close(ours.cnn.forward_features(frames), expected)
    without = {n: x for n, x in state.items() if "num_batches" not in n}
    ours.load_pretrained({f"module.{n}": x for n, x in without.items()})
    with pytest.raises(ValueError, match="missing: conv1.weight"):
        ours.load_pretrained({n: x for n, x in without.items() if n != "conv1.weight"})


@pytest.mark.parametrize("head", [False, True])
def test_bert_loads_with_its_pooler(head):
    transformers = pytest.importorskip("transformers")
    sizes = transformers.BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    whole = transformers.BertForPreTraining(sizes).eval()
    bert = whole.bert
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model_of(mlm=0).eval()
    state = (whole if head else bert).state_dict()
    skipped = model.starts()["text"].load_pretrained(state)
    prefixes = tuple({name.split(".")[0] for name in skipped})
    assert prefixes == (("cls",) if head else ()) and not [n for n in skipped if "pooler" in n]
    clips = torch.randn(2, 2, 5, 64)  # [B, views, N, C]
    ids = torch.randint(5, 60, (2, 7))
    words = torch.ones_like(ids)
    words[1, 4:] = 0
    with torch.no_grad():
        pooled = model.join(clips, model.encode_text(ids, words), words).pooled
        text = bert.embeddings(input_ids=ids)
        for view in range(2):
            x = torch.cat([text, clips[:, view]], 1)
            unseen = torch.cat([words, torch.ones(2, 5, dtype=torch.int64)], 1) == 0
            added = torch.zeros(2, 1, 1, 12).masked_fill(unseen[:, None, None], -1e9)
            for layer in bert.encoder.layer:
                x = layer(x, added)
                x = x[0] if isinstance(x, tuple) else x
            torch.testing.assert_close(pooled[:, view], bert.pooler(x), rtol=1e-4, atol=1e-5)


def test_weights_without_a_pooler_keep_its_own():
    model = model_of(mlm=0)
    start, pooler = model.starts()["text"], model.pooler.weight.detach().clone()
    state = {name: x + 1 for name, x in model.text.state_dict().items()}
    assert start.load_pretrained(state) == []
    assert torch.equal(model.pooler.weight, pooler)
    name = "embeddings.LayerNorm.bias"
    assert torch.equal(model.text.state_dict()[name], state[name])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    more = {name: x + 1 for name, x in state.items()}
    for wrong, message in (
        ({"pooler.dense.weight": torch.zeros(64, 64)}, "do not fit Linear; missing: bias"),
        ({"pooler.dense.weight": torch.zeros(3, 64), "pooler.dense.bias": torch.zeros(3)},
         r"of another shape: bias \[3\], not \[64\], weight \[3, 64\]"),
        ({"pooler.other": torch.zeros(3)}, "unexpected: pooler.other"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            start.load_pretrained(more | wrong)
    with pytest.raises(ValueError, match="missing: embeddings.LayerNorm.bias"):
        fitting = {"pooler.dense.weight": torch.zeros(64, 64), "pooler.dense.bias": torch.zeros(64)}
        start.load_pretrained({n: x for n, x in more.items() if n != name} | fitting)
    after = model.state_dict()
    assert not [name for name, x in before.items() if not torch.equal(after[name], x)]


def test_bytes_are_normalised():
    model = model_of()
    video = batch(model)["video"]
    r = model.recipe
    with torch.no_grad():
        one, other = (model.encode_clips(x) for x in
                      (video, plain.normalised(video, r.mean, r.std).float()))  # fmt: skip
    torch.testing.assert_close(one, other)
    assert one.std() > 0.1


def test_statistics_of_batch_norms_stay():
    model = model_of().train()
    before = {n: x.clone() for n, x in model.vision.named_buffers()}
    model(**batch(model))["loss"].backward()
    assert len(before) > 40 and all(
        torch.equal(x, before[n]) for n, x in model.vision.named_buffers()
    )
    assert all(p.grad is not None and p.requires_grad for p in model.vision.cnn.parameters())


def test_base_is_the_published_one():
    r = models.recipe("clipbert")
    assert (r.frames, r.views, r.views_tested, r.image_size, r.grid) == (1, 1, 16, 768, (1, 12, 12))
    assert (r.visible, r.text_layers, r.text_width, r.text_heads) == (100, 12, 768, 12)
    assert (r.cnn, r.stride, r.word_ratio, r.mlm, r.vtm, r.aggregate) == (
        "resnet50", 32, 0.15, 1, 1, "lse"
    )  # fmt: skip
    assert models.recipe("clipbert", image_size=448, mask_ratio=0.0).visible == 49


def test_what_fewer_places_save():
    """The FLOPs of BERT are those of its words and places; the CNN sees all places."""
    words, counts = 30, {}
    for name, recipe in models.recipe("clipbert", cnn="test_resnet").variants().items():
        with torch.device("meta"):
            model = models.ClipBert(dataclasses.replace(recipe, text_layers=1, backend="torch"))
        with flop_counter() as flops:
            model.text.merge(
                torch.empty(2, words, 768, device="meta"), None,
                torch.empty(2, recipe.visible, 768, device="meta"),
            )  # fmt: skip
        counts[name] = 12 * flops.get_total_flops() / 2 / 1e9
    assert counts["dense"] == pytest.approx(30.7, abs=0.2)
    assert counts["masked"] == pytest.approx(22.7, abs=0.2)


def test_places_are_those_of_the_batch_and_of_the_step():
    r = models.recipe("clipbert", "tiny")
    one, other = (r.visual_mask(torch.arange(3), step) for step in (0, 1))
    assert one.ids_keep.shape == (3, 24) and (one.ids_keep == one.ids_keep[:1]).all()
    assert not torch.equal(one.ids_keep, other.ids_keep)
    assert one.grid == (2, 4, 4) and r.visual_mask(torch.arange(3), 0, 1).grid == (1, 4, 4)


def test_a_still_is_one_view():
    model = model_of(mask_ratio=0.0)
    video = batch(model)["video"]
    with torch.no_grad():
        still = model.encode_clips(video[:, :, :1])
        same = model.encode_clips(video[:, :, :1].expand(-1, -1, 4, -1, -1))
    assert still.shape[1] == 1 and same.shape[1] == 2
    torch.testing.assert_close(still[:, 0], same[:, 1])
    inputs = batch(model) | {"video": video[:, :, :1]}
    model(**inputs)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_partners_are_the_clips_of_captions():
    model = model_of().eval()
    inputs = batch(model)
    with torch.no_grad():
        clips = model.encode_clips(inputs["video"])
        text = model.encode_text(inputs["ids"], inputs["attention_mask"])
        partner = torch.tensor([1, 0, 0, 4, 2])
        mask = inputs["attention_mask"]
        one = model.match(clips, text, mask, partner)
        other = model.match(clips[partner], text, mask)
        torch.testing.assert_close(one, other)
        single = model.match(clips[:1], text[2:3], mask[2:3])
        torch.testing.assert_close(one[2:3], single)
        assert (one - model.match(clips, text, mask)).abs().max() > 1e-4


@pytest.mark.parametrize("fields, complaint", [
    (dict(image_size=160), "need image_size as a multiple of 64, twice the stride, got 160"),
    (dict(stride=4), "need stride among 8, 16, 32, got 4"),
    (dict(views=0), "need views >= 1"),
    (dict(views_tested=0), "need views_tested >= 1"),
    (dict(mask="clip"), "need mask 'frame' or 'tube'"),
    (dict(aggregate="sum"), "aggregate"),
    (dict(tubelet_size=2), "need tubelet_size=1"),
    (dict(cnn="resnet51"), "need cnn as the name of a ResNet in timm, .*51'; did you mean"),
    (dict(cnn="vit_tiny_patch16_224"), "need cnn as the name of a ResNet in timm, got 'vit_tiny"),
])  # fmt: skip
def test_errors_of_recipes(fields, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        model_of(**fields)


def test_errors_of_clips():
    model = model_of()
    inputs = batch(model)
    long = torch.zeros(1, 3, 8, 128, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="need video of at most 6 frames"):
        model.encode_clips(long)
    with pytest.raises(
        ValueError, match="need video of whole views of model.frames=2 frames, .* 3"
    ):
        model.encode_clips(long[:, :, :3])
    with pytest.raises(ValueError, match=r"need video \[B, 3, 4, H, W\]"):
        model(**inputs | {"video": inputs["video"][:, :, :2]})
    with pytest.raises(ValueError, match="need mask of .* places as video has"):
        model.encode_clips(long[:, :, :2], model.recipe.visual_mask(torch.arange(1), 0))
