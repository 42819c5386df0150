"""Beit: timm and transformers, masks, whole clips, block-sparse attention, time, and weights."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from compare import assert_model_as_accurate
from tiny import GRID, HEADS, PATCHES, SIZE, WIDTH, B, T, clip, randomise, results
from torch import nn

from vidl.masking import visual_mask
from vidl.nn import Beit, Edges, Pruning, groups_in_time, inflate_table, resize_table

ROWS = 7 * 7 + 3
D = WIDTH // HEADS


def mask(kind="frame", ratio=0.5):
    return visual_mask(0, 0, torch.arange(B), GRID, ratio, kind=kind).ids_keep


def as_images(video):
    return video.transpose(1, 2).flatten(0, 1)


def make(**options):
    return randomise(Beit(**(SIZE | options)))


def near(ours, theirs, allowed=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)


def gradients(model, tokens):
    """Of a fixed random gradient of `tokens`, by the names of the parameters."""
    generator = torch.Generator().manual_seed(2)
    tokens.backward(torch.randn(tokens.shape, generator=generator, dtype=tokens.dtype))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# The same weights in timm and transformers


def assert_same(ours, baseline, forward):
    """Tokens and all gradients in float64; names are those of `load_pretrained`."""
    ours, baseline, video = ours.double(), baseline.double(), clip(torch.float64)
    tokens = ours(video).tokens
    expected = forward(baseline, as_images(video))
    near(tokens, expected)
    named, mine = copy.deepcopy(ours), gradients(ours, tokens)
    other = gradients(baseline, expected)
    tables = [name for name in mine if "table" in name]
    if shared := [name for name in other if "table" in name and not re.search(r"\d", name)]:
        # Each layer has a copy of the shared table, or the sum of it and its own.
        near(sum(mine[name] for name in tables), other[shared[0]])
        if any("table" in name for name in other if name not in shared):
            other[shared[0]] = torch.zeros_like(other[shared[0]])
        else:
            mine = {name: gradient for name, gradient in mine.items() if name not in tables}
    named.load_pretrained(other | without_gradient(baseline))
    theirs = dict(named.named_parameters())
    for name in mine:
        near(mine[name], theirs[name].data)


def without_gradient(model):
    """Parameters outside the encoder, which `load_pretrained` skips."""
    return {name: p.data for name, p in model.named_parameters() if p.grad is None}


TIMM = {
    "own tables": dict(use_rel_pos_bias=True, init_values=0.1),
    "shared table": dict(use_shared_rel_pos_bias=True, init_values=0.1),
    "both tables": dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True),
    "final norm": dict(use_rel_pos_bias=True, global_pool="token"),
}


@pytest.mark.parametrize("variant", TIMM)
def test_is_that_of_timm(variant):
    timm = pytest.importorskip("timm.models.beit")
    options = dict(use_abs_pos_emb=False, num_classes=0) | TIMM[variant]
    baseline = randomise(timm.Beit(**SIZE, **options)).double()
    ours = Beit(**SIZE, init_values=options.get("init_values"), final_norm="global_pool" in options)
    ours.double()  # before tables are added
    left = ours.load_pretrained(baseline.state_dict())
    assert left == [] if "global_pool" in options else set(left) == {
        "fc_norm.weight", "fc_norm.bias"
    }  # fmt: skip
    assert_same(ours, baseline, lambda model, images: model.forward_features(images))


def config(**options):
    transformers = pytest.importorskip("transformers")
    return transformers.BeitConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, image_size=32, patch_size=8, layer_norm_eps=1e-6,
        drop_path_rate=0.0, num_labels=5, vocab_size=7, **options,
    )  # fmt: skip


TRANSFORMERS = {
    "own tables": dict(use_relative_position_bias=True),
    "shared table": dict(use_shared_relative_position_bias=True, use_mask_token=True),
    "final norm": dict(use_relative_position_bias=True, use_mean_pooling=False),
}


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_is_that_of_transformers(variant):
    settings = config(**TRANSFORMERS[variant])
    import transformers

    baseline = randomise(transformers.BeitModel(settings))
    ours = Beit(**SIZE, final_norm=not settings.use_mean_pooling)
    ours.load_pretrained(baseline.state_dict())
    assert_same(ours, baseline, lambda model, images: model(images).last_hidden_state)


@pytest.mark.parametrize("kind", ["BeitForImageClassification", "BeitForMaskedImageModeling"])
def test_loads_a_beit_with_a_head(kind):
    settings = config(use_relative_position_bias=True)
    import transformers

    model = randomise(getattr(transformers, kind)(settings))
    ours = Beit(**SIZE)
    left = ours.load_pretrained(model.state_dict())
    parts = "pooler|classifier|layernorm|lm_head"
    assert left and all(re.search(parts, name) for name in left)
    images = as_images(clip())
    near(ours(images).tokens, model.beit(images).last_hidden_state, 1e-5)


def test_loads_hugging_face_names_of_old():
    settings = config(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    import transformers

    state = transformers.BeitModel(settings).state_dict()
    first, second = Beit(**SIZE), make()
    first.load_pretrained(state)
    renames = {
        r"^layers\.(\d+)\.relative_position_bias": (
            r"encoder.layer.\1.attention.attention.relative_position_bias"
        ),
        r"^shared_position_bias": "encoder.relative_position_bias",
        r"^layers\.": "encoder.layer.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
    old = {}
    for name, value in state.items():
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        old[f"beit.{name}"] = value
    old["beit.encoder.layer.0.attention.attention.relative_position_index"] = torch.zeros(17, 17)
    second.load_pretrained(old)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_base_is_as_large_as_that_of_timm():
    timm = pytest.importorskip("timm.models.beit")
    with torch.device("meta"):
        ours = Beit()
        options = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
        baseline = timm.Beit(num_classes=0, **options)
    count = sum(p.numel() for p in baseline.parameters())
    assert sum(p.numel() for p in ours.parameters()) == count - 2 * 768  # fc_norm


def test_stochastic_depth_is_that_of_timm():
    timm = pytest.importorskip("timm.models.beit")
    options = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    baseline = randomise(timm.Beit(**SIZE, num_classes=0, drop_path_rate=0.5, **options)).train()
    ours = Beit(**SIZE, drop_path=0.5).train()
    ours.load_pretrained(baseline.state_dict())
    torch.manual_seed(3)
    tokens = ours(clip()).tokens
    torch.manual_seed(3)
    near(tokens, baseline.forward_features(as_images(clip())), 1e-5)
    assert not torch.allclose(ours.eval()(clip()).tokens, tokens)


# A dense encoder in plain PyTorch: masks, whole clips, pruning


def rows_of_table(frames, num_frames):
    """For CLS and all patches of so many frames, the row of the table of each pair."""
    places = [(t, y, x) for t in range(frames) for y in range(4) for x in range(4)]
    last = (2 * num_frames - 1) * 7 * 7
    index = torch.empty(1 + len(places), 1 + len(places), dtype=torch.int64)
    index[0, :], index[:, 0] = last, last + 1
    index[0, 0] = last + 2
    for i, (t, y, x) in enumerate(places):
        for j, (s, v, u) in enumerate(places):
            index[1 + i, 1 + j] = ((t - s + num_frames - 1) * 7 + y - v + 3) * 7 + x - u + 3
    return index


def attention(part, x, bias, seen=None):
    """The output and the weights of softmax attention; x [S, N, C], bias [S, H, N, N]."""
    zeros = torch.zeros_like(part.q_bias)
    qkv = F.linear(x, part.qkv.weight, torch.cat([part.q_bias, zeros, part.v_bias]))
    q, k, v = qkv.view(*x.shape[:2], 3, HEADS, D).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / math.sqrt(D) + bias
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1)
    return part.proj((weights @ v).transpose(1, 2).flatten(2)), weights


def pick(x, chosen):
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))


def plain(model, video, ids, *, index, prune=None, masks=None, time=None):
    """Embed all patches, drop the masked ones, and run all layers with N x N biases.

    Args:
        ids: of each frame [B T, K], or of each clip [B, K].
        index: the rows of the table for CLS and all patches.
        prune: the layers that prune after the MLP, and the rate.
        masks: which tokens each layer sees, [N, N].
        time: added to the tokens of each frame.
    """
    x = model.patch_embed.proj(as_images(video)).flatten(2).mT
    cls = model.cls_token.expand(x.shape[0], -1, -1)
    if time is not None:
        x, cls = (y + time.repeat(B, 1)[:, None] for y in (x, cls))
    if ids.shape[0] == B:
        x, cls = x.unflatten(0, (B, -1)).flatten(1, 2), model.cls_token.expand(B, -1, -1)
    x, kept = torch.cat([cls, pick(x, ids)], 1), {}
    for layer, block in enumerate(model.blocks):
        places = F.pad(ids + 1, (1, 0))
        bias = block.attn.relative_position_bias_table[index[places[:, :, None], places[:, None]]]
        seen = None if masks is None else masks[layer]
        out, weights = attention(block.attn, block.norm1(x), bias.permute(0, 3, 1, 2), seen)
        x = x + block.gamma_1 * out
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
        if prune is not None and layer in prune[0]:
            scores = weights[:, :, 0, 1:].mean(1)
            count = math.ceil(prune[1] * scores.shape[1])
            chosen = scores.argsort(1, descending=True)[:, :count].sort(1).values
            x = torch.cat([x[:, :1], pick(x, 1 + chosen)], 1)
            ids = kept[layer] = ids.gather(1, chosen)
    return x, ids, kept


def in_float64(model):
    """A copy; the kernels of "native" do not take float64."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "auto"
    return model


def assert_plain(ours, ids_keep, ids, *, time=None, call=None, **options):
    """Tokens, kept patches and gradients are those of `plain`, in float64 and in float32.

    Args:
        call: further arguments of the forward of `ours`.
    """
    call = {} if call is None else call

    def sparse(model, video):
        return model(video, ids_keep, None if time is None else time.to(video.dtype), **call)

    def dense(model, video):
        own = None if time is None else time.to(video.dtype)
        return plain(model, video, ids, time=own, **options)

    double, other, video = in_float64(ours), in_float64(ours), clip(torch.float64)
    frames, (x, last, kept) = sparse(double, video), dense(other, video)
    near(frames.tokens, x)
    assert torch.equal(frames.ids, last) and frames.kept.keys() == kept.keys()
    assert all(torch.equal(frames.kept[layer], kept[layer]) for layer in kept)
    mine, theirs = gradients(double, frames.tokens), gradients(other, x)
    assert mine.keys() == theirs.keys() == dict(ours.named_parameters()).keys()
    for name in mine:
        near(mine[name], theirs[name])
    single = results(ours, lambda *a: sparse(*a).tokens, torch.float32, clip())
    low, true = (
        results(ours, lambda *a: dense(*a)[0], dtype, clip())
        for dtype in (torch.float32, torch.float64)
    )
    assert_model_as_accurate(single, low, true, torch.float32)


BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


@BACKENDS
def test_visible_patches_of_each_frame(backend):
    ids_keep, time = mask(), torch.randn(T, WIDTH)
    ids = (ids_keep % PATCHES).view(B * T, -1)
    assert_plain(make(backend=backend), ids_keep, ids, time=time, index=rows_of_table(1, 1))


@BACKENDS
@pytest.mark.parametrize("kind", [None, "clip"])
def test_whole_clips(kind, backend):
    """Of fewer frames than the table is made for; frames may show different numbers of patches."""
    ids_keep = None if kind is None else mask(kind)
    ids = torch.arange(T * PATCHES).expand(B, -1) if kind is None else ids_keep
    ours = make(joint=True, num_frames=T + 1, backend=backend)
    time = None if kind is None else torch.randn(T, WIDTH)
    assert_plain(ours, ids_keep, ids, time=time, index=rows_of_table(T, T + 1))


@BACKENDS
@pytest.mark.parametrize("joint", [False, True])
def test_pruning(joint, backend):
    ids_keep = mask("frame", 0.3)
    options = dict(joint=True, num_frames=T) if joint else {}
    pruning = Pruning(0.6, when="after_mlp")
    ours = make(prune_layers=(0, 2), pruning=pruning, backend=backend, **options)
    ids = ids_keep if joint else (ids_keep % PATCHES).view(B * T, -1)
    index = rows_of_table(T, T) if joint else rows_of_table(1, 1)
    assert_plain(ours, ids_keep, ids, prune=((0, 2), 0.6), index=index)
    assert ours.keep_rate == 0.6
    ours.set_keep_rate(1.0)
    assert_plain(ours, ids_keep, ids, index=index)


def recorded(monkeypatch):
    """The groups that `Edges` makes, as they are made."""
    drawn, groups = [], Edges.groups

    def record(self, *args, **options):
        drawn.append(groups(self, *args, **options))
        return drawn[-1]

    monkeypatch.setattr(Edges, "groups", record)
    return drawn


def pairs_of(groups):
    """Which rows see which, [rows, rows]."""
    seen = torch.zeros(groups.num_queries, groups.num_keys, dtype=torch.bool)
    for g in range(groups.num_groups):
        queries, keys = (
            torch.arange(offsets[g], offsets[g + 1])
            for offsets in (groups.query_offsets, groups.key_offsets)
        )
        queries = queries if groups.query_rows is None else groups.query_rows[queries]
        keys = keys if groups.key_rows is None else groups.key_rows[keys]
        seen[queries[:, None], keys] = True
    return seen


@BACKENDS
@pytest.mark.parametrize("pruned", [False, True])
def test_sparse_edges_are_dense_attention_with_a_mask(pruned, backend, monkeypatch):
    drawn = recorded(monkeypatch)
    edges = Edges(block=5, random=2)
    options = dict(prune_layers=(1,), pruning=Pruning(0.7, when="after_mlp")) if pruned else {}
    ours = make(joint=True, num_frames=T, edges=edges, backend=backend, **options)
    ids_keep, call = mask("clip"), dict(step=4, seed=5)
    ours(clip(), ids_keep, **call)
    masks = [pairs_of(groups).unflatten(0, (B, -1)).unflatten(2, (B, -1)) for groups in drawn]
    assert all(torch.equal(m[0, :, 0], m[1, :, 1]) and not m[0, :, 1].any() for m in masks)
    masks = [m[0, :, 0] for m in masks]
    prune = ((1,), 0.7) if pruned else None
    assert_plain(
        ours, ids_keep, ids_keep, call=call, prune=prune, masks=masks, index=rows_of_table(T, T)
    )
    K = ids_keep.shape[1]
    assert masks[0][0].all() and masks[0][:, 0].all()  # CLS
    blocks = F.pad(masks[0][1:, 1:], (0, -K % 5)).unflatten(1, (-1, 5)).any(2).sum(1)
    assert (blocks == 1 + 2).all()
    assert torch.stack(
        [masks[0][1 + i, 1 + i // 5 * 5 : 6 + i // 5 * 5].all() for i in range(K)]
    ).all()


def test_the_pattern_of_edges_is_fresh_in_each_step_and_layer(monkeypatch):
    drawn = recorded(monkeypatch)
    ours = make(joint=True, num_frames=T, edges=Edges(4, 3))
    for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        ours(clip(), step=step, seed=seed)
    patterns = [pairs_of(groups) for groups in drawn]
    assert all(map(torch.equal, patterns[:3], patterns[3:6]))  # the same step
    different = patterns[3:]
    assert not any(
        torch.equal(one, other) for i, one in enumerate(different) for other in different[:i]
    )


def test_edges_to_all_blocks_are_none(monkeypatch):
    dense, ours = (make(joint=True, num_frames=T, edges=e) for e in (None, Edges(16, 3)))
    near(ours(clip()).tokens, dense(clip()).tokens, 1e-5)
    nothing = ours(clip(), torch.empty(B, 0, dtype=torch.int64))
    assert nothing.tokens.shape == (B, 1, WIDTH)


# Attention over time in every block


def opened(model, gate):
    for block in model.blocks:
        nn.init.constant_(block.time.gate, gate)
    return model


def without_time(model, **options):
    other = Beit(**SIZE, **options)
    state = {n: x for n, x in model.state_dict().items() if ".time." not in n}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("time", ["first", "last"])
def test_time_with_a_closed_gate_is_beit(time):
    fresh = Beit(**SIZE, time=time)
    assert all(block.time.gate == 0 for block in fresh.blocks)
    ours = opened(make(time=time), 0.0)
    assert torch.equal(ours(clip(), mask()).tokens, without_time(ours)(clip(), mask()).tokens)


def through_time(module, x):
    """VindLU's attention over time with PyTorch's module; x [B T, 1 + K, C] of the same places."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=x.dtype)
    attn = module.attn
    pairs = (
        (theirs.in_proj_weight, attn.qkv.weight), (theirs.in_proj_bias, attn.qkv.bias),
        (theirs.out_proj.weight, attn.proj.weight), (theirs.out_proj.bias, attn.proj.bias),
    )  # fmt: skip
    for parameter, value in pairs:
        parameter.data = value.data
    y = F.layer_norm(x, (WIDTH,), module.norm.weight, module.norm.bias, 1e-12)
    y = y.unflatten(0, (B, T)).transpose(1, 2).flatten(0, 1)  # [B (1 + K), T, C]
    y = theirs(y, y, y, need_weights=False)[0].unflatten(0, (B, -1)).transpose(1, 2)
    return x + y.flatten(0, 1)


@pytest.mark.parametrize("time", ["first", "last"])
def test_time_with_an_open_gate_is_that_of_vindlu(time):
    ours = opened(make(time=time), 1.0).double()
    video, ids_keep = clip(torch.float64), mask("tube")
    ids = (ids_keep % PATCHES).view(B * T, -1)
    expected, stages = without_time(ours).double(), []
    for block in expected.blocks:  # what the layers of BEiT get and give
        block.register_forward_pre_hook(lambda block, args: stages.append(args))
    expected(video, ids_keep)
    x = stages[0][0]
    for block, other, (_, *rest) in zip(ours.blocks, expected.blocks, list(stages), strict=True):
        x = through_time(block.time, x) if time == "first" else x
        x, _ = other(x, *rest)
        x = through_time(block.time, x) if time == "last" else x
    near(ours(video, ids_keep).tokens, x)
    assert torch.equal(ours(video, ids_keep).ids, ids)


@pytest.mark.parametrize("time", ["first", "last"])
def test_time_follows_the_tokens_that_stay(time):
    """After pruning, tokens attend to the frames that kept their patch."""
    options = dict(time=time, prune_layers=(1,), pruning=Pruning(0.5))
    ours = opened(make(**options), 1.0)
    seen = []
    for block in ours.blocks:
        block.time.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    frames = ours(clip(), mask())
    before = (mask() % PATCHES).view(B * T, -1)
    after = groups_in_time(frames.kept[1], T, PATCHES)
    wanted = [groups_in_time(before, T, PATCHES)] * (1 if time == "last" else 2)
    for used, groups in zip(seen, [*wanted, after, after], strict=False):
        assert torch.equal(used.query_rows, groups.query_rows)
        assert torch.equal(used.query_offsets, groups.query_offsets)
    frames.tokens.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_stills_skip_time_but_give_it_a_gradient():
    ours = opened(make(time="last"), 1.0)
    still = clip()[:, :, :1]
    tokens = ours(still).tokens
    assert torch.equal(tokens, without_time(ours)(still).tokens)
    tokens.square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all() == (".time." in name), name


# Everything else


def test_every_parameter_learns():
    for options in (
        dict(time="last", final_norm=True),
        dict(joint=True, num_frames=T, edges=Edges(4, 2)),
    ):
        pruning = dict(prune_layers=(1,), pruning=Pruning(0.7, when="after_mlp"))
        ours = Beit(**SIZE, **options, **pruning)
        if "time" in options:
            opened(ours, 0.1)
        ours(clip(), mask()).tokens.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_images_uint8_and_nothing_visible():
    mean = std = (0.5, 0.5, 0.5)
    ours = make(mean=mean, std=std)
    video = torch.randint(0, 256, (B, 3, T, 32, 32), dtype=torch.uint8)
    normalised = video / 127.5 - 1
    near(ours(video).tokens, ours(normalised).tokens, 1e-4)
    near(ours(normalised[:, :, 1]).tokens, ours(normalised).tokens[1::T], 1e-5)
    nothing = ours(video, torch.empty(B, 0, dtype=torch.int64))
    assert nothing.tokens.shape == (B * T, 1, WIDTH) and nothing.ids.shape == (B * T, 0)


KINDS = {
    "frames": dict(time="last", prune_layers=(1,), pruning=Pruning(0.7)),
    "clips": dict(joint=True, num_frames=T, prune_layers=(1,), pruning=Pruning(0.7)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    ours = make(**KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        frames = ours(clip(), mask())
    expected = ours(clip(), mask())
    assert (frames.tokens[:, 0] - expected.tokens[:, 0]).abs().mean() < 0.1
    frames.tokens.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind):
    torch._dynamo.reset()
    ours = Beit(**(SIZE | dict(depth=2)), **KINDS[kind])

    def run(video, ids):
        frames = ours(video, ids)
        return frames.tokens, frames.ids

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours_, theirs in zip(compiled(clip(), mask()), run(clip(), mask()), strict=True):
        torch.testing.assert_close(ours_, theirs)


@pytest.mark.parametrize("scores", ["mean", "similarity"])
def test_other_scores(scores):
    frames = make(prune_layers=(0,), pruning=Pruning(0.5, scores))(clip())
    assert frames.ids.shape == (B * T, PATCHES // 2) and (frames.ids.diff() != 0).all()


def test_an_adapter_in_place_of_qkv_is_called():
    ours = make()
    expected = ours(clip()).tokens

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    for block in ours.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
        block.attn.q_bias.data -= 1
        block.attn.v_bias.data -= 1  # a constant in the keys changes nothing
    near(ours(clip()).tokens, expected, 1e-4)


# Tables of other grids


def table_of(model):
    return model.blocks[0].attn.relative_position_bias_table.data


def test_tables_are_resized_as_transformers_does():
    settings = config(use_relative_position_bias=True)
    import transformers

    model = randomise(transformers.BeitModel(settings))
    ours = Beit(**(SIZE | dict(img_size=48)))
    ours.load_pretrained(model.state_dict(), mode="bilinear")
    images = torch.randn(2, 3, 48, 48)
    near(ours(images).tokens, model(images).last_hidden_state, 1e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_tables_of_images_are_inflated(size):
    image = make()
    ours = Beit(**(SIZE | dict(img_size=size)), joint=True, num_frames=2)
    assert ours.load_pretrained(image.state_dict()) == []
    grid = (1, size[0] // 8, size[1] // 8)
    table = resize_table(table_of(image), (1, 4, 4), grid)
    assert torch.equal(table_of(ours), inflate_table(table, grid, 2))
    still = torch.randn(B, 3, 1, *size)
    frames = Beit(**(SIZE | dict(img_size=size)))
    frames.load_pretrained(image.state_dict())
    near(ours(still).tokens, frames(still).tokens, 1e-5)
    frames.load_pretrained(frames.state_dict())  # of the same grid, which need not be square
    ours.load_pretrained(frames.state_dict())
    near(ours(still).tokens, frames(still).tokens, 1e-5)


def test_more_frames_begin_as_fewer():
    first, second = (Beit(**SIZE, joint=True, num_frames=n) for n in (2, T))
    randomise(first)
    assert second.load_pretrained(first.state_dict()) == []
    planes, more = table_of(first)[:-3].view(3, 49, HEADS), table_of(second)[:-3]
    for displacement, nearest in enumerate((0, 0, 1, 2, 2)):
        assert torch.equal(more.view(5, 49, HEADS)[displacement], planes[nearest])
    assert torch.equal(table_of(first)[-3:], table_of(second)[-3:])


def test_time_may_be_missing_but_not_in_part():
    ours, image = Beit(**SIZE, time="last"), make()
    assert ours.load_pretrained(image.state_dict()) == []
    near(ours(clip()).tokens, image(clip()).tokens, 1e-5)
    state = ours.state_dict()
    del state["blocks.1.time.gate"]
    with pytest.raises(ValueError, match=r"missing: blocks.1.time.gate"):
        ours.load_pretrained(state)


def test_weights_that_do_not_fit_are_named():
    ours, state = Beit(**SIZE), make(depth=4).state_dict()
    before = copy.deepcopy(ours.state_dict())
    del state["blocks.1.attn.q_bias"]
    table = "blocks.0.attn.relative_position_bias_table"
    state[table] = torch.zeros(11, HEADS)
    with pytest.raises(ValueError) as error:
        ours.load_pretrained(state)
    for part in (
        "missing: blocks.1.attn.q_bias", "unexpected: blocks.3.attn.proj.bias",
        f"{table} [11, 2], not [{ROWS}, 2]",
    ):  # fmt: skip
        assert part in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="pos_embed"):
        ours.load_pretrained({**before, "pos_embed": torch.zeros(1, 17, WIDTH)})


def test_misuse_is_explained():
    pruning = dict(prune_layers=(0,))
    joint = dict(joint=True, num_frames=2)
    for message, options in {
        "need joint=True with edges": dict(edges=Edges()),
        "need joint=True with num_frames=3": dict(num_frames=3),
        "need joint=False with time='last'": dict(time="last", **joint),
        "fuse=None": dict(pruning=Pruning(0.5, fuse="sum"), **pruning),
        "heed the table": dict(pruning=Pruning(0.5, "value"), **pruning),
        "scores='cls'": dict(pruning=Pruning(0.5, "mean"), edges=Edges(), **pruning, **joint),
        "need drop_path": dict(drop_path=1.0),
        r"need prune_layers in \[0, 3\)": dict(prune_layers=(3,), pruning=Pruning(0.5)),
        "need pruning=Pruning": pruning,
    }.items():
        with pytest.raises(ValueError, match=message):
            Beit(**SIZE, **options)
    with pytest.raises(ValueError, match="at most num_frames=2 frames, got 3"):
        Beit(**SIZE, **joint)(clip())
    ours = Beit(**SIZE, joint=True, num_frames=T, edges=Edges())
    with pytest.raises(TypeError, match="need step as an int"):
        ours(clip(), step=torch.tensor(3))
    ours = Beit(**SIZE)
    ours(clip(), step=torch.tensor(3))  # has no effect
    with pytest.raises(ValueError, match=r"time \[3, 64\]"):
        ours(clip(), None, torch.zeros(2, WIDTH))
    with pytest.raises(RuntimeError, match="same number of visible patches in each frame"):
        ours(clip(), torch.arange(2 * T).expand(B, -1))
    with pytest.raises(ValueError, match="odd number of blocks"):
        Edges(local=2)
