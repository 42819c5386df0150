"""Exported encoders: timm and transformers load them strictly and compute the same."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import fitting, randomise

from vidl import models
from vidl.data.text import train_tokenizer
from vidl.masking import Vocabulary
from vidl.models.export import export, text_weights, vision_options, vision_weights

SMALL = dict(image_size=32, width=64, heads=2, text_width=64, text_heads=2, dropout=0.0)
NAMES = ["mac", "smaug"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("safetensors")
    exported = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        model = randomise(models.create(name, "tiny", **SMALL)).eval()
        export(model, folder, tokenizer())
        exported[name] = model, folder
    return exported


TEXTS = ["A red circle moves left!", "two blue squares", "a zebra", "red " * 20]
PLAIN = """
import sys, timm, torch, transformers

folder, video, texts, out, pooler = sys.argv[1:]
texts = texts.split("|")
frames = torch.load(video)
vit = timm.create_model(f"local-dir:{folder}/vision", pretrained=True).eval()
facts = timm.data.resolve_model_data_config(vit)
mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/text")
inputs = tokenizer(
    texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
)
options = {"add_pooling_layer": False} if pooler == "True" else {}
bert = transformers.AutoModel.from_pretrained(f"{folder}/text", **options).eval()
with torch.no_grad():
    tokens = vit.forward_features((frames / 255 - mean) / std)
    hidden = bert(**inputs).last_hidden_state
assert "vidl" not in sys.modules
torch.save((facts["input_size"], tokens, dict(inputs), hidden, tokenizer.mask_token_id), out)
"""


def tokenizer():
    pytest.importorskip("tokenizers")
    return train_tokenizer(["a red circle moves left!", "two blue squares", "left right"])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_plain_timm_and_transformers_compute_the_same(exported, name, tmp_path):
    """In a process without vidl: from frames and texts to features."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    model, folder = exported[name]
    video = example(model)[0][:, :, :1]
    torch.save(video[:, :, 0], tmp_path / "frames.pt")
    arguments = [folder, tmp_path / "frames.pt", "|".join(TEXTS), tmp_path / "out.pt"]
    command = [sys.executable, "-c", PLAIN, *map(str, arguments), str(name == "smaug")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, tokens, inputs, hidden, mask_id = torch.load(tmp_path / "out.pt")
    assert size == (3, 32, 32) and mask_id == tokenizer().mask_id
    ids, mask = tokenizer()(TEXTS, 12)
    assert torch.equal(inputs["input_ids"], ids) and torch.equal(inputs["attention_mask"], mask)
    assert (ids == tokenizer().unk_id).sum() == 1  # the zebra
    ours = model.encode_text(ids, mask)
    torch.testing.assert_close(ours[mask.bool()], hidden[mask.bool()], rtol=1e-4, atol=1e-4)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    if name == "mac":  # timm has no temporal attention
        for block in model.vision.blocks:
            block.timeattn.proj.weight.zero_()
            block.timeattn.proj.bias.zero_()
        model.vision.temporal_embed.zero_()
        ours = model.vision(video)
    else:
        with model.unpruned():
            ours = model.vision(video).tokens
    model.load_state_dict(before)
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-4)


def example(model):
    torch.manual_seed(1)
    video = torch.randint(256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1000, 2000, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return video, ids, mask


def timm_of(folder):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    options = json.loads((folder / "vision/timm.json").read_text())
    mean, std = (torch.tensor(options.pop(key)).view(3, 1, 1) for key in ("mean", "std"))
    vit = timm.models.VisionTransformer(**options)
    vit.load_state_dict(load_file(folder / "vision/model.safetensors"))  # strict
    return vit.eval(), mean, std


@torch.no_grad()
def test_timm_equals_the_frame_encoder_of_smaug(exported):
    model, folder = exported["smaug"]
    vit, mean, std = timm_of(folder)
    video, _, _ = example(model)
    frames = (video.transpose(1, 2).flatten(0, 1) / 255 - mean) / std
    with model.unpruned():
        ours = model.vision(video).tokens
    torch.testing.assert_close(ours, vit.forward_features(frames), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_timm_equals_the_spatial_layers_of_mac(exported):
    """Without temporal attention, Frozen's block on one frame equals timm's."""
    model, folder = exported["mac"]
    vit, mean, std = timm_of(folder)
    video = example(model)[0][:, :, :1]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for block in model.vision.blocks:
        block.timeattn.proj.weight.zero_()
        block.timeattn.proj.bias.zero_()
    model.vision.temporal_embed.zero_()
    ours = model.vision(video)
    model.load_state_dict(before)
    frames = (video[:, :, 0] / 255 - mean) / std
    torch.testing.assert_close(ours, vit.forward_features(frames), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name, kind", [("smaug", "BertModel"), ("mac", "DistilBertModel")])
def test_transformers_equals_our_text_encoder(exported, name, kind):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    model, folder = exported[name]
    config = transformers.AutoConfig.from_pretrained(folder / "text")
    pooler = {"add_pooling_layer": False} if kind == "BertModel" else {}
    strict = getattr(transformers, kind)(config, **pooler)
    strict.load_state_dict(load_file(folder / "text/model.safetensors"))
    loaded = transformers.AutoModel.from_pretrained(folder / "text", **pooler).eval()
    assert type(loaded).__name__ == kind
    _, ids, mask = example(model)
    ours = model.encode_text(ids, mask)[mask.bool()]
    for theirs in (strict.eval(), loaded):
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(ours, hidden, rtol=1e-4, atol=1e-4)


def test_tubelets_are_not_exported(tmp_path):
    model = models.create("mac", "tiny", tubelet_size=2, **SMALL)
    with pytest.raises(ValueError, match="need tubelet_size 1: patches of timm's"):
        export(model, tmp_path, tokenizer())
    assert not list(tmp_path.iterdir())
    model = models.create("mac", "tiny", **SMALL, vocabulary=Vocabulary(7, 4, (0, 1, 2, 3, 4)))
    with pytest.raises(ValueError, match="need a tokenizer of at most 7 tokens, got"):
        export(model, tmp_path, tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_exported_weights_load_again(exported, name):
    model, _ = exported[name]
    torch.manual_seed(2)
    other = models.create(name, "tiny", **SMALL)
    other.vision.load_pretrained(vision_weights(model))
    state = model.vision.state_dict()
    for key in vision_weights(model):
        assert torch.equal(other.vision.state_dict()[key], state[key])
    if name == "mac":
        other.text.load_pretrained(text_weights(model))
        for key, value in model.text.state_dict().items():
            assert torch.equal(other.text.state_dict()[key], value)


# ALPRO and ClipBERT see several frames; OmniVL sees images or clips.
OF_CLIPS = [("alpro", 4), ("omnivl", 4), ("omnivl", 1), ("clipbert", 2)]
TINY = SMALL | dict(cnn="resnet18", stride=32, image_size=64)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    pytest.importorskip("safetensors")
    pytest.importorskip("timm")
    exported = {}
    for name, frames in OF_CLIPS:
        folder = tmp_path_factory.mktemp(name)
        model = models.create(name, "tiny", **fitting(name, TINY), frames=frames)
        exported[name, frames] = randomise(model).eval(), folder
        export(model, folder, tokenizer())
    return exported


@torch.no_grad()
@pytest.mark.parametrize("name, frames", OF_CLIPS[:2])
@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_equals_the_clip_encoder(others, name, frames, batch):
    """The order of tokens differs: CLS, then frame by frame, or place by place."""
    transformers = pytest.importorskip("transformers")
    model, folder = others[name, frames]
    theirs = transformers.AutoModel.from_pretrained(folder / "vision").eval()
    assert type(theirs).__name__ == "TimesformerModel"
    torch.manual_seed(1)
    video = torch.randint(256, (batch, 3, frames, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (model.recipe.mean, model.recipe.std))
    expected = theirs(((video / 255 - mean) / std).transpose(1, 2)).last_hidden_state
    ours = model.vision(video)
    patches = ours[:, 1:].unflatten(1, (frames, -1)).transpose(1, 2).flatten(1, 2)
    ours = torch.cat([ours[:, :1], patches], 1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "vision")
    pixels = processor(list(video[0].permute(1, 2, 3, 0).numpy()), return_tensors="pt")
    normalised = ((video[0] / 255 - mean) / std).transpose(0, 1)
    torch.testing.assert_close(pixels["pixel_values"][0], normalised)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_timm_equals_the_encoder_of_images(others, batch):
    """OmniVL after its first stage."""
    import timm

    model, folder = others["omnivl", 1]
    vit, mean, std = timm_of(folder)
    loaded = timm.create_model(f"local-dir:{folder}/vision", pretrained=True).eval()
    images = torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8)
    ours = model.vision(images)
    for theirs in (vit, loaded):
        expected = theirs.forward_features((images / 255 - mean) / std)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_timm_equals_the_cnn_of_clipbert(others, batch):
    import timm

    model, folder = others["clipbert", 2]
    cnn = timm.create_model(f"local-dir:{folder}/vision", pretrained=True).eval()
    assert not (folder / "vision/timm.json").exists()
    facts = timm.data.resolve_model_data_config(cnn)
    assert tuple(facts["input_size"]) == (3, 64, 64)
    assert tuple(facts["mean"]) == model.recipe.mean
    frames = torch.randn(batch, 3, 64, 64)
    ours = model.vision.cnn.forward_features(frames)
    torch.testing.assert_close(ours, cnn.forward_features(frames), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name, frames", OF_CLIPS[:3])
@pytest.mark.parametrize("batch", [1, 5])
def test_transformers_equals_the_text_layers(others, name, frames, batch):
    transformers = pytest.importorskip("transformers")
    model, folder = others[name, frames]
    bert = transformers.AutoModel.from_pretrained(folder / "text", add_pooling_layer=False).eval()
    assert len(bert.encoder.layer) == model.text.text_layers
    ids = torch.randint(1000, 2000, (batch, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    ours = model.encode_text(ids, mask)[mask.bool()]
    hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(ours, hidden, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_equals_the_encoder_of_words_and_places(others, batch):
    """BERT of ClipBERT on embedded words and the places of a view, with its pooler."""
    transformers = pytest.importorskip("transformers")
    model, folder = others["clipbert", 2]
    bert = transformers.AutoModel.from_pretrained(folder / "text").eval()
    places = torch.randn(batch, 1, 4, model.recipe.text_width)
    ids = torch.randint(1000, 2000, (batch, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    joint = model.join(places, model.encode_text(ids, mask), mask)
    x = torch.cat([bert.embeddings(input_ids=ids), places[:, 0]], 1)
    unseen = torch.cat([mask, torch.ones(batch, 4, dtype=torch.int64)], 1) == 0
    added = torch.zeros(batch, 1, 1, 10).masked_fill(unseen[:, None, None], -1e9)
    for layer in bert.encoder.layer:
        x = layer(x, added)
        x = x[0] if isinstance(x, tuple) else x
    torch.testing.assert_close(joint.pooled[:, 0], bert.pooler(x), rtol=1e-4, atol=1e-4)
    words = mask.bool()
    torch.testing.assert_close(joint.text[words], x[:, :6][words], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_system_is_exported_or_says_why_not(name, tmp_path):
    pytest.importorskip("safetensors")
    own = dict(embed_dim=64) if name == "simvtp" else {}
    model = models.create(name, "tiny", **fitting(name, TINY), **own)
    if name in NAMES or name in dict(OF_CLIPS):
        files = {file.relative_to(tmp_path) for file in export(model, tmp_path, tokenizer())}
        written = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
        assert files == written and len([f for f in files if f.suffix == ".safetensors"]) == 2
        return
    kind = type(model.vision).__name__
    with pytest.raises(
        ValueError, match=f"cannot export .*, got {kind}, .*; vidl.training.open_run"
    ):
        export(model, tmp_path, tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["alpro", "omnivl"])
def test_tubelets_of_a_timesformer_are_not_exported(name, tmp_path):
    model = models.create(name, "tiny", **fitting(name, TINY), tubelet_size=2)
    with pytest.raises(ValueError, match="need tubelet_size 1: .*TimesformerModel have one frame"):
        export(model, tmp_path, tokenizer())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="need a vision encoder for timm's VisionTransformer, got"):
        vision_options(model)
