"""What does a learned table of relative positions cost in attention?

Every candidate receives the fused projection [rows, 3, H, D] of a model and the table [R, H], adds
the row of the table that belongs to each pair of a query and a key to its logit, and differentiates
the table. The baselines gather the table into a bias of every pair in each call, as the models do:
for SDPA (timm's BEiT), or for a matmul with a softmax (torchvision's and timm's Swin); or read the
table inside of FlexAttention. Positions of the tokens, and the baselines' indices into the table,
are made once for all layers, and not timed. The floor is the same attention without a table.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.bench.ops.layouts import Layout, layout_of
from vidl.kernels.groups import Grid, Positions
from vidl.kernels.space_time_attention import space_time_attention

OPS = ("space_time_attention",)


def _windows(cuda: int, cpu: int, grid: Grid, window: Grid, H: int, D: int) -> dict[str, Any]:
    """Clips of patches; the tokens of a window attend to each other."""
    return dict(B=dict(cuda=cuda, cpu=cpu), grid=grid, window=window, kept=None, H=H, D=D)


def _joint(cuda: int, cpu: int, grid: Grid, kept: int | None = None) -> dict[str, Any]:
    """CLS and the patches of a frame or clip, or so many of them, another set in each sample."""
    return dict(B=dict(cuda=cuda, cpu=cpu), grid=grid, window=None, kept=kept, H=12, D=64)


SHAPES = {
    "R1 BEiT, frames of 196": _joint(512, 16, (1, 14, 14)),
    "R2 BEiT, 69 of 196 kept": _joint(512, 32, (1, 14, 14), 69),
    "R3 Video Swin, window 2x7x7": _windows(64, 2, (8, 14, 14), (2, 7, 7), 12, 64),
    "R4 Video Swin, window 8x7x7": _windows(64, 1, (8, 14, 14), (8, 7, 7), 12, 64),
    "R5 Video Swin-B stage 3, heads of 32": _windows(8, 1, (8, 14, 14), (8, 7, 7), 16, 32),
    "R6 SViTT, 4 frames": _joint(64, 1, (4, 14, 14)),
    "R7 SViTT, 4 frames, half kept": _joint(64, 2, (4, 14, 14), 392),
}
PARAMETERS = ("qkv", "table")


@dataclass(frozen=True)
class Inputs:
    """The projection of a layer and its table."""

    qkv: Tensor  # [rows, 3, H, D]
    table: Tensor  # [R, H]
    grad: Tensor  # of the result, [rows, H, D]
    layout: Layout
    positions: Positions
    index: Tensor  # rows of the table, [N, N], or [G, N, N] where groups differ


Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of q, k, v and the bias


def layout_for(
    B: int, grid: Grid, window: Grid | None, kept: int | None, device: str, **_: Any
) -> Layout:
    if window is None:
        joint = (1, 1, 1 + (math.prod(grid) if kept is None else kept))
        grid, window = joint, joint
    return layout_of("windows", B, device, grid=grid, window=window)


def make(
    H: int, D: int, *, dtype: torch.dtype, device: str, generator: Any, **sizes: Any
) -> Inputs:
    """Draw a batch."""
    layout = layout_for(device=device, **sizes)
    B, grid, window, kept = (sizes[name] for name in ("B", "grid", "window", "kept"))
    patches = torch.arange(math.prod(grid), device=device)[None]
    if window is not None:
        positions = Positions.grid(patches, grid, reach=window).repeat(B)
    elif kept is None:
        positions = Positions.grid(patches, grid).with_global().repeat(B)
    else:
        draws = [torch.randperm(patches.shape[1], generator=generator)[:kept] for _ in range(B)]
        ids = torch.stack(draws).sort(-1).values.to(device)
        positions = Positions.grid(ids, grid).with_global()
    codes = torch.stack([positions.query_codes, positions.key_codes], 1)
    q, k, *_ = layout.split(codes[:, [0, 1, 1], None, None])[0]  # [G, 1, N, 1]
    if kept is None:
        q, k = q[:1], k[:1]
    index = positions.index(q.squeeze(1), k.squeeze(1).mT).squeeze(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv, table, grad = (
        randn(layout.rows, 3, H, D),
        randn(positions.rows, H),
        randn(layout.rows, H, D),
    )
    return Inputs(qkv, table, grad, layout, positions, index)


def work(H: int, D: int, *, dtype: torch.dtype, **sizes: Any) -> dict[str, Work]:
    """As for attention without a table: its size is less than 3 % of that of q, k and v."""
    layout = layout_for(device="cpu", **sizes)
    tensor, lse = layout.rows * H * D * dtype.itemsize, layout.rows * H * 4
    matmul = 2 * layout.pairs * H * D
    forward = Work(4 * tensor + lse, 2 * matmul)
    return {"forward": forward, "backward": Work(7 * tensor + lse, 5 * matmul)}


def truth(inputs: Inputs) -> Tensor:
    return attend(inputs, backend="reference")


def attend(inputs: Inputs, backend: str) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    options: Any = {"bias": inputs.table, "positions": inputs.positions, "backend": backend}
    return space_time_attention(q, k, v, inputs.layout.groups, **options)


def without_table(inputs: Inputs, backend: str) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    return space_time_attention(q, k, v, inputs.layout.groups, backend=backend)


def batch(inputs: Inputs, attention: Attention) -> Tensor:
    """Attention in one batch, with the bias gathered from the table: [1 or G, H, N, N]."""
    bias = F.embedding(inputs.index, inputs.table).movedim(-1, -3)
    q, k, v, _ = inputs.layout.split(inputs.qkv)[0]
    return inputs.layout.join([attention(q, k, v, bias if bias.ndim == 4 else bias[None])])


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def unfused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1) @ v


def flex(inputs: Inputs) -> Tensor:
    q, k, v, _ = inputs.layout.split(inputs.qkv)[0]
    N = inputs.layout.queries[0]
    index = inputs.index.int().expand(len(inputs.layout.queries), N, N)
    table = inputs.table

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[index[b, i, j], h]

    return inputs.layout.join([compiled_flex(inputs.layout)(q, k, v, score_mod=add)])


@functools.lru_cache(maxsize=1)
def compiled_flex(layout: Layout) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # otherwise later layouts hit the recompilation limit
    return torch.compile(flex_attention, dynamic=False)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl with and without the table; PyTorch with the table gathered or read by a score_mod."""
    result = ours(OPS, attend, device, dtype)
    for candidate in ours(OPS, without_table, device, dtype):
        if candidate.kind == "ours":
            name = f"{candidate.name}, no table"
            result.append(replace(candidate, name=name, kind="floor", gradients=("qkv",)))
    for name, attention in (("SDPA + table", sdpa), ("matmul-softmax-matmul + table", unfused)):
        result.append(Candidate(name, "baseline", functools.partial(batch, attention=attention)))
    only = "FlexAttention has no backward on CPUs" if device == "cpu" else None
    result.append(Candidate("FlexAttention", "baseline", flex, forward_only=only))
    return result
