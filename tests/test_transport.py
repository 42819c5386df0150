"""Optimal transport between words and patches, against IPOT sample by sample and permutations."""

import itertools

import plain
import pytest
import torch

from vidl.objectives import transport_plan, word_patch_alignment


def tokens(B=3, L=5, N=7, C=6, dtype=torch.float64):
    torch.manual_seed(0)
    text = torch.randn(B, L, C, dtype=dtype, requires_grad=True)
    clips = torch.randn(B, N, C, dtype=dtype, requires_grad=True)
    words = torch.ones(B, L, dtype=torch.int64)
    words[1, 3:] = 0
    words[2, 0] = words[2, 4] = 0
    return text, clips, words


@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.2, 7)])
def test_distances_equal_plain_ipot(beta, iterations):
    text, clips, words = tokens()
    patches = torch.ones(3, 7, dtype=torch.bool)
    patches[:, 0] = patches[1, 5] = False
    ours = word_patch_alignment(text, clips, words, patches, beta=beta, iterations=iterations)
    theirs = torch.stack([
        plain.transport_distance(x[w != 0], y[p], beta, iterations)
        for x, y, w, p in zip(text, clips, words, patches, strict=True)
    ])  # fmt: skip
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    grads = [torch.autograd.grad((x * weights).sum(), [text, clips]) for x in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_all_patches_by_default():
    text, clips, words = tokens()
    every = torch.ones(3, 7)
    assert torch.equal(
        word_patch_alignment(text, clips, words), word_patch_alignment(text, clips, words, every)
    )


def test_many_steps_find_the_best_permutation():
    """With as many words as patches, an optimal plan is a permutation over their number."""
    torch.manual_seed(1)
    cost = torch.rand(4, 4, 4, dtype=torch.float64)
    every = torch.ones(4, 4)
    plan = transport_plan(cost, every, every, iterations=2000)
    ours = (plan * cost).sum((1, 2))
    orders = torch.tensor(list(itertools.permutations(range(4))))
    costs = cost[:, torch.arange(4), orders].mean(-1)  # [B, 24]
    torch.testing.assert_close(ours, costs.amin(1), rtol=1e-3, atol=0)


def test_sums_of_the_plan():
    text, clips, words = tokens()
    plan = transport_plan(torch.rand(3, 5, 7), words, torch.ones(3, 7), iterations=200)
    assert plan.dtype == torch.float32 and not plan[words == 0].any()
    lengths = words.sum(1, keepdim=True)
    torch.testing.assert_close(plan.sum(2), words / lengths)
    torch.testing.assert_close(plan.sum(1), torch.full((3, 7), 1 / 7), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_hard_cases_are_finite(beta):
    """No word, no patch, zero rows, opposite rows, and weights that underflow."""
    text, clips, words = tokens(dtype=torch.float32)
    words[0] = 0
    patches = torch.ones(3, 7)
    patches[1] = 0
    with torch.no_grad():
        text[2, 1:3], clips[2] = 0, -text[2, 3]
    distances = word_patch_alignment(text, clips, words, patches, beta=beta)
    assert distances[0] == distances[1] == 0 and distances.isfinite().all()
    distances.sum().backward()
    for x in (text, clips):
        assert x.grad.isfinite().all() and not x.grad[:2].any()


def test_float32_under_autocast():
    text, clips, words = tokens(dtype=torch.float32)
    plain = word_patch_alignment(text, clips, words)
    exact = word_patch_alignment(text.double(), clips.double(), words)
    torch.testing.assert_close(plain.double(), exact, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(word_patch_alignment(text, clips, words), plain)
        low = word_patch_alignment(text.bfloat16(), clips.bfloat16(), words)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0, atol=0.02)


def test_it_compiles_without_reading_a_tensor():
    torch._dynamo.reset()
    text, clips, words = tokens(dtype=torch.float32)
    compiled = torch.compile(word_patch_alignment, fullgraph=True, backend="aot_eager")
    ours = compiled(text, clips, words, iterations=3)
    torch.testing.assert_close(ours, word_patch_alignment(text, clips, words, iterations=3))


def test_errors():
    text, clips, words = tokens()
    with pytest.raises(ValueError, match=r"need clips \[3, N, 6\]"):
        word_patch_alignment(text, clips[..., :5], words)
    with pytest.raises(ValueError, match=r"need words \[3, 5\]"):
        word_patch_alignment(text, clips, words[:, :4])
    with pytest.raises(ValueError, match="need beta > 0"):
        word_patch_alignment(text, clips, words, beta=0)
    with pytest.raises(ValueError, match="need iterations"):
        transport_plan(torch.rand(3, 5, 7), words, torch.ones(3, 7), iterations=0)
