"""Greedy and beam search against brute force over a tiny vocabulary."""

import itertools

import pytest
import torch

from vidl.nn import WordsDecoder, beam_search
from vidl.nn.beam_search import Special, greedy_search

WORDS, LONGEST, CLIPS = 7, 4, 3
PAD, BEGIN, END = 0, 1, 2
SPECIAL = Special(BEGIN, END, PAD, never=(PAD, BEGIN, 6))
USUAL = [word for word in range(WORDS) if word not in SPECIAL.never]


def search(texts, most=LONGEST, beams=1, **options):
    return beam_search.beam_search(texts, SPECIAL, most, beams, **options)


def decoder(seed):
    """A decoder whose words differ clearly in probability, and rows of clips."""
    torch.manual_seed(seed)
    ours = WordsDecoder(WORDS, 16, 1, 2, max_positions=6, dropout=0.0).eval()
    for parameter in ours.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return ours, torch.randn(CLIPS, 5, 16)


def all_texts(most):
    """Texts that end, and texts of the greatest length that do not."""
    words = [word for word in USUAL if word != END]
    for length in range(most + 1):
        for text in itertools.product(words, repeat=length):
            yield [*text, END] if length < most else [*text]


def log_p(ours, rows, *texts):
    """log p of texts about a clip, by one pass over all of their words."""
    length = max(map(len, texts))
    after = torch.tensor([padded(text, length) for text in texts])
    before = torch.cat([torch.full((len(texts), 1), BEGIN), after[:, :-1]], 1)
    partner = torch.zeros(len(texts), dtype=torch.int64)
    logits = ours(before, after != PAD, rows[None], partner=partner)
    logits[:, :, list(SPECIAL.never)] = -torch.inf
    likely = logits.log_softmax(-1).gather(2, after[:, :, None])[:, :, 0]
    return likely.where(after != PAD, 0).sum(1).tolist()


def padded(text, most):
    return [*text, *[PAD] * (most - len(text))]


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_many_beams_are_brute_force(penalty):
    lengths = set()
    for seed in range(3):
        ours, visual = decoder(seed)
        texts = list(all_texts(LONGEST))
        result = search(ours.write(visual, texts=300), beams=300, length_penalty=penalty)
        for clip, rows in enumerate(visual):
            likely = zip(texts, log_p(ours, rows, *texts), strict=True)
            scores = [score / len(text) ** penalty for text, score in likely]
            best = max(range(len(texts)), key=scores.__getitem__)
            assert result.ids[clip].tolist() == padded(texts[best], LONGEST)
            assert float(result.scores[clip]) == pytest.approx(scores[best], rel=1e-5)
            lengths.add(len(texts[best]))
    assert len(lengths) > 1


@torch.no_grad()
def test_one_beam_is_greedy():
    ended = set()
    for seed in range(8):
        ours, visual = decoder(seed)
        greedy = greedy_search(ours.write(visual), SPECIAL, LONGEST)
        one = search(ours.write(visual, texts=1))
        assert torch.equal(greedy.ids, one.ids)
        torch.testing.assert_close(greedy.scores, one.scores)
        for clip, rows in enumerate(visual):  # the argmax of a whole pass over its own words
            text = [word for word in greedy.ids[clip].tolist() if word != PAD]
            logits = ours(torch.tensor([[BEGIN, *text[:-1]]]), None, rows[None])[0]
            assert logits[:, USUAL].argmax(1).tolist() == [USUAL.index(word) for word in text]
            ended.add(text[-1] == END and len(text) < LONGEST)
    assert ended == {True, False}


@torch.no_grad()
def test_more_beams_are_rarely_worse():
    scores = {1: [], 2: [], 6: []}
    for seed in range(10):
        ours, visual = decoder(seed)
        for beams, own in scores.items():
            result = search(ours.write(visual, texts=beams), beams=beams, length_penalty=0.0)
            own += result.scores.tolist()
            for clip, rows in enumerate(visual):
                text = [word for word in result.ids[clip].tolist() if word != PAD]
                assert own[clip - CLIPS] == pytest.approx(*log_p(ours, rows, text), rel=1e-5)
    mean = {beams: sum(own) for beams, own in scores.items()}
    assert mean[1] < mean[2] <= mean[6]


class Scripted:
    """Texts about one clip with the same probabilities at every step."""

    device = torch.device("cpu")

    def __init__(self, rows, steps):
        self.rows, self.steps, self.at, self.chosen = rows, steps, 0, []

    def step(self, ids):
        self.at += 1
        return torch.tensor(self.steps[self.at - 1]).log().expand(self.rows, -1)

    def choose(self, texts):
        self.chosen.append(texts.tolist())


def test_the_search_stops_when_all_have_ended():
    certain = [0.0, 0.0, 0.9, 0.06, 0.04, 0.0, 0.0]
    texts = Scripted(1, [certain] * 9)
    assert greedy_search(texts, SPECIAL, 9).ids.tolist() == [[END, *[PAD] * 8]] and texts.at == 1
    # Two beams: [SEP], then 3 and 4 continue; the second step gives "3 [SEP]", the last candidate.
    texts = Scripted(2, [certain] * 9)
    assert search(texts, 9, 2, length_penalty=0.0).ids.tolist() == [[END, *[PAD] * 8]]
    assert texts.at == 2 and texts.chosen == [[0, 0]]
    # The mean log p of a word is larger for the longer text.
    late = [0.0, 0.0, 0.3, 0.65, 0.05, 0.0, 0.0], [0.0, 0.0, 0.99, 0.01, 0.0, 0.0, 0.0]
    assert search(Scripted(2, late), 2, 2, length_penalty=1.0).ids.tolist() == [[3, END]]


def test_a_device_is_asked_at_every_eighth_step_only():
    class Flag:
        def __init__(self):
            self.device, self.asked = torch.device("cuda"), 0

        def all(self):
            self.asked += 1
            return torch.tensor(False)

    done = Flag()
    assert not any(beam_search._all(done, at) for at in range(20)) and done.asked == 2


def test_arguments():
    for options, complaint in (
        (dict(most=0), "need most >= 1, got 0"), (dict(beams=0), "need beams >= 1, got 0"),
        (dict(length_penalty=float("nan")), "need a finite length_penalty, got nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            search(Scripted(2, []), **options)
