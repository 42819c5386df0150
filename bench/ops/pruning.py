"""Does a layer that prunes get faster, with attention, scores and selection together?

Every candidate receives the fused projection [B * N, 3, H, D] of a layer, CLS first in each sample,
and the tokens [B, N, C] to which the attention is added. It computes CLS, the kept tokens in their
original order and, if the shape says so, the weighted sum of the others. The projections and the
MLP are the same for all candidates and left out. The baselines are the attention matrix, as in EViT
and SViTT, and SDPA with a separate product of CLS's query with the keys.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, compiled, ours
from vidl.bench.ops.select_tokens import advanced_index, gather, index_select, layer_shapes
from vidl.kernels.groups import Groups
from vidl.kernels.select_tokens import kept_count, select_tokens
from vidl.kernels.space_time_attention import space_time_attention

OPS = ("space_time_attention", "select_tokens")
SHAPES = layer_shapes((8, 2, 8, 1, 1), H=12, D=64)
PARAMETERS = ("qkv", "x")


@dataclass(frozen=True)
class Inputs:
    """The inputs of the attention of a layer."""

    qkv: Tensor  # [B * N, 3, H, D]
    x: Tensor  # [B, N, C], C = H * D
    grad: Tensor  # of the result, [B, 1 + K (+ 1), C]
    groups: Groups
    K: int
    fuse: bool

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as batches [B, H, N, D]; views."""
        q, k, v = self.qkv.unflatten(0, self.x.shape[:2]).permute(2, 0, 3, 1, 4)
        return q, k, v


def make(
    B: int, N: int, rate: float, H: int, D: int, fuse: bool, *, dtype: torch.dtype, device: str,
    generator: torch.Generator,
) -> Inputs:  # fmt: skip
    """Draw a batch in which K tokens per sample score clearly higher, whatever the rounding."""
    K = kept_count(N - 1, rate)
    qkv = torch.randn(B, N, 3, H, D, generator=generator)
    kept = torch.rand(B, N - 1, generator=generator).argsort(-1) < K
    towards = qkv[:, :1, 0] / qkv[:, :1, 0].norm(dim=-1, keepdim=True)
    qkv[:, 1:, 1] += towards * torch.where(kept, 3.0, -3.0)[..., None, None]
    x = torch.randn(B, N, H * D, generator=generator)
    grad = torch.randn(B, 1 + K + fuse, H * D, generator=generator)
    rows, x, grad = (y.to(device, dtype) for y in (qkv.flatten(0, 1), x, grad))
    return Inputs(rows, x, grad, Groups.equal(B, N, device=device), K, fuse)


def work(
    B: int, N: int, rate: float, H: int, D: int, fuse: bool, *, dtype: torch.dtype
) -> dict[str, Work]:
    """Reads the projection and the needed tokens once; backward also writes all gradients."""
    K, row = kept_count(N - 1, rate), H * D * dtype.itemsize
    result = (1 + K + fuse) * row
    tokens = N * row if fuse else (1 + K) * row
    matmul = 2 * N * N * H * D  # as in bench/ops/space_time_attention.py
    return {
        "forward": Work(B * (3 * N * row + tokens + result), B * 2 * matmul),
        "backward": Work(B * (6 * N * row + N * row + result), B * 5 * matmul),
    }


def truth(inputs: Inputs) -> Tensor:
    return layer(inputs, backend="reference")


def layer(inputs: Inputs, backend: str) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    out, scores = space_time_attention(q, k, v, inputs.groups, return_scores="cls", backend=backend)
    B, N, _ = inputs.x.shape
    return select_tokens(
        inputs.x + out.view(B, N, -1),
        scores.view(B, N)[:, 1:],
        inputs.K,
        order="index",
        fuse="sum" if inputs.fuse else None,
        prefix=1,
        backend=backend,
    ).tokens


Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Gather = Callable[[Tensor, Tensor], Tensor]


def matrix(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of EViT: materializes all weights, and returns those of CLS."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return weights @ v, weights[:, :, 0, 1:].mean(1)


def sdpa_and_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v), weights[:, :, 0, 1:].mean(1)


def layer_in_pytorch(inputs: Inputs, attention: Attention, pick: Gather) -> Tensor:
    """topk and one gather; the fused token is one matmul."""
    out, scores = attention(*inputs.batch())
    x = inputs.x + out.transpose(1, 2).flatten(2)
    ids = scores.topk(inputs.K, sorted=False).indices.sort(1).values
    if not inputs.fuse:
        return pick(x, torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], 1))
    fused = scores.scatter(1, ids, 0).to(x.dtype)[:, None] @ x[:, 1:]
    return torch.cat([x[:, :1], pick(x, ids + 1), fused], 1)


def in_float32(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """`run` in float32: faster on CPUs without units for the dtype."""
    upcast = replace(inputs, qkv=inputs.qkv.float(), x=inputs.x.float())
    return run(upcast).to(inputs.x.dtype)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl, and the baselines: two kinds of attention, three of gather."""
    result = ours(OPS, layer, device, dtype)
    variants: list[tuple[str, Attention]] = [
        ("attention matrix", matrix), ("SDPA + CLS product", sdpa_and_product)
    ]  # fmt: skip
    for name, attention in variants:
        for pick in (gather, advanced_index, index_select):
            run = functools.partial(layer_in_pytorch, attention=attention, pick=pick)
            full = f"{name}, {pick.__name__}"
            result.append(Candidate(full, "baseline", run))
            if device == "cpu" and dtype != torch.float32:
                upcast = functools.partial(in_float32, run)
                result.append(Candidate(f"{full}, in float32", "baseline", upcast))
        run = functools.partial(layer_in_pytorch, attention=attention, pick=gather)
        result.append(compiled(name, run, device))
    return result
