"""frame_difference and run_length_ids: definitions and errors."""

import pytest
import torch
from compare import assert_as_accurate
from test_masked_patch_embed import in_layout
from torch.nn import functional as F
from where import Where

from vidl.kernels import library
from vidl.ops import frame_difference, masked_patch_embed, run_length_ids

OP = "frame_difference"
STD = (0.229, 0.224, 0.225)
INF = float("inf")
# Frames, channels, patch, and the grid of patches.
SHAPES = {
    "tubelets": (2, 3, (2, 16, 16), (3, 2, 3)),
    "frames": (1, 3, (1, 14, 14), (3, 2, 17)),
    "long tubelets": (2, 1, (4, 8, 8), (2, 1, 2)),
    "odd": (1, 2, (3, 5, 7), (2, 3, 2)),
    "wide patches": (1, 3, (2, 40, 33), (2, 1, 2)),
    "one slice": (2, 3, (2, 8, 8), (1, 2, 2)),
    "no samples": (0, 3, (2, 8, 8), (2, 2, 2)),
    "no frames": (2, 3, (2, 8, 8), (0, 2, 2)),
}
LAYOUTS = ("BCTHW", "BTCHW", "BTHWC", "window", "backwards")


def clip_of(shape, dtype, layout="BCTHW", device="cpu"):
    B, C, patch, grid = SHAPES[shape]
    sizes = (B, C, *(p * g for p, g in zip(patch, grid, strict=True)))
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        clip = torch.randint(0, 256, sizes, generator=generator).byte()
    else:
        clip = torch.randn(sizes, generator=generator).to(dtype)
    return in_layout(clip, layout).to(device), patch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_exact(shape, layout, where):
    where.skip_unless_runs(OP)
    clip, patch = clip_of(shape, torch.uint8, layout, where.device)
    out = frame_difference(clip, patch, backend=where.backend)
    assert torch.equal(out, frame_difference(clip, patch, backend="reference"))
    assert torch.equal(out, frame_difference(clip, patch, backend=where.backend))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["BCTHW", "BTHWC"])
@pytest.mark.parametrize("bytes", [False, True], ids=["float", "std"])
def test_as_accurate_as_torch(bytes, shape, layout, dtype, where):
    where.skip_unless_runs(OP, dtype)
    if bytes and dtype != torch.float32:
        pytest.skip("bytes have one dtype")
    clip, patch = clip_of(shape, torch.uint8 if bytes else dtype, layout, where.device)
    std = STD[: clip.shape[1]] if bytes else None
    ours = frame_difference(clip, patch, std=std, backend=where.backend)
    low = frame_difference(clip, patch, std=std, backend="reference")
    scaled = clip.cpu().double()
    if bytes:
        scaled = scaled / 255 / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1, 1)
    true = frame_difference(scaled, patch)
    assert ours.dtype == torch.float32 and torch.equal(ours.isinf().cpu(), true.isinf())
    finite = true.isfinite()
    assert_as_accurate(ours.cpu()[finite], low.cpu()[finite], true[finite], torch.float32)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("sides, std", [((3000, 3000), None), ((2048, 4100), (0.5,))])
def test_large_patches_of_bytes_do_not_overflow(sides, std, where):
    where.skip_unless_runs(OP)
    clip = torch.zeros(1, 1, 2, *sides, dtype=torch.uint8, device=where.device)
    clip[:, :, 1] = 255
    for view in (clip, clip.transpose(3, 4)):
        out = frame_difference(view, (1, *view.shape[3:]), std=std, backend=where.backend)
        assert out.tolist() == [[INF, 1 / (std or (1.0,))[0]]]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("layout", ["BCTHW", "BTHWC"])
def test_large_patches_are_as_accurate_as_torch(layout, dtype, where):
    where.skip_unless_runs(OP, dtype)
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 2, 2, 2048, 2048, generator=generator).to(dtype)
    clip = in_layout(clip, layout).to(where.device)
    ours, low, true = (
        frame_difference(x, (1, 512, 1024), backend=backend)[:, 8:]
        for x, backend in (
            (clip, where.backend),
            (clip, "reference"),
            (clip.cpu().double(), "reference"),
        )
    )
    assert_as_accurate(ours, low, true, torch.float32)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_equals_run_length_tokenization(t):
    """The rule of the paper: differences of frames, pooled over patches."""
    clip = torch.randn(2, 3, 6, 32, 48, dtype=torch.float64)
    pixels = (clip[:, :, 2 * t - 1 :: t] - clip[:, :, :-t:t]).abs()
    pooled = F.avg_pool3d(pixels, (1, 16, 16)).mean(1).flatten(1)
    out = frame_difference(clip, (t, 16, 16))
    torch.testing.assert_close(out[:, 6:], pooled)
    assert (out[:, :6] == INF).all()


def test_opcheck_and_compile(where):
    where.skip_unless_runs(OP)
    for dtype, std in ((torch.uint8, [0.2, 0.3, 0.4]), (torch.float32, [])):
        clip, patch = clip_of("tubelets", dtype, device=where.device)
        torch.library.opcheck(library.kernel(OP, where.backend), (clip, list(patch), std))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: frame_difference(x, patch, backend=where.backend),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(clip), frame_difference(clip, patch, backend=where.backend))


DIFFERENCES = torch.tensor(
    [
        [INF, INF, 0.5, 0.0, 0.0, 0.2, 0.05, 0.0],
        [INF, INF, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [INF, INF, 0.2, float("nan"), 0.3, 0.4, 0.1, 9.0],
    ]
)


@pytest.mark.parametrize("total", [None, 12])
def test_run_lengths(total):
    ids, cu_seqlens, lengths = run_length_ids(DIFFERENCES, 4, total=total)
    assert cu_seqlens.tolist() == [0, 4, 6, 12] and cu_seqlens.dtype == torch.int32
    assert ids.tolist() == [0, 1, 2, 5, 0, 1, 0, 1, 2, 4, 5, 7]
    assert lengths.tolist() == [1, 2, 3, 2, 4, 4, 1, 2, 1, 2, 1, 1]


def test_the_most_different_are_kept():
    ids, cu_seqlens, lengths = run_length_ids(DIFFERENCES, 4, keep=3)
    assert cu_seqlens is None
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 7]]
    assert lengths.tolist() == [[1, 4, 3], [1, 4, 3], [4, 3, 1]]
    for keep in (0, 8):
        assert run_length_ids(DIFFERENCES, 4, keep=keep).ids.shape == (3, keep)


def test_runs_cover_every_slice():
    differences = torch.rand(3, 5 * 7)
    differences[:, :7] = INF
    for runs in (run_length_ids(differences, 5, 0.6), run_length_ids(differences, 5, keep=20)):
        assert runs.lengths.sum() == 3 * 5 * 7


def test_only_tubelets_with_motion_are_embedded():
    """A static clip, and a clip in which one patch changes."""
    clip = torch.randint(0, 256, (1, 3, 1, 32, 32)).byte().repeat(2, 1, 4, 1, 1)
    clip[1, :, 2:, :16, 16:] = 255 - clip[1, :, 2:, :16, 16:]
    scores = frame_difference(clip, (2, 16, 16))
    ids, cu_seqlens, lengths = run_length_ids(scores, 2)
    assert ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 5] and cu_seqlens.tolist() == [0, 4, 9]
    assert lengths.tolist() == [2, 2, 2, 2, 2, 1, 2, 2, 1]
    tokens = masked_patch_embed(
        clip, torch.randn(8, 3, 2, 16, 16), ids_keep=ids, cu_seqlens=cu_seqlens
    )
    assert tokens.shape == (9, 8)


CLIP = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error, text, change",
    [
        (TypeError, "uint8 or one of", {"video": CLIP.int()}),
        (ValueError, r"\[B, C, T, H, W\]", {"video": CLIP[0]}),
        (ValueError, r"\[B, C, T, H, W\]", {"video": CLIP[:, :0]}),
        (ValueError, "divide", {"patch": (3, 16, 16)}),
        (ValueError, "patch >= 1", {"patch": (2, 16, 0)}),
        (ValueError, "patch as 3 ints", {"patch": (16, 16)}),
        (ValueError, "taken as normalised", {"video": CLIP.float(), "std": STD}),
        (ValueError, "3 numbers in std, got 2", {"std": STD[:2]}),
        (ValueError, "positive", {"std": (0.2, 0.0, 0.2)}),
        (ValueError, "finite std", {"std": (0.2, float("nan"), 0.2)}),
        (ValueError, "finite std", {"std": (0.2, INF, 0.2)}),
        (ValueError, "backend", {"backend": "numpy"}),
        (RuntimeError, "not in float64", {"video": CLIP.double(), "backend": "native"}),
    ],
)
def test_misuse_is_explained(error, text, change):
    with pytest.raises(error, match=text):
        frame_difference(**({"video": CLIP, "patch": (2, 16, 16)} | change))


@pytest.mark.parametrize(
    "text, change",
    [
        ("multiple of the slices", {"slices": 3}),
        ("slices >= 1", {"slices": 0}),
        (r"\[B, N\]", {"differences": DIFFERENCES[0]}),
        ("keep in 0 to 8", {"keep": 9}),
        ("finite threshold", {"threshold": float("nan")}),
        ("finite threshold", {"threshold": INF}),
        ("no total", {"keep": 2, "total": 6}),
    ],
)
def test_misuse_of_run_lengths_is_explained(text, change):
    with pytest.raises(ValueError, match=text):
        run_length_ids(**({"differences": DIFFERENCES, "slices": 4} | change))


def test_a_wrong_total_is_caught():
    with pytest.raises(RuntimeError, match="total"):
        run_length_ids(DIFFERENCES, 4, total=3)


def test_no_backend_falls_back():
    Where("native", "cpu").skip_unless_runs(OP)
    with pytest.raises(RuntimeError, match="reference: can run"):
        frame_difference(CLIP.double(), (2, 16, 16), backend="native")
