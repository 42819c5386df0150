"""vidl.prune: timm's models with layers that drop tokens, against timm's own with masks.

A token that no other token attends to has no effect. So the baseline is timm's unchanged model with
the dropped tokens masked in all later attentions: it must compute the same for all other tokens.
Its positions, rotary embeddings and relative biases are right by construction.
"""

import copy
import pickle
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_model_as_accurate
from tiny import token_importance

pytest.importorskip("timm")

from test_swapping_timm import MODELS, SIZE, VIT, assert_equal, images, make, results  # noqa: E402
from timm.layers import apply_keep_indices_nlc  # noqa: E402
from timm.models._features import FeatureGetterNet  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.vision_transformer import ParallelScalingBlock  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import vidl  # noqa: E402
from vidl.bench.measure import cases  # noqa: E402
from vidl.bench.measure.check import check  # noqa: E402
from vidl.bench.ops import swapped  # noqa: E402
from vidl.nn import Block, Pruning, pruning  # noqa: E402
from vidl.ops import kept_count  # noqa: E402

BEIT = dict(use_rel_pos_bias=True, init_values=0.1)
PRUNED = {
    **{name: MODELS[name] for name in ("ViT", "DeiT, distilled", "DeiT-III", "DINOv2", "CLIP")},
    **{name: MODELS[name] for name in ("norms of q, k and heads", "EVA", "EVA-02", "DINOv3")},
    **{name: MODELS[name] for name in ("EVA, norms after", "RoPE, mixed", "RoPE, shared keys")},
    "narrow heads": partial(VIT, num_heads=4),
    "BEiT": partial(Beit, **SIZE, **BEIT, use_abs_pos_emb=False),
    "BEiT, shared bias": partial(Beit, **SIZE, **BEIT, use_shared_rel_pos_bias=True),
}
RATE, LAYERS = 0.6, (1, 2)
SLOW = pytest.mark.slow


def deep(name):
    """The model with four layers; two that drop tokens follow one another."""
    model = make(partial(PRUNED.get(name) or MODELS[name], depth=4))
    for name, weights in model.named_parameters():
        if "bias_table" in name:
            weights.data *= 20  # large enough to change which tokens stay
    return model


def features(model, x):
    return model.forward_features(x)


@pytest.fixture
def chosen(monkeypatch):
    """The tokens that each layer of a pruned model keeps, in the order of the calls."""
    kept, select = [], pruning.select_tokens

    def record(*args, **options):
        selected = select(*args, **options)
        kept.append(selected.ids_keep)
        return selected

    monkeypatch.setattr(pruning, "select_tokens", record)
    return kept


class Masked:
    """timm's model, masking tokens from the layers in LAYERS on; `choices` are the kept ids."""

    def __init__(self, monkeypatch, scores, choices, right):
        self.scores, self.choices, self.right = scores, choices, right
        self.sdpa, self.patch = F.scaled_dot_product_attention, monkeypatch

    def __call__(self, model, x):
        N = model.patch_embed.num_patches
        self.prefix, self.calls = model.num_prefix_tokens, 0
        self.alive = torch.ones(x.shape[0], N, dtype=torch.bool)
        with self.patch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", self.attend)
            out = model.forward_features(x)
        kept = F.pad(self.alive, (self.prefix, 0), value=True)
        return out[kept].view(x.shape[0], -1, out.shape[-1])

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        seen = F.pad(self.alive, (self.prefix, 0), value=True)
        hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))
        mask = hidden[:, None, None] if attn_mask is None else attn_mask + hidden[:, None, None]
        layer, self.calls = self.calls, self.calls + 1
        if layer in LAYERS:
            weights = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1).float()
            scores = self.score(weights.detach(), k.detach(), v.detach(), seen)
            self.drop(scores[:, self.prefix :], self.choices[LAYERS.index(layer)])
        return self.sdpa(q, k, v, attn_mask=mask.expand(-1, q.shape[1], q.shape[2], -1))

    def score(self, weights, k, v, seen):
        """The scores of the tokens that are not masked, sample by sample."""
        scores = weights.new_zeros(seen.shape)
        for sample, rows in enumerate(seen):
            own = [x[sample : sample + 1, :, rows] for x in (weights[..., rows], k, v)]
            scores[sample, rows] = token_importance(self.scores, *own)[0].to(scores.dtype)
        return scores

    def drop(self, scores, ids):
        alive = self.alive.clone()
        for sample, positions in enumerate(self.alive):
            positions = positions.nonzero().flatten()
            keep = positions[ids[sample]]
            if self.right is not None:
                count = kept_count(len(positions), RATE)
                best = positions[scores[sample, positions].topk(count).indices].sort().values
                self.right.append(torch.equal(keep, best))
            alive[sample] = False
            alive[sample, keep] = True
        self.alive = alive


@pytest.mark.parametrize(
    "name, scores",
    [(name, "cls") for name in PRUNED]
    + [(name, "mean") for name in PRUNED]
    + [(name, "value") for name in ("ViT", "DeiT, distilled", "RoPE, shared keys", "DINOv3")]
    + [("BEiT", "value"), ("BEiT, shared bias", "value")]
    + [(name, "similarity") for name in ("ViT", "SigLIP", "EVA, norms after", "RoPE, shared keys")],
)
def test_dropped_tokens_are_as_if_masked(name, scores, chosen, monkeypatch):
    model, x = deep(name), images()
    baseline = copy.deepcopy(model)
    vidl.prune(model, RATE, LAYERS, scores=scores)
    ours = results(model, x, features)
    right = []
    low = results(baseline, x, Masked(monkeypatch, scores, chosen, right))
    assert len(right) == 6 and all(right), "the tokens with the highest scores stay"
    masked = Masked(monkeypatch, scores, chosen, None)
    true = results(copy.deepcopy(baseline).double(), x.detach().double().requires_grad_(), masked)
    assert_model_as_accurate(ours, low, true, torch.float32)
    kept = kept_count(kept_count(16, RATE), RATE)
    assert ours[0].shape[1] == model.num_prefix_tokens + kept


@pytest.mark.parametrize("name", ["ViT", "EVA-02", "BEiT"])
def test_bfloat16(name, chosen, monkeypatch):
    model, x = deep(name), images()
    baseline = copy.deepcopy(model)
    vidl.prune(model, RATE, LAYERS)
    ours = results(model.bfloat16(), images(torch.bfloat16), features)
    masked = Masked(monkeypatch, "cls", chosen, None)  # the same tokens, as rounding may swap two
    true = results(copy.deepcopy(baseline).double(), x.detach().double().requires_grad_(), masked)
    low = results(baseline.bfloat16(), images(torch.bfloat16), masked)
    assert_model_as_accurate(ours, low, true, torch.bfloat16)


@pytest.mark.parametrize("fuse", [None, "sum", "mean"])
@pytest.mark.parametrize("when", ["before_mlp", "after_mlp"])
@pytest.mark.parametrize("name", ["ViT", "DeiT-III", "CLIP"])
def test_vit_is_our_block(name, when, fuse):
    model, x = deep(name), images()
    baseline = copy.deepcopy(model)
    options = dict(pruning=Pruning(RATE, "cls", when, "index", fuse), backend="reference")

    def written_out(baseline, x):
        x = baseline.norm_pre(baseline._pos_embed(baseline.patch_embed(x)))
        for layer, block in enumerate(baseline.blocks):
            x = Block.from_block(block, **options)(x) if layer in LAYERS else block(x)
        return baseline.norm(x)

    vidl.prune(model, RATE, LAYERS, when=when, fuse=fuse)
    assert_equal(results(model, x, features), results(baseline, x, written_out))


@pytest.mark.parametrize("fuse", ["sum", "mean"])
@pytest.mark.parametrize("name", ["EVA-02", "RoPE, mixed", "DINOv3"])
def test_a_fused_token_has_no_position(name, fuse, chosen, monkeypatch):
    model, x = deep(name), images()
    baseline = copy.deepcopy(model)
    vidl.prune(model, RATE, LAYERS, fuse=fuse)
    ours = results(model, x, features)
    rows = first_rows(monkeypatch)

    def written_out(baseline, x):
        """timm's layers on our choice of tokens, tracking positions sample by sample."""
        x, rope = baseline._pos_embed(baseline.patch_embed(x))
        x = baseline.norm_pre(x)
        prefix, positions = baseline.num_prefix_tokens, [list(range(16)) for _ in x]
        for layer, block in enumerate(baseline.blocks):
            own = rope[layer] if rope.ndim == 4 else rope
            identity = own.new_tensor([0.0, 1.0]).repeat_interleave(own.shape[-1] // 2)
            table = torch.cat([own, identity.expand(*own.shape[:-2], 1, -1)], -2)
            ids = torch.tensor(positions)
            rotary = apply_keep_indices_nlc(x, table, ids)
            rotary = rotary if rotary.ndim == 4 else rotary.unsqueeze(1)
            out = block.attn(block.norm1(x), rope=rotary)
            x = x + (out if block.gamma_1 is None else block.gamma_1 * out)
            if layer in LAYERS:
                keep = chosen[LAYERS.index(layer)]
                x = fused(x, rows[-1][:, prefix:], keep, prefix, fuse)
                positions = [
                    [own[i] for i in row.tolist()] + [16]
                    for own, row in zip(positions, keep, strict=True)
                ]
            out = block.mlp(block.norm2(x))
            x = x + (out if block.gamma_2 is None else block.gamma_2 * out)
        return baseline.norm(x)

    assert_equal(ours, results(baseline, x, written_out))


def first_rows(monkeypatch):
    """Attention from the first query, averaged over heads, for every attention of timm."""
    rows, sdpa = [], F.scaled_dot_product_attention

    def record(q, k, v, **options):
        rows.append((q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0])
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return rows


def fused(x, scores, keep, prefix, fuse):
    """The prefix, the kept tokens, and the weighted sum or mean of the other tokens."""
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter(1, keep, True)
    weights = scores.masked_fill(stays, 0.0)
    if fuse == "mean":
        weights = weights / weights.sum(1, keepdim=True)
    patches = x[:, prefix:]
    kept = patches.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :prefix], kept, weights[:, None] @ patches], 1)


@pytest.mark.parametrize("name", ["ViT", "RoPE, mixed", "EVA-02", "BEiT"])
def test_everything_around_it(name, tmp_path):
    """Checkpointing, copies, saved weights, and two forwards before a backward."""
    model, x = deep(name), images()
    names = list(model.state_dict())
    vidl.prune(model, RATE, LAYERS)
    assert list(model.state_dict()) == names
    pruned = results(model, x)
    assert_equal(results(copy.deepcopy(model), x), pruned)
    assert_equal(results(pickle.loads(pickle.dumps(model)), x), pruned)

    def twice(model, x):
        first = model(x)
        model(x.flip(0).detach())  # keeps other tokens
        return first

    model.set_grad_checkpointing()
    assert_equal(results(model, x, twice), pruned)
    model.set_grad_checkpointing(False)

    vidl.unswap(model)
    untouched = deep(name)
    untouched.load_state_dict(model.state_dict())
    for our, baseline in zip(results(model, x), results(untouched, x), strict=True):
        assert torch.equal(our, baseline)
    assert str(model) == str(untouched)


@pytest.mark.parametrize("name", ["ViT", "RoPE, mixed", pytest.param("BEiT", marks=SLOW)])
def test_compile(name):
    model, x = make(PRUNED[name]), images()
    vidl.prune(model, RATE, [0], fuse=None if name == "BEiT" else "sum")
    pruned = results(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(results(model, x, lambda _, x: compiled(x)), pruned)


@pytest.mark.parametrize("name", ["ViT", "DINOv3", "BEiT"])
def test_intermediates_have_no_grid(name):
    model, x = deep(name), images()
    vidl.prune(model, RATE, LAYERS)
    with pytest.raises(ValueError, match="output_fmt='NLC'.*got 'NCHW'.*vidl.unswap"):
        model.forward_intermediates(x)
    final, layers = model.forward_intermediates(x, output_fmt="NLC")
    assert [y.shape[1] for y in layers] == [16, 10, 6, 6]
    assert torch.equal(final, model.forward_features(x))
    if hasattr(model, "get_intermediate_layers"):
        with pytest.raises(ValueError, match="no grid of tokens"):
            model.get_intermediate_layers(x, reshape=True)


def test_again_with_another_rate_and_after_a_swap():
    model, x = deep("ViT"), images()
    baseline = model.forward_features(x)
    vidl.swap(model, backend="reference")
    report = vidl.prune(model, 0.5, [0])
    assert model.forward_features(x).shape[1] == 1 + 8
    assert {change.name for change in report.changes} == {"", "blocks.0"}
    assert "keeps 0.5 of its tokens by scores='cls'" in str(report)
    vidl.prune(model, 0.25, [1, 3], fuse="sum")
    assert model.forward_features(x).shape[1] == 1 + 3
    vidl.prune(model, 1.0, [2])
    torch.testing.assert_close(model.forward_features(x), baseline)
    vidl.unswap(model)
    assert torch.equal(model.forward_features(x), baseline)


def test_features_need_a_grid():
    """As `features_only=True` builds it."""
    for name in ("ViT", "BEiT"):
        model = FeatureGetterNet(deep(name), [3], output_fmt="NLC")
        vidl.prune(model, RATE, [0])
        assert model(images())[-1].shape[1] == 10
        model = FeatureGetterNet(deep(name), [3])
        with pytest.raises(ValueError, match="features_only=True returns grids.*'NLC'"):
            vidl.prune(model, RATE, [0])
        assert not any(type(m).__module__.startswith("vidl") for m in model.modules())


def test_masks_are_refused_where_tokens_are_dropped():
    model, x = deep("ViT"), images()
    vidl.prune(model, RATE, LAYERS)
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(1, 1, 17, 17)}):
        with pytest.raises(ValueError, match="layer 1 drops tokens.*vidl.unswap"):
            model(x, **options)


@pytest.mark.parametrize(
    "model, options, reason",
    [
        (MODELS["SigLIP"], {}, "no class token; need scores='mean' or scores='similarity'"),
        (MODELS["SigLIP"], {"scores": "value"}, "no class token"),
        (MODELS["DINOv2"], {"scores": "similarity"}, "5 prefix tokens, .* one class token"),
        (MODELS["BEiT"], {"fuse": "sum"}, "a fused token has no position"),
        (MODELS["ViT"], {"layers": [2]}, r"layers in \[0, 2\).* got \[2\]"),
        (MODELS["ViT"], {"layers": []}, r"layers in \[0, 2\)"),
        (MODELS["ViT"], {"keep_rate": 1.5}, r"a rate in \(0, 1\], got 1.5"),
        (MODELS["ViT"], {"scores": "norm"}, "need scores among 'cls', .*, got 'norm'"),
        (MODELS["ViT"], {"fuse": "max"}, "need fuse among None, 'sum', 'mean', got 'max'"),
        (MODELS["ViT"], {"when": "later"}, "need when among .*, got 'later'"),
        (MODELS["NaFlexVit"], {}, r"need a vision transformer .*VisionTransformer.* found none"),
        (partial(VIT, attn_drop_rate=0.1), {}, "attention of layer 0 was left"),
        (partial(VIT, block_fn=ParallelScalingBlock), {}, "layer 0 is a ParallelScalingBlock"),
    ],
)
def test_what_cannot_be_pruned(model, options, reason):
    built = model()
    before = str(built), [type(part) for part in built.modules()]
    with pytest.raises(ValueError, match=reason):
        vidl.prune(built, **{"keep_rate": 0.5, "layers": [0], **options})
    assert (str(built), [type(part) for part in built.modules()]) == before


@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_benchmark(rate, monkeypatch):
    """The benchmark's candidates are correct, and its FLOPs are those that PyTorch counts."""
    options = (("depth", 4), ("embed_dim", 64), ("num_heads", 2), ("img_size", 64))
    sizes = dict(model="vit", name="vit_tiny_patch16_224", options=options, rate=rate)
    monkeypatch.setattr(swapped, "SHAPES", {"tiny": sizes | {"B": {"cpu": 2}}})
    monkeypatch.setattr(swapped, "LAYERS", (1, 2))
    (case,) = cases.plan(["swapped"], dtypes=["float32"], device="cpu").cases
    trials = check(case)
    assert [t.candidate.name for t in trials if t.status not in ("ok", "cannot run")] == []
    assert {t.candidate.name for t in trials if t.status == "ok"} > {"vidl native"}
    assert all({"result", "first"} == set(t.errors) for t in trials if t.status == "ok")

    inputs = case.make()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        swapped.step(inputs, "vidl native")
    # The benchmark does not count the sum over dropped tokens.
    fused = 2 * 2 * 64 * (4 + 3) if rate < 1 else 0
    assert counter.get_total_flops() == case.work("forward")[0].flops + fused


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "swap_timm.py"))
    said = capsys.readouterr().out
    assert float(said.split("largest difference ")[1].split()[0]) < 1e-5
    assert "72 of 197 tokens" in said
