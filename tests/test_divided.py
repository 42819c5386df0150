"""SpaceTimeTransformer: Frozen in Time in plain PyTorch, masks, and published weights."""

import pytest
import torch
from compare import assert_model_as_accurate
from tiny import GRID, HEADS, PATCHES, SIZE, WIDTH, B, T, clip, randomise, results

from vidl.masking import visual_mask
from vidl.nn import SpaceTimeTransformer, ViT

SIZE = SIZE | dict(depth=2)


def attention(part, x, seen):
    """Softmax attention with the mask `seen`, [B, N, N]; x [B, N, C]."""
    q, k, v = part.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return part.proj((weights @ v).transpose(1, 2).flatten(2))


def with_cls(same):
    """Attention mask, [B, 1 + K, 1 + K]: CLS attends to all tokens, and all attend to CLS."""
    seen = torch.ones(len(same), same.shape[1] + 1, same.shape[1] + 1, dtype=torch.bool)
    seen[:, 1:, 1:] = same
    return seen


def plain(model, video, ids, kind):
    """The whole encoder with N x N masks in place of groups."""
    frames = video.shape[2]
    patches = model.patch_embed.proj(video.transpose(1, 2).flatten(0, 1)).flatten(2).mT
    x = patches.unflatten(0, (len(video), frames)) + model.pos_embed[:, None, 1:]
    x = (x + model.temporal_embed[:, :frames, None]).flatten(1, 2)
    x = x.gather(1, ids[..., None].expand(-1, -1, WIDTH))
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(video), -1, -1)
    x = torch.cat([cls, x], 1)
    time, place = ids // PATCHES, ids % PATCHES
    slot = torch.arange(ids.shape[1]) % max(ids.shape[1] // frames, 1)
    label = dict(slot=slot.expand_as(ids), position=place, joint=torch.zeros_like(ids))[kind]
    space, through = (with_cls(y[:, :, None] == y[:, None]) for y in (time, label))
    for block in model.blocks:
        t = attention(block.timeattn, block.norm3(x), through)
        s = attention(block.attn, block.norm1(x + t), space)
        y = x + s
        x = y + block.mlp(block.norm2(y))
    return model.norm(x)


def divided(part, x, frames, through_time):
    """Frozen's `VarAttention` on all tokens of all frames, with separate attention of CLS."""
    q, k, v = part.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5
    cls = (q[:, :, :1] @ k.mT * scale).softmax(-1) @ v

    def grouped(y):  # [B, H, T P, D] -> [B, H, groups, members, D]
        y = y[:, :, 1:].unflatten(2, (frames, PATCHES))
        return y.transpose(2, 3) if through_time else y

    def with_cls(y):  # the key of CLS before the keys of each group
        rest = grouped(y)
        return torch.cat([y[:, :, None, :1].expand(*rest.shape[:3], 1, -1), rest], 3)

    out = (grouped(q) @ with_cls(k).mT * scale).softmax(-1) @ with_cls(v)
    out = out.transpose(2, 3) if through_time else out
    return part.proj(torch.cat([cls, out.flatten(2, 3)], 2).transpose(1, 2).flatten(2))


def make(**options):
    return randomise(SpaceTimeTransformer(**SIZE, **(dict(num_frames=4) | options)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "kind, drawn",
    [
        ("slot", None),
        ("slot", "frame"),
        ("position", "frame"),
        ("position", "block"),
        ("joint", "clip"),
    ],
)
def test_is_frozen_written_plainly(kind, drawn, backend):
    model = make(time=kind, backend=backend)
    ids, ids_keep = torch.arange(T * PATCHES).expand(B, -1), None
    if drawn:
        ids = ids_keep = visual_mask(0, 0, torch.arange(B), GRID, 0.6, kind=drawn).ids_keep
    ours = results(model, lambda model, video: model(video, ids_keep), torch.float32, clip())
    low, true = (
        results(model, lambda model, video: plain(model, video, ids, kind), dtype, clip())
        for dtype in (torch.float32, torch.float64)
    )
    assert_model_as_accurate(ours, low, true, torch.float32)


def test_groups_are_those_of_frozen():
    block = make().blocks[0]
    x = torch.randn(B, 1 + T * PATCHES, WIDTH)
    ids = torch.arange(T * PATCHES).expand(B, -1)
    for part, label, through_time in (
        (block.timeattn, ids % PATCHES, True),
        (block.attn, ids // PATCHES, False),
    ):
        seen = with_cls(label[:, :, None] == label[:, None])
        torch.testing.assert_close(attention(part, x, seen), divided(part, x, T, through_time))


def test_slot_and_position_agree_for_tubes():
    slot, position = make(time="slot"), make(time="position")
    ids = visual_mask(0, 0, torch.arange(B), GRID, 0.6, kind="tube").ids_keep
    torch.testing.assert_close(slot(clip(), ids), position(clip(), ids))
    other = visual_mask(0, 0, torch.arange(B), GRID, 0.6, kind="frame").ids_keep
    assert not torch.allclose(slot(clip(), other), position(clip(), other))


def test_begins_as_an_image_model():
    torch.manual_seed(0)
    ours, image = SpaceTimeTransformer(**SIZE, num_frames=4), randomise(ViT(**SIZE))
    assert ours.load_pretrained(image.state_dict()) == []
    frame = clip()[:, :, 0]
    torch.testing.assert_close(ours(frame), image(frame).tokens)


def test_attention_through_time_learns():
    """Temporal attention learns from its gradient, not from rounding: float64 gives the same."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = SpaceTimeTransformer(**SIZE, num_frames=4, backend="reference").to(dtype)
        target = torch.randn(B, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            (model(clip())[:, 0] - target).square().mean().backward()
            optimizer.step()
        time = (p for name, p in model.named_parameters() if "timeattn" in name or "norm3" in name)
        gradients.append([p.grad.double() / p.grad.abs().max() for p in time])
    # Softmax is invariant to the bias of the keys, which adds the same to all products.
    for single, double in zip(*gradients, strict=True):
        rows = slice(None) if single.shape[0] != 3 * WIDTH else slice(2 * WIDTH, None)
        torch.testing.assert_close(single[rows], double[rows], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["slot", "position", "joint"])
def test_fewer_frames_and_nothing_visible(kind):
    model = make(time=kind)
    assert model(clip()[:, :, :2]).shape == (B, 1 + 2 * PATCHES, WIDTH)
    nothing = model(clip(), torch.empty(B, 0, dtype=torch.int64))
    assert nothing.shape == (B, 1, WIDTH)
    torch.testing.assert_close(nothing[0], nothing[1])
    video = clip().mul(50).add(100).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(model(video), model(video.float() / 255), rtol=1e-4, atol=1e-4)


def test_autocast():
    model, ids = make(), visual_mask(0, 0, torch.arange(B), GRID, 0.6).ids_keep
    with torch.autocast("cpu", torch.bfloat16):
        out = model(clip(), ids)
    assert out.dtype == torch.float32
    assert (out - model(clip(), ids)).abs().mean() < 0.1


def test_compiles():
    torch._dynamo.reset()
    model = make()
    ids = visual_mask(0, 0, torch.arange(B), GRID, 0.6).ids_keep
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(clip(), ids), model(clip(), ids))


def test_names_are_those_of_frozen_in_time():
    names = set(make().state_dict())
    assert {"cls_token", "pos_embed", "temporal_embed", "patch_embed.proj.weight"} <= names
    parts = ("norm1", "norm2", "norm3", "attn.qkv", "attn.proj", "timeattn.qkv", "timeattn.proj")
    for part in (*parts, "mlp.fc1", "mlp.fc2"):
        assert {f"blocks.1.{part}.weight", f"blocks.1.{part}.bias"} <= names


@pytest.mark.parametrize("frames", [2, 4, 6])
def test_loads_a_model_of_other_frames(frames):
    state = make().state_dict()
    whole = {f"module.video_model.{name}": value for name, value in state.items()}
    whole |= {"module.txt_proj.1.weight": torch.zeros(3)}
    ours = make(num_frames=frames)
    assert ours.load_pretrained(whole) == ["module.txt_proj.1.weight"]
    before, after = state["temporal_embed"], ours.temporal_embed.data
    both = min(frames, 4)
    assert torch.equal(after[:, :both], before[:, :both]) and not after[:, 4:].any()
    torch.testing.assert_close(ours(clip()[:, :, :both]), make()(clip()[:, :, :both]))
    ours.load_pretrained(whole, frames="interpolate")
    after = ours.temporal_embed.data
    torch.testing.assert_close(after[:, [0, -1]], before[:, [0, -1]])
    low, high = before[0, :, 0].min(), before[0, :, 0].max()
    assert ((after[0, :, 0] >= low - 1e-6) & (after[0, :, 0] <= high + 1e-6)).all()


def test_weights_that_do_not_fit_are_named():
    ours, state = make(), make().state_dict()
    del state["blocks.1.timeattn.qkv.bias"], state["blocks.0.norm3.weight"]
    with pytest.raises(ValueError, match="missing: blocks.0.norm3.weight, blocks.1.timeattn.qkv"):
        ours.load_pretrained(state)
    image = ViT(**SIZE, init_values=0.1).state_dict()
    with pytest.raises(ValueError, match="unexpected: blocks.0.ls1.gamma, blocks.0.ls2.gamma"):
        ours.load_pretrained(image)
    with pytest.raises(ValueError, match="frames"):
        ours.load_pretrained(state, frames="repeat")


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="time among slot, position, joint"):
        make(time="space")
    with pytest.raises(ValueError, match="num_frames"):
        make(num_frames=0)
    with pytest.raises(ValueError, match="at most num_frames=2 frames, got 3"):
        make(num_frames=2)(clip())
    uneven = torch.arange(2 * T).expand(B, -1)
    with pytest.raises(RuntimeError, match="same number of visible"):
        make()(clip(), uneven)
    with pytest.raises(ValueError, match="each of 3 frames"):
        make()(clip(), uneven[:, :4])
