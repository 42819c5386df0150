"""What does a layer that prunes cost: attention, scores and selection together?

Every candidate gets a layer's fused [B * N, 3, H, D] projection, CLS in front of every sample, and
the tokens [B, N, C] that its attention is added to. It answers with CLS, the kept tokens in their
order and, where the shape says so, the weighted sum of the others. The projections and the MLP
around it are the same for all, and left out. The baselines are EViT's and SViTT's way, through the
attention matrix, and what a careful user writes: SDPA, and the product of the first query alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.bench.ops.select_tokens import advanced_index, gather, index_select
from vidl.kernels.groups import Groups
from vidl.kernels.select_tokens import kept_count, select_tokens
from vidl.kernels.space_time_attention import space_time_attention

OPS = ("space_time_attention", "select_tokens")


def _shape(cuda: int, cpu: int, N: int, rate: float) -> dict[str, dict[str, Any]]:
    """B samples of N tokens, without and with the fused token."""
    sizes = dict(B=dict(cuda=cuda, cpu=cpu), N=N, rate=rate, H=12, D=64)
    return {"": sizes | dict(fuse=False), ", fused": sizes | dict(fuse=True)}


_FAMILIES = {
    "P1 SMAUG joint, mask 0.65, keep 0.7": _shape(64, 8, 273, 0.7),
    "P1f SMAUG joint, keep 0.5": _shape(64, 2, 785, 0.5),
    "P2 frames of 197, keep 0.7": _shape(256, 8, 197, 0.7),
    "P3 VideoMAE clip, keep 0.5": _shape(64, 1, 1568, 0.5),
}
SHAPES = {f"{name}{end}": s for name, both in _FAMILIES.items() for end, s in both.items()}
PARAMETERS = ("qkv", "x")


@dataclass(frozen=True)
class Inputs:
    """What a layer has before its attention; the harness casts and differentiates these."""

    qkv: Tensor  # [B * N, 3, H, D]
    x: Tensor  # [B, N, C], C = H * D
    grad: Tensor  # of the result, [B, 1 + K (+ 1), C]
    groups: Groups
    K: int
    fuse: bool

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the baselines want them, [B, H, N, D]; views."""
        q, k, v = self.qkv.unflatten(0, self.x.shape[:2]).permute(2, 0, 3, 1, 4)
        return q, k, v


def make(
    B: int, N: int, rate: float, H: int, D: int, fuse: bool, *, dtype: torch.dtype, device: str,
    generator: torch.Generator,
) -> Inputs:  # fmt: skip
    """Draw a batch in which K tokens of each sample stand out, so that no rounding swaps two."""
    K = kept_count(N - 1, rate)
    qkv = torch.randn(B, N, 3, H, D, generator=generator)
    chosen = torch.rand(B, N - 1, generator=generator).argsort(-1) < K
    towards = qkv[:, :1, 0] / qkv[:, :1, 0].norm(dim=-1, keepdim=True)
    qkv[:, 1:, 1] += towards * torch.where(chosen, 3.0, -3.0)[..., None, None]
    x = torch.randn(B, N, H * D, generator=generator)
    grad = torch.randn(B, 1 + K + fuse, H * D, generator=generator)
    rows, x, grad = (y.to(device, dtype) for y in (qkv.flatten(0, 1), x, grad))
    return Inputs(rows, x, grad, Groups.equal(B, N, device=device), K, fuse)


def work(
    B: int, N: int, rate: float, H: int, D: int, fuse: bool, *, dtype: torch.dtype
) -> dict[str, Work]:
    """The projection and the needed tokens once, the result once; backward all gradients too."""
    K, row = kept_count(N - 1, rate), H * D * dtype.itemsize
    result = (1 + K + fuse) * row
    tokens = N * row if fuse else (1 + K) * row
    product = 2 * N * N * H * D  # as in bench/ops/space_time_attention.py
    return {
        "forward": Work(B * (3 * N * row + tokens + result), B * 2 * product),
        "backward": Work(B * (6 * N * row + N * row + result), B * 5 * product),
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
    """EViT's attention: every weight is stored, and CLS's are looked up."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return weights @ v, weights[:, :, 0, 1:].mean(1)


def sdpa_and_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v), weights[:, :, 0, 1:].mean(1)


def layer_in_pytorch(inputs: Inputs, attention: Attention, pick: Gather) -> Tensor:
    """topk and one gather; where asked for, the weighted sum of the others as one product."""
    out, scores = attention(*inputs.batch())
    x = inputs.x + out.transpose(1, 2).flatten(2)
    ids = scores.topk(inputs.K, sorted=False).indices.sort(1).values
    if not inputs.fuse:
        return pick(x, torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], 1))
    fused = scores.scatter(1, ids, 0).to(x.dtype)[:, None] @ x[:, 1:]
    return torch.cat([x[:, :1], pick(x, ids + 1), fused], 1)


def in_float32(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """The same, computed in float32: the way round for a CPU without units for the dtype."""
    detour = replace(inputs, qkv=inputs.qkv.float(), x=inputs.x.float())
    return run(detour).to(inputs.x.dtype)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, and the baselines: two ways to attend, three ways to pick rows."""
    found = ours(OPS, layer, device, dtype)
    ways: list[tuple[str, Attention]] = [
        ("attention matrix", matrix), ("SDPA + CLS product", sdpa_and_product)
    ]  # fmt: skip
    picks: list[Gather] = [gather, advanced_index, index_select]
    for name, attention in ways:
        for pick in picks:
            run = functools.partial(layer_in_pytorch, attention=attention, pick=pick)
            full = f"{name}, {pick.__name__}"
            found.append(Candidate(full, "baseline", run))
            if device == "cpu" and dtype != torch.float32:
                detour = functools.partial(in_float32, run)
                found.append(Candidate(f"{full}, in float32", "baseline", detour))
        run = functools.partial(layer_in_pytorch, attention=attention, pick=gather)
        found.append(
            Candidate(
                f"{name}, torch.compile",
                "baseline",
                torch.compile(run) if device == "cuda" else run,
                reason="timed on CUDA only" if device == "cpu" else None,
            )
        )
    return found
