"""Is attention in groups faster than what PyTorch has, and near what the memory allows?

Every candidate gets the fused [rows, 3, H, D] projection as a model has it, rows in the order of
time, row and column, and answers in that order: a baseline that wants its groups side by side pays for
the copies there and back. What depends on the mask alone (our groups; a baseline's offsets, padding or
block mask) is made once for all layers of a model, and is not timed.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.bench.ops.layouts import Layout, Windows, layout_of
from vidl.kernels.groups import Grid
from vidl.kernels.space_time_attention.op import Scores, space_time_attention

OP = "space_time_attention"


def _shape(cuda: int, cpu: int, form: str = "windows", H: int = 12, **sizes: Any) -> dict[str, Any]:
    """B clips whose rows `layouts` puts into groups."""
    return dict(form=form, B=dict(cuda=cuda, cpu=cpu), **sizes, H=H, D=64)


def _windows(cuda: int, cpu: int, grid: Grid, window: Grid, H: int = 12) -> dict[str, Any]:
    """Tokens of a clip in (time, row, column) order; those of one window see one another."""
    return _shape(cuda, cpu, H=H, grid=grid, window=window)


SHAPES = {
    "A1 SMAUG frames, mask 0.65": _windows(64, 8, (4, 1, 69), (1, 1, 69)),
    "A2 SMAUG joint, mask 0.65": _windows(64, 4, (1, 1, 273), (1, 1, 273)),
    "A2f SMAUG joint": _windows(64, 1, (1, 1, 785), (1, 1, 785)),
    "A3 VideoMAE encoder, mask 0.9": _windows(64, 8, (1, 1, 160), (1, 1, 160)),
    "A4 VideoMAE decoder": _windows(64, 1, (1, 1, 1568), (1, 1, 1568), H=6),
    "A5 spatial, 8 frames": _windows(64, 2, (8, 1, 197), (1, 1, 197)),
    "A6 temporal, 8 frames": _windows(64, 2, (8, 14, 14), (8, 1, 1)),
    "A6b temporal, 16 frames": _windows(64, 1, (16, 14, 14), (16, 1, 1)),
    "A7 spatial, 8 frames, mask 0.65": _windows(64, 4, (8, 1, 69), (1, 1, 69)),
    "A8 window 8x7x7": _windows(64, 1, (8, 14, 14), (8, 7, 7)),
    "A9 window 2x7x7": _windows(64, 1, (8, 14, 14), (2, 7, 7)),
    "A10 joint, half pruned": _windows(64, 2, (1, 1, 393), (1, 1, 393)),
    "A11 frames of 50": _windows(64, 8, (4, 1, 50), (1, 1, 50)),
    "ragged, 40 to 100": _shape(8, 1, "ragged", groups=32, shortest=40, longest=100),
    "Frozen divided, 4 frames": _shape(64, 8, "divided", frames=4, size=69),
}
PARAMETERS = ("qkv",)


@dataclass(frozen=True)
class Inputs:
    """What a model's projection gives; the harness casts and differentiates what it finds here."""

    qkv: Tensor  # [rows, 3, H, D]
    grad: Tensor  # of the result, [rows, H, D]
    layout: Layout


Run = Callable[[Inputs], Tensor]


def make(
    B: int, H: int, D: int, *, dtype: torch.dtype, device: str, generator: Any, **layout: Any
) -> Inputs:
    """Draw a batch."""
    found = layout_of(B=B, device=device, **layout)
    qkv = torch.randn(found.rows, 3, H, D, generator=generator).to(device, dtype)
    grad = torch.randn(found.rows, H, D, generator=generator).to(device, dtype)
    return Inputs(qkv, grad, found)


def work(B: int, H: int, D: int, *, dtype: torch.dtype, **layout: Any) -> dict[str, Work]:
    """q, k, v and the result once; backward reads q, k, v and a gradient, and writes three."""
    found = layout_of(B=B, device="cpu", **layout)
    one, lse = found.rows * H * D * dtype.itemsize, found.rows * H * 4
    product = 2 * found.pairs * H * D  # QK' and PV; backward: QK' again, dO V', dV, dQ and dK
    forward = Work(4 * one + lse, 2 * product)
    return {"forward": forward, "backward": Work(7 * one + lse, 5 * product)}


def truth(inputs: Inputs) -> Tensor:
    return attend(inputs, backend="reference")


def attend(inputs: Inputs, backend: str, scores: Scores | None = None) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    groups = inputs.layout.groups
    found = space_time_attention(q, k, v, groups, return_scores=scores, backend=backend)
    return found[0] if isinstance(found, tuple) else found


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    products = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        products = products.masked_fill(~mask, float("-inf"))
    return products.softmax(-1) @ v


def sdpa_and_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).mean(1)  # "cls", as EViT needs it
    return sdpa(q, k, v, mask)


def batches(inputs: Inputs, attention: Callable[..., Tensor] = sdpa) -> Tensor:
    layout = inputs.layout
    return layout.join([attention(*part) for part in layout.split(inputs.qkv)])


def loop_over_groups(inputs: Inputs) -> Tensor:
    layout = inputs.layout
    packed = zip(layout.packed(inputs.qkv), (layout.queries, layout.keys, layout.keys), strict=True)
    groups = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x, sizes in packed), strict=True)
    return layout.unpack(torch.cat([sdpa(*qkv)[0].transpose(0, 1) for qkv in groups]))


def loop_over_clips(inputs: Inputs) -> Tensor:
    """Attention through time without a copy: the places of one clip are a batch of strided rows."""
    layout = inputs.layout
    assert isinstance(layout, Windows)
    clips = inputs.qkv.unflatten(0, (layout.B, layout.N, -1))  # [B, T, S, 3, H, D]
    outs = [sdpa(*clip.permute(2, 1, 3, 0, 4)) for clip in clips.unbind(0)]
    return torch.stack(outs).permute(0, 3, 1, 2, 4).flatten(0, 2)


def nested(inputs: Inputs) -> Tensor:
    layout, cpu = inputs.layout, inputs.qkv.device.type == "cpu"

    def jagged(x: Tensor, offsets: Tensor, sizes: list[int]) -> Tensor:
        x = x.contiguous() if cpu else x  # all that a CPU has, the math, takes nothing else
        make = torch.nested.nested_tensor_from_jagged
        return make(x, offsets, min_seqlen=min(sizes), max_seqlen=max(sizes)).transpose(1, 2)

    q, k, v = layout.packed(inputs.qkv)
    q = jagged(q, layout.offsets[0], layout.queries)
    k, v = (jagged(x, layout.offsets[1], layout.keys) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext():
        return layout.unpack(sdpa(q, k, v).transpose(1, 2).values())


def flex(inputs: Inputs) -> Tensor:
    layout, attention = inputs.layout, flex_for(inputs.layout)
    if layout.labels is None:  # a batch needs no mask
        return batches(inputs, lambda q, k, v, mask: attention(q, k, v))
    q, k, v = inputs.qkv.unflatten(0, (layout.sequences, -1)).transpose(1, 3).unbind(2)
    return attention(q, k, v).transpose(1, 2).flatten(0, 1)


@functools.lru_cache(maxsize=1)
def flex_for(layout: Layout) -> Callable[..., Tensor]:
    """FlexAttention with its block mask; the first call compiles it, which is that of the check."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # or the limit of recompilations makes later layouts eager
    compiled = torch.compile(flex_attention, dynamic=False)
    if (labels := layout.labels) is None:
        return compiled

    def together(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (labels[q] == labels[k]) | (labels[q] < 0) | (labels[k] < 0)

    L = labels.shape[0]
    mask = create_block_mask(together, None, None, L, L, device=labels.device)
    return functools.partial(compiled, block_mask=mask)


def varlen(inputs: Inputs, module: str, function: str) -> Tensor:
    layout, call = inputs.layout, getattr(importlib.import_module(module), function)
    q, k, v = layout.packed(inputs.qkv)
    return layout.unpack(call(q, k, v, *layout.offsets, max(layout.queries), max(layout.keys)))


def xformers(inputs: Inputs) -> Tensor:
    q, k, v = (x[None] for x in inputs.layout.packed(inputs.qkv))
    call = importlib.import_module("xformers.ops").memory_efficient_attention
    return inputs.layout.unpack(call(q, k, v, attn_bias=blocks(inputs.layout))[0])


@functools.lru_cache(maxsize=1)
def blocks(layout: Layout) -> Any:
    bias = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask
    return bias.from_seqlens(layout.queries, layout.keys, device=layout.offsets[0].device)


def by(backend: str, inputs: Inputs) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return batches(inputs)


def in_float32(run: Run, inputs: Inputs) -> Tensor:
    """The same, computed in float32: the way round for a CPU without units for the dtype."""
    return run(replace(inputs, qkv=inputs.qkv.float())).to(inputs.qkv.dtype)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours without and with scores; the baselines: in batches, loops, nested, compiled, packed."""
    layout = layout_of(device=device, **{n: x for n, x in sizes.items() if n not in ("H", "D")})
    found = ours(OP, attend, device, dtype)
    scored = ours(OP, functools.partial(attend, scores="cls"), device, dtype)
    found += [replace(each, name=f"{each.name}, cls scores") for each in scored]

    baselines: list[tuple[str, Run]] = [
        (f"SDPA, {layout.batch}", batches),
        ("SDPA, loop over groups", loop_over_groups),
        ("matmul-softmax-matmul", functools.partial(batches, attention=unfused)),
        ("nested tensors", nested),
    ]
    if isinstance(layout, Windows):
        scoring = functools.partial(batches, attention=sdpa_and_scores)
        baselines.append((f"SDPA + scores, {layout.batch}", scoring))
        if layout.window == (layout.grid[0], 1, 1):
            baselines.append(("SDPA, loop over clips", loop_over_clips))
    emulated = device == "cpu" and dtype != torch.float32  # at least on many CPUs
    for name, run in baselines:
        slow = reason = None
        if name == "nested tensors" and device == "cpu":
            slow = "several ms for each group" if len(layout.queries) > 64 else None
            reason = slow or ("seconds on many CPUs: only in float32" if emulated else None)
        found.append(Candidate(name, "baseline", run, reason=reason))
        if emulated:
            detour = functools.partial(in_float32, run)
            found.append(Candidate(f"{name}, in float32", "baseline", detour, reason=slow))

    only = "FlexAttention has no backward on CPUs" if device == "cpu" else None
    name = f"FlexAttention, {layout.batch if layout.labels is None else 'block mask'}"
    found.append(Candidate(name, "baseline", flex, forward_only=only))
    cuda = "needs CUDA" if device == "cpu" else None
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        name = f"SDPA, {layout.batch}, {backend.split('_')[0]}"
        found.append(Candidate(name, "baseline", functools.partial(by, backend), reason=cuda))
    for module, function in (
        ("torch.nn.attention.varlen", "varlen_attn"),
        ("flash_attn", "flash_attn_varlen_func"),
        ("xformers", "memory_efficient_attention"),
    ):
        run = functools.partial(varlen, module=module, function=function)
        reason = None if importlib.util.find_spec(module) else f"{module} is not installed"
        if module != "xformers" and dtype == torch.float32:
            reason = reason or "needs float16 or bfloat16"
        run = xformers if module == "xformers" else run
        found.append(Candidate(function, "baseline", run, reason=cuda or reason))
    return found
