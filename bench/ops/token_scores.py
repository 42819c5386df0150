"""Do token scores cost no more than reading the keys, without the attention matrix?

Every candidate receives the fused projection [rows, 3, H, D] of a model, and computes the float32
score of every token. The baselines for "cls" and "value" are the attention matrix, as in EViT and
ATS, and the attention of the first query alone, which is the stronger one. For "mean" they are the
matrix, and two calls of FlexAttention. "similarity" has no gradient and is not timed here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, compiled, ours
from vidl.kernels.groups import Groups
from vidl.kernels.token_scores import (
    cls_attention_scores,
    mean_attention_scores,
    value_weighted_scores,
)

OP = "token_scores"

# B samples of N tokens, the class token first.
_SAMPLES = {
    "P1 SMAUG joint, mask 0.65": dict(B={"cuda": 64, "cpu": 8}, N=273),
    "P1f SMAUG joint": dict(B={"cuda": 64, "cpu": 4}, N=785),
    "P2 frames": dict(B={"cuda": 256, "cpu": 16}, N=197),
    "P3 VideoMAE, no mask": dict(B={"cuda": 64, "cpu": 1}, N=1568),
    OVERHEAD: dict(B={"cuda": 1, "cpu": 1}, N=16),
}
SHAPES: dict[str, dict[str, Any]] = {
    f"{name}, {kind}": sizes | dict(H=12, D=64, kind=kind)
    for kind in ("cls", "mean", "value")
    for name, sizes in _SAMPLES.items()
}
PARAMETERS = ("qkv",)


@dataclass(frozen=True)
class Inputs:
    """The projection of a layer."""

    qkv: Tensor  # [B * N, 3, H, D]
    lse: Tensor  # for "mean": the log-sum-exp of the attention, [H, B * N]
    grad: Tensor  # of the scores, [B * N] float32
    groups: Groups
    kind: str

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as batches [B, H, N, D]; views."""
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
    """Reads k once, for "mean" also q, for "value" also v; backward writes three gradients."""
    tensor, scores = B * N * H * D * dtype.itemsize, B * N * 4
    read = tensor if kind == "cls" else 2 * tensor
    flops = 2 * B * N * H * D * (N if kind == "mean" else 1)
    return {
        "forward": Work(read + scores, flops),
        "backward": Work(read + 3 * tensor + scores, (3 if kind == "mean" else 2) * flops),
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
    """The scores from the attention [B, H, num_queries, N] of the queries that count."""
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
    """Multiplies and sums without a copy of the strided keys."""
    q, k, v = inputs.batch()
    products = (q[:, :, :1] * q.shape[-1] ** -0.5 * k).sum(-1)
    return finish(products.softmax(-1)[:, :, None], v, inputs)


def two_flex(inputs: Inputs) -> Tensor:
    """The log-sum-exp of every query by FlexAttention, then the sums of the keys by another."""
    q, k, _ = inputs.batch()
    return sums_of_keys(q, k, flex_lse(q, k))


def one_flex(inputs: Inputs) -> Tensor:
    """The attention returned the log-sum-exp."""
    q, k, _ = inputs.batch()
    return sums_of_keys(q, k, inputs.lse.unflatten(1, (q.shape[0], -1)).transpose(0, 1))


def sums_of_keys(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """The weights that each key receives, summed over queries by FlexAttention.

    Keys attend to queries: the sum over i of exp(scale q_i . k_j - lse_i) is the exponential of the
    log-sum-exp of key j, if each logit is reduced by the log-sum-exp of its query.
    """

    def reduced(logit: Tensor, b: Tensor, h: Tensor, key: Tensor, query: Tensor) -> Tensor:
        return logit - lse[b, h, query]

    return flex_lse(k, q, score_mod=reduced).exp().mean(1).flatten() / q.shape[2]


def flex_lse(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The log-sum-exp of each query [B, H, N] by FlexAttention, with as few values as it takes."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    v = k.new_zeros(*k.shape[:3], 16)
    return flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)[1].lse


def in_float32(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """`run` in float32: faster on CPUs without units for the dtype."""
    return run(replace(inputs, qkv=inputs.qkv.float()))


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl, for "mean" with and without the log-sum-exp, and the baselines."""
    mean = sizes["kind"] == "mean"
    result = ours(OP, score, device, dtype)
    if mean:
        given = ours(OP, functools.partial(score, given=True), device, dtype)
        result += [replace(c, name=f"{c.name}, lse given") for c in given]
    baselines = [("attention matrix", matrix)]
    if not mean:
        baselines += [
            ("one query, matmul", one_query),
            ("one query, einsum", one_query_einsum),
            ("one query, product and sum", one_query_sum),
        ]
    for name, run in baselines:
        result.append(Candidate(name, "baseline", run))
        if device == "cpu" and dtype != torch.float32:
            upcast = functools.partial(in_float32, run)
            result.append(Candidate(f"{name}, in float32", "baseline", upcast))
        result.append(compiled(name, run, device))
    if mean:
        result.append(compiled("two FlexAttention calls", two_flex, device))
        constant = "its gradient takes the log-sum-exp for a constant"
        given_lse = compiled("FlexAttention, lse given", one_flex, device, forward_only=constant)
        result.append(replace(given_lse, kind="given"))
    return result
