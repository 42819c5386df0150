"""KeysOfText: the tokens of a clip that a caption keeps, and cross-attention to them alone."""

import copy
import math

import pytest
import torch
from compare import gradients
from torch import nn

from vidl.nn import Bert, KeysOfText

S, N, C, W, H = 3, 11, 64, 48, 2
LENGTHS = (4, 1, 6, 3)
B, L = len(LENGTHS), 6
PARTNER = torch.tensor([2, 0, 2, 1])
MASK = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


def bert(fusion_layers=3, backend="auto"):
    torch.manual_seed(0)
    model = Bert(
        50, C, 1, fusion_layers, H, 96, visual_width=W, max_positions=8, dropout=0.0,
        backend=backend,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(dtype=torch.float64, clips=S):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(B, L, C, generator=generator, dtype=torch.float64) * MASK[..., None]
    visual = torch.randn(clips, N, W, generator=generator, dtype=torch.float64)
    return text.to(dtype), visual.to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 1.0])
def test_keeps_the_highest_scores_in_order(keep_rate, prefix):
    clips, scores = torch.randn(S, N, C, requires_grad=True), torch.rand(B, N, requires_grad=True)
    keys = KeysOfText(keep_rate, prefix=prefix)
    kept = keys.select(clips, scores, PARTNER)
    count = math.ceil(keep_rate * (N - prefix))
    top = scores[:, prefix:].topk(count).indices.sort(1).values + prefix
    rows = torch.cat([torch.arange(prefix).expand(B, -1), top], 1)
    expected = clips[PARTNER].gather(1, rows[..., None].expand(-1, -1, C))
    assert torch.equal(kept, expected)
    assert keys.drops(N) == (count < N - prefix)
    mine, theirs = (gradients(x, [clips])[1] for x in (kept, expected))
    torch.testing.assert_close(mine, theirs)
    again = keys.select(clips, scores, PARTNER).sum()
    assert torch.autograd.grad(again, [scores], allow_unused=True) == (None,)
    own = keys.select(clips, scores[:S])
    assert torch.equal(own, keys.select(clips, scores[:S], torch.arange(S)))


def plain(model, text, visual, keys, partner):
    """Fusion layers on padded captions, with a key mask for each caption."""
    clips = visual if partner is None else visual[partner]
    visible = torch.ones(B, N, dtype=torch.bool)
    x = text
    for number, layer in enumerate(model.encoder.layer[model.text_layers :]):
        x, _ = attend(layer.attention, x, x, MASK)
        x, weights = attend(layer.crossattention, x, clips, visible)
        if number == keys.layer:
            scores = weights[:, :, 0, keys.prefix :].mean(1)
            count = math.ceil(keys.keep_rate * scores.shape[1])
            visible = torch.zeros_like(visible)
            visible[:, : keys.prefix] = True
            visible.scatter_(1, scores.topk(count).indices + keys.prefix, True)
        hidden = nn.functional.gelu(layer.intermediate.dense(x))
        x = layer.output.LayerNorm(x + layer.output.dense(hidden))
    return x * MASK[..., None]


def attend(part, x, context, mask):
    q, k, v = (
        p(y).unflatten(-1, (H, -1)).transpose(1, 2)
        for p, y in (
            (part.self.query, x),
            (part.self.key, context),
            (part.self.value, context),
        )  # fmt: skip
    )
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    weights = logits.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return part.output.LayerNorm(x + part.output.dense(out)), weights


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer, prefix", [(0, 1), (1, 1), (2, 0)])
def test_later_layers_see_the_kept_keys_only(layer, prefix, shared):
    model, keys = bert().double(), KeysOfText(0.3, layer, prefix)
    partner = PARTNER if shared else None
    results = []
    for run in (
        lambda m, t, v: m.fuse(t, MASK, v, partner=partner, keys=keys),
        lambda m, t, v: plain(m, t, v, keys, partner),
    ):
        text, visual = (x.requires_grad_() for x in inputs(clips=S if shared else B))
        fusion = copy.deepcopy(model)
        parameters = list(fusion.encoder.layer[1:].parameters())
        results.append(gradients(run(fusion, text, visual), [text, visual, *parameters]))
    (mine, text, *ours), (true, expected, *theirs) = results
    for a, b in zip((mine, text[MASK], *ours), (true, expected[MASK], *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("words", [None, sum(LENGTHS) + 2, B * L])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_and_padding_agree(backend, words):
    text, visual = inputs(torch.float32)
    keys = KeysOfText(0.5, 1)
    out = bert(backend=backend).fuse(
        text, MASK, visual, partner=PARTNER, words=words, keys=keys
    )  # fmt: skip
    expected = (
        bert().double().fuse(text.double(), MASK, visual.double(), partner=PARTNER, keys=keys)
    )
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


def test_all_keys_are_as_without():
    text, visual = inputs(torch.float32)
    model = bert()
    whole = model.fuse(text, MASK, visual, partner=PARTNER)
    for keys in (KeysOfText(1.0), KeysOfText(0.1, 2)):  # the last layer prunes for nobody
        assert torch.equal(model.fuse(text, MASK, visual, partner=PARTNER, keys=keys), whole)
    pruned = model.fuse(text, MASK, visual, partner=PARTNER, keys=KeysOfText(0.1, 1))
    assert not torch.allclose(pruned, whole)


def test_compiles():
    torch._dynamo.reset()
    model, (text, visual) = bert(2), inputs(torch.float32)

    def run(text, visual):
        return model.fuse(text, MASK, visual, partner=PARTNER, keys=KeysOfText(0.3))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(text, visual), run(text, visual))


def test_misuse_is_explained():
    text, visual = inputs(torch.float32)
    model = bert()
    with pytest.raises(TypeError, match="need keys=KeysOfText"):
        model.fuse(text, MASK, visual, partner=PARTNER, keys=0.1)
    with pytest.raises(ValueError, match="below fusion_layers=3"):
        model.fuse(text, MASK, visual, partner=PARTNER, keys=KeysOfText(0.1, 3))
    packed = dict(cu_visual=torch.tensor([0, 11, 22, 33, 44], dtype=torch.int32), max_visual=11)
    with pytest.raises(ValueError, match="got cu_visual"):
        model.fuse(text, MASK, torch.zeros(44, W), keys=KeysOfText(0.1), **packed)
    with pytest.raises(ValueError, match="prefix of 2, got 1"):
        KeysOfText(0.1, prefix=2).select(visual[:, :1], torch.zeros(S, 1))
