"""Evaluation: ranks against plain loops, broken clips, ranks of torch.distributed, re-ranking."""

import dataclasses
import json
import math
import statistics

import numpy
import pytest
import torch
from gloo import on_two_ranks
from tiny import fitting

from vidl import models
from vidl.data.dataset import ClipSet, Sample
from vidl.data.formats import Row
from vidl.data.moving_shapes import MovingShapes
from vidl.data.sampler import Key
from vidl.data.text import train_tokenizer
from vidl.data.video import BrokenClip
from vidl.evaluation import (
    Options,
    multiple_choice,
    question_answering,
    rank_statistics,
    ranks,
    reranked,
    retrieval,
)
from vidl.models import Aligns, can

SMALL = dict(image_size=32, width=64, heads=2, text_width=64, text_heads=2, depth=2)
SMALL |= dict(text_layers=1, frames=2)
SMAUG = dict(prune_layers=(1,), frames_kept=1, fusion_layers=1, decoder_width=64)
QUIET = Options(batch_size=3, text_batch=5, quiet=True)


class Stored(ClipSet):
    """Fixed noise clips with given rows."""

    def __init__(self, rows, broken=(), train=False):
        texts = (t for row in rows for t in (*row.captions, *row.options, row.question or ""))
        super().__init__(tokenizer=train_tokenizer(texts, size=120), words=8)
        self.rows, self.broken, self.train, self.reads = rows, set(broken), train, []

    def __len__(self):
        return len(self.rows)

    def images(self):
        return numpy.array([row.kind == "image" for row in self.rows])

    def row(self, index):
        return self.rows[index]

    def read(self, key):
        row = self.rows[key.index]
        self.reads.append(row.media)
        if row.media in self.broken:
            raise BrokenClip(row.media, "no frames")
        frames = 1 if row.kind == "image" else 2
        noise = torch.Generator().manual_seed(int(row.media.removesuffix(".mp4")))
        pictures = torch.randint(256, (frames, 32, 32, 3), dtype=torch.uint8, generator=noise)
        return Sample(pictures, key.index, row, "")


TEXT = "a red dog runs over green grass while two old men sing songs about rain"
WORDS = TEXT.split()


def captioned(count, captions=1):
    def text(number):
        return " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 3, 5, 7))

    return [
        Row(f"{clip}.mp4", captions=[text(clip * captions + i) for i in range(captions)])
        for clip in range(count)
    ]


PRUNED = dict(prune_layers=(0,), fusion_layers=1)
OWN = {
    "smaug": SMAUG,
    "singularity": PRUNED | dict(frames=1, frames_tested=2),
    "vindlu": PRUNED,
    "svitt": PRUNED | dict(fusion_layers=2, block=4, random_blocks=1),
    "vlc": dict(text_layers=0, decoder_width=16, decoder_depth=1, decoder_heads=1),
    "alpro": dict(merge_layers=1, entities=4),
    "simvtp": dict(embed_dim=64, text_layers=0, decoder_width=16, decoder_depth=1, decoder_heads=1),
    "omnivl": dict(fusion_layers=1, writer_layers=1),
}


def tiny(name, **overrides):
    torch.manual_seed(0)
    words = dataclasses.replace(models.recipe(name).vocabulary, size=120)
    options = SMALL | OWN.get(name, {}) | dict(vocabulary=words)
    model = models.create(name, "tiny", **fitting(name, options | overrides))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.2)  # distinct features
    return model


@pytest.mark.parametrize("seed", range(20))
def test_ranks_equal_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (7, 9), generator=generator).float()  # with many ties
    scores[torch.rand(7, 9, generator=generator) < 0.1] = math.nan
    correct = torch.rand(7, 9, generator=generator) < 0.25
    result = ranks(scores, correct).tolist()
    for query in range(7):
        values, right = scores[query].tolist(), correct[query].tolist()
        own = [value for value, own in zip(values, right, strict=True) if own]
        best = -math.inf if not own else math.nan if any(map(math.isnan, own)) else max(own)
        others = [value for value, own in zip(values, right, strict=True) if not own]
        assert result[query] == 1 + sum(not value < best for value in others)


def test_constant_scores_give_the_worst_rank():
    correct = torch.eye(5, dtype=torch.bool)
    assert ranks(torch.zeros(5, 5), correct).tolist() == [5] * 5
    assert ranks(torch.full((5, 5), math.nan), correct).tolist() == [5] * 5
    assert ranks(torch.eye(5), correct).tolist() == [1] * 5
    with pytest.raises(ValueError, match=r"need two \[num_queries, candidates\], got \(2, 3\)"):
        ranks(torch.zeros(2, 3), correct)


def test_statistics_of_ranks():
    summary = rank_statistics(torch.tensor([1, 2, 6, 11]))
    assert summary.recall == {1: 25.0, 5: 50.0, 10: 75.0}
    assert (summary.queries, summary.median, summary.mean) == (4, 4.0, 5.0)
    # With a single candidate a miss also has rank 1, but is still a miss.
    assert rank_statistics(torch.tensor([1]), torch.tensor([False])).recall[1] == 0
    with pytest.raises(ValueError, match="need at least one query"):
        rank_statistics(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("seed", range(10))
def test_reranked_candidates_come_first(seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(6, (5, 8), generator=generator).float()
    judged = torch.zeros(5, 8, dtype=torch.bool)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    judged.scatter_(1, order[:, :3], True)
    matching = torch.randint(3, (5, 8), generator=generator).float().masked_fill(~judged, -math.inf)
    correct = torch.zeros(5, 8, dtype=torch.bool)
    correct[torch.arange(5), torch.randint(8, (5,), generator=generator)] = True
    result = reranked(similarity, matching, correct)
    for query in range(5):
        (own,) = correct[query].nonzero().flatten().tolist()
        if judged[query, own]:
            keys = matching[query].tolist()
        else:
            keys = similarity[query].tolist()
            assert result[query] > 3
        worse = sum(key < keys[own] for key in keys)
        assert result[query] == 8 - worse


def similarities(model, data):
    """The similarity of every clip and every caption, one by one, [clips, captions]."""
    model.eval()
    clips = [data.read(Key(0, i)).pictures.permute(3, 0, 1, 2)[None] for i in range(len(data))]
    texts = [data.tokenizer([text], 8) for row in data.rows for text in row.captions]
    with torch.no_grad():
        v, t = [model.embed_clips(clip) for clip in clips], [model.embed_text(*x) for x in texts]
        return torch.tensor([[model.similarity(x, y).item() for y in t] for x in v])


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("captions", [1, 3])
def test_retrieval_equals_a_plain_loop(name, captions):
    model, data = tiny(name), Stored(captioned(7, captions))
    result = retrieval(model, data, QUIET)
    assert (result.clips, result.captions, result.broken) == (7, 7 * captions, {})
    scores = (similarities if can(model, Aligns) else all_pairs)(model, data).tolist()
    by_caption, by_clip = [], []
    for j in range(7 * captions):
        own = j // captions
        by_caption.append(sum(scores[i][j] >= scores[own][j] for i in range(7)))
    for i in range(7):
        own = range(i * captions, (i + 1) * captions)
        best = max(scores[i][j] for j in own)
        by_clip.append(1 + sum(x >= best for j, x in enumerate(scores[i]) if j not in own))
    for key, expected in (("t2v", by_caption), ("v2t", by_clip)):
        measured = result.rankings[key]
        assert measured.queries == len(expected)
        assert measured.median == statistics.median(expected)
        assert measured.mean == pytest.approx(statistics.mean(expected))
        for k in (1, 5, 10):
            share = 100 * sum(rank <= k for rank in expected) / len(expected)
            assert measured.recall[k] == pytest.approx(share)


def test_equal_captions_are_ties():
    rows = [Row(f"{clip}.mp4", captions=["a red dog"]) for clip in range(4)]
    result = retrieval(tiny("smaug"), Stored(rows), QUIET, rerank=4)
    assert result.rankings["v2t"].mean == result.reranked["v2t"].mean == 4  # four equal captions
    assert sorted([result.rankings["t2v"].recall[1], result.rankings["t2v"].mean]) == [2.5, 25]


def test_rows_of_the_same_clip_are_one_clip_read_once():
    rows = captioned(6)
    twice = [*rows, *(dataclasses.replace(row, captions=["old songs"]) for row in rows[:2])]
    data = Stored(twice)
    result = retrieval(tiny("mac"), data, QUIET)
    assert (result.clips, result.captions) == (6, 8)
    assert sorted(data.reads) == [row.media for row in rows]
    # Another part of the same file is a different clip.
    other = dataclasses.replace(rows[0], start=1.0)
    assert retrieval(tiny("mac"), Stored([*rows, other]), QUIET).clips == 7


@pytest.mark.parametrize("name", models.MODELS)
def test_a_broken_clip_is_a_miss_and_is_listed(name):
    rows = captioned(6, 2)
    data, without = Stored(rows, broken=["1.mp4"]), Stored(rows[:1] + rows[2:])
    without.tokenizer = data.tokenizer
    whole = retrieval(tiny(name), without, QUIET)
    rerank = 6 if name == "smaug" else 0
    result = retrieval(tiny(name), data, QUIET, rerank=rerank)
    assert result.broken == {"1.mp4": "no frames"}
    assert (result.clips, result.captions) == (6, 12)
    assert sorted(data.reads) == [row.media for row in rows]  # nothing replaced it
    assert "1 clip could not be read" in str(result) and "1.mp4: no frames" in str(result)
    # Two of twelve captions miss it although R@10 covers all six clips; five clips are hits.
    for rankings in (result.rankings, result.reranked) if rerank else (result.rankings,):
        assert rankings["t2v"].recall[10] == pytest.approx(100 * 10 / 12)
        assert rankings["v2t"].recall[10] <= 100 * 5 / 6 + 1e-9
    # It does not worsen other ranks: their sum is the same as without the broken clip.
    ours, others = result.rankings["t2v"], whole.rankings["t2v"]
    assert ours.mean * 12 == pytest.approx(others.mean * 10 + 2 * 6)


@pytest.mark.parametrize("name", models.MODELS)
def test_broken_clips_are_never_replaced(name):
    data = Stored(captioned(4), broken=[f"{clip}.mp4" for clip in range(4)])
    data.if_broken = "replace"
    result = retrieval(tiny("mac"), data, QUIET)
    assert len(result.broken) == 4
    assert result.rankings["t2v"].recall == result.rankings["v2t"].recall == {1: 0, 5: 0, 10: 0}


def test_reranking_equals_a_plain_loop():
    model, data = tiny("smaug"), Stored(captioned(7))
    result = retrieval(model, data, QUIET, rerank=3)
    model.eval()
    clips = [data.read(Key(0, i)).pictures.permute(3, 0, 1, 2)[None] for i in range(7)]
    similarity, matching = torch.empty(7, 7), torch.empty(7, 7)
    with torch.no_grad():
        for i, clip in enumerate(clips):
            for j, row in enumerate(data.rows):
                ids, mask = data.tokenizer(row.captions, 8)
                v, t = model.encode_clips(clip), model.encode_text(ids, mask)
                similarity[i, j] = model.similarity(
                    model.embed_clips(clip), model.embed_text(ids, mask)
                )
                matching[i, j] = model.match(v, t, mask) @ torch.tensor([-1.0, 1.0])
    for key, s, m in (("t2v", similarity.T, matching.T), ("v2t", similarity, matching)):
        expected = []
        for query in range(7):
            order = sorted(range(7), key=lambda n: -s[query, n])  # noqa: B023
            order = [*sorted(order[:3], key=lambda n: -m[query, n]), *order[3:]]  # noqa: B023
            expected.append(1 + order.index(query))
        assert result.reranked[key].mean == pytest.approx(statistics.mean(expected))
        assert result.reranked[key].recall[1] == pytest.approx(100 * expected.count(1) / 7)
    assert result.reranked != result.rankings


class OnlyMatches(torch.nn.Module):
    """A model without features: the encoders and the matching head of another."""

    def __init__(self, model):
        super().__init__()
        self.model, self.recipe, self.sizes = model, model.recipe, []
        for name in ("encode_clips", "encode_text", "join", "unpruned"):
            setattr(self, name, getattr(model, name))

    joined_width = 64

    def match(self, clips, text, *rest):
        self.sizes.append(len(text))
        return self.model.match(clips, text, *rest)


def all_pairs(model, data):
    """The log-odds of every clip and every caption, pair by pair."""
    rows = []
    with torch.no_grad():
        for number in range(len(data)):
            clip = data.read(Key(0, number)).pictures.permute(3, 0, 1, 2)[None]
            v, row = model.eval().encode_clips(clip), []
            for text in (text for other in data.rows for text in other.captions):
                ids, mask = data.tokenizer([text], 8)
                logits = model.match(v, model.encode_text(ids, mask), mask)
                row.append((logits[0, 1] - logits[0, 0]).item())
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("text_batch", [1, 3, 14, 1000])
def test_a_model_without_features_matches_all_pairs(text_batch):
    model, data = OnlyMatches(tiny("smaug")), Stored(captioned(7, 2))
    scores = all_pairs(model, data)
    correct = torch.arange(14)[None] // 2 == torch.arange(7)[:, None]
    model.sizes.clear()
    result = retrieval(model, data, dataclasses.replace(QUIET, text_batch=text_batch))
    distinct = len({text for row in data.rows for text in row.captions})
    assert sum(model.sizes) == 7 * distinct and max(model.sizes) == min(text_batch, 7 * distinct)
    assert result.rankings == {
        "t2v": rank_statistics(ranks(scores.T, correct.T)),
        "v2t": rank_statistics(ranks(scores, correct)),
    }
    assert (result.rerank, result.reranked, result.clips, result.captions) == (0, {}, 7, 14)


def test_a_broken_clip_is_a_miss_for_a_model_without_features():
    data = Stored(captioned(4), broken=["2.mp4"])
    result = retrieval(OnlyMatches(tiny("smaug")), data, QUIET)
    assert result.broken == {"2.mp4": "no frames"} and result.rankings["t2v"].recall[10] == 75
    none = retrieval(OnlyMatches(tiny("smaug")), Stored(captioned(1), broken=["0.mp4"]), QUIET)
    assert none.rankings["t2v"].recall[10] == none.rankings["v2t"].recall[10] == 0


def test_errors_of_models_without_features():
    model, data = OnlyMatches(tiny("smaug")), Stored(captioned(2))
    with pytest.raises(ValueError, match="need a model that compares features .* to re-rank"):
        retrieval(model, data, QUIET, rerank=2)
    with pytest.raises(ValueError, match="need a model that compares features .* multiple choice"):
        multiple_choice(model, Stored(choices(2)), QUIET, fused=False)
    for evaluated in (retrieval, multiple_choice):
        with pytest.raises(ValueError, match=r"need .* trained with vtm > 0 for .*, got vtm=0"):
            evaluated(OnlyMatches(tiny("smaug", vtm=0.0)), data, QUIET)
        complaint = "compares features of clips and captions or matches .*: smaug, mac.*got Linear"
        with pytest.raises(ValueError, match=complaint):
            evaluated(torch.nn.Linear(2, 2), data, QUIET)


def test_reranking_with_a_perfect_matcher(monkeypatch):
    """A fusion encoder that scores all re-ranked candidates correctly."""
    model, data = tiny("smaug").eval(), Stored(captioned(8))
    pictures = torch.stack([data.read(Key(0, i)).pictures for i in range(8)])
    with torch.no_grad():
        known_clips = model.encode_clips(pictures.permute(0, 4, 1, 2, 3))
        known_texts = model.encode_text(*data.tokenizer([row.captions[0] for row in data.rows], 8))

    def match(clips, text, attention_mask, partner, words):
        nearest = [
            torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)
            for x, known in ((clips[partner], known_clips), (text, known_texts))
        ]
        right = (nearest[0] == nearest[1]).float()
        return torch.stack([-right, right], 1)

    monkeypatch.setattr(model, "match", match)
    for k in (1, 3, 8):
        result = retrieval(model, data, QUIET, rerank=k)
        for key in ("t2v", "v2t"):
            first = result.rankings[key]
            share = first.recall[1] if k == 1 else result.reranked[key].recall[1]
            assert result.reranked[key].recall[1] == pytest.approx(share)
            # All correct candidates among the top k are first now.
            assert result.reranked[key].recall[1] >= first.recall[1]
    assert result.reranked["t2v"].recall[1] == result.reranked["v2t"].recall[1] == 100
    assert result.rankings["t2v"].recall[1] < 100


def test_masking_and_pruning_options():
    model, data = tiny("smaug", keep_rate=0.5), Stored(captioned(6))
    seen = []
    handle = model.vision.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[1] is not None, output.tokens.shape[1]))
    )
    for options in (dict(), dict(masked=True), dict(pruned=False)):
        retrieval(model.train(), data, dataclasses.replace(QUIET, **options), rerank=2)
    handle.remove()
    # 16 patches a frame: half of them and the fused token; of 5 visible ones; all of them.
    assert seen[::2] == [(False, 1 + 8 + 1), (True, 1 + 3 + 1), (False, 1 + 16)]
    assert model.training and model.vision.keep_rate == 0.5 and model.selector.keep == 1
    low = retrieval(model, data, dataclasses.replace(QUIET, dtype=torch.bfloat16), rerank=2)
    assert math.isfinite(low.reranked["t2v"].mean)


def test_images_and_videos_together():
    rows = captioned(6)
    rows[2:4] = [dataclasses.replace(row, kind="image") for row in rows[2:4]]
    result = retrieval(tiny("smaug"), Stored(rows), QUIET, rerank=6)
    assert result.clips == 6 and result.reranked["t2v"].queries == 6


def choices(count, question=None):
    """Two questions about each clip, of two and three options."""
    return [
        Row(f"{n // 2}.mp4", question=question, options=WORDS[n : n + 2 + n % 2], correct=n % 2)
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "name, fused", [("smaug", True), ("smaug", False), ("mac", None), ("vlc", None)]
)
@pytest.mark.parametrize("question", [None, "who sings"])
def test_multiple_choice_equals_a_plain_loop(name, fused, question):
    model, data = tiny(name), Stored(choices(9, question), broken=["2.mp4"])
    result = multiple_choice(model, data, QUIET, fused=fused)
    assert sorted(data.reads) == [f"{clip}.mp4" for clip in range(5)]
    model.eval()
    right = 0
    for number, row in enumerate(data.rows):
        if row.media == "2.mp4":
            continue
        clip = data.read(Key(0, number)).pictures.permute(3, 0, 1, 2)[None]
        scores = []
        for text in row.options:
            ids, mask = data.tokenizer([f"{question} {text}" if question else text], 8)
            with torch.no_grad():
                if fused or name == "vlc":
                    match = model.match(
                        model.encode_clips(clip), model.encode_text(ids, mask), mask
                    )
                    scores.append((match[0, 1] - match[0, 0]).item())
                else:
                    texts = model.embed_text(ids, mask)
                    scores.append(model.similarity(model.embed_clips(clip), texts).item())
        right += scores.index(max(scores)) == row.correct
    assert (result.questions, result.right, result.answerable) == (9, right, 9)
    assert result.accuracy == pytest.approx(100 * right / 9) and result.broken == {
        "2.mp4": "no frames"
    }
    assert json.loads(result.to_json())["right"] == right
    assert str(result).startswith(f"9 questions, {right} correct")


def test_ties_are_wrong():
    rows = [Row("1.mp4", options=["dog", "dog"], correct=0)]
    assert multiple_choice(tiny("smaug"), Stored(rows), QUIET).right == 0


ANSWERS = ("red", "dog", "rain", "men")


def questions(count):
    texts = ["who sings", "what runs", "which colour"]
    return [
        Row(f"{n // 3}.mp4", question=texts[n % 3], answer=ANSWERS[n * n % 4]) for n in range(count)
    ]


def answering(**overrides):
    rows = questions(12)
    return models.Answering(tiny("smaug", **overrides), models.frequent_answers(
        (row.answer for row in rows), 3))  # fmt: skip


def test_questions_are_learned_and_answered():
    """The model memorises answers to questions about noise; unknown answers are counted."""
    data = Stored(questions(9))
    model = answering(mask_ratio=0.0, dropout=0.0)
    torch.nn.init.normal_(model.model.time, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-3)
    batch = data.__getitems__([Key(0, n) for n in range(9)])
    ids, mask = data.tokenizer([row.question for row in data.rows], 8)
    truth = model.numbers(row.answer for row in data.rows)
    for step in range(60):
        loss = model(batch.video, ids, mask, batch.index, step, answers=truth)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert step or all(p.grad is not None for p in learning)  # DDP would wait for its gradient
        optimizer.step()
    assert loss < 0.3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = (
        "model.project_",
        "model.matches",
        "model.contrast",
        "model.text.cls",
        "model.decoder",
    )
    assert changed and not [name for name in changed if name.startswith(frozen)]
    result = question_answering(model, data, QUIET)
    known = int((truth >= 0).sum())
    assert (result.questions, result.answerable, result.right) == (9, known, known)
    assert "have an answer outside the model's answer set" in str(result) or known == 9
    broken = question_answering(model, Stored(questions(9), broken=["0.mp4"]), QUIET)
    assert broken.right <= known - int((truth[:3] >= 0).sum()) and list(broken.broken) == ["0.mp4"]


def test_answers():
    assert models.frequent_answers(["b", "a", "c", "c", None, ""], 2) == ["c", "a"]
    with pytest.raises(ValueError, match="need answers|need most"):
        models.frequent_answers([None], 3)
    with pytest.raises(ValueError, match="need a model that fuses .* to answer: smaug.*got Mac"):
        models.Answering(tiny("mac"), ["yes"])
    with pytest.raises(ValueError, match="need answers that differ"):
        models.Answering(tiny("smaug"), ["yes", "yes"])
    # A batch of unknown answers has zero loss, not NaN.
    model = answering()
    batch = Stored(questions(3)).__getitems__([Key(0, 0), Key(0, 1)])
    ids = torch.ones(2, 4, dtype=torch.int64)
    unknown = torch.tensor([-1, -1])
    assert model(batch.video, ids, ids, batch.index, answers=unknown)["loss"] == 0


def _rank(rank, out):
    model, data = tiny("smaug"), Stored(captioned(7, 2), broken=["3.mp4"])
    result = retrieval(model, data, QUIET, rerank=4)
    assert len(data.reads) in (3, 4)  # half of the clips
    matched = retrieval(OnlyMatches(model), data, QUIET)
    chosen = multiple_choice(model, Stored(choices(9), broken=["2.mp4"]), QUIET)
    with open(f"{out}/{rank}.json", "w") as file:
        file.write(f"[{result.to_json()}, {matched.to_json()}, {chosen.to_json()}]")


def test_two_ranks_equal_one(tmp_path):
    on_two_ranks(_rank, tmp_path)
    data = Stored(captioned(7, 2), broken=["3.mp4"])
    result = retrieval(tiny("smaug"), data, QUIET, rerank=4)
    matched = retrieval(OnlyMatches(tiny("smaug")), data, QUIET)
    chosen = multiple_choice(tiny("smaug"), Stored(choices(9), broken=["2.mp4"]), QUIET)
    alone = json.loads(f"[{result.to_json()}, {matched.to_json()}, {chosen.to_json()}]")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_table_of_moving_shapes():
    tokenizer = train_tokenizer(MovingShapes("train", 1).caption(0).split(), size=100)
    data = MovingShapes("val", 6, frames=2, size=32, same_looks=True, tokenizer=tokenizer)
    result = retrieval(tiny("smaug"), data, QUIET, rerank=2)
    lines = str(result).splitlines()
    assert " ".join(lines[0].split()) == "6 clips, 6 captions R@1 R@5 R@10 median mean"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "text to video", "video to text", "text to video, top 2 re-ranked",
        "video to text, top 2 re-ranked",
    ]  # fmt: skip
    assert json.loads(result.to_json())["rankings"]["t2v"]["recall"]["5"] <= 100


@pytest.mark.parametrize(
    "name, data, rerank, complaint",
    [
        ("smaug", Stored([Row("1.mp4", question="what?", answer="yes")]), 0, "need a caption of"),
        ("smaug", Stored(captioned(2), train=True), 0, "need a data set made with train=False"),
        ("smaug", MovingShapes("val", 2), 0, "need a data set with a tokenizer"),
        ("mac", Stored(captioned(2)), 2, "need a model that matches .* to re-rank: smaug.*got Mac"),
        ("mac", Stored(captioned(2)), -1, "need rerank >= 0"),
    ],
)
def test_errors_of_retrieval(name, data, rerank, complaint):
    with pytest.raises(ValueError, match=complaint):
        retrieval(tiny(name), data, QUIET, rerank=rerank)


def test_a_tokenizer_of_another_model():
    words = dataclasses.replace(models.recipe("mac").vocabulary, size=105)
    with pytest.raises(ValueError, match="need a tokenizer of at most 105 tokens"):
        data = Stored(captioned(2))
        data.tokenizer = train_tokenizer([chr(n) for n in range(97, 97 + 26)] * 2 + WORDS + [
            f"w{n}" for n in range(100)])  # fmt: skip
        retrieval(tiny("mac", vocabulary=words), data, QUIET)
    with pytest.raises(ValueError, match="need batch_size >= 1"):
        Options(batch_size=0)
    with pytest.raises(ValueError, match="need options and the correct one of each row"):
        multiple_choice(tiny("mac"), Stored(captioned(2)), QUIET)
    with pytest.raises(ValueError, match="need a model that matches .* for fused=True: smaug"):
        multiple_choice(tiny("mac"), Stored(choices(2)), QUIET, fused=True)
    with pytest.raises(ValueError, match="need a question and an answer in each row"):
        question_answering(answering(), Stored(captioned(2)), QUIET)
