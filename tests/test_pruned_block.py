"""PrunedBlock: twelve layers against EViT and SViTT written plainly, and the weights of timm."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate, gradients
from torch import nn

from vidl.nn import PrunedBlock

WIDTH, HEADS, TOKENS = 384, 12, 50
PRUNING = (3, 6, 9)


def stack(**options):
    """Twelve blocks as of a ViT-B, narrower; sharp attention, so that no two scores are close."""
    torch.manual_seed(0)
    blocks = nn.ModuleList()
    for layer in range(12):
        pruning = options if layer in PRUNING else {}
        blocks.append(PrunedBlock(WIDTH, HEADS, 1.0, True, init_values=0.5, **pruning))
        blocks[-1].attn.qkv.weight.data *= 4
    return blocks


def eager(blocks, x, prune_before=None, prune_after=None):
    """The same with the whole attention matrix; `prune_...(x, scores)` at the layers of PRUNING."""
    for layer, block in enumerate(blocks):
        B, N, C = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(B, N, 3, HEADS, C // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(C // HEADS)).softmax(-1)
        scores = attention[:, :, 0, 1:].mean(1)
        x = x + block.ls1.gamma * block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        if prune_before and layer in PRUNING:
            x = prune_before(x, scores)
        hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + block.ls2.gamma * block.mlp.fc2(hidden)
        if prune_after and layer in PRUNING:
            x = prune_after(x, scores)
    return x


def evit(x, scores):
    """The best in their order, and the others weighed by their scores and added up."""
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
    """The best, in the order in which they were."""
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
    ],
    ids=["EViT", "SViTT"],
)
def test_twelve_layers(options, rule, tokens):
    blocks = stack(keep_rate=0.7, **options)
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
    for our, theirs, truth in zip(ours, low, true, strict=True):
        assert_as_accurate(our, theirs, truth, torch.float32)


def test_without_pruning_it_is_a_block():
    blocks = stack()
    x = torch.randn(2, TOKENS, WIDTH)
    out = nn.Sequential(*blocks)(x)
    assert_near(out, eager(blocks, x))


def test_ids_and_order():
    torch.manual_seed(0)
    x = torch.randn(2, 11, 64)
    block = PrunedBlock(64, 2)
    whole, ids = block(x, return_ids=True)
    assert ids is None and whole.shape == x.shape
    block.keep_rate, block.when, block.order = 0.5, "after_mlp", "index"
    pruned, ids = block(x, return_ids=True)
    assert ids.shape == (2, 5) and torch.equal(ids, ids.sort(1).values)
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + ids], 1)
    assert torch.equal(pruned, whole[torch.arange(2)[:, None], rows])
    block.keep_rate = 0.95  # of 10 tokens all 10: nothing is pruned and nothing fused
    block.fuse = "sum"
    out, ids = block(x, return_ids=True)
    assert ids is None and out.shape == x.shape
    assert block(x[:, :1]).shape == (2, 1, 64)


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1, qk_norm=True, qkv_bias=True)])
def test_takes_over_a_block_of_timm(options):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    stock = vision_transformer.Block(64, 2, drop_path=0.5, **options).eval()
    ours = PrunedBlock.from_block(stock)
    assert not ours.training
    assert {n: p.data_ptr() for n, p in ours.named_parameters()} == {
        n: p.data_ptr() for n, p in stock.named_parameters()
    }
    x = torch.randn(2, 9, 64)
    assert_near(ours(x), stock(x))
    pruned = PrunedBlock.from_block(stock, keep_rate=0.5, fuse="mean")
    assert pruned(x).shape == (2, 6, 64)


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_loads_the_weights_of_timm(init_values):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    stock = vision_transformer.Block(64, 2, qkv_bias=True, init_values=init_values)
    ours = PrunedBlock(64, 2, qkv_bias=True, init_values=init_values)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 9, 64)
    assert_near(ours(x), stock(x))


def test_compiles():
    torch.manual_seed(0)
    block = PrunedBlock(64, 2, keep_rate=0.7, fuse="sum")
    x = torch.randn(2, 11, 64)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_autocast_prunes_in_float32():
    block = PrunedBlock(64, 2, keep_rate=0.5, fuse="sum")
    x = torch.randn(2, 11, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32 and out.shape == (2, 7, 64)
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="rate"):
        PrunedBlock(64, 2, keep_rate=1.5)
    with pytest.raises(ValueError, match="when"):
        PrunedBlock(64, 2, when="between")
    with pytest.raises(ValueError, match="order"):
        PrunedBlock(64, 2, order="random")
    with pytest.raises(ValueError, match="fuse"):
        PrunedBlock(64, 2, fuse="max")
    with pytest.raises(ValueError, match="multiple"):
        PrunedBlock(64, 3)
    with pytest.raises(ValueError, match="CLS"):
        PrunedBlock(64, 2)(torch.zeros(9, 64))
    with pytest.raises(TypeError, match="Block"):
        PrunedBlock.from_block(nn.Linear(3, 3))
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    with pytest.raises(ValueError, match="attn_drop"):
        PrunedBlock.from_block(vision_transformer.Block(64, 2, attn_drop=0.1))
