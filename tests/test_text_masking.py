"""Masks of captions: masked words, their frequency and replacement, reproducibility."""

import pytest
import torch

from vidl.masking import Vocabulary, continuations, mask_words, most_hidden, uniform

B, L = 400, 20
CLS, SEP, MASK = 101, 102, 103


def captions():
    """[CLS], words, [SEP] and padding; words are numbers from 1000."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30522, (B, L), generator=generator)
    lengths = torch.randint(3, L + 1, (B, 1), generator=generator)
    place = torch.arange(L)
    ids[:, 0] = CLS
    ids = torch.where(place == lengths - 1, SEP, ids)
    return torch.where(place < lengths, ids, 0), (place < lengths).long()


def masked(ids, mask, ratio=0.15, seed=1, step=2, samples=None, **options):
    samples = torch.arange(len(ids)) if samples is None else samples
    return mask_words(seed, step, samples, ids, mask, ratio, **options)


def assert_share(part, whole, expected):
    """The share is within 4 standard deviations of independent draws."""
    part, whole = int(part.sum()), int(whole.sum())
    assert abs(part - whole * expected) <= 4 * (whole * expected * (1 - expected)) ** 0.5


@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_shares_of_bert_masking(ratio):
    ids, mask = captions()
    words = ids >= 1000
    result = masked(ids, mask, ratio)
    assert not (result.hidden & ~words).any()
    assert torch.equal(result.ids[~result.hidden], ids[~result.hidden])
    assert_share(result.hidden, words, ratio)
    for column in range(1, L - 1):
        assert_share(result.hidden[:, column], words[:, column], ratio)

    is_mask, same = result.ids == MASK, result.ids == ids
    assert_share(is_mask & result.hidden, result.hidden, 0.8)
    assert_share(same & result.hidden, result.hidden, 0.1)
    other = result.ids[result.hidden & ~is_mask & ~same]
    assert other.min() >= 0 and other.max() < 30522
    assert abs(other.double().mean() / 30521 - 0.5) < 4 / (12 * len(other)) ** 0.5


def test_mask_replaces_all_as_in_mac():
    ids, mask = captions()
    result, bert = (masked(ids, mask, 0.4, replace=rule) for rule in ("mask", "bert"))
    assert (result.ids[result.hidden] == MASK).all()
    assert torch.equal(result.ids[~result.hidden], ids[~result.hidden])
    assert torch.equal(result.hidden, bert.hidden)
    nothing, everything = (masked(ids, mask, ratio, replace="mask") for ratio in (0.0, 1.0))
    assert torch.equal(nothing.ids, ids) and nothing.positions.shape == (0,)
    assert torch.equal(everything.hidden, ids >= 1000)


def test_labels_equal_a_plain_loop():
    ids, mask = captions()
    result = masked(ids, mask)
    assert result.positions.shape == result.labels.shape == (most_hidden(B * L, 0.15),)
    expected = [(b * L + n, int(ids[b, n])) for b, n in result.hidden.nonzero().tolist()]
    real = result.labels != -100
    pairs = zip(result.positions[real].tolist(), result.labels[real].tolist(), strict=True)
    assert list(pairs) == expected
    assert len(set(result.positions.tolist())) == len(result.positions)
    few = masked(ids, mask, most=7)
    assert torch.equal(few.positions, result.positions[:7])
    assert torch.equal(few.ids, result.ids)


def test_whole_words_are_masked_together():
    ids, mask = captions()
    words = [f"w{i}" if i % 3 else f"##w{i}" for i in range(30522)]
    table = continuations(words)
    assert table.sum() == len([word for word in words if word.startswith("##")])
    starts = ~table[ids] | (ids < 1000)
    result = masked(ids, mask, 0.3, word_starts=starts)
    drawn = uniform(1, 2, torch.arange(B), L, stream=1 << 58)
    for b in range(B):
        for n in range(L):
            first = n
            while not starts[b, first]:
                first -= 1
            special = ids[b, n] < 1000 or not mask[b, n]
            assert result.hidden[b, n] == (not special and bool(drawn[b, first] < 0.3))
    assert_share(result.hidden & starts, (ids >= 1000) & starts, 0.3)


def test_a_mask_depends_on_its_sample_only():
    ids, mask = captions()
    whole = masked(ids, mask, 0.5)
    order = torch.randperm(B)
    shuffled = masked(ids[order], mask[order], 0.5, samples=order)
    assert torch.equal(shuffled.ids, whole.ids[order])
    # More padding in another batch changes nothing.
    longer = torch.nn.functional.pad(ids[:5], (0, 9)), torch.nn.functional.pad(mask[:5], (0, 9))
    assert torch.equal(masked(*longer, 0.5).ids[:, :L], whole.ids[:5])
    again = masked(ids, mask, 0.5, step=torch.tensor(2))
    assert torch.equal(again.ids, whole.ids)
    for options in (dict(seed=2), dict(step=3), dict(stream=1)):
        assert not torch.equal(masked(ids, mask, 0.5, **options).hidden, whole.hidden)


def test_another_vocabulary():
    ids = torch.randint(0, 10, (B, L))
    vocabulary = Vocabulary(size=10, mask=4, special=(0, 4))
    result = masked(ids, torch.ones(B, L, dtype=torch.bool), 1.0, vocabulary=vocabulary)
    assert torch.equal(result.hidden, (ids != 0) & (ids != 4))
    assert result.ids.max() == 9


def test_compiles():
    torch._dynamo.reset()
    ids, mask = captions()
    samples = torch.arange(B)

    def run(step):
        return mask_words(1, step, samples, ids, mask, 0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in range(2):
        result, expected = compiled(torch.tensor(step)), run(step)
        assert torch.equal(result.ids, expected.ids)
        assert torch.equal(result.labels, expected.labels)


@pytest.mark.gpu
def test_the_same_on_cuda_without_synchronising():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    ids, mask = captions()
    here = masked(ids, mask, 0.5)
    on_card = [x.cuda() for x in (ids, mask, torch.arange(B))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = mask_words(1, 2, on_card[2], *on_card[:2], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("ids", "hidden", "positions", "labels"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())


def test_misuse_is_explained():
    ids, mask = captions()
    with pytest.raises(TypeError, match="int64"):
        masked(ids.int(), mask)
    with pytest.raises(ValueError, match="attention_mask"):
        masked(ids, mask[:, :3])
    with pytest.raises(ValueError, match="samples"):
        masked(ids, mask, samples=torch.arange(1))
    with pytest.raises(ValueError, match="mask_ratio"):
        masked(ids, mask, 1.5)
    with pytest.raises(ValueError, match="replace"):
        masked(ids, mask, replace="zero")
    with pytest.raises(ValueError, match="word_starts"):
        masked(ids, mask, word_starts=mask)
    with pytest.raises(ValueError, match=r"need mask in \[0, 50\)"):
        masked(ids, mask, vocabulary=Vocabulary(size=50))
