"""Singularity, VindLU and SViTT: a whole step against plain PyTorch, in float64."""

import dataclasses

import plain
import pytest
import torch
from torch import Tensor

from vidl import models
from vidl.masking import Vocabulary

SIZES = dict(
    image_size=32, patch_size=8, width=64, depth=3, heads=2, prune_layers=(1,), text_width=64,
    text_layers=1, fusion_layers=2, text_heads=2, embed_dim=16, dropout=0.0,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip


def model_of(name, **fields):
    torch.manual_seed(0)
    model = models.create(name, "tiny", **(SIZES | fields)).double()
    for key, parameter in model.named_parameters():  # gates and tables begin at zero
        if key.endswith(("gate", "table", "time", "_bias", "gamma_1", "gamma_2")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def batch(model, B=4, words=7):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    inputs["attention_mask"][1, 4:] = 0
    r = model.recipe
    # A clip in float64: the op normalises bytes with float32 constants.
    video = plain.normalised(inputs["video"], r.mean, r.std)
    return inputs | {"video": video, "step": 3}


def visible(w, r, inputs, T) -> tuple[Tensor, Tensor]:
    """The visible patches of clips and their ids, [B, K, C] and [B, K]."""
    x = plain.embedded(w.of("vision.patch_embed.proj"), inputs["video"])
    mask = r.visual_mask(inputs["samples"], inputs["step"], T)
    ids = torch.arange(x.shape[1]).expand(len(x), -1) if mask is None else mask.ids_keep
    return plain.rows(x, ids), ids


def in_frames(w, r, inputs, time=None):
    """The tokens of each frame, [B T, 1 + K, C], and their patches; `time`: what VindLU adds."""
    video = inputs["video"]
    T, patches = video.shape[2], r.grid[1] * r.grid[2]
    x, ids = visible(w, r, inputs, T)
    x, ids = (y.unflatten(1, (T, -1)).flatten(0, 1) for y in (x, ids % patches))
    x = torch.cat([w["vision.cls_token"].expand(len(x), -1, -1), x], 1)
    if time is not None and T > 1:
        x = x + w["time"][:T].repeat(len(video), 1)[:, None]
    for number in range(r.depth):
        block = w.of(f"vision.blocks.{number}")
        if time == "first" and T > 1:
            x = through_time(block.of("time"), r, x, ids, T)
        index = torch.stack([plain.relative_rows(row, (1, *r.grid[1:])) for row in ids])
        x, scores = plain.beit_block(block, x, r.heads, index)
        if number in r.prune_layers and r.keep_rate < 1:
            x, ids = plain.kept(x, ids, scores, r.keep_rate)
        if time == "last" and T > 1:
            x = through_time(block.of("time"), r, x, ids, T)
    return plain.norm(w.of("norm"), x, 1e-12), ids


def same_place(ids, T):
    """Which tokens of a clip are at the same place, [B, T N, T N]; CLS is a place of its own."""
    place = torch.cat([ids.new_full((len(ids), 1), -1), ids], 1).unflatten(0, (-1, T)).flatten(1)
    return place[:, :, None] == place[:, None]


def through_time(w, r, x, ids, T):
    """VindLU's attention over time with its gate."""
    y = plain.norm(w.of("norm"), x, 1e-12).unflatten(0, (-1, T)).flatten(1, 2)
    q, k, v = plain.linear(w.of("attn.qkv"), y).chunk(3, -1)
    y = plain.softmax_attention(q, k, v, r.heads, same_place(ids, T))
    return x + w["gate"] * plain.linear(w.of("attn.proj"), y).view(x.shape)


def late(w, r, x, ids, T):
    """Singularity-temporal: layers of BERT over time at each place."""
    shape = x.shape
    x = x + w["time"][:T].repeat(len(x) // T, 1)[:, None]
    x, seen = x.unflatten(0, (-1, T)).flatten(1, 2), same_place(ids, T)
    for number in range(r.time_layers):
        layer = w.of(f"late.layer.{number}")
        x = plain.bert_attention(layer.of("attention"), x, x, r.heads, seen)
        hidden = torch.nn.functional.gelu(plain.linear(layer.of("intermediate.dense"), x))
        out = plain.linear(layer.of("output.dense"), hidden)
        x = plain.norm(layer.of("output.LayerNorm"), x + out, 1e-12)
    return x.view(shape)


FRAMES = [
    ("singularity", {}),
    ("singularity", dict(mask_ratio=0.0, keep_rate=1.0)),
    ("singularity", dict(frames=3, frames_tested=0, time_layers=2, mask="tube", keep_rate=0.6)),
    ("singularity", dict(frames=3, frames_tested=0, time_layers=1, mask_ratio=0.0, keep_rate=1.0)),
    ("vindlu", {}),
    ("vindlu", dict(time="first", mask="frame")),
    ("vindlu", dict(mask_ratio=0.0, keep_rate=1.0)),
    ("vindlu", dict(frames=1)),
]


@pytest.mark.parametrize("name, fields", FRAMES)
def test_frames(name, fields):
    model = model_of(name, **fields)
    inputs, r = batch(model), model.recipe

    def losses(w):
        T = inputs["video"].shape[2]
        x, ids = in_frames(w, r, inputs, getattr(r, "time", None))
        if getattr(r, "time_layers", 0):
            x = late(w, r, x, ids, T)
        x = x.unflatten(0, (-1, T))
        return plain.fusing_losses(w, r, inputs, x.flatten(1, 2), x[:, :, 1:].mean(2))

    plain.assert_same_step(model, inputs, losses)


def test_a_still_skips_time():
    model = model_of("vindlu")
    inputs = batch(model)
    inputs["video"] = inputs["video"][:, :, :1]

    def losses(w):
        x, _ = in_frames(w, model.recipe, inputs, "last")
        return plain.fusing_losses(w, model.recipe, inputs, x, x[:, None, 1:].mean(2))

    plain.assert_same_step(model, inputs, losses)
    unused = [p for n, p in model.named_parameters() if ".time." in n or n == "time"]
    assert unused and all(p.grad is not None and not p.grad.any() for p in unused)


@pytest.mark.parametrize("fields", [
    dict(block=0), dict(block=4, random_blocks=1), dict(block=0, mask_ratio=0.0, keep_keys=1.0),
    dict(block=4, random_blocks=1, mask_ratio=0.3, fusion_layers=3, keep_keys=0.3),
], ids=str)  # fmt: skip
def test_svitt(fields):
    model = model_of("svitt", **fields)
    inputs, r = batch(model), model.recipe

    def losses(w):
        x, ids = visible(w, r, inputs, r.frames)
        x = torch.cat([w["vision.cls_token"].expand(len(x), -1, -1), x], 1)
        for number in range(r.depth):
            index = torch.stack([plain.relative_rows(row, r.grid) for row in ids])
            groups = model.vision._groups(x, r.seed, inputs["step"], number)
            seen = groups_as_mask(groups, len(x), x.shape[1])
            x, scores = plain.beit_block(w.of(f"vision.blocks.{number}"), x, r.heads, index, seen)
            if number in r.prune_layers:
                x, ids = plain.kept(x, ids, scores, r.keep_rate)
        x = plain.norm(w.of("norm"), x, 1e-12)
        return plain.fusing_losses(w, r, inputs, x, x[:, 1:].mean(1), r.keep_keys)

    plain.assert_same_step(model, inputs, losses)


def groups_as_mask(groups, B, N):
    """Which rows see which, [B, N, N] bool, from offsets and rows of the groups."""
    seen = torch.zeros(B * N, B * N, dtype=torch.bool)
    queries = torch.arange(B * N) if groups.query_rows is None else groups.query_rows
    keys = torch.arange(B * N) if groups.key_rows is None else groups.key_rows
    q, k = groups.query_offsets.tolist(), groups.key_offsets.tolist()
    for g in range(groups.num_groups):
        seen[queries[q[g] : q[g + 1]].long()[:, None], keys[k[g] : k[g + 1]].long()] = True
    return torch.stack([seen[b * N : (b + 1) * N, b * N : (b + 1) * N] for b in range(B)])


def test_ensembles_of_frames():
    for kind, reduce in (
        ("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0)),
        ("lse", lambda x: x.logsumexp(0)),
    ):  # fmt: skip
        model = model_of("singularity", ensemble=kind, frames_tested=3).eval()
        video = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
        ids = torch.randint(5, 60, (2, 6))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            clips, text = model.encode_clips(video), model.encode_text(ids, mask)
            odds = model.match(clips, text, mask).diff(dim=1)
            alone = [model.match(clips[:, t : t + 1], text, mask).diff(dim=1) for t in range(3)]
        torch.testing.assert_close(odds, reduce(torch.stack(alone)))
    assert model_of("singularity").recipe.evaluation_frames == 4


@pytest.mark.parametrize("name, fewer, more", [
    ("vindlu", dict(frames=1), dict(frames=4)),
    ("singularity", dict(frames=2, frames_tested=0, time_layers=1),
     dict(frames=4, frames_tested=0, time_layers=1)),
    ("svitt", dict(frames=1), dict(frames=4)),
])  # fmt: skip
def test_a_run_with_more_frames_begins_with_one_of_fewer(name, fewer, more):
    first, second = model_of(name, **fewer), model_of(name, **more)
    second.load_state_dict(second.resized(first.state_dict()))
    frames = first.recipe.frames
    video = torch.randn(2, 3, frames, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            first.eval().encode_clips(video), second.eval().encode_clips(video)
        )


def test_base_is_the_published_one():
    singularity, vindlu, svitt = (models.recipe(n) for n in ("singularity", "vindlu", "svitt"))
    for r in (singularity, vindlu, svitt):
        assert (r.width, r.depth, r.heads, r.patch_size, r.image_size) == (768, 12, 12, 16, 224)
        assert (r.text_layers, r.fusion_layers, r.word_ratio, r.temperature) == (9, 3, 0.5, 0.07)
        assert (r.vtc, r.vtm, r.mlm) == (1, 1, 1) and r.mean == r.std == (0.5, 0.5, 0.5)
        assert r.mask_ratio == 0
    assert (singularity.frames, singularity.gather, singularity.keep_rate) == (1, False, 1)
    assert (vindlu.frames, vindlu.gather, vindlu.time, vindlu.drop_path) == (4, True, "last", 0.1)
    assert (svitt.frames, svitt.block, svitt.random_blocks, svitt.keep_rate) == (4, 56, 3, 0.7)
    stages = list(svitt.tokens().values())
    assert stages[2:5] == [1 + 549, 1 + 385, 1 + 270]
    eight = list(models.recipe("svitt", "frames8").tokens().values())
    assert eight[2:5] == [1 + 941, 1 + 565, 1 + 339]


@pytest.mark.parametrize("name, fields, complaint", [
    ("singularity", dict(tubelet_size=2, frames=2), "need tubelet_size=1"),
    ("singularity", dict(mask="block"), "need mask 'frame' or 'tube'"),
    ("singularity", dict(time_layers=1), "need frames_tested <= frames=1"),
    ("vindlu", dict(drop_path=1.0), "need drop_path in"),
    ("svitt", dict(keep_keys=0.0), "need keep_keys in"),
])  # fmt: skip
def test_errors(name, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(models.recipe(name), **fields)
