"""masked_patch_embed against its definition and Conv3d; errors."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from compare import assert_as_accurate, gradients
from torch.nn import functional as F
from where import Where

from vidl.kernels import library
from vidl.ops import masked_patch_embed

OP = "masked_patch_embed"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A clip, a patch size and patches: `ids` is a list per sample, or their number per sample."""

    B: int = 2
    grid: tuple[int, int, int] = (2, 2, 3)
    patch: tuple[int, int, int] = (1, 16, 16)
    C: int = 3
    D: int = 24
    ids: int | list[list[int]] | None = 4
    ragged: bool = False
    video: torch.dtype = torch.uint8
    layout: str = "BCTHW"
    bias: bool = True
    position: str | None = "one"  # or "pair"
    float32: tuple[str, ...] = field(default=())  # what stays in float32, as under autocast

    def inputs(self, dtype, device):
        seed = torch.Generator().manual_seed(len(repr(self)))

        def randn(*shape, keep=False):
            numbers = torch.randn(shape, generator=seed)
            return numbers.to(device, torch.float32 if keep else dtype)

        T, H, W = (g * p for g, p in zip(self.grid, self.patch, strict=True))
        if self.video == torch.uint8:
            clip = torch.randint(0, 256, (self.B, self.C, T, H, W), generator=seed).byte()
        else:
            clip = torch.randn(self.B, self.C, T, H, W, generator=seed).to(self.video)
        clip = in_layout(clip, self.layout).to(device)
        weight = randn(self.D, self.C, *self.patch) * 0.05
        bias = randn(self.D, keep="bias" in self.float32) if self.bias else None
        N, S = self.grid[0] * self.grid[1] * self.grid[2], self.grid[1] * self.grid[2]
        keep = "position" in self.float32
        position = {
            None: lambda: (),
            "one": lambda: (randn(N, self.D, keep=keep),),
            "pair": lambda: (randn(self.grid[0], self.D, keep=keep), randn(S, self.D, keep=keep)),
        }[self.position]()
        ids = self.ids
        if isinstance(ids, int):
            ids = [torch.randperm(N, generator=seed)[:ids].tolist() for _ in range(self.B)]
        if ids is None:
            return clip, weight, bias, position, None, None
        if not self.ragged:
            rows = torch.tensor(ids, dtype=torch.int64, device=device)
            return clip, weight, bias, position, rows, None
        lengths = torch.tensor([0, *map(len, ids)])
        packed = torch.tensor(sum(ids, []), dtype=torch.int64, device=device)
        return clip, weight, bias, position, packed, lengths.cumsum(0).int().to(device)


def in_layout(clip, layout):
    """The clip [B, C, T, H, W] as a view of memory in another order, or of a larger clip."""
    if layout == "BTCHW":
        return clip.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "BTHWC":
        return clip.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    if layout == "window":  # off the grid of any alignment, surrounded by NaN or by 255
        around = torch.full([n + 3 for n in clip.shape], 255, dtype=torch.uint8)
        if clip.is_floating_point():
            around = torch.full([n + 3 for n in clip.shape], float("nan"), dtype=clip.dtype)
        view = around[1:-2, 2:-1, 1:-2, 2:-1, 1:-2]
        view.copy_(clip)
        return view
    if layout == "backwards":  # every other pixel of a clip twice as wide
        wide = torch.zeros(*clip.shape[:-1], 2 * clip.shape[-1], dtype=clip.dtype)
        wide[..., ::2] = clip
        return wide[..., ::2]
    assert layout == "BCTHW"
    return clip


CASES = {
    "image patches": Case(),
    "tubelets": Case(grid=(2, 2, 2), patch=(2, 16, 16), position="pair"),
    "dense": Case(ids=None, D=37),
    "dense float": Case(ids=None, video=torch.float32, position="pair", grid=(2, 1, 2)),
    "patch 14": Case(patch=(1, 14, 14), B=3, ids=5, float32=("bias", "position")),
    "patch 32": Case(patch=(1, 32, 32), grid=(1, 2, 2), ids=2, D=8, bias=False),
    "large patch": Case(
        B=1, patch=(2, 48, 48), grid=(1, 1, 2), ids=2, D=3, video=torch.float32, bias=False
    ),
    "odd patch": Case(patch=(3, 5, 7), C=1, D=5, grid=(2, 3, 3), ids=7, video=torch.float32),
    "four channels": Case(patch=(1, 8, 8), C=4, grid=(1, 3, 3), video=torch.bfloat16),
    "half clip": Case(video=torch.float16, position=None, layout="BTCHW"),
    "nothing added": Case(bias=False, position=None, float32=("bias",)),
    "frames first": Case(layout="BTCHW", float32=("position",)),
    "channels last": Case(layout="BTHWC", position="pair"),
    "channels last float": Case(layout="BTHWC", video=torch.float32, patch=(2, 8, 8), ids=6),
    "window": Case(layout="window", ids=6),
    "window float": Case(layout="window", video=torch.float32, ids=6),
    "strided": Case(layout="backwards", patch=(1, 16, 16), ids=3),
    "ragged": Case(B=4, ids=[[3, 1], [], [0, 11, 5, 7, 2], [4]], ragged=True),
    "ragged float": Case(B=3, ids=[[], [9], [3, 2, 1]], ragged=True, video=torch.float32),
    "twice": Case(B=2, ids=[[1, 1, 5, 1], [0, 0, 0, 0]], video=torch.float32, position="pair"),
    "one row": Case(B=1, ids=[[5]]),
    "two chunks": Case(B=1, ids=1100, grid=(1, 25, 45), patch=(1, 2, 3), D=48),
    "one channel": Case(B=4, ids=12, D=1),
    "all visible": Case(ids=12, position="pair"),
    "no rows": Case(ids=[[], []], video=torch.float32),
    "no rows ragged": Case(ids=[[], []], ragged=True),
    "no samples": Case(B=0, ids=None, video=torch.float32, position="pair"),
    "no samples ragged": Case(B=0, ids=[], ragged=True),
}


def arguments(case):
    return {"mean": MEAN[: case.C], "std": STD[: case.C]} if case.video == torch.uint8 else {}


def run(case, dtype, device, backend, compute=None):
    """The result and all gradients of inputs in `dtype`, computed in `compute`."""
    clip, weight, bias, position, ids, cu_seqlens = case.inputs(dtype, device)
    if compute is not None:
        weight, bias, *position = (
            x if x is None else x.to(compute) for x in (weight, bias, *position)
        )
        clip = clip.to(compute) if clip.is_floating_point() else clip
    leaves = [weight, *([] if bias is None else [bias]), *position]
    leaves += [clip] if clip.is_floating_point() else []
    for leaf in leaves:
        leaf.requires_grad_()
    place = {0: None, 1: position[:1] and position[0], 2: tuple(position)}[len(position)]
    out = masked_patch_embed(
        clip, weight, bias, place, ids, cu_seqlens, backend=backend, **arguments(case)
    )
    return gradients(out, leaves)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_torch(case, dtype, where):
    where.skip_unless_runs(OP, dtype)
    ours = run(case, dtype, where.device, where.backend)
    low = run(case, dtype, where.device, "reference")
    true = run(case, dtype, "cpu", "reference", torch.float64)
    for our, theirs, truth in zip(ours, low, true, strict=True):
        assert our.dtype == theirs.dtype
        clip_only = case.video.itemsize == 2 and theirs.dtype == case.video
        assert_as_accurate(our, theirs, truth, case.video if clip_only else dtype)


@pytest.mark.parametrize("layout", ["BTCHW", "BTHWC", "window", "backwards"])
def test_strides_change_no_bit(layout, where):
    where.skip_unless_runs(OP)
    results = []
    for order in ("BCTHW", layout):
        clip, weight, bias, (position,), ids, _ = Case().inputs(torch.float32, "cpu")
        clip = in_layout(clip, order)
        moved = [x.to(where.device) for x in (weight, bias, position, ids)]
        out = masked_patch_embed(
            clip.to(where.device), *moved, mean=MEAN, std=STD, backend=where.backend
        )
        results.append(out)
    assert torch.equal(*results)


def test_equals_conv_then_gather():
    """The definition against nn.Conv3d."""
    case = Case(patch=(2, 16, 16), grid=(2, 2, 3))
    clip, weight, bias, (position,), ids, _ = case.inputs(torch.float64, "cpu")
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1, 1) for x in (MEAN, STD))
    tokens = F.conv3d((clip.double() / 255 - mean) / std, weight, bias, stride=case.patch)
    tokens = tokens.flatten(2).mT + position
    expected = tokens.gather(1, ids[:, :, None].expand(-1, -1, case.D))
    out = masked_patch_embed(clip, weight, bias, position, ids, mean=MEAN, std=STD)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dense float", "ragged float", "twice"])
def test_gradcheck(name):
    clip, weight, bias, position, ids, cu_seqlens = CASES[name].inputs(torch.float64, "cpu")
    patch = Case(patch=(1, 2, 2)).inputs(torch.float64, "cpu")[1][: CASES[name].D, :, :, :, :]
    small = clip.double()[..., : 2 * CASES[name].grid[1], : 2 * CASES[name].grid[2]]
    leaves = [x.requires_grad_() for x in (small.contiguous(), patch[:3].contiguous(), bias[:3])]
    place = [p[:, :3].contiguous().requires_grad_() for p in position]

    def op(clip, weight, bias, *place):
        place = place[0] if len(place) == 1 else tuple(place)
        return masked_patch_embed(clip, weight, bias, place, ids, cu_seqlens, backend="reference")

    assert torch.autograd.gradcheck(op, (*leaves, *place))


def test_the_mean_does_not_cost_accuracy(dtype, where):
    """Bright clips of low contrast: folding must keep the small differences from the mean."""
    where.skip_unless_runs(OP, dtype)
    clip = torch.randint(220, 240, (2, 3, 1, 32, 32), dtype=torch.uint8, device=where.device)
    weight = (torch.randn(16, 3, 1, 16, 16, device=where.device) * 0.05).to(dtype)
    results = [
        masked_patch_embed(
            clip.to(w.device), w, mean=(0.9, 0.901, 0.902), std=(0.02,) * 3, backend=backend
        )
        for w, backend in (
            (weight, where.backend),
            (weight, "reference"),
            (weight.cpu().double(), "reference"),
        )
    ]
    assert_as_accurate(*results, dtype)


@pytest.mark.parametrize("position", ["one", "pair"])
@pytest.mark.parametrize("distinct", [1, 3])
def test_repeated_ids_are_as_accurate_as_torch(distinct, position, where):
    """One row of the position is the sum of many: rounding errors must not grow with them."""
    where.skip_unless_runs(OP)
    slow = {"triton": 512, "emulated": 4096} if where.device == "cpu" else {}
    rows = slow.get(where.backend, 65536)
    ids = torch.arange(rows, device=where.device)[None] % distinct
    clip = torch.randint(0, 256, (1, 1, 2, 2, 2), dtype=torch.uint8, device=where.device)
    shapes = [(8, 1, 1, 1, 1), (8,), *([(8, 8)] if position == "one" else [(2, 8), (4, 8)])]
    numbers = [torch.rand(shape, device=where.device) for shape in shapes]
    grad = torch.rand(1, rows, 8, device=where.device)

    def results(dtype, backend):
        weight, bias, *table = leaves = [x.to(dtype).requires_grad_() for x in numbers]
        place = table[0] if position == "one" else tuple(table)
        out = masked_patch_embed(clip, weight, bias, place, ids, backend=backend)
        return torch.autograd.grad(out, leaves[1:], grad.to(dtype))

    for parts in zip(
        results(torch.float32, where.backend),
        results(torch.float32, "reference"),
        results(torch.float64, "reference"),
        strict=True,
    ):
        assert_as_accurate(*parts, torch.float32)


def test_same_bits_every_time(where):
    where.skip_unless_runs(OP)
    case = CASES["twice"]
    first = run(case, torch.float32, where.device, where.backend)
    for _ in range(3 if where.device == "cpu" else 100):
        again = run(case, torch.float32, where.device, where.backend)
        assert all(map(torch.equal, first, again))


def test_threads_change_no_bit_of_the_position():
    if reason := library.why_not("native", OP, "cpu", torch.float32):
        pytest.skip(reason)
    case, threads, results = Case(D=300, ids=12), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, "cpu", "native")[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["image patches", "ragged float", "no rows", "dense"])
def test_opcheck(name, where):
    where.skip_unless_runs(OP)
    case = CASES[name]
    clip, weight, bias, position, ids, cu_seqlens = case.inputs(torch.float32, where.device)
    mean, std = list(arguments(case).get("mean", [])), list(arguments(case).get("std", []))
    leaves = [x.requires_grad_() for x in (weight, bias, position[0])]
    torch.library.opcheck(
        library.kernel(OP, where.backend),
        (clip, leaves[0], leaves[1], None, leaves[2], ids, cu_seqlens, mean, std),
    )
    grad = torch.ones(())
    rows = (case.B, 12) if ids is None else ids.shape
    torch.library.opcheck(
        library.kernel(f"{OP}_bwd", where.backend),
        (
            grad.to(where.device).expand(*rows, case.D),
            clip,
            weight.detach(),
            ids,
            cu_seqlens,
            mean,
            std,
            clip.is_floating_point(),
            True,
            True,
        ),
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiles_once_for_all_lengths(backend, where):
    if where.backend != "native":
        pytest.skip("the graph is the same for every kernel")
    where.skip_unless_runs(OP)
    clip, weight, bias, (position,), _, _ = Case().inputs(torch.float32, where.device)
    weight.requires_grad_()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def embed(clip, weight, bias, position, ids):
        return masked_patch_embed(
            clip, weight, bias, position, ids, mean=MEAN, std=STD, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, backend=count)
    for K in (4, 5, 7, 9, 12):
        ids = torch.stack([torch.randperm(12)[:K] for _ in range(2)]).to(where.device)
        torch._dynamo.mark_dynamic(ids, 1)
        torch.testing.assert_close(
            compiled(clip, weight, bias, position, ids), embed(clip, weight, bias, position, ids)
        )
    assert len(graphs) == 1


def test_compiled_gradients(where):
    where.skip_unless_runs(OP)
    clip, weight, bias, (position,), ids, _ = Case().inputs(torch.float32, where.device)
    leaves = [x.requires_grad_() for x in (weight, bias, position)]

    def embed(weight, bias, position):
        return masked_patch_embed(
            clip, weight, bias, position, ids, mean=MEAN, std=STD, backend=where.backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        gradients(compiled(*leaves), leaves), gradients(embed(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_autocast_casts_the_weight_and_not_the_clip(where):
    where.skip_unless_runs(OP, torch.bfloat16)
    case = Case(video=torch.float32)
    clip, weight, bias, (position,), ids, _ = case.inputs(torch.float32, where.device)
    weight.requires_grad_()
    with torch.autocast(where.device, torch.bfloat16):
        out = masked_patch_embed(clip, weight, bias, position, ids, backend=where.backend)
    low = masked_patch_embed(clip, weight.bfloat16(), bias, position, ids, backend=where.backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, low)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def test_flops(where):
    where.skip_unless_runs(OP)
    clip, weight, bias, (position,), ids, _ = Case().inputs(torch.float32, where.device)
    weight.requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        masked_patch_embed(
            clip, weight, bias, position, ids, mean=MEAN, std=STD, backend=where.backend
        ).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4) * 768 * 24 * 2  # forward, and as much for dW


@pytest.mark.parametrize("ids", [[[0, 12]], [[-1, 3]], [[2**40, 0]]])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ids_out_of_range_are_caught(ids, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    clip, weight, *_ = Case(B=1).inputs(torch.float32, "cpu")
    with pytest.raises((RuntimeError, AssertionError), match=r"\[0, 12\)"):
        masked_patch_embed(clip, weight, ids_keep=torch.tensor(ids), backend=backend)


@pytest.mark.parametrize("offsets", [[0, 5, 4], [1, 2, 4], [0, 2, 3], [0, 2, 9]])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_offsets_that_do_not_fit_are_caught(offsets, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    clip, weight, *_ = Case().inputs(torch.float32, "cpu")
    ids, cu_seqlens = torch.tensor([0, 1, 2, 3]), torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises((RuntimeError, AssertionError), match="ascend"):
        masked_patch_embed(clip, weight, ids_keep=ids, cu_seqlens=cu_seqlens, backend=backend)


CLIP = torch.zeros(2, 3, 2, 32, 32, dtype=torch.uint8)
WEIGHT = torch.zeros(8, 3, 1, 16, 16)
IDS = torch.zeros(2, 4, dtype=torch.int64)
MISUSE = {
    "a clip of four dimensions": (ValueError, "video", {"video": CLIP[0]}),
    "an int32 clip": (TypeError, "uint8", {"video": CLIP.int()}),
    "a float8 clip": (TypeError, "uint8", {"video": CLIP.float().to(torch.float8_e4m3fn)}),
    "a clip without channels": (
        ValueError,
        "C > 0",
        {"video": CLIP[:, :0], "weight": WEIGHT[:, :0]},
    ),
    "an integer weight": (TypeError, "weight", {"weight": WEIGHT.int()}),
    "other channels": (ValueError, r"weight \[C, 3", {"weight": torch.zeros(8, 4, 1, 16, 16)}),
    "a flat weight": (ValueError, r"weight \[C, 3", {"weight": torch.zeros(8, 768)}),
    "a patch that does not fit": (ValueError, "divides", {"weight": torch.zeros(8, 3, 1, 14, 14)}),
    "a tubelet that does not fit": (ValueError, "divides", {"weight": torch.zeros(8, 3, 3, 8, 8)}),
    "an empty patch": (ValueError, "divides", {"weight": torch.zeros(8, 3, 0, 16, 16)}),
    "int32 ids": (TypeError, "int64", {"ids_keep": IDS.int()}),
    "a mask for ids": (TypeError, "int64", {"ids_keep": IDS.bool()}),
    "ids of other samples": (ValueError, r"\[2, K\]", {"ids_keep": IDS[:1]}),
    "packed ids alone": (ValueError, "cu_seqlens", {"ids_keep": IDS[0]}),
    "offsets alone": (ValueError, "ids_keep", {"cu_seqlens": torch.zeros(3).int()}),
    "offsets with uniform ids": (
        ValueError,
        r"\[total\]",
        {"ids_keep": IDS, "cu_seqlens": torch.zeros(3).int()},
    ),
    "int64 offsets": (
        TypeError,
        "int32",
        {"ids_keep": IDS[0], "cu_seqlens": torch.zeros(3).long()},
    ),
    "too few offsets": (
        ValueError,
        r"cu_seqlens \[3\]",
        {"ids_keep": IDS[0], "cu_seqlens": torch.zeros(2).int()},
    ),
    "a bias of another width": (ValueError, r"bias \[8\]", {"bias": torch.zeros(9)}),
    "a double bias": (TypeError, "bias", {"bias": torch.zeros(8).double()}),
    "too few positions": (ValueError, r"position \[8, 8\]", {"position": torch.zeros(4, 8)}),
    "a pair that does not fit": (
        ValueError,
        "position for time",
        {"position": (torch.zeros(4, 8), torch.zeros(4, 8))},
    ),
    "a pair without space": (
        ValueError,
        r"position \(time, space\).*NoneType",
        {"position": (torch.zeros(2, 8), None)},
    ),
    "a pair without time": (
        ValueError,
        r"position \(time, space\).*NoneType",
        {"position": (None, torch.zeros(8, 8))},
    ),
    "a pair of nothing": (ValueError, r"position \(time, space\)", {"position": (None, None)}),
    "three positions": (
        ValueError,
        r"position \(time, space\)",
        {"position": (torch.zeros(2, 8),) * 3},
    ),
    "a number as position": (TypeError, "position.*float", {"position": 1.0}),
    "mean of two channels": (ValueError, "3 numbers", {"mean": (0.5, 0.5)}),
    "std of zero": (ValueError, "positive", {"std": (0.2, 0.0, 0.2)}),
    "std of NaN": (ValueError, "finite std", {"std": (0.2, float("nan"), 0.2)}),
    "an infinite std": (ValueError, "finite std", {"std": (0.2, float("inf"), 0.2)}),
    "mean of NaN": (ValueError, "finite mean", {"mean": (0.2, float("nan"), 0.2)}),
    "an infinite mean": (ValueError, "finite mean", {"mean": (0.2, float("-inf"), 0.2)}),
    "mean in words": (TypeError, "mean as a number", {"mean": ("a", "b", "c")}),
    "mean of a float clip": (ValueError, "uint8", {"video": CLIP.float(), "mean": (0.5,) * 3}),
    "weight elsewhere": (ValueError, "on cpu", {"weight": WEIGHT.to("meta")}),
    "ids elsewhere": (ValueError, "on cpu", {"ids_keep": IDS.to("meta")}),
    "an unknown backend": (ValueError, "backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, text, change", MISUSE.values(), ids=MISUSE)
def test_misuse_is_explained(error, text, change):
    with pytest.raises(error, match=text):
        masked_patch_embed(**({"video": CLIP, "weight": WEIGHT} | change))


@pytest.mark.parametrize("ids", [None, 4, "ragged"])
@pytest.mark.parametrize("position", [None, "one", "pair"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("video", [torch.uint8, torch.float32])
def test_every_combination_of_options(video, bias, position, ids, where):
    where.skip_unless_runs(OP)
    case = Case(video=video, bias=bias, position=position, ids=ids)
    if ids == "ragged":
        case = replace(case, ids=[[3, 1, 11], [0]], ragged=True)
    clip, weight, bias, position, ids, cu_seqlens = case.inputs(torch.float32, where.device)
    place = position if len(position) == 2 else (*position, None)[0]
    for given in ({"mean", "std"}, {"mean"}, {"std"}, set()):
        options = {name: x for name, x in arguments(case).items() if name in given}
        ours, theirs = (
            masked_patch_embed(clip, weight, bias, place, ids, cu_seqlens, **options, backend=name)
            for name in (where.backend, "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


TABLES = {
    "time without space": ("space", {"time": torch.zeros(2, 8)}),
    "a short time": ("time", {"time": torch.zeros(1, 8), "space": torch.zeros(4, 8)}),
    "a short space": ("space", {"space": torch.zeros(7, 8)}),
    "a frame for a clip": ("space", {"space": torch.zeros(4, 8)}),
    "a clip for a frame": ("space", {"time": torch.zeros(2, 8), "space": torch.zeros(8, 8)}),
    "a narrow space": ("space", {"space": torch.zeros(8, 7)}),
    "a short bias": ("bias", {"bias": torch.zeros(7)}),
}


@pytest.mark.parametrize("name, change", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("backend", ["native", "triton", "emulated"])
def test_the_registered_op_checks_its_tables(name, change, backend):
    Where(backend, "cpu").skip_unless_runs(OP)
    given = {"bias": torch.zeros(8), "time": None, "space": None} | change
    with pytest.raises(RuntimeError, match=f"need {name}"):
        library.kernel(OP, backend)(CLIP, WEIGHT, *given.values(), IDS, None, [], [])


def test_a_backend_asked_for_never_falls_back():
    with pytest.raises(RuntimeError, match="native: .*\n  triton: .*\n  torch: can run"):
        masked_patch_embed(CLIP, WEIGHT.double(), backend="native")
    assert masked_patch_embed(CLIP, WEIGHT.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "variable, value, dtype", [("BF16", "1", "bf16"), ("MKL", "0", "fp32"), ("MKL", "1", "fp32")]
)
def test_matmuls_of_another_cpu(variable, value, dtype):
    """bfloat16 matmuls, and both kinds of float32 matmuls, whatever this CPU would choose."""
    name = f"VIDL_CPU_{variable}"
    if reason := library.why_not("native", OP, "cpu", torch.bfloat16):
        pytest.skip(reason)
    if name in os.environ:
        pytest.skip("this is that run")
    tests = (
        f"{__file__}::test_as_accurate_as_torch",
        f"{__file__}::test_the_mean_does_not_cost_accuracy",
        f"{__file__}::test_strides_change_no_bit",
    )
    select = "native-cpu" if dtype == "fp32" else f"{dtype} and native-cpu"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", select, *tests],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_an_infinite_gradient_stays_infinite(where):
    """The compensation of rounding errors must not turn it into NaN."""
    dtype = where.widest(OP)
    video = torch.zeros(1, 1, 1, 2, 4, dtype=dtype, device=where.device)
    weight = torch.ones(8, 1, 1, 2, 2, dtype=dtype, device=where.device)
    position = torch.zeros(2, 8, dtype=dtype, device=where.device, requires_grad=True)
    ids = torch.tensor([[0, 0, 1, 0]], device=where.device)
    out = masked_patch_embed(video, weight, None, position, ids, backend=where.backend)
    grad = torch.ones_like(out)
    grad[0, 0] = float("inf")
    out.backward(grad)
    assert position.grad[0].isposinf().all() and (position.grad[1] == 1).all()
