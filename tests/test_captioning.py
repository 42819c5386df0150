"""Captioning: its loss against plain PyTorch, for all systems with the ability, and evaluation."""

import dataclasses
import json

import pytest
import torch
from test_evaluation import QUIET, Stored
from test_ranking import SIZES, VOCABULARY, plain_logits
from test_systems import NAMES, fields

from vidl import models
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.text import train_tokenizer
from vidl.evaluation import bleu, captioning, cider_d, rouge_l
from vidl.models import Captioning, Describes, can
from vidl.training.sources import vocabulary

ABLE = [name for name in NAMES if can(models.MODELS[name].model, Describes)]
TEXTS = ["a red ring moves left", "a ring", "the blue dog", ""]
TOKENIZER = train_tokenizer(TEXTS)
WORDS = vocabulary(TOKENIZER)


def tiny(name="smaug", layers=2, sizes=SIZES, **changed):
    torch.manual_seed(0)
    model = models.create(name, "tiny", **sizes | dict(vocabulary=WORDS, dropout=0.0) | changed)
    model = Captioning(model, TOKENIZER, layers=layers)
    for parameter in model.parameters():  # no trivial biases
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(model):
    r = model.recipe
    shape = (4, 3, r.frames, r.image_size, r.image_size)
    video = torch.randint(256, shape, dtype=torch.uint8)
    ids, mask = TOKENIZER(TEXTS, 9)
    return dict(video=video, ids=ids, attention_mask=mask, samples=torch.arange(4))


def plain_loss(model, inputs):
    """The mean loss of a word, one caption without padding after the other."""
    visible = model.recipe.visual_mask(inputs["samples"], 0, inputs["video"].shape[2])
    clips = model.model.described(model.encode_clips(inputs["video"], visible))
    losses = []
    for ids, mask, rows in zip(inputs["ids"], inputs["attention_mask"], clips, strict=True):
        ids = ids[mask.bool()]
        log_p = plain_logits(model.decoder, ids[:-1], rows).log_softmax(-1)
        losses += [-log_p[at, word] for at, word in enumerate(ids[1:])]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("words", [None, 24])
def test_the_loss_is_that_of_plain_pytorch(words):
    model = tiny()
    inputs = batch(model)
    losses, expected = model(**inputs, words=words), plain_loss(model, inputs)
    assert losses["caption"] is losses["loss"]
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, plain = (
        torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for loss in (losses["loss"], expected)
    )
    scale = max(float(x.abs().max()) for x in plain if x is not None)
    for name, one, other in zip(named, ours, plain, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * scale, msg=name)
    learning = {name for name, one in zip(named, ours, strict=True) if one is not None}
    assert {name for name in named if name.startswith("decoder.")} <= learning
    assert any(name.startswith("model.vision.") for name in learning)


@pytest.mark.parametrize("name", ABLE)
def test_every_system_learns_to_write_by_any_backend(name):
    """Losses and gradients are those of the reference, and captions too."""
    results = []
    for backend in ("reference", "native"):
        model = tiny(name, sizes=fields(name), backend=backend)
        assert model.decoder.visual_width == model.model.described_width
        torch.manual_seed(1)
        inputs = batch(model)
        model(**inputs)["loss"].backward()
        vision = [p.grad for p in model.model.vision.parameters() if p.grad is not None]
        assert vision and all(p.grad is not None for p in model.decoder.parameters())
        with torch.no_grad():
            model.eval()
            clips = model.encode_clips(inputs["video"])
            written = [model.generate(clips, 6, beams=beams) for beams in (1, 3)]
        results.append((vision, written))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_captions_are_the_most_probable_words():
    model = tiny().eval()
    inputs = batch(model)
    special = {TOKENIZER.pad_id, TOKENIZER.unk_id, TOKENIZER.cls_id, TOKENIZER.mask_id}
    with torch.no_grad():
        clips = model.encode_clips(inputs["video"])
        written = model.generate(clips, 6, beams=1, length_penalty=0.0)
        for ids, score, rows in zip(*written, model.model.described(clips), strict=True):
            text, total = [TOKENIZER.cls_id], 0.0
            while len(text) <= 6 and text[-1] != TOKENIZER.sep_id:
                logits = plain_logits(model.decoder, torch.tensor(text), rows)[-1]
                logits[list(special)] = -torch.inf
                total += float(logits.log_softmax(0).max())
                text.append(int(logits.argmax()))
            assert ids.tolist()[: len(text) - 1] == text[1:]
            assert not set(text[1:]) & special and float(score) == pytest.approx(total, rel=1e-4)


def test_captions_of_masked_and_shorter_clips():
    """Of the same clips with fewer visible patches."""
    model = tiny().eval()
    inputs = batch(model)
    with torch.no_grad():
        mask = model.recipe.visual_mask(inputs["samples"], 0)
        clips = model.encode_clips(inputs["video"], mask)
        assert (
            model.model.described(clips).shape[1]
            < model.model.described(model.encode_clips(inputs["video"])).shape[1]
        )
        assert model.generate(clips, 5).ids.shape == (4, 5)


def test_the_decoder_starts_with_the_text_encoder():
    torch.manual_seed(0)
    smaug = models.create("smaug", "tiny", **SIZES | dict(width=32, text_width=32))
    decoder = Captioning(smaug, TOKENIZER, layers=1).decoder.state_dict()
    text = smaug.text.state_dict()  # one text layer and one fusion layer
    for name in ("embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert torch.equal(decoder[name], text[name])
    name = "encoder.layer.{}.crossattention.self.key.weight"
    assert torch.equal(decoder[name.format(0)], text[name.format(1)])
    vlc = models.create("vlc", "tiny", **fields("vlc"))
    name = "embeddings.position_embeddings.weight"
    assert torch.equal(
        Captioning(vlc, TOKENIZER).decoder.state_dict()[name], vlc.text.state_dict()[name]
    )


def test_evaluation_of_captions():
    rows = [Row(f"{n // 2}.mp4", captions=[TEXTS[n % 3]]) for n in range(6)]
    data = Stored(rows, broken=["1.mp4"])
    data.tokenizer = TOKENIZER
    model = tiny(image_size=32)
    result = captioning(model, data, QUIET, beams=2)
    assert model.training
    assert [clip.media for clip in result.clips] == ["0.mp4", "1.mp4", "2.mp4"]
    references = [[TEXTS[n % 3], TEXTS[(n + 1) % 3]] for n in (0, 2, 4)]
    assert [clip.references for clip in result.clips] == references
    assert list(result.broken) == ["1.mp4"] and result.clips[1].caption == ""
    model.eval()
    for number in (0, 2):
        clip = data.read(Key(0, 2 * number)).pictures.permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            (ids,), _ = model.generate(model.encode_clips(clip), data.words - 1, beams=2)
        ids = ids.tolist()
        assert result.clips[number].caption == TOKENIZER.decode(ids)  # without special words
    captions = [clip.caption for clip in result.clips]
    for name, metric in (("bleu", bleu), ("rouge_l", rouge_l), ("cider_d", cider_d)):
        assert getattr(result, name) == 100 * metric(captions, references)
    stored = json.loads(result.to_json())
    assert stored["clips"][1] == dict(media="1.mp4", caption="", references=references[1])
    assert str(result).startswith("3 clips: BLEU-4 ") and "1 clip could not be read" in str(result)
    short = captioning(model, data, QUIET, words=1, beams=1)
    assert all(len(clip.caption.split()) <= 1 for clip in short.clips)


def test_a_perfect_decoder_has_the_best_scores(monkeypatch):
    rows = [Row(f"{n}.mp4", captions=[text]) for n, text in enumerate(TEXTS[:3])]
    data = Stored(rows)
    data.tokenizer = TOKENIZER
    model = tiny(image_size=32)
    right = TOKENIZER(TEXTS[:3], 9)[0][:, 1:]
    monkeypatch.setattr(
        Captioning, "generate", lambda *a, **o: models.captioning.Written(right, torch.zeros(3))
    )
    result = captioning(model, data, QUIET)
    assert result.bleu == result.rouge_l == pytest.approx(100) and result.cider_d > 300


def test_arguments():
    model = tiny()
    inputs = batch(model)
    long = dict(ids=torch.ones(4, 600).long(), attention_mask=torch.ones(4, 600))
    with pytest.raises(ValueError, match="need ids of at most 512 words, the positions of the d"):
        model(**inputs | long)
    clips = model.encode_clips(inputs["video"])
    with pytest.raises(ValueError, match="need words of at most 512, the positions .*, got 513"):
        model.generate(clips, 513)
    names = ", ".join(ABLE)
    with pytest.raises(ValueError, match=f"need a model that gives a decoder .*: {names}; got Mac"):
        Captioning(models.create("mac", "tiny"), TOKENIZER)
    assert set(ABLE) == set(NAMES) - {"mac"}
    few = dataclasses.replace(VOCABULARY, size=3, special=(0,), mask=1)
    with pytest.raises(ValueError, match="need a tokenizer of at most 3 tokens, .* got token 3"):
        Captioning(models.create("smaug", "tiny", **SIZES | dict(vocabulary=few)), TOKENIZER)
    data = Stored([Row("1.mp4", question="what?", answer="yes")])
    with pytest.raises(ValueError, match="need a caption of every clip, got none of 1.mp4"):
        captioning(model, data, QUIET)
