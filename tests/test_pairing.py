"""Pairs of clips: the loss against plain PyTorch, moving shapes, rows, the command line."""

import dataclasses
import json

import plain
import pytest
import torch
import torch.nn.functional as F
from test_evaluation import QUIET
from test_systems import NAMES, fields

from vidl import models
from vidl.cli import main
from vidl.data import annotations
from vidl.data.dataset import Clips
from vidl.data.formats import Row
from vidl.data.moving_shapes import MOTIONS, MovingShapes, caption_of
from vidl.data.sampler import Key
from vidl.data.sharding import write_shards
from vidl.data.shards import captions_of
from vidl.data.text import train_tokenizer
from vidl.data.video import BrokenClip
from vidl.evaluation import Options, multiple_choice, pairs_of_clips, retrieval
from vidl.masking import VisualMask, Vocabulary
from vidl.models import Joins, Pairing, can
from vidl.training import Config, open_run, pretrain

ABLE = [name for name in NAMES if can(models.MODELS[name].model, Joins)]


def tiny(name, **changed):
    torch.manual_seed(0)
    sizes = fields(name) | dict(vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), dropout=0.0)
    model = Pairing(models.create(name, "tiny", **(sizes | changed)))
    assert not model.second.any(), "both clips are of the same type at first"
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(model, B=3):
    r = model.recipe
    shape = (B, 3, 2 * r.training_frames, r.image_size, r.image_size)
    ids = torch.randint(5, 60, (B, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return dict(video=torch.randint(256, shape, dtype=torch.uint8), ids=ids, attention_mask=mask,
                samples=torch.arange(B), labels=torch.arange(B) % 2 == 0)  # fmt: skip


def plain_logits(model, inputs, mask):
    """One sentence without padding and one clip after the other."""
    w, system, logits = plain.Weights(model.state_dict()), model.model, []
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        ids = inputs["ids"][b : b + 1, :length]
        pooled = []
        for number, clip in enumerate(inputs["video"][b : b + 1].chunk(2, 2)):
            own = None
            if mask is not None:
                ids_of = (mask.ids_keep[b : b + 1], mask.ids_mask[b : b + 1])
                own = VisualMask(*ids_of, mask.grid)
            tokens = system.encode_clips(clip, own) + number * w["second"]
            text = system.encode_text(ids, torch.ones_like(ids))
            pooled.append(system.join(tokens, text, torch.ones_like(ids)).pooled)
        hidden = plain.linear(w.of("head.0"), torch.cat(pooled, -1))
        hidden = F.gelu(plain.norm(w.of("head.1"), hidden, 1e-5))
        logits.append(system.over_views(plain.linear(w.of("head.3"), hidden)))
    return torch.cat(logits)


@pytest.mark.parametrize("name", ABLE)
def test_the_loss_is_that_of_plain_pytorch(name):
    model = tiny(name).eval()
    inputs = batch(model)
    with torch.no_grad():
        mask = model.recipe.visual_mask(inputs["samples"], 0)
        logits = plain_logits(model, inputs, mask)
        losses = model(**inputs)
        expected = F.cross_entropy(logits, inputs["labels"].long())
        torch.testing.assert_close(losses["pair"], expected, rtol=1e-4, atol=1e-5)
        assert losses["loss"] is losses["pair"]
        counted = model(**inputs, words=20)
        torch.testing.assert_close(counted["pair"], expected, rtol=1e-4, atol=1e-5)
        # The order of the clips counts, and each sentence has its own pair.
        clips = model.encode_clips(inputs["video"])
        text = model.encode_text(inputs["ids"], inputs["attention_mask"])
        own = model.compare(clips, text, inputs["attention_mask"])
        partner = torch.tensor([2, 0, 0])
        other = model.compare(clips, text, inputs["attention_mask"], partner)
        alone = model.compare(clips[partner], text, inputs["attention_mask"])
        torch.testing.assert_close(other, alone, rtol=1e-4, atol=1e-5)
        exchanged = torch.cat(inputs["video"].chunk(2, 2)[::-1], 2)
        reverse = model.compare(model.encode_clips(exchanged), text, inputs["attention_mask"])
        assert (own - reverse).abs().max() > 1e-3 and (own - other).abs().max() > 1e-3


def test_what_pairs_train():
    model = tiny("vlc")
    model(**batch(model))["loss"].backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"second", "head.0.weight", "model.pooler.weight"} <= names
    assert not [n for n in names if n.startswith(("model.matches", "model.decoder"))]
    assert not [n for n, p in model.named_parameters() if n in names and p.grad is None]


def test_vlc_has_a_norm_in_its_head_of_answers():
    heads = {name: models.Answering(tiny(name).model, ["a", "b", "c"]).head for name in ABLE}
    kinds = {name: [type(layer).__name__ for layer in head] for name, head in heads.items()}
    assert kinds.pop("vlc") == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert all(kind == ["Linear", "GELU", "Linear"] for kind in kinds.values())


@pytest.mark.parametrize("name", ["vlc", "smaug"])
def test_a_pair_of_images(name):
    """VLC sees each as one frame, SMAUG as a clip of equal frames."""
    model = tiny(name, frames=2).eval()
    inputs = batch(model)
    images = inputs["video"][:, :, :2]
    whole = images.repeat_interleave(1 if name == "vlc" else 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_clips(images), model.encode_clips(whole))
        model(**inputs | {"video": images})


def changed(actor, number):
    motions = list(actor.motions)
    motions[number] = MOTIONS[MOTIONS.index(motions[number]) ^ 1]
    return dataclasses.replace(actor, motions=tuple(motions))


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_pairs_of_moving_shapes(difficulty):
    options = dict(difficulty=difficulty, frames=2, size=16)
    data = MovingShapes("train", 200, task="pair", **options)
    labels, words = [], set()
    for index in range(len(data)):
        row = data.row(index)
        first, second = data.actors(index), data.actors(index, second=True)
        (sentence,) = row.captions
        holds = sentence == " and ".join(map(caption_of, (first, second)))
        assert row.label == holds and row.media != row.second
        labels.append(row.label)
        words |= set(sentence.replace(",", "").split())
        if not holds:  # one motion is reversed
            both = [first, second]
            variants = [
                [[changed(actor, k) if actor is reverse else actor for actor in actors]
                 for actors in both]
                for actors in both for reverse in actors for k in range(len(reverse.motions))
            ]  # fmt: skip
            assert sentence in [" and ".join(map(caption_of, clips)) for clips in variants]
    assert 70 < sum(labels) < 130
    captions = MovingShapes("train", 200, **options)
    known = {word for index in range(200) for word in
             captions.caption(index).replace(",", "").split()}  # fmt: skip
    assert words <= known
    pictures = data.read(Key(0, 3)).pictures
    assert pictures.shape == (4, 16, 16, 3)
    assert torch.equal(pictures[:2], captions.read(Key(0, 3)).pictures)
    assert not torch.equal(pictures[:2], pictures[2:])


def test_rows_of_pairs(tmp_path):
    entry = {"video": "a.mp4", "second": "b.mp4", "caption": "both", "label": True}
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([entry, entry | {"label": "False", "second": "c.mp4"}]))
    rows = annotations.load((file, tmp_path))
    assert rows[1] == Row(f"{tmp_path}/a.mp4", captions=["both"], second=f"{tmp_path}/c.mp4",
                          label=False)  # fmt: skip
    assert rows[0].label is True and rows.pairs().all()
    table = tmp_path / "pairs.csv"
    table.write_text("video,second,caption,label\na.mp4,b.mp4,both,true\nc.mp4,,alone,7\n")
    rows = annotations.load((table, tmp_path))
    assert rows.pairs().tolist() == [True, False] and rows[0].label is True
    lines = tmp_path / "train.json"
    nlvr2 = {"identifier": "train-10-0-1", "sentence": "two dogs", "label": "True"}
    more = json.dumps(nlvr2 | {"directory": 62})
    lines.write_text(f"{json.dumps(nlvr2)}\n{more}\n")
    assert annotations.convert(lines, tmp_path / "n.arrow", format="nlvr2") == 2
    first, second = annotations.load((tmp_path / "n.arrow", "images"))
    assert first == Row("images/train-10-0-img0.png", "image", "train-10-0-1", ["two dogs"],
                        second="images/train-10-0-img1.png", label=True)  # fmt: skip
    assert second.second == "images/62/train-10-0-img1.png"


@pytest.mark.parametrize("change, complaint", [
    (dict(label=None), "need label as true or false in a row with second, got None"),
    (dict(label="yes"), "need label as true or false in a row with second, got 'yes'"),
    (dict(caption=["a", "b"]), "need one caption in a row with second, got 2"),
    (dict(start=1.0), "need a row with second without start and end"),
    (dict(second=""), "need second as a non-blank text"),
    (dict(second="../b.mp4"), "need files below the folder of the media, got '../b.mp4'"),
    (dict(second="http://host/b.mp4"), "need files below the folder .*vidl opens no URLs"),
])  # fmt: skip
def test_wrong_rows_of_pairs(change, complaint, tmp_path):
    entry = {"video": "a.mp4", "second": "b.mp4", "caption": "both", "label": True} | change
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=complaint):
        annotations.load((tmp_path / "pairs.json", tmp_path))


def test_both_clips_are_read_and_a_broken_one_is_named(tmp_path):
    pytest.importorskip("av")
    from clips import write_video

    for name, size in (("a", (48, 48)), ("b", (64, 40))):
        write_video(tmp_path / f"{name}.mp4", 6, size=size)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    rows = [Row(str(tmp_path / f"{one}.mp4"), captions=["both"], second=str(tmp_path / other),
                label=label) for one, other, label in
            (("a", "b.mp4", True), ("b", "a.mp4", False), ("a", "c.mp4", True))]  # fmt: skip
    tokenizer = train_tokenizer(["both"])
    options = dict(frames=2, size=32, tokenizer=tokenizer, words=7)
    data = Clips(rows, train=False, **options)
    one, other = (data.read(Key(0, index)).pictures for index in (0, 1))
    assert torch.equal(one[:2], other[2:]) and torch.equal(one[2:], other[:2])
    assert Clips(rows, train=True, **options).read(Key(0, 0)).pictures.shape == (4, 32, 32, 3)
    model = tiny("vlc", frames=2)
    result = pairs_of_clips(model, data, QUIET)
    assert result.questions == 3 and list(result.broken) == [str(tmp_path / "c.mp4")]
    with torch.no_grad():
        model.eval()
        clips = model.encode_clips(torch.stack([one, other]).permute(0, 4, 1, 2, 3))
        ids, mask = tokenizer(["both"] * 2, 7)
        holds = model.compare(clips, model.encode_text(ids, mask), mask).argmax(1)
    assert result.right == int((holds == torch.tensor([1, 0])).sum())
    with pytest.raises(ValueError, match="need masked=False for pairs of clips"):
        pairs_of_clips(model, data, Options(masked=True))
    with pytest.raises(ValueError, match="need a caption, second and label in each row of pairs"):
        pairs_of_clips(model, Clips([Row("a.mp4", captions=["x"])], train=False, **options), QUIET)


def test_pairs_are_refused_where_one_clip_is_needed(tmp_path):
    """Only the first clip would be read, with a sentence about both."""
    pytest.importorskip("av")
    one, both = Row("a.png", "image", captions=["x"]), Row("b.png", "image", captions=["y"],
                                                           second="c.png", label=True)  # fmt: skip
    with pytest.raises(ValueError, match="of one clip to write shards, got .* second: b.png"):
        write_shards([one, both], tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    options = dict(frames=2, size=32, train=False, tokenizer=train_tokenizer(["x"]))
    with pytest.raises(ValueError, match="of one clip or of two clips, not both, got .*: b.png"):
        Clips([one, both], **options)
    model = tiny("vlc").model
    for evaluate in (retrieval, multiple_choice):
        with pytest.raises(ValueError, match="need rows of one clip, got one with second .*b.png"):
            evaluate(model, Clips([both], **options), QUIET)
    raw = {"json": json.dumps({"caption": "y", "second": "c.png", "label": True}), "txt": b"y"}
    with pytest.raises(BrokenClip, match="need a sample of one clip, got json with second"):
        captions_of(raw, "b")


def test_a_preview_shows_both_clips(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("av")
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    entry = {"image": "a.png", "second": "b.png", "caption": "both", "label": True}
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    out = tmp_path / "preview.png"
    sizes = ["--frames", "1", "--size", "32", "--out", str(out)]
    assert main(["data", "preview", str(tmp_path / "pairs.json"), *sizes]) == 0
    assert Image.open(out).size == (36, 16 + 2 * 36)


TINY = [
    "model.image_size=32", "model.frames=2", "model.width=32", "model.heads=2", "model.depth=1",
    "model.text_width=32", "model.text_heads=2", "model.patch_size=8", "model.decoder_width=32",
    "data.source=moving_shapes", "data.clips=20", "data.words=24", "data.batch_size=4",
    "data.workers=0", "evaluation.pairs=6", "schedule.steps=1", "schedule.warmup=1",
    "run.threads=1", "run.device=cpu", "run.log_every=1", "model.name=vlc",
]  # fmt: skip


def test_a_run_of_pairs(tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    pretrain(Config.read(None, [*TINY, f"run.folder={base}"]), lambda training: {})
    command = ["finetune", "pair", "--weights", str(base)]
    assert main([*command, f"run.folder={run}", "schedule.steps=2", "optimizer.lr=1e-3"]) == 0
    assert main(["eval", "pair", "--weights", str(run), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["questions"] == 6
    assert isinstance(open_run(run).model, Pairing)
    for wrong, complaint in (
        (["eval", "pair", "--weights", str(base)], "need a run of `vidl finetune pair`, got Vlc"),
        (["eval", "retrieval", "--weights", str(run)], "need a run for retrieval, got Pairing"),
        ([*command, "data.source=shards", "data.files=[a.tar]", f"run.folder={tmp_path}/x"],
         "need data.source clips or moving_shapes for pairs, got shards"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(wrong) == 1
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "pair", "--weights", str(run), "--masked"])
    assert "--masked is not for pair" in capsys.readouterr().err
    # It goes on from the weights of another run of pairs.
    more = ["finetune", "pair", "--weights", str(run), f"run.folder={tmp_path}/more"]
    assert main([*more, "schedule.steps=1"]) == 0


def test_errors():
    mac = models.create("mac", "tiny", **fields("mac"))
    able = ", ".join(ABLE)
    with pytest.raises(ValueError, match=f"to compare two clips: {able}; got Mac"):
        Pairing(mac)
    model = tiny("vlc")
    inputs = batch(model)
    with pytest.raises(ValueError, match="need video with the frames of two clips"):
        model(**inputs | {"video": inputs["video"][:, :, :3]})
    with pytest.raises(TypeError, match="need labels in bool"):
        model(**inputs | {"labels": inputs["labels"].long()})
    with pytest.raises(ValueError, match=r"need labels \[3\]"):
        model(**inputs | {"labels": inputs["labels"][:2]})


def test_the_example_of_pairs(tmp_path):
    from test_systems import ROOT

    rows = annotations.load(ROOT / "examples" / "pairs.json")
    assert rows.pairs().all() and len(rows) == 24
    assert sum(row.label for row in (rows[i] for i in range(24))) == 12
