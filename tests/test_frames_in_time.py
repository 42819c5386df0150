"""Attention over time: nn.MultiheadAttention and layers of BERT at each place, and stills."""

import copy

import pytest
import torch
from compare import gradients
from torch import nn

from vidl.nn import BertInTime, FramesInTime, groups_in_time

B, T, P, K, C, H = 2, 3, 6, 4, 64, 2
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def different():
    """Other patches in each frame, in any order."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(P, generator=generator)[:K] for _ in range(B * T)])


def tube():
    return different()[::T].repeat_interleave(T, 0)


def randomise(module):
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "orm.weight" in name or "gate" in name else 0.0, 0.15)
    return module


def tokens(dtype=torch.float64, count=1 + K, frames=B * T):
    return torch.randn(
        frames, count, C, dtype=dtype, generator=torch.Generator().manual_seed(2)
    )  # fmt: skip


def at_each_place(x, ids, run):
    """Apply `run` to the sequence of frames that have a place, [1, frames, C], for each place."""
    out = torch.empty_like(x)
    for b in range(B):
        frames = range(b * T, (b + 1) * T)
        rows = {-1: [(f, 0) for f in frames]}  # CLS
        for f in frames:
            for k, place in enumerate(ids[f].tolist()):
                rows.setdefault(place, []).append((f, 1 + k))
        for members in rows.values():
            f, n = torch.tensor(members).T
            out[f, n] = run(x[f, n][None])[0]
    return out


def attention_of(module):
    """The same as `module` with PyTorch's attention, and the parameters in its order."""
    theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    own = dict(module.named_parameters())
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    with torch.no_grad():
        for parameter, name in zip(theirs.parameters(), names, strict=True):
            parameter.copy_(own[f"attn.{name}"])
    norm = nn.LayerNorm(C, eps=1e-12, dtype=torch.float64)  # VindLU's eps
    norm.load_state_dict(module.norm.state_dict())
    gate = None if module.gate is None else module.gate.detach().clone().requires_grad_()

    def run(x):
        y = norm(x)
        y = theirs(y, y, y, need_weights=False)[0]
        return x + (y if gate is None else gate * y)

    gates = [] if gate is None else [gate]
    return run, [*gates, *norm.parameters(), *theirs.parameters()]


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("make", [different, tube])
def test_is_multihead_attention_at_each_place(make, gate):
    ids = make()
    ours = randomise(FramesInTime(C, H, gate=gate)).double()
    run, parameters = attention_of(ours)
    names = [name for name, _ in ours.named_parameters()]
    order = [n for n in ("gate", "norm.weight", "norm.bias") if n in names]
    order += [f"attn.{n}" for n in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")]
    own = dict(ours.named_parameters())
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    mine = gradients(ours(x, groups_in_time(ids, T, P)), [x, *(own[n] for n in order)])
    theirs = gradients(at_each_place(y, ids, run), [y, *parameters])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@BACKENDS
def test_backends_agree(backend):
    ours = randomise(FramesInTime(C, H, backend=backend))
    x, time = tokens(torch.float32), groups_in_time(different(), T, P)
    expected = copy.deepcopy(ours).double()
    expected.backend = "auto"
    torch.testing.assert_close(ours(x, time), expected(x.double(), time).float())


def test_groups_of_all_patches_are_those_of_any():
    ids = torch.arange(P).expand(B * T, P)
    x, ours = tokens(count=1 + P), randomise(FramesInTime(C, H)).double()
    some, every = (groups_in_time(ids, T, P, every=e).check() for e in (False, True))
    assert torch.equal(some.query_rows, every.query_rows) and every.uniform
    assert torch.equal(some.query_offsets, every.query_offsets)
    torch.testing.assert_close(ours(x, some), ours(x, every), rtol=1e-12, atol=1e-12)
    assert groups_in_time(ids[:, :0], T, P).check().max_queries == T


def test_ragged_groups_have_the_frames_that_show_a_patch():
    ids = torch.tensor([[0, 2], [2, 1], [3, 0]])
    groups = groups_in_time(ids, 3, 4).check()
    members = groups.query_rows.tensor_split(groups.query_offsets[1:-1].long())
    # CLS, and the patches 0 to 3: rows of three frames of three tokens each.
    assert [m.tolist() for m in members] == [[0, 3, 6], [1, 8], [5], [2, 4], [7]]


@pytest.mark.parametrize("kind", [FramesInTime, BertInTime])
def test_a_clip_of_one_frame_is_left_but_has_a_gradient(kind):
    ours = randomise(FramesInTime(C, H) if kind is FramesInTime else BertInTime(C, 2, H))
    x = tokens(torch.float32).requires_grad_()
    out = ours(x, groups_in_time(different(), 1, P))
    assert torch.equal(out, x)
    out.sum().backward()
    assert (x.grad == 1).all()
    assert all((p.grad == 0).all() for p in ours.parameters())


def test_infinite_parameters_do_not_reach_a_clip_of_one_frame():
    ours, x = FramesInTime(C, H), tokens(torch.float32)
    nn.init.constant_(ours.gate, torch.inf)
    assert torch.equal(ours(x, groups_in_time(different(), 1, P)), x)


def test_stochastic_depth_leaves_out_whole_clips():
    ours = randomise(FramesInTime(C, H, drop_path=0.5)).train()
    many = 32
    x = tokens(torch.float32, frames=many * T)
    time = groups_in_time(torch.arange(K).expand(many * T, K), T, P)
    torch.manual_seed(0)
    change = (ours(x, time) - x).unflatten(0, (many, T)).flatten(2)
    left = (change == 0).all(2)
    assert (left.all(1) == left.any(1)).all() and 0 < left[:, 0].sum() < many
    kept = ~left[:, 0]
    whole = (ours.eval()(x, time) - x).unflatten(0, (many, T)).flatten(2)
    torch.testing.assert_close(change[kept], 2 * whole[kept], rtol=1e-4, atol=1e-4)


def bert_layers(ours):
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertEncoder

    config = transformers.BertConfig(
        hidden_size=C, num_attention_heads=H, intermediate_size=96, num_hidden_layers=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    encoder = BertEncoder(config).double()
    encoder.load_state_dict(ours.state_dict())
    return encoder


@pytest.mark.parametrize("make", [different, tube])
def test_layers_of_bert_are_those_of_transformers(make):
    ours = randomise(BertInTime(C, 2, H, 96, 0.0)).double()
    encoder, ids = bert_layers(ours), make()

    def run(x):
        for layer in encoder.layer:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x

    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    own = dict(ours.named_parameters())
    names = [name for name, _ in encoder.named_parameters()]
    assert set(names) == set(own)
    mine = gradients(ours(x, groups_in_time(ids, T, P)), [x, *(own[n] for n in names)])
    theirs = gradients(at_each_place(y, ids, run), [y, *encoder.parameters()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_compiles():
    torch._dynamo.reset()
    first, late = randomise(FramesInTime(C, H)), randomise(BertInTime(C, 1, H, dropout=0.0))

    def run(x, ids):
        time = groups_in_time(ids, T, P)
        return late(first(x, time), time)

    x, ids = tokens(torch.float32), different()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, ids), run(x, ids))


def test_misuse_is_explained():
    ids = different()
    with pytest.raises(ValueError, match="whole clips of 4 frames"):
        groups_in_time(ids, 4, P)
    with pytest.raises(ValueError, match="at most 3 rows"):
        groups_in_time(torch.zeros(B * T, 2, dtype=torch.int64), T, P)  # a patch twice
    ours, time = FramesInTime(C, H), groups_in_time(ids, T, P)
    with pytest.raises(ValueError, match=r"x \[B T, 1 \+ K, 64\]"):
        ours(torch.zeros(B * T, 1 + K, 32), time)
    with pytest.raises(ValueError, match="need x \\[total, C\\] with time of its rows"):
        ours(torch.zeros(B * T, 2 + K, C), time)
    with pytest.raises(ValueError, match="whole clips of 3 frames"):
        ours(torch.zeros(2, 3 * (1 + K), C), time)
