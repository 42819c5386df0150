"""Ranking: its loss and its scores against plain PyTorch, ties, unknown answers, evaluation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import QUIET, Stored

from vidl import models
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.text import train_tokenizer
from vidl.evaluation import question_answering
from vidl.models import Ranking, ranking
from vidl.training.sources import vocabulary

ANSWERS = ["left", "up left", "two red rings", "red", "Red", "left up", "blue"]
QUESTIONS = ["which way", "which colour is the ring", "how many", "what"]
TOKENIZER = train_tokenizer([*ANSWERS, *QUESTIONS])
VOCABULARY = vocabulary(TOKENIZER)
SIZES = dict(vocabulary=VOCABULARY, image_size=16, patch_size=8, width=16, heads=2, depth=1)
SIZES |= dict(
    frames=2,
    text_width=32,
    text_heads=2,
    text_layers=1,
    prune_layers=(),
    frames_kept=1,
    fusion_layers=1,
)
SIZES |= dict(decoder_width=16, decoder_heads=2, decoder_depth=1, dropout=0.0)


def tiny(answers=ANSWERS, **options):
    torch.manual_seed(0)
    model = Ranking(models.create("smaug", "tiny", **SIZES), answers, TOKENIZER, **options)
    for parameter in model.parameters():  # no trivial biases, and answers that differ clearly
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch():
    video = torch.randint(256, (4, 3, 2, 16, 16), dtype=torch.uint8)
    ids, mask = TOKENIZER(QUESTIONS, 8)
    return dict(video=video, ids=ids, attention_mask=mask, samples=torch.arange(4))


def attention(module, x, context, causal):
    """A part of a layer: attention of one text, residual and LayerNorm, by SDPA."""
    q, k, v = (
        layer(y).unflatten(-1, (2, -1)).transpose(0, 1)
        for layer, y in (
            (module.self.query, x), (module.self.key, context), (module.self.value, context),
        )
    )  # fmt: skip
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1)
    return module.output.LayerNorm(x + module.output.dense(out))


def plain_logits(decoder, ids, rows):
    """The logits of the words after one text without padding, [L, vocabulary]."""
    e = decoder.embeddings
    x = e.word_embeddings(ids) + e.position_embeddings(torch.arange(len(ids)))
    x = e.LayerNorm(x + e.token_type_embeddings.weight[0])
    for layer in decoder.encoder.layer:
        x = attention(layer.attention, x, x, causal=True)
        x = attention(layer.crossattention, x, rows, causal=False)
        hidden = layer.output.dense(F.gelu(layer.intermediate.dense(x)))
        x = layer.output.LayerNorm(x + hidden)
    head = decoder.cls.predictions
    x = head.transform.LayerNorm(F.gelu(head.transform.dense(x)))
    return x @ e.word_embeddings.weight.T + head.bias


def plain_log_p(decoder, answer, rows):
    """log p of one answer to one question."""
    (ids,), (mask,) = TOKENIZER([answer], 12)
    ids = ids[mask.bool()]
    log_p = plain_logits(decoder, ids[:-1], rows).log_softmax(-1)
    return sum(log_p[at, word] for at, word in enumerate(ids[1:]))


def rows_of(model, inputs):
    """The tokens of each question fused with its clip, without padding."""
    mask = inputs["attention_mask"]
    visible = model.recipe.visual_mask(inputs["samples"], 0)
    clips = model.encode_clips(inputs["video"], visible)
    fused = model.model.join(clips, model.encode_text(inputs["ids"], mask), mask).text
    return [rows[own.bool()] for rows, own in zip(fused, mask, strict=True)]


@pytest.mark.parametrize("words", [None, 24])
def test_the_loss_is_that_of_plain_pytorch(words):
    model, inputs = tiny(layers=2), batch()
    right = ["up left", "two red rings", "unheard of", "red"]
    numbers = model.numbers(right)
    assert numbers.tolist() == [1, 2, -1, 3]
    losses = model(**inputs, answers=numbers, words=words)
    rows = rows_of(model, inputs)
    known = [0, 1, 3]
    expected = -sum(plain_log_p(model.decoder, right[b], rows[b]) for b in known) / 3
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=0)
    assert losses["qa"] is losses["loss"]
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, plain = (
        torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
        for loss in (losses["loss"], expected)
    )
    scale = max(float(gradient.abs().max()) for gradient in plain if gradient is not None)
    for name, one, other in zip(learning, ours, plain, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * scale, msg=name)
    trained = {name for name, one in zip(learning, ours, strict=True) if one is not None}
    assert {name for name, _ in model.decoder.named_parameters(prefix="decoder")} <= trained


def test_unknown_answers_are_ignored():
    model, inputs = tiny(), batch()
    some = model(**inputs, answers=torch.tensor([2, -1, -1, 5]))["loss"]
    own = {name: x[[0, 3]] for name, x in inputs.items()}
    torch.testing.assert_close(some, model(**own, answers=torch.tensor([2, 5]))["loss"])
    none = model(**inputs, answers=torch.full((4,), -1))["loss"]
    none.backward()
    assert none == 0
    assert all((p.grad == 0).all() for p in model.decoder.parameters())


@pytest.mark.parametrize("words", [None, 24])
def test_the_soft_loss_is_that_of_plain_pytorch(words):
    """Each distinct answer of several people counts by its share."""
    model, inputs = tiny(layers=2), batch()
    people = [["up left", "Up, left!", "left", "no idea"], "red", ["unheard of"] * 2, None]
    targets = model.targets(people)
    assert targets[0].nonzero().flatten().tolist() == [0, 1] and targets[1, 3] == 1
    assert targets[0, :2].tolist() == [0.25, 0.5] and not targets[2:].any()
    loss = model(**inputs, answers=targets, words=words)["loss"]
    rows = rows_of(model, inputs)
    first = 0.5 * plain_log_p(model.decoder, "up left", rows[0])
    first = first + 0.25 * plain_log_p(model.decoder, "left", rows[0])
    expected = -(first + plain_log_p(model.decoder, "red", rows[1])) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    learning = [p for p in model.parameters() if p.requires_grad]
    ours, plain = (
        torch.autograd.grad(x, learning, allow_unused=True, retain_graph=True)
        for x in (loss, expected)
    )
    scale = max(float(gradient.abs().max()) for gradient in plain if gradient is not None)
    for name, one, other in zip(names, ours, plain, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * scale, msg=name)
    none = model(**inputs, answers=torch.zeros(4, len(ANSWERS)))["loss"]
    none.backward()
    assert none == 0
    assert all((p.grad == 0).all() for p in model.decoder.parameters())


@pytest.mark.parametrize("top", [7, 128])
@pytest.mark.parametrize("logits", [1, ranking.LOGITS])
def test_all_answers_are_ranked_as_by_brute_force(top, logits, monkeypatch):
    monkeypatch.setattr(ranking, "LOGITS", logits)  # one question at a time, or all at once
    model, inputs = tiny(top=top).eval(), batch()
    partner = torch.tensor([1, 1, 0, 3])
    with torch.no_grad():
        clips = model.encode_clips(inputs["video"])
        mask = inputs["attention_mask"]
        text = model.encode_text(inputs["ids"], mask)
        scores = model.answer(clips, text, mask, partner)
        fused = model.model.join(clips, text, mask, partner).text
        expected = [
            [plain_log_p(model.decoder, answer, rows[own.bool()]) for answer in ANSWERS]
            for rows, own in zip(fused, mask, strict=True)
        ]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=0)
    assert scores.std(1).min() > 0.1


@pytest.mark.parametrize("top", [1, 2, 4])
def test_the_first_word_chooses_what_is_ranked(top):
    model, inputs = tiny(top=top).eval(), batch()
    with torch.no_grad():
        mask = inputs["attention_mask"]
        clips, text = model.encode_clips(inputs["video"]), model.encode_text(inputs["ids"], mask)
        scores = model.answer(clips, text, mask)
        fused = model.model.join(clips, text, mask).text
        begin = torch.tensor([TOKENIZER.cls_id])
        distinct = [answer for answer in ANSWERS if answer != "Red"]  # its words are those of "red"
        first = TOKENIZER(distinct, 12)[0][:, 1].tolist()
        for question, (rows, own) in enumerate(zip(fused, mask, strict=True)):
            logits = plain_logits(model.decoder, begin, rows[own.bool()])[0]
            # Answers with the same first word stay in their order.
            order = sorted(range(len(distinct)), key=lambda n: -logits[first[n]].item())
            chosen = {distinct[number] for number in order[:top]}
            for answer, score in zip(ANSWERS, scores[question].tolist(), strict=True):
                if answer.lower() not in chosen:
                    assert score == -torch.inf
                    continue
                expected = plain_log_p(model.decoder, answer, rows[own.bool()]).item()
                assert score == pytest.approx(expected, rel=1e-5)


def test_answers_with_equal_words_are_ties_and_the_first_is_given():
    model, inputs = tiny().eval(), batch()
    with torch.no_grad():
        mask = inputs["attention_mask"]
        clips, text = model.encode_clips(inputs["video"]), model.encode_text(inputs["ids"], mask)
        scores = model.answer(clips, text, mask)
    assert torch.equal(scores[:, 3], scores[:, 4])
    only = tiny(["Red", "red"]).eval()
    with torch.no_grad():
        assert only.answer(clips, text, mask).argmax(1).tolist() == [0] * 4


def test_the_decoder_starts_with_the_text_encoder():
    torch.manual_seed(0)
    smaug = models.create("smaug", "tiny", **SIZES)
    decoder = Ranking(smaug, ANSWERS, TOKENIZER, layers=3).decoder.state_dict()
    text = smaug.text.state_dict()
    assert set(text) - set(decoder) == set()
    for name, weight in text.items():  # the text encoder has 2 layers, the decoder 3
        name = name.replace("layer.1.", "layer.2.").replace("layer.0.", "layer.1.")
        assert torch.equal(decoder[name], weight) == (decoder[name].shape == weight.shape), name
    fresh = [name for name in decoder if "layer.0." in name]
    assert fresh and not torch.equal(
        decoder["encoder.layer.0.output.dense.weight"], text["encoder.layer.0.output.dense.weight"]
    )
    one = Ranking(smaug, ANSWERS, TOKENIZER, layers=1).decoder.state_dict()
    name = "encoder.layer.{}.crossattention.output.dense.weight"
    assert torch.equal(one[name.format(0)], text[name.format(1)])


def test_evaluation_of_a_ranking():
    rows = [
        Row(f"{n // 2}.mp4", question=question, answer=answer)
        for n, (question, answer) in enumerate(zip(QUESTIONS * 2, [*ANSWERS, "green"], strict=True))
    ]
    data = Stored(rows, broken=["3.mp4"])
    data.tokenizer = TOKENIZER
    torch.manual_seed(0)
    smaug = models.create("smaug", "tiny", **SIZES | dict(image_size=32))
    model = Ranking(smaug, ANSWERS, TOKENIZER)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    result = question_answering(model, data, QUIET)
    right = 0
    with torch.no_grad():
        for number, row in enumerate(rows[:6]):
            clip = data.read(Key(0, number)).pictures.permute(3, 0, 1, 2)[None]
            ids, mask = TOKENIZER([row.question], 8)
            scores = model.eval().answer(
                model.encode_clips(clip), model.encode_text(ids, mask), mask
            )
            right += ANSWERS[scores.argmax()] == row.answer
    assert (result.questions, result.right, result.answerable) == (8, right, 7)
    assert list(result.broken) == ["3.mp4"]
    shuffled = Ranking(model.model, ANSWERS[::-1], TOKENIZER)
    shuffled.decoder.load_state_dict(model.decoder.state_dict())
    # "Red" is now before "red"; nothing else depends on the order of the answers.
    assert abs(question_answering(shuffled, data, QUIET).right - right) <= 1


def test_arguments_of_a_ranking():
    words = dataclasses.replace(VOCABULARY, size=10)
    small = models.create("smaug", "tiny", **SIZES | dict(vocabulary=words))
    with pytest.raises(ValueError, match=r"need a tokenizer of at most 10 tokens, .* got token \d"):
        Ranking(small, ANSWERS, TOKENIZER)
    with pytest.raises(ValueError, match="need a model that fuses .* to answer: smaug"):
        Ranking(models.create("mac", "tiny"), ANSWERS, TOKENIZER)
