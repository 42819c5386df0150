"""Is attention in groups faster than in PyTorch, and close to the hardware limit?

Every candidate receives the fused projection [rows, 3, H, D] of a model, with rows in the order of
time, row and column, and returns its result in that order; a baseline that needs contiguous groups
pays for the copies. Everything that depends on the mask alone (vidl's groups, and a baseline's
offsets, padding or block mask) is computed once per mask for all layers, and not timed.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, ours
from vidl.bench.ops.layouts import Layout, Windows, layout_of
from vidl.kernels.groups import Grid
from vidl.kernels.space_time_attention.op import Scores, space_time_attention
from vidl.kernels.space_time_attention.pytorch import provides

OP = "space_time_attention"


def _shape(cuda: int, cpu: int, form: str = "windows", H: int = 12, **sizes: Any) -> dict[str, Any]:
    """Sizes of B clips; `layouts` arranges their rows in groups."""
    return dict(form=form, B=dict(cuda=cuda, cpu=cpu), **sizes, H=H, D=64)


def _windows(cuda: int, cpu: int, grid: Grid, window: Grid, H: int = 12) -> dict[str, Any]:
    """Clips in (time, row, column) order; the tokens of a window attend to each other."""
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
    OVERHEAD: _windows(1, 1, (1, 1, 16), (1, 1, 16), H=1),
    "ragged, 40 to 100": _shape(8, 1, "ragged", groups=32, shortest=40, longest=100),
    "Frozen divided, 4 frames": _shape(64, 8, "divided", frames=4, size=69),
}
PARAMETERS = ("qkv",)


@dataclass(frozen=True)
class Inputs:
    """The projection of a layer, and its groups."""

    qkv: Tensor  # [rows, 3, H, D]
    grad: Tensor  # of the result, [rows, H, D]
    layout: Layout


Run = Callable[[Inputs], Tensor]


def make(
    B: int, H: int, D: int, *, dtype: torch.dtype, device: str, generator: Any, **layout: Any
) -> Inputs:
    """Draw a batch."""
    groups = layout_of(B=B, device=device, **layout)
    qkv = torch.randn(groups.rows, 3, H, D, generator=generator).to(device, dtype)
    grad = torch.randn(groups.rows, H, D, generator=generator).to(device, dtype)
    return Inputs(qkv, grad, groups)


def work(B: int, H: int, D: int, *, dtype: torch.dtype, **layout: Any) -> dict[str, Work]:
    """Reads q, k and v and writes the result; backward also reads a gradient and writes three."""
    groups = layout_of(B=B, device="cpu", **layout)
    tensor, lse = groups.rows * H * D * dtype.itemsize, groups.rows * H * 4
    matmul = 2 * groups.pairs * H * D  # forward: 2; backward: the weights again, and 4 gradients
    forward = Work(4 * tensor + lse, 2 * matmul)
    return {"forward": forward, "backward": Work(7 * tensor + lse, 5 * matmul)}


def truth(inputs: Inputs) -> Tensor:
    return attend(inputs, backend="reference")


def attend(inputs: Inputs, backend: str, scores: Scores | None = None) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    groups = inputs.layout.groups
    result = space_time_attention(q, k, v, groups, return_scores=scores, backend=backend)
    return result[0] if isinstance(result, tuple) else result


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    products = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        products = products.masked_fill(~mask, float("-inf"))
    return products.softmax(-1) @ v


def sdpa_and_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).mean(1)  # CLS scores as in EViT
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
    """Temporal attention without a copy: the positions of a clip are a batch of strided rows."""
    layout = inputs.layout
    assert isinstance(layout, Windows)
    clips = inputs.qkv.unflatten(0, (layout.B, layout.N, -1))  # [B, T, P, 3, H, D]
    outs = [sdpa(*clip.permute(2, 1, 3, 0, 4)) for clip in clips.unbind(0)]
    return torch.stack(outs).permute(0, 3, 1, 2, 4).flatten(0, 2)


def nested(inputs: Inputs) -> Tensor:
    layout, cpu = inputs.layout, inputs.qkv.device.type == "cpu"

    def jagged(x: Tensor, offsets: Tensor, sizes: list[int]) -> Tensor:
        x = x.contiguous() if cpu else x  # the math backend, the only one on CPUs, requires it
        make = torch.nested.nested_tensor_from_jagged
        return make(x, offsets, min_seqlen=min(sizes), max_seqlen=max(sizes)).transpose(1, 2)

    q, k, v = layout.packed(inputs.qkv)
    q = jagged(q, layout.offsets[0], layout.queries)
    k, v = (jagged(x, layout.offsets[1], layout.keys) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext():
        return layout.unpack(sdpa(q, k, v).transpose(1, 2).values())


def flex(inputs: Inputs, backend: str = "AUTO") -> Tensor:
    layout, attention = inputs.layout, flex_for(inputs.layout, backend)
    if layout.labels is None:  # equal groups need no mask
        return batches(inputs, lambda q, k, v, mask: attention(q, k, v))
    q, k, v = inputs.qkv.unflatten(0, (layout.sequences, -1)).transpose(1, 3).unbind(2)
    return attention(q, k, v).transpose(1, 2).flatten(0, 1)


@functools.lru_cache(maxsize=1)
def compiled_flex(layout: Layout) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # otherwise later layouts hit the recompilation limit
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=2)
def flex_for(layout: Layout, backend: str) -> Callable[..., Tensor]:
    """FlexAttention with its block mask; the call of the check compiles it.

    Args:
        backend: "AUTO", the kernels of Triton or C++; or "FLASH", those of FlashAttention 4.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    options = None if backend == "AUTO" else {"BACKEND": backend}
    compiled = functools.partial(compiled_flex(layout), kernel_options=options)
    if (labels := layout.labels) is None:
        return compiled

    def together(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (labels[q] == labels[k]) | (labels[q] < 0) | (labels[k] < 0)

    rows = labels.shape[0]
    # On compute capability 10 FlashAttention 4 has tiles of 256 queries (attention-gym #212).
    large = backend == "FLASH" and torch.cuda.get_device_capability(labels.device)[0] == 10
    mask = create_block_mask(
        *(together, None, None, rows, rows),
        device=labels.device,
        BLOCK_SIZE=(256, 128) if large else 128,
    )
    return functools.partial(compiled, block_mask=mask)


def varlen(inputs: Inputs, module: str, function: str) -> Tensor:
    layout, call = inputs.layout, getattr(importlib.import_module(module), function)
    q, k, v = layout.packed(inputs.qkv)
    return layout.unpack(call(q, k, v, *layout.offsets, max(layout.queries), max(layout.keys)))


def cudnn_flex(inputs: Inputs) -> Tensor:
    q, k, v = inputs.layout.packed(inputs.qkv)
    call = importlib.import_module("cudnn.flex_attention").flex_attn_func
    plan = mask_plan(inputs.layout, q.shape[1], q.shape[2], q.dtype)
    return inputs.layout.unpack(call(q, k, v, mask_plan=plan))


@functools.lru_cache(maxsize=1)
def mask_plan(layout: Layout, H: int, D: int, dtype: torch.dtype) -> Any:
    """What cuDNN's flex_attention computes of the mask, for packed groups."""
    device, sizes = layout.offsets[0].device, (sum(layout.queries), sum(layout.keys))
    q, k = (torch.empty(rows, H, D, dtype=dtype, device=device) for rows in sizes)
    return importlib.import_module("cudnn.flex_attention").create_mask_plan(
        *(visible_keys(layout), q, k, k),
        cu_seqlens_q=layout.offsets[0],
        cu_seqlens_k=layout.offsets[1],
        max_seqlen_q=max(layout.queries),
        max_seqlen_k=max(layout.keys),
        build_backward=True,
    )


def visible_keys(layout: Layout) -> Tensor:
    """For each packed query the end of the keys of its group that it attends to: all of them.

    Returns:
        [1, 1, queries] int32: of all heads, of one interval that begins at the first key.
    """
    queries, keys = (offsets.diff() for offsets in layout.offsets)
    ends = keys.repeat_interleave(queries.long(), output_size=sum(layout.queries))
    return ends.view(1, 1, -1)


def xformers(inputs: Inputs) -> Tensor:
    q, k, v = (x[None] for x in inputs.layout.packed(inputs.qkv))
    call = importlib.import_module("xformers.ops").memory_efficient_attention
    return inputs.layout.unpack(call(q, k, v, attn_bias=blocks(inputs.layout))[0])


@functools.lru_cache(maxsize=1)
def blocks(layout: Layout) -> Any:
    bias = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask
    return bias.from_seqlens(layout.queries, layout.keys, device=layout.offsets[0].device)


def sdpa_by(backend: str, inputs: Inputs) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return batches(inputs)


def in_float32(run: Run, inputs: Inputs) -> Tensor:
    """`run` in float32: faster on CPUs without units for the dtype."""
    return run(replace(inputs, qkv=inputs.qkv.float())).to(inputs.qkv.dtype)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl without and with scores; baselines in batches, loops, nested tensors and packed."""
    layout = layout_of(device=device, **{n: x for n, x in sizes.items() if n not in ("H", "D")})
    result = ours(OP, attend, device, dtype)
    scored = ours(OP, functools.partial(attend, scores="cls"), device, dtype)
    result += [replace(c, name=f"{c.name}, cls scores") for c in scored]

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
    emulated = device == "cpu" and dtype != torch.float32  # on many CPUs
    for name, run in baselines:
        slow = reason = None
        if name == "nested tensors" and device == "cpu":
            slow = "takes several ms per group" if len(layout.queries) > 64 else None
            reason = slow or (
                "takes seconds on many CPUs: timed in float32 only" if emulated else None
            )
        result.append(Candidate(name, "baseline", run, reason=reason))
        if emulated:
            upcast = functools.partial(in_float32, run)
            result.append(Candidate(f"{name}, in float32", "baseline", upcast, reason=slow))

    only = "FlexAttention has no backward on CPUs" if device == "cpu" else None
    form = layout.batch if layout.labels is None else "block mask"
    result.append(Candidate(f"FlexAttention, {form}", "baseline", flex, forward_only=only))
    cuda = "needs CUDA" if device == "cpu" else None
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        name = f"SDPA, {layout.batch}, {backend.split('_')[0]}"
        result.append(Candidate(name, "baseline", functools.partial(sdpa_by, backend), reason=cuda))
    varlens = [
        ("torch.nn.attention.varlen", "varlen_attn"),
        ("flash_attn", "flash_attn_varlen_func"),
    ]
    others: list[tuple[str, Run, str, str]] = [
        (function, functools.partial(varlen, module=module, function=function), module, function)
        for module, function in varlens
    ]
    flash = functools.partial(flex, backend="FLASH")
    others += [
        ("memory_efficient_attention", xformers, "xformers.ops", "memory_efficient_attention"),
        (f"FlexAttention FLASH, {form}", flash, "flash_attn.cute", "flash_attn_func"),
        ("cuDNN flex_attention", cudnn_flex, "cudnn.flex_attention", "flex_attn_func"),
    ]
    for name, run, module, function in others:
        reason = cuda or why_not(module, function, dtype)
        result.append(Candidate(name, "baseline", run, reason=reason))
    return result


# The GPUs for which a module has kernels; of others the call itself says so.
CAPABILITIES = {"cudnn.flex_attention": ((9, 0), (10, 0), (10, 3))}


def why_not(module: str, function: str, dtype: torch.dtype) -> str | None:
    """The reason why an optional baseline cannot run on this GPU, or None if it can."""
    if not provides(module, function):
        return f"{module}.{function} is not installed"
    if module != "xformers.ops" and dtype == torch.float32:
        return "needs float16 or bfloat16"
    if module in CAPABILITIES and (here := torch.cuda.get_device_capability()) not in (
        known := CAPABILITIES[module]
    ):
        names = ", ".join(f"{major}.{minor}" for major, minor in known)
        return f"needs compute capability {names}, this GPU has {here[0]}.{here[1]}"
    return None
