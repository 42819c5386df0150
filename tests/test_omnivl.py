"""OmniVL: a whole step against plain PyTorch, its two stages, its queue, and its decoder."""

import plain
import pytest
import torch
import torch.nn.functional as F
from gloo import on_two_ranks
from safetensors.torch import load_file

from vidl import models
from vidl.data.text import train_tokenizer
from vidl.masking import Vocabulary
from vidl.models.omnivl import numbers_of
from vidl.nn import Bert
from vidl.objectives import hard_negatives
from vidl.training import Config, checkpoints, pretrain
from vidl.training.sources import vocabulary

SIZES = dict(
    frames=4, image_size=32, patch_size=8, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    text_layers=1, fusion_layers=2, writer_layers=2, embed_dim=16, dropout=0.0,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip
STEP, B = 3, 5


def model_of(**fields):
    torch.manual_seed(0)
    model = models.create("omnivl", "tiny", **(SIZES | fields))
    for name, parameter in model.named_parameters():  # they begin at zero
        if "temporal_fc" in name or name.endswith(("time_embed", "cls_token")):
            torch.nn.init.normal_(parameter, std=0.3)
    if model.recipe.queue:  # other weights than those of the encoders
        for parameter in model.momentum.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(model, still=False, words=7):
    """The texts of the samples 0 and 3 are equal up to padding; 1 and 4 show the same clip."""
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    inputs["ids"][3, :5] = inputs["ids"][0, :5]
    inputs["attention_mask"][0, 5:] = 0
    inputs["attention_mask"][3, 5:] = 0
    video = inputs["video"][:, :, :1] if still else inputs["video"]
    pixels = plain.normalised(video, model.recipe.mean, model.recipe.std)
    clip_ids = torch.tensor([5, 6, 7, 8, 6])
    return inputs | {"video": pixels, "step": STEP, "clip_ids": clip_ids}


EQUAL = [(0, 3), (3, 0), (1, 4), (4, 1), *((i, i) for i in range(B))]


def cosines(v, t, temperature):
    return F.normalize(v, dim=1) @ F.normalize(t, dim=1).T / temperature


def positives(similarity, equal):
    """The mean over queries of the mean of -log softmax at equal keys."""
    log = similarity.log_softmax(1)
    means = []
    for i in range(len(similarity)):
        means.append(torch.stack([-log[i, j] for j in range(log.shape[1]) if (i, j) in equal]))
    return torch.stack([x.mean() for x in means]).mean()


def encoded(w, r, inputs, mask):
    """Tokens of clips and captions, and the features of both."""
    still = inputs["video"].shape[2] == 1
    visible = None if mask is None else mask.ids_keep
    clips = plain.timesformer(w.of("vision"), r.heads, inputs["video"], visible, still)
    text = plain.captions(w, r, inputs["ids"], inputs["attention_mask"] != 0)
    v = plain.linear(w.of("project_clip"), clips[:, 0])
    return clips, text, v, plain.linear(w.of("project_text"), text[:, 0])


def written(w, r, ids, words, rows):
    """Language modelling: one caption after the other, without padding."""
    losses = []
    for b in range(len(ids)):
        text = ids[b][words[b]][None]
        seen = torch.ones(text.shape[1] - 1, text.shape[1] - 1, dtype=torch.bool).tril()[None]
        x = plain.bert_embeddings(w.of("embeddings"), text[:, :-1])
        for number in range(r.writer_layers):
            layer = w.of(f"encoder.layer.{number}")
            x = plain.bert_attention(layer.of("attention"), x, x, r.text_heads, seen)
            cross = layer.of("crossattention")
            x = plain.bert_attention(cross, x, rows[b : b + 1], r.text_heads, None)
            hidden = F.gelu(plain.linear(layer.of("intermediate.dense"), x))
            out = plain.linear(layer.of("output.dense"), hidden)
            x = plain.norm(layer.of("output.LayerNorm"), x + out, 1e-12)
        logits = plain.predict_words(w, x[0])
        losses.append(F.cross_entropy(logits, text[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


def plain_losses(model, inputs, w, earlier=None):
    r, ids, words = model.recipe, inputs["ids"], inputs["attention_mask"] != 0
    own = torch.arange(B)
    mask = r.visual_mask(inputs["samples"], STEP, inputs["video"].shape[2])
    clips, text, v, t = encoded(w, r, inputs, mask)
    temperature, equal = w["contrast.temperature"], EQUAL
    slow_v, slow_t = v, t
    if r.queue:
        _, _, slow_v, slow_t = (x.detach() for x in encoded(w.of("momentum"), r, inputs, mask))
        slow_v, slow_t = (
            torch.cat([F.normalize(x, dim=1), x_earlier])
            for x, x_earlier in zip((slow_v, slow_t), earlier[:2], strict=True)
        )
        equal = equal + [(i, B + j) for i in range(B) for j in earlier[2][i]]
    losses = {"vtc": (positives(cosines(v, slow_t, temperature), equal)
                      + positives(cosines(t, slow_v, temperature), equal)) / 2}  # fmt: skip
    kinds = torch.tensor([0, 1, 2, 0, 1])
    similarity = cosines(v, t, temperature)
    negatives = hard_negatives(r.seed, STEP, inputs["samples"], similarity, kinds)
    of_text = torch.cat([own, own, negatives.captions])
    of_clip = torch.cat([own, negatives.clips, own])
    pairs = plain.fused(w, r, text[of_text], words[of_text], clips[of_clip])
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    losses["vtm"] = F.cross_entropy(plain.linear(w.of("matches"), pairs[:, 0]), labels)
    losses["lm"] = written(w.of("decoder"), r, ids, words, clips)
    return losses


@pytest.mark.parametrize("fields, still", [
    ({}, False), ({}, True), (dict(mask_ratio=0.0), False), (dict(tubelet_size=2), False),
    (dict(tubelet_size=2, mask_ratio=0.75), True), (dict(frames=1), True),
], ids=str)  # fmt: skip
def test_a_step_equals_plain_pytorch(fields, still):
    model = model_of(**fields)
    inputs = batch(model, still)
    plain.assert_same_step(model, inputs, lambda w: plain_losses(model, inputs, w))
    if still and model.recipe.frames > 1:  # for DDP and FSDP2
        unused = [p for n, p in model.named_parameters() if "temporal" in n or "patch_embed" in n]
        assert unused and all(p.grad is not None and not p.grad.any() for p in unused)


def test_a_step_with_a_queue_equals_plain_pytorch():
    model = model_of(queue=7).double()
    queue = model.contrast.queue
    torch.manual_seed(2)
    v, t = (F.normalize(torch.randn(3, 16).double(), dim=1) for _ in range(2))
    inputs = batch(model)
    words = numbers_of(inputs["ids"], inputs["attention_mask"])
    # The first has the text of the samples 0 and 3, the second the clip of 1 and 4.
    ids = torch.stack([torch.tensor([1, 6, 2]), words[[0, 2, 2]] + torch.tensor([0, 1, 2])], 1)
    queue.push(v, t, ids)
    earlier = (v, t, [[0], [1], [], [0], [1]])
    plain.assert_same_step(model, inputs, lambda w: plain_losses(model, inputs, w, earlier))
    assert int(queue.pushed) == 3 + B and queue.ids[3:, 0].tolist() == [5, 6, 7, 8]


def test_numbers_of_texts():
    ids = torch.randint(5, 30000, (2000, 12))
    mask = torch.ones_like(ids)
    numbers = numbers_of(ids, mask)
    assert len(set(numbers.tolist())) == 2000
    padded = torch.cat([ids, torch.randint(9, (2000, 3))], 1)
    of_padded = numbers_of(padded, torch.cat([mask, torch.zeros(2000, 3, dtype=mask.dtype)], 1))
    assert torch.equal(of_padded, numbers)
    order = numbers_of(ids.flip(1), mask)
    assert not (order == numbers).any()


def test_the_second_stage_begins_with_the_first():
    """Features of images are equal, and those of a clip of equal frames are those of its frame."""
    torch.manual_seed(0)
    first = models.create("omnivl", "tiny", **(SIZES | dict(frames=1))).eval()
    frozen = {name for name, p in first.named_parameters() if not p.requires_grad}
    assert frozen and all("temporal" in n or "time_embed" in n or "patch_embed" in n
                          for n in frozen)  # fmt: skip
    for parameter in first.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for fields in ({}, dict(tubelet_size=2), dict(queue=6)):
        torch.manual_seed(1)
        second = models.create("omnivl", "tiny", **(SIZES | fields)).eval()
        second.load_state_dict(second.resized(first.state_dict()))
        second.begin()
        assert all(p.requires_grad for n, p in second.named_parameters() if "momentum" not in n)
        image = torch.randn(2, 3, 1, 32, 32)
        with torch.no_grad():
            expected = first.encode_clips(image)
            torch.testing.assert_close(second.encode_clips(image), expected)
            x = second.encode_clips(image.expand(-1, -1, 4, -1, -1))
            torch.testing.assert_close(x[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
            frames = x[:, 1:].unflatten(1, (-1, 16))
            torch.testing.assert_close(
                frames, expected[:, None, 1:].expand_as(frames), rtol=1e-4, atol=1e-5
            )
            if fields.get("queue"):
                slow = second.momentum.vision(image)
                torch.testing.assert_close(slow, expected)
                assert int(second.contrast.queue.pushed) == 0


def run(folder, *more):
    fields = [f"model.{n}={v}" for n, v in SIZES.items() if n not in ("vocabulary", "backend")]
    data = ["data.source=moving_shapes", "data.clips=16", "data.words=12", "data.batch_size=4",
            "data.workers=0", "evaluation.pairs=4", "schedule.steps=2", "schedule.warmup=1",
            "run.threads=1", "run.device=cpu", "model.name=omnivl"]  # fmt: skip
    return Config.read(None, [*data, *fields, f"run.folder={folder}", *more])


def test_two_stages_as_runs(tmp_path):
    """A run on single frames, and one on clips with its weights; noise never enters the queue."""
    first = pretrain(run(tmp_path / "first", "model.frames=1"), lambda training: {})
    assert first["finished"]
    states, name = [], "blocks.0.attn.qkv.weight"

    def keep(training):
        model = training.model
        parts = (model.momentum.vision.get_parameter(name), model.vision.get_parameter(name))
        states.append(
            (int(model.contrast.queue.pushed), *(part.detach().clone() for part in parts))
        )
        return {}

    more = (
        "model.queue=8",
        "model.momentum=0.5",
        "optimizer.lr=0.01",
        f"start.model={tmp_path / 'first'}",
        "evaluation.every=1",
    )
    assert pretrain(run(tmp_path / "second", *more), keep)["finished"]
    assert [pushed for pushed, *_ in states] == [4, 8]
    weights = load_file(checkpoints.newest(tmp_path / "first") / "model.safetensors")
    expected = weights[f"vision.{name}"]
    for _, slow, own in states:
        expected = (expected + own) / 2
        torch.testing.assert_close(slow, expected)


def test_a_queue_fits_the_data(tmp_path):
    with pytest.raises(ValueError, match="need model.queue=0, or from 4, .*, to 16, .*, got 17"):
        pretrain(run(tmp_path / "run", "model.queue=17"))
    with pytest.raises(ValueError, match="need model.queue=0, or from 4, .*, got 3"):
        pretrain(run(tmp_path / "run", "model.queue=3"))


def test_the_generation_decoder_begins_with_bert_and_writes_captions():
    texts = ["a red ring", "a blue dog", "the dog"]
    tokenizer = train_tokenizer(texts)
    words = vocabulary(tokenizer)
    model = model_of(vocabulary=words)
    bert = Bert(words.size, 64, 3, 0, 2)
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter)
    assert model.starts()["text"].load_pretrained(bert.state_dict()) == []
    query = "encoder.layer.{}.attention.self.query.weight"
    own, theirs = model.state_dict(), bert.state_dict()
    assert torch.equal(own[f"text.{query.format(2)}"], theirs[query.format(2)])
    assert torch.equal(own[f"decoder.{query.format(0)}"], theirs[query.format(1)])
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(own[f"decoder.{name}"], theirs[name])
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter)
    captioning = models.Captioning(model, tokenizer, layers=2)
    weights = model.decoder.state_dict()
    assert weights and all(
        torch.equal(x, weights[name]) for name, x in captioning.decoder.state_dict().items()
    )


class Losses(torch.nn.Module):
    """The loss of a model as the only output of a module, for DDP."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)["loss"]


def shared_steps(model, inputs):
    """Three steps of SGD on batches of these kinds; the weights after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for own in inputs:
        optimizer.zero_grad()
        model(**own).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        model.module.model.after_step()


def kinds_of(model):
    """A clip and an image batch, without the float64 of the parity tests."""
    clips, images = batch(model), batch(model, still=True)
    return [x | {"video": x["video"].float()} for x in (clips, images)]


def _rank(rank, folder):
    model = model_of(queue=12)
    clips, images = kinds_of(model)
    ddp = torch.nn.parallel.DistributedDataParallel(Losses(model), broadcast_buffers=False)
    shared_steps(ddp, [clips, images, images] if rank == 0 else [images, clips, images])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_ranks_may_see_images_and_clips_in_one_step(tmp_path):
    """Two ranks with other kinds of batches do not wait for ever, and stay equal."""
    on_two_ranks(_rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert int(one["contrast.queue.pushed"]) == 3 * 2 * B


def test_base_is_the_reported_one():
    r = models.recipe("omnivl")
    assert (r.frames, r.image_size, r.grid, r.mask_ratio) == (8, 224, (8, 14, 14), 0)
    assert (r.width, r.depth, r.heads, r.text_width) == (768, 12, 12, 768)
    assert (r.vtc, r.vtm, r.lm, r.queue, r.momentum, r.temperature) == (1, 1, 1, 0, 0.995, 0.07)


@pytest.mark.parametrize("fields, complaint", [
    (dict(mask="frame"), "need mask 'tube'"),
    (dict(momentum=1.5), r"need momentum in \[0, 1\]"),
    (dict(queue=-1), "need queue >= 0"),
    (dict(queue=4, vtc=0.0), "need vtc > 0 with a queue"),
    (dict(fusion_layers=0), "need fusion_layers >= 1 for vtm"),
    (dict(writer_layers=0), "need writer_layers >= 1"),
])  # fmt: skip
def test_errors(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        model_of(**fields)
