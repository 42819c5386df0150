"""Block: EViT, SViTT, ATS and ToMe in plain PyTorch, packed samples, timm's weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_model_as_accurate, gradients
from tiny import token_importance
from torch import nn

from vidl.kernels.groups import Groups
from vidl.nn import Block, Pruning

WIDTH, HEADS, TOKENS = 384, 12, 50
PRUNING = (3, 6, 9)


def stack(pruning=None):
    """Twelve narrow blocks with sharp attention, so that no two scores are close."""
    torch.manual_seed(0)
    blocks = nn.ModuleList()
    for layer in range(12):
        own = pruning if layer in PRUNING else None
        blocks.append(Block(WIDTH, HEADS, 1.0, True, init_values=0.5, pruning=own))
        blocks[-1].attn.qkv.weight.data *= 4
    return blocks


def eager(blocks, x, kind="cls", prune_before=None, prune_after=None):
    """Blocks with a full attention matrix; `prune_...(x, scores)` runs at the layers of PRUNING."""
    for layer, block in enumerate(blocks):
        B, N, C = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(B, N, 3, HEADS, C // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(C // HEADS)).softmax(-1)
        scores = token_importance(kind, attention, k, v)[:, 1:]
        x = x + block.ls1.gamma * block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        if prune_before and layer in PRUNING:
            x = prune_before(x, scores)
        hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + block.ls2.gamma * block.mlp.fc2(hidden)
        if prune_after and layer in PRUNING:
            x = prune_after(x, scores)
    return x


def evit(x, scores):
    """The best tokens in the order of scores, and the sum of the others weighted by scores."""
    K = math.ceil(0.7 * scores.shape[1])
    order = scores.argsort(1, descending=True)
    kept, rest = (
        torch.stack([x[b, 1 + i] for b, i in enumerate(ids)]) for ids in order.split(
            [K, scores.shape[1] - K], 1
        )
    )  # fmt: skip
    weights = scores.gather(1, order[:, K:])
    return torch.cat([x[:, :1], kept, (weights[..., None] * rest).sum(1, keepdim=True)], 1)


def svitt(x, scores):
    """The best tokens in their original order."""
    ids = scores.topk(math.ceil(0.7 * scores.shape[1])).indices.sort(1).values
    return torch.stack([torch.cat([x[b, :1], x[b, 1 + i]]) for b, i in enumerate(ids)])


def assert_near(ours, expected):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "options, rule, tokens",
    [
        (dict(fuse="sum"), dict(prune_before=evit), 21),  # 49 -> 35 + 1 -> 26 + 1 -> 19 + 1
        (dict(when="after_mlp"), dict(prune_after=svitt), 19),  # 49 -> 35 -> 25 -> 18
        (dict(scores="mean", fuse="sum"), dict(kind="mean", prune_before=evit), 21),
        (dict(scores="value", fuse="sum"), dict(kind="value", prune_before=evit), 21),
        (
            dict(scores="similarity", when="after_mlp"),
            dict(kind="similarity", prune_after=svitt),
            19,
        ),
    ],
    ids=["EViT", "SViTT", "mean", "ATS", "ToMe"],
)
def test_twelve_layers(options, rule, tokens):
    blocks = stack(Pruning(0.7, **options))
    x = torch.randn(2, TOKENS, WIDTH)

    def run(forward, blocks, dtype):
        """The result and all gradients."""
        blocks = copy.deepcopy(blocks).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        return gradients(forward(blocks, leaf), [leaf, *blocks.parameters()])

    ours = run(lambda blocks, x: nn.Sequential(*blocks)(x), blocks, torch.float32)
    assert ours[0].shape == (2, tokens, WIDTH)
    low, true = (
        run(lambda blocks, x: eager(blocks, x, **rule), blocks, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_model_as_accurate(ours, low, true, torch.float32)


def test_without_pruning_it_is_a_block():
    blocks = stack()
    x = torch.randn(2, TOKENS, WIDTH)
    out = nn.Sequential(*blocks)(x)
    assert_near(out, eager(blocks, x))


def test_ids_and_order():
    torch.manual_seed(0)
    x = torch.randn(2, 11, 64)
    block = Block(64, 2)
    whole, ids = block(x, return_ids=True)
    assert ids is None and whole.shape == x.shape
    block.pruning = Pruning(0.5, when="after_mlp")
    pruned, ids = block(x, return_ids=True)
    assert ids.shape == (2, 5) and torch.equal(ids, ids.sort(1).values)
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + ids], 1)
    assert torch.equal(pruned, whole[torch.arange(2)[:, None], rows])
    block.pruning = Pruning(0.95, fuse="sum")  # keeps all 10 tokens: nothing to fuse
    out, ids = block(x, return_ids=True)
    assert ids is None and out.shape == x.shape
    assert block(x[:, :1]).shape == (2, 1, 64)


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1, qk_norm=True, qkv_bias=True)])
def test_from_block_of_timm(options):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    baseline = vision_transformer.Block(64, 2, drop_path=0.5, **options).eval()
    ours = Block.from_block(baseline)
    assert not ours.training
    assert {n: p.data_ptr() for n, p in ours.named_parameters()} == {
        n: p.data_ptr() for n, p in baseline.named_parameters()
    }
    x = torch.randn(2, 9, 64)
    assert_near(ours(x), baseline(x))
    pruned = Block.from_block(baseline, pruning=Pruning(0.5, fuse="mean"))
    assert pruned(x).shape == (2, 6, 64)


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_loads_the_weights_of_timm(init_values):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    baseline = vision_transformer.Block(64, 2, qkv_bias=True, init_values=init_values)
    ours = Block(64, 2, qkv_bias=True, init_values=init_values)
    ours.load_state_dict(baseline.state_dict(), strict=True)
    x = torch.randn(2, 9, 64)
    assert_near(ours(x), baseline(x))


def test_compiles():
    torch.manual_seed(0)
    block = Block(64, 2, pruning=Pruning(0.7, fuse="sum"))
    x = torch.randn(2, 11, 64)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_autocast_prunes_in_float32():
    block = Block(64, 2, pruning=Pruning(0.5, fuse="sum"))
    x = torch.randn(2, 11, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32 and out.shape == (2, 7, 64)
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="rate"):
        Pruning(1.5)
    with pytest.raises(ValueError, match="need when among 'before_mlp', 'after_mlp', got 'betwe"):
        Pruning(0.5, when="between")
    with pytest.raises(ValueError, match="order"):
        Pruning(0.5, order="random")
    with pytest.raises(ValueError, match="fuse"):
        Pruning(0.5, fuse="max")
    with pytest.raises(ValueError, match="need scores among"):
        Pruning(0.5, scores="norm")
    with pytest.raises(ValueError, match="cannot weight a fused token"):
        Pruning(0.5, scores="similarity", fuse="mean")
    with pytest.raises(ValueError, match="multiple"):
        Block(64, 3)
    with pytest.raises(ValueError, match="CLS"):
        Block(64, 2)(torch.zeros(9, 64))
    with pytest.raises(TypeError, match="Block"):
        Block.from_block(nn.Linear(3, 3))
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    with pytest.raises(ValueError, match="attn_drop"):
        Block.from_block(vision_transformer.Block(64, 2, attn_drop=0.1))


LENGTHS = (9, 1, 14, 4)


def packed(lengths=LENGTHS, width=64):
    """Ragged samples, their groups, and a list of single samples."""
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), width, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return x, Groups.joint(offsets, len(x), max(lengths)), [y[None] for y in x.split(lengths)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "pruning",
    [
        None,
        Pruning(0.5, fuse="sum"),
        Pruning(0.6, when="after_mlp", rounding="floor"),
        Pruning(0.5, "value", fuse="sum"),
        Pruning(0.5, "similarity"),
    ],
    ids=["dense", "EViT", "SViTT", "ATS", "ToMe"],
)
def test_packed_samples_equal_single_samples(pruning, backend):
    x, groups, alone = packed()
    first, second = (Block(64, 2, 1.0, True, pruning=pruning, backend=backend) for _ in range(2))
    for block in (first, second):
        block.attn.qkv.weight.data *= 4
    out, middle, ids = first(x, groups, return_ids=True)
    out, after = second(out, middle)
    assert after.check().num_queries == len(out)

    def run(block, y):
        """One sample; if nothing is dropped, its fused token is zero, as in a packed batch."""
        z, positions = block(y, return_ids=True)
        if positions is None and pruning is not None and pruning.fuse:
            z = torch.cat([z, block.mlp(block.norm2(torch.zeros(1, 1, 64)))], 1)
        return z, torch.arange(y.shape[1] - 1) if positions is None else positions[0]

    expected, kept = [], []
    for y in alone:
        z, positions = run(first, y)
        expected.append(run(second, z)[0][0])
        kept.append(positions)
    assert after.row_offsets.diff().tolist() == [len(z) for z in expected]
    assert_near(out, torch.cat(expected))
    if pruning is not None:
        assert torch.equal(ids, torch.cat(kept))
    else:
        assert ids is None and after is groups

    weights = [x, *first.parameters()]
    ours = gradients(out, weights)[1:]
    theirs = gradients(torch.cat(expected), weights)[1:]
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their)


def test_packed_samples_of_one_length_are_a_batch():
    x = torch.randn(3, 9, 64)
    block = Block(64, 2, pruning=Pruning(0.5, fuse="sum"))
    batch, ids = block(x, return_ids=True)
    out, groups, packed_ids = block(x.flatten(0, 1), Groups.equal(3, 9), return_ids=True)
    assert groups.uniform and groups.max_queries == batch.shape[1] == 6
    assert torch.equal(out, batch.flatten(0, 1)) and torch.equal(packed_ids, ids.flatten())


def test_packed_in_other_groups():
    ids = torch.stack([torch.randperm(24)[:10].sort().values for _ in range(2)])
    x = torch.randn(20, 64)
    groups = Groups.spatial(ids, (3, 2, 4))
    block = Block(64, 2)
    out, after = block(x, groups)
    assert after is groups
    frames = ids.flatten() // 8 + 3 * torch.arange(2).repeat_interleave(10)
    for frame in frames.unique():
        rows = frames == frame
        assert_near(out[rows], block(x[rows][None])[0])
    block.pruning = Pruning(0.5)
    for other in (groups, Groups.equal(2, 10).causal()):
        with pytest.raises(ValueError, match="whole samples without query_limits"):
            block(x, other)


def test_packed_pruning_compiles_where_the_count_is_known():
    x, groups, _ = packed()
    block = Block(64, 2, pruning=Pruning(0.5))
    expected, after = block(x, groups)
    num_kept = len(expected) - len(LENGTHS)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, offsets = compiled(x, groups, num_kept=num_kept)
    torch.testing.assert_close(out, expected)
    assert torch.equal(offsets.row_offsets, after.row_offsets)


def test_misuse_of_packed_tokens_is_explained():
    x, groups, _ = packed()
    with pytest.raises(ValueError, match="groups of its rows"):
        Block(64, 2)(x[1:], groups)
    with pytest.raises(ValueError, match="groups of its rows"):
        Block(64, 2)(x[None], groups)
