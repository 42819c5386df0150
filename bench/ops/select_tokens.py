"""Does `select_tokens` choose, gather and fuse tokens at the speed of the memory?

Every candidate receives the tokens, CLS first, and the scores of the others. It computes CLS, the
kept tokens in the order of their scores and, if the shape says so, the fused token. The baselines
are the implementation of EViT, and variants of it with another gather or without a copy by `cat`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, compiled, ours
from vidl.kernels.select_tokens.op import kept_count, select_tokens

OP = "select_tokens"


# B on CUDA, N and the keep rate of layers that prune.
_LAYERS = {
    "P1 SMAUG joint, mask 0.65, keep 0.7": (64, 273, 0.7),
    "P1f SMAUG joint, keep 0.5": (64, 785, 0.5),
    "P2 frames of 197, keep 0.7": (256, 197, 0.7),
    "P3 VideoMAE clip, keep 0.5": (64, 1568, 0.5),
    OVERHEAD: (1, 17, 0.5),
}


def layer_shapes(cpu: Sequence[int], **sizes: int) -> dict[str, dict[str, Any]]:
    """Sizes of the layers without and with the fused token; `cpu` has B of each on a CPU."""
    return {
        name + ", fused" * fuse: dict(B=dict(cuda=cuda, cpu=B), N=N, rate=rate, fuse=fuse) | sizes
        for (name, (cuda, N, rate)), B in zip(_LAYERS.items(), cpu, strict=True)
        for fuse in (False, True)
    }


SHAPES = layer_shapes((16, 8, 32, 4, 1), C=768)
PARAMETERS = ("x", "scores")


@dataclass(frozen=True)
class Inputs:
    """The tokens and scores after the attention of a layer."""

    x: Tensor  # [B, N, C], CLS first
    scores: Tensor  # [B, N - 1]
    grad: Tensor  # of the result, [B, 1 + K (+ 1), C]
    K: int
    fuse: bool


def make(
    B: int, N: int, rate: float, C: int, fuse: bool, *, dtype: torch.dtype, device: str,
    generator: torch.Generator,
) -> Inputs:  # fmt: skip
    """Draw a batch; the scores are a softmax without ties."""
    K = kept_count(N - 1, rate)
    x = torch.randn(B, N, C, generator=generator)
    order = torch.rand(B, N - 1, generator=generator).argsort(-1)
    scores = (order.float() / 256).softmax(-1)
    grad = torch.randn(B, 1 + K + fuse, C, generator=generator)
    return Inputs(x.to(device, dtype), scores.to(device), grad.to(device, dtype), K, fuse)


def work(B: int, N: int, rate: float, C: int, fuse: bool, *, dtype: torch.dtype) -> dict[str, Work]:
    """Reads the needed rows and the scores once; writes the result and its ids once."""
    K, row = kept_count(N - 1, rate), C * dtype.itemsize
    dropped = N - 1 - K
    read = (N if fuse else 1 + K) * row + 4 * (N - 1)
    forward = read + (1 + K + fuse) * row + 8 * (K + N - 1)
    # Backward reads the gradient of the result and, for that of the scores, the dropped rows; it
    # writes the whole gradient of x.
    backward = (1 + K + fuse) * row + N * row + 8 * (N - 1) + fuse * (dropped * row + 8 * (N - 1))
    return {
        "forward": Work(B * forward, 2 * B * dropped * C * fuse),
        "backward": Work(B * backward, 3 * B * dropped * C * fuse),
    }


def truth(inputs: Inputs) -> Tensor:
    tokens = select(inputs, backend="reference")
    # Without fusion the scores have no gradient; the harness expects one and gets zeros.
    return tokens if inputs.fuse else tokens + 0 * inputs.scores.sum().to(tokens.dtype)


def select(inputs: Inputs, backend: str) -> Tensor:
    return select_tokens(
        inputs.x,
        inputs.scores,
        inputs.K,
        order="score",
        fuse="sum" if inputs.fuse else None,
        prefix=1,
        backend=backend,
    ).tokens


Gather = Callable[[Tensor, Tensor], Tensor]


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """x[b, ids[b, k]] by torch.gather, like EViT and MAE."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def advanced_index(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ids]


def index_select(x: Tensor, ids: Tensor) -> Tensor:
    B, N, C = x.shape
    rows = ids + N * torch.arange(B, device=x.device)[:, None]
    return x.reshape(B * N, C).index_select(0, rows.flatten()).view(*ids.shape, C)


def complement(ids: Tensor, N: int) -> Tensor:
    """The ids from 0 to N - 1 that are not in `ids`, by a sort, like EViT."""
    positions = torch.arange(N, device=ids.device)
    rest = positions.expand(ids.shape[0], N).scatter(1, ids, 0)
    return rest.sort(1).values[:, ids.shape[1] :]


def evit(inputs: Inputs, pick: Gather) -> Tensor:
    """EViT: topk and gather; fuses the complement as a weighted sum."""
    x, scores = inputs.x, inputs.scores
    ids = scores.topk(inputs.K, sorted=True).indices
    others = x[:, 1:]
    parts = [x[:, :1], pick(others, ids)]
    if inputs.fuse:
        rest = complement(ids, scores.shape[1])
        weights = scores.gather(1, rest).to(x.dtype)
        parts.append((pick(others, rest) * weights[..., None]).sum(1, keepdim=True))
    return torch.cat(parts, 1)


def one_gather(inputs: Inputs, pick: Gather) -> Tensor:
    """Gathers CLS together with the kept tokens, without a copy by `cat`."""
    ids = inputs.scores.topk(inputs.K, sorted=True).indices
    if not inputs.fuse:
        return pick(inputs.x, torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], 1))
    weights = inputs.scores.scatter(1, ids, 0).to(inputs.x.dtype)
    fused = weights[:, None] @ inputs.x[:, 1:]
    return torch.cat([inputs.x[:, :1], pick(inputs.x, ids + 1), fused], 1)


def argsort(inputs: Inputs, pick: Gather) -> Tensor:
    """Sorts all tokens by score, and slices the kept and the other ones."""
    ids = inputs.scores.argsort(1, descending=True)
    tokens = pick(inputs.x[:, 1:], ids)
    parts = [inputs.x[:, :1], tokens[:, : inputs.K]]
    if inputs.fuse:
        weights = inputs.scores.gather(1, ids[:, inputs.K :]).to(inputs.x.dtype)
        parts.append(weights[:, None] @ tokens[:, inputs.K :])
    return torch.cat(parts, 1)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl, and each baseline with three kinds of gather."""
    gradients = None if sizes["fuse"] else ("x",)  # without fusion the scores have none
    result = [replace(c, gradients=gradients) for c in ours(OP, select, device, dtype)]
    variants: list[tuple[str, Callable[..., Tensor]]] = [
        ("EViT", evit), ("one gather", one_gather), ("argsort", argsort),
    ]  # fmt: skip
    for name, run in variants:
        for pick in (gather, advanced_index, index_select):
            call = functools.partial(run, pick=pick)
            full = f"{name}, {pick.__name__}"
            result.append(Candidate(full, "baseline", call, gradients=gradients))
    run = functools.partial(one_gather, pick=gather)
    return [*result, compiled("one gather", run, device, gradients=gradients)]
