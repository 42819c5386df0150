"""Do scores cost what reading the keys costs, where attention keeps its weights to itself?

Every candidate gets the fused [rows, 3, H, D] projection of a model, and answers with the float32
score of every token. The peers for "cls" and "value" are EViT's and ATS's own way, through the
whole attention matrix, and the honest bar: the product of the first query alone. For "mean" there
is only the matrix. "similarity" has no gradient, so it is not timed here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.kernels.groups import Groups
from vidl.kernels.token_scores import (
    cls_attention_scores,
    mean_attention_scores,
    value_weighted_scores,
)

OP = "token_scores"

# B samples of N tokens, the first of which is the class token.
_SAMPLES = {
    "P1 SMAUG joint, mask 0.65": dict(B={"cuda": 64, "cpu": 8}, N=273),
    "P1f SMAUG joint": dict(B={"cuda": 64, "cpu": 4}, N=785),
    "P2 frames": dict(B={"cuda": 256, "cpu": 16}, N=197),
    "P3 VideoMAE, no mask": dict(B={"cuda": 64, "cpu": 1}, N=1568),
}
SHAPES: dict[str, dict[str, Any]] = {
    f"{name}, {kind}": sizes | dict(H=12, D=64, kind=kind)
    for kind in ("cls", "mean", "value")
    for name, sizes in _SAMPLES.items()
}
PARAMETERS = ("qkv",)


@dataclass(frozen=True)
class Inputs:
    """What a model's projection gives; the harness casts and differentiates what it finds here."""

    qkv: Tensor  # [B * N, 3, H, D]
    lse: Tensor  # of "mean", as the attention may have returned it: [H, B * N]
    grad: Tensor  # of the scores, [B * N] float32
    groups: Groups
    kind: str

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the peers want them, [B, H, N, D]; views."""
        q, k, v = self.qkv.unflatten(0, (self.groups.num_groups, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


def make(
    B: int, N: int, H: int, D: int, kind: str, *, dtype: torch.dtype, device: str, generator: Any
) -> Inputs:
    """Draw a batch."""
    qkv = torch.randn(B * N, 3, H, D, generator=generator).to(device, dtype)
    grad = torch.randn(B * N, generator=generator).to(device)
    inputs = Inputs(qkv, grad, grad, Groups.equal(B, N, device=device), kind)
    if kind != "mean":
        return inputs
    q, k, _ = inputs.batch()
    lse = [logits(x.float(), y.float()).logsumexp(-1) for x, y in zip(q, k, strict=True)]
    return replace(inputs, lse=torch.cat(lse, 1))


def work(B: int, N: int, H: int, D: int, kind: str, *, dtype: torch.dtype) -> dict[str, Work]:
    """Read k once, for "mean" q and for "value" v too; backward also writes all three gradients."""
    one, scores = B * N * H * D * dtype.itemsize, B * N * 4
    read = one if kind == "cls" else 2 * one
    products = 2 * B * N * H * D * (N if kind == "mean" else 1)
    return {
        "forward": Work(read + scores, products),
        "backward": Work(read + 3 * one + scores, (3 if kind == "mean" else 2) * products),
    }


def truth(inputs: Inputs) -> Tensor:
    return score(inputs, backend="reference")


def score(inputs: Inputs, backend: str, given: bool = False) -> Tensor:
    q, k, v = inputs.qkv.unbind(1)
    if inputs.kind == "cls":
        return cls_attention_scores(q, k, inputs.groups, backend=backend)
    if inputs.kind == "value":
        return value_weighted_scores(q, k, v, inputs.groups, backend=backend)
    lse = inputs.lse if given else None
    return mean_attention_scores(q, k, inputs.groups, lse=lse, backend=backend)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5) @ k.mT


def finish(attention: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """From the attention [B, H, queries, N] of the queries that count to the scores."""
    scores = attention.mean((1, 2), dtype=torch.float32)
    if inputs.kind == "value":
        scores = scores * v.float().square().sum((1, 3)).sqrt()
        scores = scores / scores.sum(1, keepdim=True)
    return scores.flatten()


def matrix(inputs: Inputs) -> Tensor:
    q, k, v = inputs.batch()
    attention = logits(q, k).softmax(-1)
    return finish(attention if inputs.kind == "mean" else attention[:, :, :1], v, inputs)


def one_query(inputs: Inputs) -> Tensor:
    q, k, v = inputs.batch()
    return finish(logits(q[:, :, :1], k).softmax(-1), v, inputs)


def one_query_einsum(inputs: Inputs) -> Tensor:
    q, k, v = inputs.batch()
    products = torch.einsum("bhd,bhnd->bhn", q[:, :, 0] * q.shape[-1] ** -0.5, k)
    return finish(products.softmax(-1)[:, :, None], v, inputs)


def one_query_sum(inputs: Inputs) -> Tensor:
    """Multiplied and summed where the keys lie: no copy of a strided k."""
    q, k, v = inputs.batch()
    products = (q[:, :, :1] * q.shape[-1] ** -0.5 * k).sum(-1)
    return finish(products.softmax(-1)[:, :, None], v, inputs)


def in_float32(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """The same, computed in float32: the way round for a CPU without units for the dtype."""
    return run(replace(inputs, qkv=inputs.qkv.float()))


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, for "mean" with and without the log-sum-exp, and the peers."""
    mean = sizes["kind"] == "mean"
    found = ours(OP, score, device, dtype)
    if mean:
        given = ours(OP, functools.partial(score, given=True), device, dtype)
        found += [replace(each, name=f"{each.name}, lse given") for each in given]
    peers = [("attention matrix", matrix)]
    if not mean:
        peers += [
            ("one query, matmul", one_query),
            ("one query, einsum", one_query_einsum),
            ("one query, product and sum", one_query_sum),
        ]
    for name, run in peers:
        found.append(Candidate(name, "peer", run))
        if device == "cpu" and dtype != torch.float32:
            detour = functools.partial(in_float32, run)
            found.append(Candidate(f"{name}, in float32", "peer", detour))
        found.append(
            Candidate(
                f"{name}, torch.compile",
                "peer",
                torch.compile(run) if device == "cuda" else run,
                reason="timed on CUDA only" if device == "cpu" else None,
            )
        )
    return found
