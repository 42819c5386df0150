"""Random draws and visual masks: reproducible, well distributed, with published counts."""

import pytest
import torch

from vidl.kernels.select_tokens import kept_count
from vidl.masking import replace_masked, uniform, visual_mask, zero_masked
from vidl.nn import MaskedPatchEmbed

SAMPLES = torch.arange(1000)


def by_hand(seed, step, sample, i, stream):
    """The definition with Python integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    low, high = 0x243F6A88, 0x13198A2E
    for number in (seed, stream, step, sample):
        for word in (number % 2**32, number >> 32):
            low, high = mix(low ^ word), mix((high + mix(word ^ 0x3C6EF372)) % 2**32)
    return (mix(mix((i * 0x9E3779B9 + low) % 2**32) ^ high) >> 8) / 2**24


def test_draws_are_as_defined():
    samples = [0, 1, 17, 2**40 + 3]
    for seed, step, stream in [(0, 0, 0), (1, 2, 3), (2**63 - 1, 2**33, 2**32 + 1)]:
        drawn = uniform(seed, step, torch.tensor(samples), 9, stream=stream)
        expected = [[by_hand(seed, step, s, i, stream) for i in range(9)] for s in samples]
        assert torch.equal(drawn, torch.tensor(expected))


def test_draws_do_not_depend_on_batch_rank_or_length():
    whole = uniform(3, 5, SAMPLES, 40)
    shuffled = torch.randperm(1000)
    assert torch.equal(uniform(3, 5, shuffled, 40), whole[shuffled])
    ranks = [uniform(3, 5, SAMPLES[rank::4], 40) for rank in range(4)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole)
    assert torch.equal(uniform(3, torch.tensor(5), SAMPLES, 40), whole)
    assert torch.equal(uniform(3, 5, SAMPLES, 7), whole[:, :7])
    assert uniform(3, 5, SAMPLES[:0], 7).shape == (0, 7)


def test_compiled_draws_are_one_op_with_the_same_bits():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def draw(step, samples):
        return uniform(3, step, samples, 40, stream=2) < 0.5

    compiled = torch.compile(draw, backend=keep, fullgraph=True)
    for step in (5, torch.tensor(5)):
        assert torch.equal(compiled(step, SAMPLES), draw(step, SAMPLES))
    assert len(graphs) == 2
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert sum("vidl.uniform" in target for target in targets) == 1
        assert not any("shift" in target for target in targets)  # arithmetic of the mixer
    arguments = (3, torch.tensor(5), SAMPLES, 40, 2)
    torch.library.opcheck(torch.ops.vidl.uniform.default, arguments)


@pytest.mark.gpu
def test_draws_are_the_same_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    here = uniform(3, 5, SAMPLES, 40)
    samples, step = SAMPLES.cuda(), torch.tensor(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = uniform(3, step, samples, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), here)


def chi_squares(rows, bins=16):
    """Deviation of the mean Pearson statistic of the rows, in standard deviations."""
    labels = (rows * bins).long() + bins * torch.arange(len(rows))[:, None]
    counts = labels.flatten().bincount(minlength=bins * len(rows)).view(len(rows), bins)
    expected = rows.shape[1] / bins
    statistic = ((counts - expected) ** 2 / expected).sum(1)
    return (statistic.mean() - (bins - 1)) / (2 * (bins - 1) / len(rows)) ** 0.5


def test_draws_are_uniform_and_independent():
    drawn = uniform(1, 2, SAMPLES, 500)
    assert drawn.min() >= 0 and drawn.max() < 1
    # Along each axis: positions of a sample, samples at a position, steps, seeds and streams.
    of_one = torch.tensor([5])
    axes = {
        "places": drawn,
        "samples": drawn.T,
        "steps": torch.cat([uniform(1, step, of_one, 64) for step in range(500)]).T,
        "seeds": torch.cat([uniform(seed, 2, of_one, 64) for seed in range(500)]).T,
        "streams": torch.cat([uniform(1, 2, of_one, 64, stream=s) for s in range(500)]).T,
    }
    for name, rows in axes.items():
        assert abs(chi_squares(rows)) < 4, name
    # No correlation between neighbours along any axis.
    others = {
        "places": (drawn[:, 1:], drawn[:, :-1]),
        "samples": (drawn[1:], drawn[:-1]),
        "steps": (drawn, uniform(1, 3, SAMPLES, 500)),
        "seeds": (drawn, uniform(2, 2, SAMPLES, 500)),
        "streams": (drawn, uniform(1, 2, SAMPLES, 500, stream=1)),
        "swapped": (drawn, uniform(2, 1, SAMPLES, 500)),
        "upper words": (drawn, uniform(1, 2, SAMPLES + 2**32, 500)),
    }
    for name, (x, y) in others.items():
        product = (x.double() - 0.5) * (y.double() - 0.5) * 12
        assert abs(product.mean()) * product.numel() ** 0.5 < 4, name
        assert not torch.equal(x, y)


def test_draws_compile():
    torch._dynamo.reset()
    compiled = torch.compile(uniform, fullgraph=True, backend="aot_eager")
    for step in range(3):
        tensor = torch.tensor(step)
        assert torch.equal(compiled(1, tensor, SAMPLES, 9), uniform(1, step, SAMPLES, 9))


def test_misuse_of_draws_is_explained():
    with pytest.raises(TypeError, match="samples in int64"):
        uniform(0, 0, SAMPLES.int(), 3)
    with pytest.raises(ValueError, match=r"samples \[B\]"):
        uniform(0, 0, SAMPLES[None], 3)
    with pytest.raises(TypeError, match="step in int64"):
        uniform(0, torch.tensor(0.0), SAMPLES, 3)
    with pytest.raises(ValueError, match="scalar step"):
        uniform(0, SAMPLES, SAMPLES, 3)
    for wrong in (dict(seed=-1), dict(step=-1), dict(n=-1), dict(stream=-1)):
        options = dict(seed=0, step=0, n=3) | wrong
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*-1"):
            uniform(samples=SAMPLES, **options)


GRID = (4, 6, 5)
N, FRAME = 120, 30
KINDS = ("frame", "tube", "clip", "block")


def draw(kind="frame", ratio=0.6, samples=SAMPLES[:40], grid=GRID, **options):
    return visual_mask(1, 2, samples, grid, ratio, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [GRID, (1, 14, 14), (2, 1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.9])
def test_every_patch_is_in_one_list(kind, grid, ratio):
    mask = draw(kind, ratio, grid=grid)
    patches = grid[0] * grid[1] * grid[2]
    assert mask.grid == grid and mask.ids_keep.dtype == mask.ids_mask.dtype == torch.int64
    both = torch.cat([mask.ids_keep, mask.ids_mask], 1)
    assert torch.equal(both.sort(1).values, torch.arange(patches).expand(40, -1))
    for ids in (mask.ids_keep, mask.ids_mask):
        assert (ids.diff(dim=1) > 0).all()
    expected = torch.zeros(40, patches, dtype=torch.bool)
    for row, ids in zip(expected, mask.ids_mask, strict=True):
        row[ids] = True
    assert torch.equal(mask.masked(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["ceil", "floor", "floor_min_one", "drop_floor"])
def test_roundings_are_those_of_kept_count(kind, rounding):
    for ratio in (0.0, 0.65, 0.75, 0.9, 0.99):
        mask = draw(kind, ratio, rounding=rounding)
        if kind in ("frame", "tube"):
            expected = GRID[0] * kept_count(FRAME, 1 - ratio, rounding)
        else:
            expected = kept_count(N, 1 - ratio, rounding)
        assert mask.ids_keep.shape == (40, expected)


def test_published_counts():
    grid = (8, 14, 14)
    videomae = draw("tube", 0.9, grid=grid, rounding="drop_floor")
    assert videomae.ids_keep.shape[1] == 8 * 20
    assert draw("clip", 0.9, grid=grid).ids_keep.shape[1] == 156  # int(1568 (1 - 0.9)), MAE-ST
    assert draw("frame", 0.75, grid=(1, 14, 14)).ids_keep.shape[1] == 49  # MAE


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_depend_on_batch_rank_or_step_type(kind):
    whole = draw(kind).ids_keep
    for rank in range(3):
        assert torch.equal(draw(kind, samples=SAMPLES[rank:40:3]).ids_keep, whole[rank::3])
    tensor = visual_mask(1, torch.tensor(2), SAMPLES[:40], GRID, 0.6, kind=kind)
    assert torch.equal(tensor.ids_keep, whole)
    for other in (
        visual_mask(1, 3, SAMPLES[:40], GRID, 0.6, kind=kind),
        visual_mask(2, 2, SAMPLES[:40], GRID, 0.6, kind=kind),
        draw(kind, stream=1),
    ):
        assert not torch.equal(other.ids_keep, whole)


def test_frames_of_each_kind():
    frame, tube, clip, block = (draw(kind).masked().view(40, 4, 6, 5) for kind in KINDS)
    assert (frame.sum((2, 3)) == 18).all()
    assert not torch.equal(frame[:, 0], frame[:, 1])
    assert torch.equal(tube, tube[:, :1].expand_as(tube))
    assert (clip.sum((1, 2, 3)) == 72).all() and clip.sum((2, 3)).unique().numel() > 1
    # Neighbours are masked together more often with cuboids than with other kinds.
    same = [(m[..., 1:] == m[..., :-1]).float().mean() for m in (clip, block)]
    assert same[1] > same[0] + 0.15
    # All patches are masked equally often, within the binomial deviation.
    for kind in ("frame", "tube", "clip"):
        often = draw(kind, samples=SAMPLES).masked().float().mean(0)
        assert (often - 0.6).abs().max() < 4.5 * (0.6 * 0.4 / 1000) ** 0.5


def test_few_masked_patches_are_one_cuboid():
    def spread(kind):
        masked = draw(kind, 0.0125, grid=(4, 14, 14), samples=SAMPLES).masked()
        places = masked.view(-1, 4, 14, 14).nonzero()[:, 2:].view(1000, 10, 2)
        return (places.amax(1) - places.amin(1)).double().mean()

    assert spread("block") < 0.6 * spread("clip")


def test_replace_and_zero_masked():
    mask = draw()
    tokens = torch.randn(40, N, 8)
    masked = mask.masked()
    mask_token = torch.randn(8)
    replaced = replace_masked(tokens, mask, mask_token)
    expected = tokens.clone()
    expected[masked] = mask_token
    assert torch.equal(replaced, expected)
    video = torch.randn(40, 3, 4, 12, 10)
    zeroed = zero_masked(video, mask)
    grid = masked.view(40, 4, 6, 5)
    for row in range(12):
        for column in range(10):
            gone = grid[:, None, :, row // 2, column // 2].expand(-1, 3, -1)
            pixel = video[..., row, column].masked_fill(gone, 0)
            assert torch.equal(zeroed[..., row, column], pixel)


def test_the_embedding_drops_masked_patches():
    torch.manual_seed(0)
    mask, embed = draw(), MaskedPatchEmbed(2, 3, 8)
    video = torch.randn(40, 3, 4, 12, 10)
    visible = embed(video)[~mask.masked()].view(40, -1, 8)
    torch.testing.assert_close(embed(video, mask.ids_keep), visible)


@pytest.mark.parametrize("kind", ["frame", "tube"])
def test_masks_of_frames(kind):
    mask = draw(kind)
    frames = mask.per_frame()
    assert frames.grid == (1, 6, 5) and frames.ids_keep.shape == (160, 12)
    assert torch.equal(frames.masked().view(40, N), mask.masked())


def test_masks_compile():
    torch._dynamo.reset()

    def keep(step, kind):
        return visual_mask(1, step, SAMPLES[:4], GRID, 0.6, kind=kind).ids_keep

    compiled = torch.compile(keep, fullgraph=True, backend="eager")
    for kind in ("tube", "block"):
        step = torch.tensor(2)
        assert torch.equal(compiled(step, kind), keep(step, kind))


def test_misuse_of_masks_is_explained():
    with pytest.raises(ValueError, match="kind"):
        draw("cube")
    with pytest.raises(ValueError, match="grid"):
        draw(grid=(0, 3, 3))
    with pytest.raises(ValueError, match="mask_ratio"):
        draw(ratio=1.0)
    with pytest.raises(ValueError, match="rounding"):
        draw(rounding="round")
    with pytest.raises(ValueError, match="each of 4 frames"):
        draw("clip", 0.01).per_frame()
    with pytest.raises(RuntimeError, match="same number of visible patches in each frame"):
        draw("clip").per_frame()
    mask = draw()
    with pytest.raises(ValueError, match="tokens"):
        replace_masked(torch.zeros(40, 7, 8), mask, torch.zeros(8))
    with pytest.raises(ValueError, match="divides into"):
        zero_masked(torch.zeros(40, 3, 4, 13, 10), mask)
