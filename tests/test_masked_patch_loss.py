"""masked_patch_loss against its definition, MAE and VideoMAE; errors."""

from dataclasses import dataclass

import pytest
import torch
from compare import assert_as_accurate, gradients
from test_masked_patch_embed import in_layout
from where import Where

from vidl.kernels import library
from vidl.ops import masked_patch_loss

# A warning of torch.var for an empty input.
pytestmark = pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom")

OP = "masked_patch_loss"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A clip, a patch size and patches: `ids` is a list per sample, or their number per sample."""

    B: int = 2
    grid: tuple[int, int, int] = (2, 2, 3)
    patch: tuple[int, int, int] = (2, 8, 8)
    C: int = 3
    ids: int | list[list[int]] = 5
    ragged: bool = False
    video: torch.dtype = torch.uint8
    layout: str = "BCTHW"
    target: str = "videomae"
    norm_pix: bool = True
    rows: str = "contiguous"  # or how the rows of the prediction are strided

    def inputs(self, dtype, device):
        seed = torch.Generator().manual_seed(len(repr(self)))
        T, H, W = (g * p for g, p in zip(self.grid, self.patch, strict=True))
        if self.video == torch.uint8:
            clip = torch.randint(0, 256, (self.B, self.C, T, H, W), generator=seed).byte()
        else:
            clip = torch.randn(self.B, self.C, T, H, W, generator=seed).to(self.video)
        clip = in_layout(clip, self.layout).to(device)
        N = self.grid[0] * self.grid[1] * self.grid[2]
        ids, cu_seqlens = self.ids, None
        if isinstance(ids, int):
            ids = [torch.randperm(N, generator=seed)[:ids].tolist() for _ in range(self.B)]
        rows = torch.tensor(ids, dtype=torch.int64) if not self.ragged else None
        if self.ragged:
            cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0).int().to(device)
            rows = torch.tensor(sum(ids, []), dtype=torch.int64)
        t, h, w = self.patch
        prediction = torch.randn(*rows.shape, t * h * w * self.C, generator=seed)
        return self.strided(prediction.to(device, dtype)), clip, rows.to(device), cu_seqlens

    def strided(self, prediction):
        if self.rows == "last tokens":  # of a decoder's, as it computes them
            more = torch.full_like(prediction[:, :1], float("nan"))
            return torch.cat([more, prediction], 1)[:, 1:]
        if self.rows == "part":  # of wider rows, off any alignment
            wide = torch.nn.functional.pad(prediction, (1, 2), value=float("nan"))
            return wide[..., 1:-2]
        if self.rows == "backwards":  # no row is contiguous
            return prediction.mT.contiguous().mT
        return prediction

    def options(self):
        options = {"patch_size": self.patch[1:], "tubelet_size": self.patch[0]}
        options |= {"target": self.target, "norm_pix": self.norm_pix}
        if self.video == torch.uint8 or self.target == "videomae":
            options |= {"mean": (MEAN * 2)[: self.C], "std": (STD * 2)[: self.C]}
        return options


CASES = {
    "VideoMAE": Case(),
    "VideoMAE pixels": Case(norm_pix=False),
    "VideoMAE float": Case(video=torch.float32),
    "VideoMAE float pixels": Case(video=torch.float32, norm_pix=False),
    "MAE": Case(target="mae", patch=(1, 16, 16)),
    "MAE pixels": Case(target="mae", patch=(1, 16, 16), norm_pix=False),
    "MAE float": Case(target="mae", video=torch.float32),
    "MAE float pixels": Case(target="mae", video=torch.float32, norm_pix=False),
    "half clip": Case(video=torch.float16, target="mae"),
    "bfloat16 clip": Case(video=torch.bfloat16),
    "one channel": Case(C=1),
    "four channels": Case(C=4, target="mae"),
    "five channels": Case(C=5),
    "patch 14": Case(patch=(1, 14, 14), target="mae"),
    "odd patch": Case(patch=(3, 5, 7), grid=(2, 3, 3), ids=7, rows="part"),
    "two pixels": Case(patch=(1, 1, 2), grid=(2, 4, 4), ids=9),
    "frames first": Case(layout="BTCHW"),
    "channels last": Case(layout="BTHWC", patch=(1, 16, 16)),
    "channels last float": Case(layout="BTHWC", video=torch.float32, target="mae"),
    "window": Case(layout="window"),
    "window float": Case(layout="window", video=torch.float32, target="mae"),
    "every other pixel": Case(layout="backwards"),
    "last tokens": Case(rows="last tokens"),
    "columns": Case(rows="backwards", target="mae"),
    "ragged": Case(B=4, ids=[[3, 1], [], [0, 11, 5, 7, 2], [4]], ragged=True),
    "ragged part": Case(B=3, ids=[[], [9], [3, 2, 1]], ragged=True, rows="part", target="mae"),
    "twice": Case(ids=[[1, 1, 5], [0, 0, 0]]),
    "all": Case(ids=12, target="mae"),
    "no rows": Case(ids=[[], []]),
    "no rows ragged": Case(ids=[[], []], ragged=True),
    "no samples": Case(B=0, ids=[], ragged=True),
}


def run(case, dtype, device, backend, compute=None):
    """The loss of each patch, and the gradient of the prediction."""
    prediction, clip, ids, cu_seqlens = case.inputs(dtype, device)
    if compute is not None:
        prediction = prediction.to(compute)
        clip = clip.to(compute) if clip.is_floating_point() else clip
    prediction.requires_grad_()
    losses = masked_patch_loss(
        prediction, clip, ids, cu_seqlens, reduction="none", backend=backend, **case.options()
    )
    return gradients(losses, [prediction])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_torch(case, dtype, where):
    where.skip_unless_runs(OP, dtype)
    ours = run(case, dtype, where.device, where.backend)
    low = run(case, dtype, where.device, "reference")
    true = run(case, dtype, "cpu", "reference", torch.float64)
    assert [x.dtype for x in ours] == [torch.float32, dtype]
    for our, theirs, truth, kind in zip(ours, low, true, (torch.float32, dtype), strict=True):
        assert_as_accurate(our, theirs, truth, kind)


@pytest.mark.parametrize("target, norm_pix", [("mae", True), ("videomae", True), ("mae", False)])
def test_large_patches_are_as_accurate_as_torch(target, norm_pix):
    if reason := library.why_not("native", OP, "cpu", torch.float32):
        pytest.skip(reason)
    clip, prediction = torch.rand(1, 3, 2, 256, 1024), torch.randn(1, 2, 3 * 2 * 256 * 512)
    ids, options = torch.tensor([[0, 1]]), {"patch_size": (256, 512), "tubelet_size": 2}

    def results(dtype, backend):
        leaf = prediction.to(dtype).requires_grad_()
        losses = masked_patch_loss(
            leaf, clip.to(dtype), ids, target=target, norm_pix=norm_pix, reduction="none",
            backend=backend, **options,
        )  # fmt: skip
        return gradients(losses, [leaf])

    for ours, low, true in zip(
        results(torch.float32, "native"),
        results(torch.float32, "reference"),
        results(torch.float64, "reference"),
        strict=True,
    ):
        assert_as_accurate(ours, low, true, torch.float32)


@pytest.mark.parametrize("rows, numbers", [(4, 384), (5, 383)])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_registered_op_checks_its_prediction(rows, numbers, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    _, clip, ids, _ = Case().inputs(torch.float32, "cpu")
    options = ((2, 8, 8), "none", [1.0] * 3, [0.0] * 3, 1e-6)
    with pytest.raises(RuntimeError, match="need a prediction"):
        library.kernel(OP, backend)(torch.zeros(2, rows, numbers), clip, ids, None, *options)


@pytest.mark.parametrize("name", ["MAE", "VideoMAE", "ragged", "no rows", "no rows ragged"])
def test_mean(name, where):
    where.skip_unless_runs(OP)
    case = CASES[name]
    prediction, clip, ids, cu_seqlens = case.inputs(torch.float32, where.device)
    prediction.requires_grad_()
    args = (prediction, clip, ids, cu_seqlens)
    loss = masked_patch_loss(*args, backend=where.backend, **case.options())
    losses = masked_patch_loss(*args, backend=where.backend, reduction="none", **case.options())
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.mean() if len(losses.flatten()) else loss.new_zeros(()))
    (grad,) = torch.autograd.grad(loss, prediction)
    assert grad.shape == prediction.shape and not grad.isnan().any()


@pytest.mark.parametrize("target", ["mae", "videomae"])
@pytest.mark.parametrize("video", [torch.uint8, torch.float32], ids=["uint8", "f32"])
@pytest.mark.parametrize("mean", [0.5, 0.3], ids=str)
def test_a_patch_of_one_colour_has_a_target_of_zero(target, video, mean, where):
    """With zero variance, rounding errors must not be divided by 1e-6."""
    where.skip_unless_runs(OP)
    colours = torch.tensor([77, 77, 77] if target == "mae" else [201, 3, 77]).view(1, 3, 1, 1, 1)
    clip = colours.expand(2, 3, 2, 14, 14).to(where.device, video)
    options = {"patch_size": 7, "tubelet_size": 2, "target": target, "reduction": "none"}
    if video == torch.uint8:
        options |= {"mean": (mean,) * 3, "std": (0.3,) * 3}
    else:
        clip = clip * 0.013
    prediction = torch.randn(2, 4, 294, device=where.device, requires_grad=True)
    ids = torch.arange(4, device=where.device).expand(2, 4)
    losses = masked_patch_loss(prediction, clip, ids, backend=where.backend, **options)
    torch.testing.assert_close(losses, prediction.square().mean(-1))
    (grad,) = torch.autograd.grad(losses.sum(), prediction)
    torch.testing.assert_close(grad, prediction * (2 / 294))


def test_strides_of_the_clip_change_no_bit(where):
    where.skip_unless_runs(OP)
    results = []
    for layout in ("BCTHW", "BTCHW", "BTHWC", "window", "backwards"):
        prediction, clip, ids, _ = Case(target="mae").inputs(torch.float32, where.device)
        clip = in_layout(clip.cpu(), layout).to(where.device)
        options = Case(target="mae").options()
        results.append(masked_patch_loss(prediction, clip, ids, backend=where.backend, **options))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_wide_strides(monkeypatch, where):
    """64-bit offsets within a patch, forced on, since no clip here is that large."""
    if where.backend != "triton":
        pytest.skip("other backends have no narrow offsets")
    where.skip_unless_runs(OP)
    from vidl.kernels.masked_patch_loss import triton_kernels

    for case in (Case(), Case(target="mae", layout="BTHWC")):
        monkeypatch.setattr(triton_kernels, "NARROW", 2**31)
        narrow = run(case, torch.float32, where.device, where.backend)
        monkeypatch.setattr(triton_kernels, "NARROW", 0)
        assert all(map(torch.equal, narrow, run(case, torch.float32, where.device, where.backend)))


def videomae(norm_pix):
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    part |= {"intermediate_size": 24}
    config = transformers.VideoMAEConfig(
        image_size=16,
        patch_size=4,
        num_frames=4,
        tubelet_size=2,
        norm_pix_loss=norm_pix,
        **part,
        **{f"decoder_{name}": value for name, value in part.items()},
    )
    return transformers.VideoMAEForPreTraining(config)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("source", ["uint8", "float"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_videomae_of_transformers(norm_pix, source, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    clip = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    pixels = (clip / 255 - mean) / std
    masked = torch.rand(2, 32).argsort(1) >= 3
    out = videomae(norm_pix)(pixels.transpose(1, 2), bool_masked_pos=masked)
    ids = masked.nonzero()[:, 1].view(2, -1)
    prediction = out.logits.detach().requires_grad_()
    loss = masked_patch_loss(
        prediction,
        clip if source == "uint8" else pixels,
        ids,
        patch_size=4,
        tubelet_size=2,
        target="videomae",
        norm_pix=norm_pix,
        mean=MEAN,
        std=STD,
        backend=backend,
    )
    torch.testing.assert_close(loss, out.loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, prediction), torch.autograd.grad(out.loss, out.logits)
    )


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("source", ["uint8", "float"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_mae_of_transformers(norm_pix, source, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    part |= {"intermediate_size": 24}
    config = transformers.ViTMAEConfig(
        image_size=16,
        patch_size=4,
        norm_pix_loss=norm_pix,
        **part,
        **{f"decoder_{name}": value for name, value in part.items()},
    )
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pixels = (image / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    out = transformers.ViTMAEForPreTraining(config)(pixels)
    ids = out.ids_restore.argsort(1)[:, 4:]  # of 16, a quarter is visible
    rows = ids[..., None].expand(-1, -1, 48)
    prediction = out.logits.detach().gather(1, rows).requires_grad_()
    uint8 = source == "uint8"
    loss = masked_patch_loss(
        prediction,
        (image if uint8 else pixels)[:, :, None],
        ids,
        patch_size=4,
        norm_pix=norm_pix,
        mean=MEAN if uint8 else None,
        std=STD if uint8 else None,
        backend=backend,
    )
    torch.testing.assert_close(loss, out.loss)
    (every,) = torch.autograd.grad(out.loss, out.logits)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction)[0], every.gather(1, rows))


def test_one_frame_a_tubelet_is_a_view():
    """MAE-ST predicts one frame of each tubelet: a strided view of the clip."""
    prediction, clip, ids, _ = Case(patch=(1, 8, 8)).inputs(torch.float32, "cpu")
    longer = clip.repeat_interleave(2, 2)
    longer[:, :, 1::2] = 0
    assert torch.equal(
        masked_patch_loss(prediction, longer[:, :, ::2], ids, patch_size=8),
        masked_patch_loss(prediction, clip, ids, patch_size=8),
    )


@pytest.mark.parametrize("name", ["MAE float", "VideoMAE", "ragged"])
def test_gradcheck(name):
    case = CASES[name]
    prediction, clip, ids, cu_seqlens = case.inputs(torch.float64, "cpu")
    t, h, w = (min(p, 2) for p in case.patch)
    g = case.grid
    small = clip[:, :, : g[0] * t, : g[1] * h, : g[2] * w]
    prediction = prediction[..., : t * h * w * case.C].contiguous().requires_grad_()
    options = case.options() | {"patch_size": (h, w), "tubelet_size": t}

    def loss(prediction):
        return masked_patch_loss(prediction, small, ids, cu_seqlens, **options)

    assert loss(prediction).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, prediction)


def test_same_bits_every_time_and_for_every_number_of_threads(where):
    where.skip_unless_runs(OP)
    case, threads = CASES["twice"], torch.get_num_threads()
    first = run(case, torch.float32, where.device, where.backend)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(case, torch.float32, where.device, where.backend)
            assert all(map(torch.equal, first, again))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["MAE", "VideoMAE pixels", "ragged", "no rows"])
def test_opcheck(name, where):
    where.skip_unless_runs(OP)
    case = CASES[name]
    prediction, clip, ids, cu_seqlens = case.inputs(torch.float32, where.device)
    statistics = {"mae": "patch", "videomae": "channel"}[case.target]
    options = (list(case.patch), statistics if case.norm_pix else "none")
    options += ([0.1, 0.2, 0.3], [0.0, -0.1, 0.2], 1e-6)
    args = (prediction.requires_grad_(), clip, ids, cu_seqlens, *options)
    torch.library.opcheck(library.kernel(OP, where.backend), args)
    losses, moments = library.kernel(OP, where.backend)(*args)
    grad = torch.ones((), device=where.device).expand_as(losses)
    args = (grad, moments.detach(), prediction.detach(), clip, ids, cu_seqlens, *options)
    torch.library.opcheck(library.kernel(f"{OP}_bwd", where.backend), args)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_once_for_all_lengths(backend, where):
    if where.backend != "native":
        pytest.skip("the graph is the same for every kernel")
    where.skip_unless_runs(OP)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def loss(prediction, clip, ids):
        return masked_patch_loss(prediction, clip, ids, backend=backend, **Case().options())

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for K in (4, 5, 7, 9, 12):
        prediction, clip, ids, _ = Case(ids=K).inputs(torch.float32, where.device)
        for x in (prediction.requires_grad_(), ids):
            torch._dynamo.mark_dynamic(x, 1)
        args = (prediction, clip, ids)
        torch.testing.assert_close(compiled(*args), loss(*args))
    assert len(graphs) == 1


def test_compiled_gradients(where):
    where.skip_unless_runs(OP)
    prediction, clip, ids, _ = Case().inputs(torch.float32, where.device)
    prediction.requires_grad_()

    def loss(prediction):
        return masked_patch_loss(prediction, clip, ids, backend=where.backend, **Case().options())

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        gradients(compiled(prediction), [prediction]),
        gradients(loss(prediction), [prediction]),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


def test_autocast_changes_nothing(where):
    where.skip_unless_runs(OP)
    prediction, clip, ids, _ = Case().inputs(torch.float32, where.device)
    options = Case().options()
    plain = masked_patch_loss(prediction, clip, ids, backend=where.backend, **options)
    with torch.autocast(where.device, torch.bfloat16):
        loss = masked_patch_loss(prediction, clip, ids, backend=where.backend, **options)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)


@pytest.mark.parametrize("ids", [[[0, 12]], [[-1, 3]], [[2**40, 0]]])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ids_out_of_range_are_caught(ids, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    prediction, clip, *_ = Case(B=1, ids=2).inputs(torch.float32, "cpu")
    with pytest.raises((RuntimeError, AssertionError), match=r"\[0, 12\)"):
        masked_patch_loss(prediction, clip, torch.tensor(ids), backend=backend, **Case().options())


@pytest.mark.parametrize("offsets", [[0, 5, 4], [1, 2, 4], [0, 2, 3], [0, 2, 9]])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_offsets_that_do_not_fit_are_caught(offsets, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    case = Case(ids=[[0, 1], [2, 3]], ragged=True)
    prediction, clip, ids, _ = case.inputs(torch.float32, "cpu")
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises((RuntimeError, AssertionError), match="ascend"):
        masked_patch_loss(prediction, clip, ids, cu_seqlens, backend=backend, **case.options())


CLIP = torch.zeros(2, 3, 2, 32, 32, dtype=torch.uint8)
PREDICTION = torch.zeros(2, 4, 768)
IDS = torch.zeros(2, 4, dtype=torch.int64)
PIXELS = {"patch_size": 1, "prediction": PREDICTION[..., :3]}
MISUSE = {
    "a clip of four dimensions": (ValueError, "video", {"video": CLIP[0]}),
    "an int32 clip": (TypeError, "uint8", {"video": CLIP.int()}),
    "a clip without channels": (
        ValueError,
        "C > 0",
        {"video": CLIP[:, :0], "prediction": PREDICTION[..., :0]},
    ),
    "a clip with a gradient": (
        ValueError,
        "detach",
        {"video": CLIP.float().requires_grad_()},
    ),
    "a patch that does not fit": (ValueError, "divides", {"patch_size": 14}),
    "a tubelet that does not fit": (ValueError, "divides", {"tubelet_size": 3}),
    "no patch": (ValueError, "patch_size >= 1", {"patch_size": 0}),
    "half a patch": (TypeError, "patch_size as an int", {"patch_size": 16.5}),
    "a patch of three sides": (ValueError, "one or two", {"patch_size": (1, 16, 16)}),
    "int32 ids": (TypeError, "int64", {"ids_masked": IDS.int()}),
    "a mask for ids": (TypeError, "int64", {"ids_masked": IDS.bool()}),
    "ids of other samples": (ValueError, r"\[2, K\]", {"ids_masked": IDS[:1]}),
    "packed ids alone": (ValueError, "cu_seqlens", {"ids_masked": IDS[0]}),
    "int64 offsets": (
        TypeError,
        "int32",
        {"ids_masked": IDS[0], "cu_seqlens": torch.zeros(3).long()},
    ),
    "an integer prediction": (TypeError, "prediction", {"prediction": PREDICTION.int()}),
    "a prediction of other patches": (
        ValueError,
        r"prediction \[2, 4, 768\]",
        {"prediction": PREDICTION[..., :256]},
    ),
    "a prediction for every patch": (
        ValueError,
        r"prediction \[2, 4, 768\]",
        {"prediction": torch.zeros(2, 8, 768)},
    ),
    "an unknown target": (ValueError, "'mae' or 'videomae'", {"target": "dvae"}),
    "an unknown reduction": (ValueError, "'mean' or 'none'", {"reduction": "sum"}),
    "one pixel a channel": (ValueError, "two pixels", PIXELS | {"target": "videomae"}),
    "mean of two channels": (ValueError, "3 numbers", {"mean": (0.5, 0.5)}),
    "an infinite std": (ValueError, "finite std", {"std": (0.2, float("inf"), 0.2)}),
    "mean of NaN": (ValueError, "finite mean", {"mean": (0.2, float("nan"), 0.2)}),
    "std of zero": (ValueError, "positive", {"std": (0.2, 0.0, 0.2)}),
    "mean of a float clip": (ValueError, "uint8", {"video": CLIP.float(), "mean": (0.5,) * 3}),
    "prediction elsewhere": (ValueError, "on cpu", {"prediction": PREDICTION.to("meta")}),
    "ids elsewhere": (ValueError, "on cpu", {"ids_masked": IDS.to("meta")}),
    "an unknown backend": (ValueError, "backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, text, change", MISUSE.values(), ids=MISUSE)
def test_misuse_is_explained(error, text, change):
    given = {"prediction": PREDICTION, "video": CLIP, "ids_masked": IDS, "patch_size": 16}
    with pytest.raises(error, match=text):
        masked_patch_loss(**(given | change))


def test_a_pixel_alone_has_a_target_over_its_channels():
    assert masked_patch_loss(PREDICTION[..., :3], CLIP, IDS, patch_size=1) == 0
    loss = masked_patch_loss(
        PREDICTION[..., :3], CLIP, IDS, patch_size=1, target="videomae", norm_pix=False
    )
    assert loss == 0


def test_a_backend_asked_for_never_falls_back():
    prediction = torch.zeros(2, 1, 3 * 2 * 64 * 64)
    video, ids = torch.zeros(2, 3, 2, 64, 64), torch.zeros(2, 1, dtype=torch.int64)
    options = {"patch_size": 64, "tubelet_size": 2}
    with pytest.raises(RuntimeError, match=r"triton: .*\n  torch: can run"):
        masked_patch_loss(prediction, video, ids, backend="triton", **options)
    for inputs in ((prediction.double(), video), (prediction, video.double())):
        with pytest.raises(RuntimeError, match=r"not in float64"):
            masked_patch_loss(*inputs, ids, backend="native", **options)
        assert masked_patch_loss(*inputs, ids, **options).dtype == torch.float64


@pytest.mark.parametrize("C, p", [(65, 2), (3, 64)], ids=["channels", "numbers"])
def test_what_the_cuda_kernels_cannot_hold_is_refused(C, p):
    Where("emulated", "cpu").skip_unless_runs(OP)
    video, ids = torch.zeros(1, C, 1, p, p), torch.zeros(1, 1, dtype=torch.int64)
    prediction = torch.zeros(1, 1, C * p * p)
    with pytest.raises(RuntimeError, match="cannot run"):
        masked_patch_loss(prediction, video, ids, patch_size=p, backend="emulated")
