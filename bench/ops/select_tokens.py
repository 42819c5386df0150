"""Are tokens chosen, packed and fused as fast as the memory allows?

Every candidate gets the tokens, CLS in front, and the scores of the others; it answers
with CLS, the kept tokens with the best first, and, where the shape says so, the fused one.
The baselines are what EViT writes and what a careful user would write.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.kernels.select_tokens.op import kept_count, select_tokens

OP = "select_tokens"


def _shape(cuda: int, cpu: int, N: int, rate: float) -> dict[str, dict[str, Any]]:
    """B samples of N tokens of C channels, without and with the fused token."""
    sizes = dict(B=dict(cuda=cuda, cpu=cpu), N=N, rate=rate, C=768)
    return {"": sizes | dict(fuse=False), ", fused": sizes | dict(fuse=True)}


_FAMILIES = {
    "P1 SMAUG joint, mask 0.65, keep 0.7": _shape(64, 16, 273, 0.7),
    "P1f SMAUG joint, keep 0.5": _shape(64, 8, 785, 0.5),
    "P2 frames of 197, keep 0.7": _shape(256, 32, 197, 0.7),
    "P3 VideoMAE clip, keep 0.5": _shape(64, 4, 1568, 0.5),
}
SHAPES = {f"{name}{end}": s for name, both in _FAMILIES.items() for end, s in both.items()}
PARAMETERS = ("x", "scores")


@dataclass(frozen=True)
class Inputs:
    """What a layer's attention leaves; the harness casts and differentiates what it finds here."""

    x: Tensor  # [B, N, C], the first token of a sample is CLS
    scores: Tensor  # [B, N - 1]
    grad: Tensor  # of the result, [B, 1 + K (+ 1), C]
    K: int
    fuse: bool


def make(
    B: int, N: int, rate: float, C: int, fuse: bool, *, dtype: torch.dtype, device: str,
    generator: torch.Generator,
) -> Inputs:  # fmt: skip
    """Draw a batch; the scores are those of a softmax, all different."""
    K = kept_count(N - 1, rate)
    x = torch.randn(B, N, C, generator=generator)
    order = torch.rand(B, N - 1, generator=generator).argsort(-1)
    scores = (order.float() / 256).softmax(-1)
    grad = torch.randn(B, 1 + K + fuse, C, generator=generator)
    return Inputs(x.to(device, dtype), scores.to(device), grad.to(device, dtype), K, fuse)


def work(B: int, N: int, rate: float, C: int, fuse: bool, *, dtype: torch.dtype) -> dict[str, Work]:
    """Rows that are needed and scores read once, the result and its ids written once."""
    K, row = kept_count(N - 1, rate), C * dtype.itemsize
    dropped = N - 1 - K
    read = (N if fuse else 1 + K) * row + 4 * (N - 1)
    forward = read + (1 + K + fuse) * row + 8 * (K + N - 1)
    # backward: the tokens' gradients and, for the scores', the dropped rows; all of x's gradient
    backward = (1 + K + fuse) * row + N * row + 8 * (N - 1) + fuse * (dropped * row + 8 * (N - 1))
    return {
        "forward": Work(B * forward, 2 * B * dropped * C * fuse),
        "backward": Work(B * backward, 3 * B * dropped * C * fuse),
    }


def truth(inputs: Inputs) -> Tensor:
    tokens = select(inputs, backend="reference")
    # Without fusion the scores have no gradient; the harness wants one, and gets zeros.
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
    """x[b, ids[b, k]], as EViT and MAE write it."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def advanced_index(x: Tensor, ids: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ids]


def index_select(x: Tensor, ids: Tensor) -> Tensor:
    B, N, C = x.shape
    rows = ids + N * torch.arange(B, device=x.device)[:, None]
    return x.reshape(B * N, C).index_select(0, rows.flatten()).view(*ids.shape, C)


def complement(ids: Tensor, N: int) -> Tensor:
    """The ids that are not among those given, by a sort, as EViT finds them."""
    every = torch.arange(N, device=ids.device)
    rest = every.expand(ids.shape[0], N).scatter(1, ids, 0)
    return rest.sort(1).values[:, ids.shape[1] :]


def evit(inputs: Inputs, pick: Gather) -> Tensor:
    """topk, gather, and where asked for the others by their complement, weighed and added."""
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
    """The CLS token picked together with the others: no copy by `cat`."""
    ids = inputs.scores.topk(inputs.K, sorted=True).indices
    if not inputs.fuse:
        return pick(inputs.x, torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], 1))
    weights = inputs.scores.scatter(1, ids, 0).to(inputs.x.dtype)
    fused = weights[:, None] @ inputs.x[:, 1:]
    return torch.cat([inputs.x[:, :1], pick(inputs.x, ids + 1), fused], 1)


def argsort(inputs: Inputs, pick: Gather) -> Tensor:
    """All tokens sorted: the kept ones and the others are two slices."""
    ids = inputs.scores.argsort(1, descending=True)
    tokens = pick(inputs.x[:, 1:], ids)
    parts = [inputs.x[:, :1], tokens[:, : inputs.K]]
    if inputs.fuse:
        weights = inputs.scores.gather(1, ids[:, inputs.K :]).to(inputs.x.dtype)
        parts.append(weights[:, None] @ tokens[:, inputs.K :])
    return torch.cat(parts, 1)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, and each baseline with three ways to pick rows."""
    grads = None if sizes["fuse"] else ("x",)  # without fusion the scores have none
    found = [
        Candidate(c.name, c.kind, c.run, gradients=grads, reason=c.reason)
        for c in ours(OP, select, device, dtype)
    ]
    ways: list[tuple[str, Callable[..., Tensor]]] = [
        ("EViT", evit), ("one gather", one_gather), ("argsort", argsort),
    ]  # fmt: skip
    picks: list[Gather] = [gather, advanced_index, index_select]
    for name, run in ways:
        for pick in picks:
            call = functools.partial(run, pick=pick)
            found.append(Candidate(f"{name}, {pick.__name__}", "baseline", call, gradients=grads))
    compiled = torch.compile(functools.partial(one_gather, pick=gather))
    cuda = "timed on CUDA only" if device == "cpu" else None
    found.append(
        Candidate("one gather, torch.compile", "baseline", compiled, gradients=grads, reason=cuda)
    )
    return found
