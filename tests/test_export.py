"""Exported encoders: timm and transformers load them strictly and compute the same."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import randomise

from vidl import models
from vidl.data.text import train_tokenizer
from vidl.masking import Vocabulary
from vidl.models.export import export, text_weights, vision_weights

SMALL = dict(image_size=32, width=64, heads=2, text_width=64, text_heads=2, dropout=0.0)
NAMES = ["mac", "smaug"]  # others have encoders without a class in timm or transformers


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
