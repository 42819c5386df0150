"""Ids, offsets and rows out of range on CUDA: nothing out of range is read, and nothing asserts.

The emulator runs the CUDA kernels, and Triton's interpreter the Triton kernels. The kernels of
attention in CUDA: `test_space_time_attention.py`. AddressSanitizer: `test_cuda_on_cpu.py`.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bounds import checked_addresses
from grouped import fused
from where import Where

from vidl.kernels import library
from vidl.ops import (
    Groups,
    Positions,
    cls_attention_scores,
    key_similarity_scores,
    masked_patch_embed,
    masked_patch_loss,
    mean_attention_scores,
    space_time_attention,
    value_weighted_scores,
)

ROOT = Path(__file__).parents[1]
MOST, LEAST = 2**31 - 1, -(2**31)
B, N, SIDE = 3, 12, 8
IDS = torch.arange(B * 4).view(B, 4) % N
BAD_IDS = (-1, N, -(2**63), 2**63 - 1)
BAD_OFFSETS = (
    [0, 9, 5, 12],
    [1, 5, 5, 12],
    [0, 5, 5, 11],
    [0, 5, 5, 13],
    [-9, LEAST, MOST, 12],
    [MOST] * 4,
)


def checked(backend, op):
    Where(backend, "cpu").skip_unless_runs(op)
    return checked_addresses() if backend == "triton" else nullcontext()


def test_an_address_out_of_range_is_found():
    with checked("triton", "masked_patch_embed"):
        from vidl.kernels.masked_patch_embed.triton_kernels import position_kernel

        grad, first = torch.ones(4, 2), torch.arange(4, dtype=torch.int32)
        following = torch.full((4,), -1, dtype=torch.int32)

        def launch(first, out):
            position_kernel[(4,)](grad, first, following, out, 1, 4, 2, 1, 2)

        launch(first, torch.empty(4, 2))
        with pytest.raises(Exception, match="an address is out of range"):
            launch(first, torch.empty(3, 2))
        with pytest.raises(Exception, match="an address is out of range"):
            launch(first[:3], torch.empty(4, 2))


def embed(ids, cu_seqlens, backend, dtype=torch.float32):
    """The tokens, and the gradients of the clip, of the weight and of the positions."""
    seed = torch.Generator().manual_seed(3)
    leaves = [
        torch.randn(shape, generator=seed).to(dtype).requires_grad_()
        for shape in ((B, 3, 2, 2 * SIDE, 3 * SIDE), (5, 3, 1, SIDE, SIDE), (N, 5))
    ]
    video, weight, position = leaves
    tokens = masked_patch_embed(
        video, weight, None, position, ids, cu_seqlens=cu_seqlens, backend=backend
    )
    return tokens, torch.autograd.grad(tokens.float().nan_to_num().sum(), leaves)


def loss(ids, cu_seqlens, backend, norm_pix=True):
    """The loss of every patch, and the gradient of the prediction."""
    seed = torch.Generator().manual_seed(3)
    video = torch.randint(0, 256, (B, 3, 2, 2 * SIDE, 3 * SIDE), generator=seed).byte()
    prediction = torch.randn(*ids.shape, 3 * SIDE * SIDE, generator=seed).requires_grad_()
    options = {"patch_size": SIDE, "tubelet_size": 1, "norm_pix": norm_pix, "reduction": "none"}
    losses = masked_patch_loss(
        prediction, video, ids, cu_seqlens, target="mae", backend=backend, **options
    )
    return losses, torch.autograd.grad(losses.nan_to_num().sum(), [prediction])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "emulated"])
def test_tokens_of_bad_ids_are_nan(backend, dtype):
    with checked(backend, "masked_patch_embed"):
        good, grads = embed(IDS, None, backend, dtype)
        for x in BAD_IDS:
            ids = IDS.clone()
            ids[0, 2] = ids[2, 3] = x
            tokens, (grad_video, grad_weight, _) = embed(ids, None, backend, dtype)
            bad = ids == x
            assert tokens[bad].isnan().all() and torch.equal(tokens[~bad], good[~bad])
            assert grad_weight.isnan().all() and torch.equal(grad_video[1], grads[0][1])


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("backend", ["triton", "emulated"])
def test_losses_of_bad_ids_are_nan(backend, norm_pix):
    with checked(backend, "masked_patch_loss"):
        good, (good_grad,) = loss(IDS, None, backend, norm_pix)
        for x in BAD_IDS:
            ids = IDS.clone()
            ids[0, 2] = ids[2, 3] = x
            losses, (grad,) = loss(ids, None, backend, norm_pix)
            bad = ids == x
            assert losses[bad].isnan().all() and torch.equal(losses[~bad], good[~bad])
            assert grad[bad].isnan().all() and torch.equal(grad[~bad], good_grad[~bad])


@pytest.mark.parametrize("run", [embed, loss])
@pytest.mark.parametrize("backend", ["triton", "emulated"])
def test_bad_offsets_of_patches_give_nan(backend, run):
    ids = IDS.flatten()
    with checked(backend, f"masked_patch_{run.__name__}"):
        out, _ = run(ids, torch.tensor([0, 5, 5, 12]).int(), backend)
        assert out.isfinite().all()
        for offsets in BAD_OFFSETS:
            out, _ = run(ids, torch.tensor(offsets).int(), backend)
            assert out[0].isnan().any()


@pytest.mark.parametrize(
    "prefix, fuse, order", [(0, "", "index"), (2, "sum", "score"), (1, "mean", "index")]
)
@pytest.mark.parametrize("backend", ["triton", "emulated"])
def test_bad_offsets_of_selected_tokens_give_nan(backend, prefix, fuse, order):
    seed = torch.Generator().manual_seed(3)
    total, kept = 60 + 3 * prefix, 25
    seqlens = torch.tensor([0, 30 + prefix, 35 + 2 * prefix, total]).int()
    counts = torch.tensor([0, 12, 15, kept]).int()
    x, numbers = torch.randn(total, 7, generator=seed), torch.rand(total, generator=seed)
    weights = numbers if fuse else None

    def run(seqlens, counts):
        forward, backward = (
            library.kernel(name, backend) for name in ("select_tokens", "select_tokens_bwd")
        )
        tokens, ids, *saved = forward(
            x, numbers, weights, seqlens, counts, kept, prefix, order, fuse
        )
        inverse, ends, means = saved
        options = (means if fuse == "mean" else None, prefix, fuse, True, bool(fuse))
        grads = backward(torch.ones_like(tokens), x, weights, inverse, seqlens, ends, *options)
        return tokens, ids, grads

    bad = [[1, 1, 2, total], [0, 35, 30, total], [0, 30, 35, total - 1], [0, 30, 35, total + 1]]
    bad += [[0, MOST, LEAST, total], [MOST] * 4, [LEAST, 0, 0, MOST]]
    bad_counts = [[1, 12, 15, kept], [0, 15, 12, kept], [0, 12, 24, kept]]
    bad_counts += [[0, MOST, LEAST, kept], [MOST] * 4]
    with checked(backend, "select_tokens"):
        tokens, _, grads = run(seqlens, counts)
        assert tokens.isfinite().all() and all(x.isfinite().all() for x in grads)
        for offsets in bad:
            tokens, *_ = run(torch.tensor(offsets).int(), counts)
            assert tokens.isnan().any(), offsets
        for offsets in bad_counts:
            tokens, *_ = run(seqlens, torch.tensor(offsets).int())
            # Where they descend, samples have rows in common, and either may write them last.
            assert tokens.isnan().any() or sorted(offsets) != offsets


def lists(size):
    """Three groups of shuffled rows, whose keys are in two groups each; the second has the ends."""
    seed = torch.Generator().manual_seed(size)
    rows = torch.randperm(3 * size - 2, generator=seed).int() + 1
    rows = torch.cat([rows[:size], torch.tensor([0, 3 * size - 1]).int(), rows[size:]])
    offsets = torch.tensor([0, size, 2 * size, 3 * size]).int()
    key_rows = torch.cat([rows, rows.roll(size)])
    return Groups(
        offsets, offsets * 2, rows, key_rows.view(2, 3, size).transpose(0, 1).flatten(),
        max_queries=size, max_keys=2 * size, num_queries=3 * size, num_keys=3 * size,
    )  # fmt: skip


def attend(groups, scores, dtype):
    q, k, v = (x.detach().requires_grad_() for x in fused(groups, 1, 32, dtype, "cpu"))
    out, score = space_time_attention(q, k, v, groups, return_scores=scores, backend="triton")
    grads = torch.autograd.grad(out.float().sum() + score.sum(), (q, k, v))
    return out, score, grads


def biased(groups, scores, dtype):
    """With codes of any value."""
    q, k, v = (x.detach().requires_grad_() for x in fused(groups, 1, 32, dtype, "cpu"))
    codes = torch.arange(groups.num_keys).int()
    codes[::20], codes[3], codes[4] = MOST, LEAST, -1
    table = torch.linspace(-1, 1, 9)[:, None].requires_grad_()
    key_bias = torch.linspace(-1, 1, groups.num_keys)
    key_bias[1::4] = -torch.inf
    out, score = space_time_attention(
        *(q, k, v, groups),
        bias=table,
        positions=Positions(codes, codes.flip(0), 9, 2),
        key_bias=key_bias,
        return_scores=scores,
        backend="triton",
    )
    grads = torch.autograd.grad(out.float().sum() + score.sum(), (q, k, v, table))
    return out, score, grads


def limited(groups, scores, dtype):
    """With limits of any value."""
    limits = torch.arange(groups.num_queries).int() % 7
    limits[::5], limits[3], limits[4] = MOST, LEAST, -1
    return attend(replace(groups, query_limits=limits, checked=True), scores, dtype)


def scored_with_bias(groups, kind, dtype):
    """With codes and limits of any value."""
    q, k, _ = (x.detach().requires_grad_() for x in fused(groups, 1, 32, dtype, "cpu"))
    codes = torch.arange(groups.num_keys).int()
    codes[::20], codes[3], codes[4] = MOST, LEAST, -1
    limits = codes.roll(2) % 30
    limits[::5], limits[3], limits[4] = MOST, LEAST, -1
    table = torch.linspace(-1, 1, 9)[:, None].requires_grad_()
    key_bias = torch.linspace(-1, 1, groups.num_keys)
    key_bias[1::4] = -torch.inf
    function = {"cls": cls_attention_scores, "mean": mean_attention_scores}[kind]
    score = function(
        *(q, k, replace(groups, query_limits=limits, checked=True)),
        bias=table,
        positions=Positions(codes, codes.flip(0), 9, 2),
        key_bias=key_bias,
        backend="triton",
    )
    grads = torch.autograd.grad(score.sum(), (q, k, table))
    return torch.zeros(groups.num_queries, 1), score, grads


def scored(groups, kind, dtype):
    q, k, v = (x.detach().requires_grad_() for x in fused(groups, 1, 32, dtype, "cpu"))
    function, leaves = {
        "cls": (cls_attention_scores, (q, k)),
        "mean": (mean_attention_scores, (q, k)),
        "value": (value_weighted_scores, (q, k, v)),
        "similarity": (key_similarity_scores, (k,)),
    }[kind]
    score = function(*leaves, groups, backend="triton")
    grads = torch.autograd.grad(score.sum(), leaves) if kind != "similarity" else ()
    return torch.zeros(groups.num_queries, 1), score, grads


def slow(*run):
    return pytest.param(*run, marks=pytest.mark.slow)


RUNS = [
    *((run, 6, "mean", torch.float32) for run in (attend, biased, limited)),
    *((scored, 6, kind, torch.float32) for kind in ("cls", "mean", "value", "similarity")),
    *(slow(attend, size, "mean", torch.float16) for size in (6, 20)),
    *(slow(attend, size, "cls", torch.float16) for size in (6, 80)),
    slow(attend, 40, "mean", torch.float32),
    *(slow(biased, 6, kind, torch.float16) for kind in ("cls", "mean")),
    slow(biased, 40, "mean", torch.float32),
    *(slow(limited, size, "mean", torch.float16) for size in (6, 40)),
    *(slow(scored_with_bias, 20, kind, torch.float32) for kind in ("cls", "mean")),
    *(slow(scored, 20, kind, torch.float32) for kind in ("cls", "mean", "value", "similarity")),
]


@pytest.mark.parametrize("run, size, kind, dtype", RUNS)
def test_bad_rows_leave_other_groups_alone(run, size, kind, dtype):
    """Rows out of range become the first or the last row, which belong to the same group here."""
    groups = lists(size)
    with checked("triton", "space_time_attention"):
        good = run(groups, kind, dtype)
        for x in (-1, MOST):
            queries, keys = groups.query_rows.clone(), groups.key_rows.clone()
            queries[size], keys[2 * size + 3] = x, x  # of the second group
            bad = run(replace(groups, query_rows=queries, key_rows=keys, checked=True), kind, dtype)
            others = torch.cat([groups.query_rows[:size], groups.query_rows[2 * size :]]).long()
            assert torch.equal(bad[0][others], good[0][others])
            for part in (slice(2 * size), slice(4 * size, None)):
                assert torch.equal(bad[1][part], good[1][part])


@pytest.mark.parametrize("run, size, kind, dtype", RUNS)
def test_bad_lists_stay_in_range(run, size, kind, dtype):
    groups = lists(size)
    with checked("triton", "space_time_attention"):
        for x in (MOST, LEAST):
            changed = {}
            for name in (
                *("query_offsets", "key_offsets", "query_rows", "key_rows"),
                *("entry_offsets", "entries"),
            ):
                changed[name] = getattr(groups, name).clone()
                changed[name][1::3] = x
            run(replace(groups, **changed, checked=True), kind, dtype)


def test_kernels_have_no_assertions():
    """An assertion on the device ends the CUDA context of the process."""
    for file in (*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu")):
        assert not re.search(r"(?<!static_)\bassert\(|__trap", file.read_text()), file
    for file in ROOT.glob("kernels/**/triton_*.py"):
        assert not re.search('device_assert|debug=True|"debug"', file.read_text()), file
