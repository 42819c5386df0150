"""Draws and visual masks: the same everywhere, well distributed, and of the sources' sizes."""

import pytest
import torch

from vidl.masking import uniform

SAMPLES = torch.arange(1000)


# ---- Draws -----------------------------------------------------------------------------------


def by_hand(seed, step, sample, i, stream):
    """The definition in plain integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    low, high = 0x243F6A88, 0x13198A2E
    for number in (seed, stream, step, sample):
        for word in (number % 2**32, number >> 32):
            low, high = mix(low ^ word), mix((high + mix(word ^ 0x3C6EF372)) % 2**32)
    return (mix(mix((i * 0x9E3779B9 + low) % 2**32) ^ high) >> 8) / 2**24


def test_draws_are_as_defined():
    samples = [0, 1, 17, 2**40 + 3]
    for seed, step, stream in [(0, 0, 0), (1, 2, 3), (2**63 - 1, 2**33, 2**32 + 1)]:
        drawn = uniform(seed, step, torch.tensor(samples), 9, stream=stream)
        expected = [[by_hand(seed, step, s, i, stream) for i in range(9)] for s in samples]
        assert torch.equal(drawn, torch.tensor(expected))


def test_draws_do_not_depend_on_batch_rank_or_length():
    whole = uniform(3, 5, SAMPLES, 40)
    shuffled = torch.randperm(1000)
    assert torch.equal(uniform(3, 5, shuffled, 40), whole[shuffled])
    ranks = [uniform(3, 5, SAMPLES[rank::4], 40) for rank in range(4)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole)
    assert torch.equal(uniform(3, torch.tensor(5), SAMPLES, 40), whole)
    assert torch.equal(uniform(3, 5, SAMPLES, 7), whole[:, :7])
    assert uniform(3, 5, SAMPLES[:0], 7).shape == (0, 7)


@pytest.mark.gpu
def test_draws_are_the_same_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    here = uniform(3, 5, SAMPLES, 40)
    step = torch.tensor(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = uniform(3, step, SAMPLES.cuda(non_blocking=True), 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), here)


def chi_squares(rows, bins=16):
    """How far the mean of the rows' Pearson statistics is off, in standard deviations."""
    counts = torch.stack([torch.histc(row, bins, 0, 1) for row in rows])
    expected = rows.shape[1] / bins
    statistic = ((counts - expected) ** 2 / expected).sum(1)
    return (statistic.mean() - (bins - 1)) / (2 * (bins - 1) / len(rows)) ** 0.5


def test_draws_are_uniform_and_independent():
    drawn = uniform(1, 2, SAMPLES, 500)
    assert drawn.min() >= 0 and drawn.max() < 1
    # Along each axis: places of a sample, samples at a place, steps, seeds and streams.
    of_one = torch.tensor([5])
    axes = {
        "places": drawn,
        "samples": drawn.T,
        "steps": torch.cat([uniform(1, step, of_one, 64) for step in range(500)]).T,
        "seeds": torch.cat([uniform(seed, 2, of_one, 64) for seed in range(500)]).T,
        "streams": torch.cat([uniform(1, 2, of_one, 64, stream=s) for s in range(500)]).T,
    }
    for name, rows in axes.items():
        assert abs(chi_squares(rows.contiguous())) < 4, name
    # No correlation with the neighbours along any of them.
    others = {
        "places": (drawn[:, 1:], drawn[:, :-1]),
        "samples": (drawn[1:], drawn[:-1]),
        "steps": (drawn, uniform(1, 3, SAMPLES, 500)),
        "seeds": (drawn, uniform(2, 2, SAMPLES, 500)),
        "streams": (drawn, uniform(1, 2, SAMPLES, 500, stream=1)),
        "swapped": (drawn, uniform(2, 1, SAMPLES, 500)),
        "upper words": (drawn, uniform(1, 2, SAMPLES + 2**32, 500)),
    }
    for name, (x, y) in others.items():
        product = (x.double() - 0.5) * (y.double() - 0.5) * 12
        assert abs(product.mean()) * product.numel() ** 0.5 < 4, name
        assert not torch.equal(x, y)


def test_draws_compile():
    torch._dynamo.reset()
    compiled = torch.compile(uniform, fullgraph=True, backend="aot_eager")
    for step in range(3):
        tensor = torch.tensor(step)
        assert torch.equal(compiled(1, tensor, SAMPLES, 9), uniform(1, step, SAMPLES, 9))


def test_misuse_of_draws_is_explained():
    with pytest.raises(TypeError, match="samples in int64"):
        uniform(0, 0, SAMPLES.int(), 3)
    with pytest.raises(ValueError, match=r"samples \[B\]"):
        uniform(0, 0, SAMPLES[None], 3)
    with pytest.raises(TypeError, match="step in int64"):
        uniform(0, torch.tensor(0.0), SAMPLES, 3)
    with pytest.raises(ValueError, match="scalar step"):
        uniform(0, SAMPLES, SAMPLES, 3)
    for wrong in (dict(seed=-1), dict(step=-1), dict(n=-1), dict(stream=-1)):
        options = dict(seed=0, step=0, n=3) | wrong
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*-1"):
            uniform(samples=SAMPLES, **options)
