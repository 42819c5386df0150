"""FrameSelector: the best frames in temporal order, and the gradient of the scores."""

import pytest
import torch
import torch.nn.functional as F

from vidl.nn import FrameSelector

B, T, N, C, TEXT, KEEP = 3, 5, 4, 32, 16, 2


def make(**options):
    torch.manual_seed(0)
    return FrameSelector(C, TEXT, KEEP, T, **options)


def inputs():
    return torch.randn(B, T, C), torch.randn(B, TEXT), torch.randn(B, T, N, C)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_the_rule_written_plainly(backend):
    model, arguments = make(backend=backend), inputs()
    leaves = [x.clone().requires_grad_() for x in arguments]
    selected = model(*leaves)

    frames, text, tokens = (x.clone().requires_grad_() for x in arguments)
    joined = torch.stack([torch.cat([frames[:, t], text], 1) for t in range(T)], 1)
    scores = F.linear(F.gelu(F.linear(joined, model.fc1.weight, model.fc1.bias)), model.fc2.weight)
    p = scores[..., 0].softmax(1)
    ids = torch.stack([torch.tensor(sorted(row.topk(KEEP).indices.tolist())) for row in p])
    expected = torch.stack([tokens[b, row] for b, row in enumerate(ids)])
    assert torch.equal(selected.ids, ids) and torch.equal(selected.tokens, expected)
    torch.testing.assert_close(selected.probabilities, p)
    torch.testing.assert_close(selected.probabilities.sum(1), torch.ones(B))

    grad = torch.randn_like(expected)
    selected.tokens.backward(grad)
    # Straight-through: the gradient of p is that of p x token, that of tokens is of a plain gather.
    weight = p.gather(1, ids)[..., None, None]
    (weight * expected.detach() + expected).backward(grad)
    for ours, theirs in zip(leaves, (frames, text, tokens), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(p.grad is not None for p in model.parameters())


def test_learns_which_frame_the_text_is_about():
    torch.manual_seed(0)
    model = FrameSelector(8, 8, 1, 4, hidden_dim=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = F.one_hot(torch.randint(0, 4, (64, 4)), 8).float()
    asked = torch.randint(0, 4, (64,))
    labels[..., 4:] = F.one_hot(torch.stack([torch.randperm(4) for _ in range(64)]), 4)
    text = labels[torch.arange(64), asked].clone()
    text[:, :4] = 0
    right = (labels[..., 4:] * text[:, None, 4:]).sum(-1) * 2 - 1  # 1 in one frame, -1 in others
    with torch.no_grad():
        before = (model(labels, text, labels[:, :, None]).ids[:, 0] == asked).float().mean()
    for _ in range(150):
        selected = model(labels, text, right[..., None, None])
        optimizer.zero_grad()
        (-selected.tokens.mean()).backward()  # the model only sees what the chosen frame holds
        optimizer.step()
    after = (selected.ids[:, 0] == asked).float().mean()
    assert after > 0.9 > before


def test_other_lengths_and_autocast():
    model = make()
    frames, text, tokens = inputs()
    whole = model(frames[:, :KEEP], text, tokens[:, :KEEP])
    assert torch.equal(whole.tokens, tokens[:, :KEEP])
    with torch.autocast("cpu", torch.bfloat16):
        selected = model(frames, text, tokens)
    assert selected.tokens.dtype == selected.probabilities.dtype == torch.float32


def test_compiles():
    torch._dynamo.reset()
    model, arguments = make(), inputs()

    def run(*arguments):
        selected = model(*arguments)
        return selected.tokens, selected.ids

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(*arguments), run(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_misuse_is_explained():
    for keep in (0, 6):
        with pytest.raises(ValueError, match=r"need keep"):
            FrameSelector(C, TEXT, keep, T)
    frames, text, tokens = inputs()
    with pytest.raises(ValueError, match="need text"):
        make()(frames, text[:2], tokens)
    with pytest.raises(ValueError, match="need frames"):
        make()(frames[:, :1], text, tokens[:, :1])
