"""token_scores: the importance of each token, from queries and keys instead of attention weights.

    cls:         scores[j] = mean over heads: softmax_j(scale q_first . k_j + bias)
    mean:        scores[j] = mean over heads and queries i: softmax_j(scale q_i . k_j + bias)
    value:       scores[j] = cls[j] |v_j| / sum over the keys i of the group: cls[i] |v_i|
    similarity:  scores[j] = - max over odd keys i of the group: cosine(k_j, k_i), for even j

scaled_dot_product_attention and flash attention do not return their weights. These scores are
computed from the queries and keys, and never materialize the weights. One function for each kind.
Sources: EViT (arXiv 2202.07800, 3.1) and SViTT (arXiv 2304.08809, 3.2) for "cls"; ATS (arXiv
2111.15667, 3.1) for "value"; ToMe (arXiv 2210.09461, 3) for "similarity".
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels import choices, gpu, library
from vidl.kernels.arguments import check_tensors, finite, in_dtype
from vidl.kernels.groups import (
    BIAS_SCHEMA,
    SCHEMA,
    Groups,
    Positions,
    bias_of,
    is_given,
    split,
)

from . import pytorch, reference

LARGEST_HEAD = 128
HEAD_SIZES = (32, 64, 96, 128)  # of the CUDA C++ kernels; others are padded to the next


def _limits(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_size: int = 64,
    bias: bool = False,
    query_limits: bool = False,
    kind: str = "cls",
) -> str | None:
    if (backend, device) == ("native", "cpu"):
        return None
    if head_size > LARGEST_HEAD:
        return f"head sizes are at most {LARGEST_HEAD}, not {head_size}"
    if backend == "triton":
        return None
    if dtype == torch.float32:
        return "its CUDA kernels multiply in float16 and bfloat16 only"
    if (backend, device) == ("native", "cuda") and (given := gpu.shared_memory()) is not None:
        # Tiles of 64 rows: six of "similarity", three of "mean" beside the numbers of two tiles of
        # queries; the gradient of a table adds those of 64 x 64 pairs (csrc/groups/table.h).
        tile = 64 * (_padded(head_size) + 8) * 2
        needed = {"similarity": 6 * tile, "mean": 3 * tile + 2 * 64 * 5 * 4}.get(kind, 0)
        needed += 2048 + 64 * 72 * 4 if kind == "mean" and bias else 0
        if needed > given:
            return (
                f'"{kind}" with heads of {head_size} needs {needed} bytes of shared memory for a '
                f"block, this GPU has {given}"
            )
    return None


def _padded(head_size: int) -> int:
    return next(size for size in HEAD_SIZES if size >= head_size)


def _adapt(
    call: Callable[..., Any],
    backend: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad heads to a size that the CUDA C++ kernels have: a copy. Zeros change no score."""
    D, cuda = k.shape[2], k.device.type == "cuda" or backend not in library.BACKENDS
    if backend == "triton" or not cuda or D in HEAD_SIZES:
        return call(q, k, v, *rest)
    wider = (0, _padded(D) - D)
    return call(*(x if x is None else F.pad(x, wider) for x in (q, k, v)), *rest)


def _fake(q, k, v, lse, *rest) -> tuple[Tensor, Tensor, Tensor]:
    (groups, _, (_, kind)), (num_keys, H, _) = split(rest), k.shape
    entries = groups.num_entries(num_keys)
    high = torch.promote_types(k.dtype, torch.float32)
    weights = {"cls": (H, entries), "value": (H, entries), "similarity": (0,)}
    if kind == "mean":
        weights["mean"] = (H, q.shape[0]) if lse is None else (0,)
    return (
        k.new_empty(entries, dtype=high),
        k.new_empty(weights[kind], dtype=high),
        k.new_empty(num_keys if kind == "value" else 0, dtype=high),
    )


def _fake_bwd(grad_scores, weights, norms, q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, bias, (need_bias, _, _) = split(rest)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        k.new_empty(0 if v is None else v.shape),
        weights.new_empty(bias.table.shape if need_bias and bias.table is not None else 0),
    )


def _flops(q, k, v, lse, *rest, **kwargs: Any) -> int:
    """Multiplications and additions of all products of queries and keys."""
    groups, kind, (_, H, D) = split(rest)[0], rest[-1], k.shape
    queries, keys = groups.query_offsets.diff().long(), groups.key_offsets.diff().long()
    if kind == "similarity":  # of the mean of the heads
        return 2 * int(((keys + 1) // 2 * (keys // 2)).sum()) * D
    if groups.query_limits is None:
        scoring = queries if kind == "mean" else queries.clamp(max=1)
        return 2 * int((scoring * keys).sum()) * H * D
    limits = groups.query_limits
    if kind != "mean":
        first = groups.query_offsets[:-1][queries > 0]
        limits = limits[first if groups.query_rows is None else groups.query_rows[first]]
    return 2 * int(limits.sum()) * H * D


def _flops_bwd(grad_scores, weights, norms, q, k, v, *rest, **kwargs: Any) -> int:
    products = 3 if rest[-1] == "mean" else 2  # the weights again for "mean", and two gradients
    return products * _flops(q, k, v, None, *rest)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, lse, *lists, ctx.max_queries, ctx.max_keys, limits, table, query_codes = inputs[:15]
    key_codes, ctx.shift, key_bias, ctx.scale, ctx.kind = inputs[15:]
    _, weights, norms = output
    saved = (weights if lse is None else lse, norms, q, k, v, *lists)
    ctx.save_for_backward(*saved, limits, table, query_codes, key_codes, key_bias)
    ctx.set_materialize_grads(False)


def _backward(bwd: Callable[..., Any], ctx, grad_scores, grad_weights, grad_norms):
    if grad_scores is None or ctx.kind == "similarity":
        return (None,) * 20
    *lists, limits, table, query_codes, key_codes, key_bias = ctx.saved_tensors
    need_bias = table is not None and ctx.needs_input_grad[13]
    grad_q, grad_k, grad_v, grad_bias = bwd(
        grad_scores.contiguous(),
        *lists,
        ctx.max_queries,
        ctx.max_keys,
        limits,
        table,
        query_codes,
        key_codes,
        ctx.shift,
        key_bias,
        need_bias,
        ctx.scale,
        ctx.kind,
    )
    return (
        grad_q,
        grad_k,
        grad_v if ctx.kind == "value" else None,
        *(None,) * 10,
        grad_bias if need_bias else None,
        *(None,) * 6,
    )


library.define(
    library.Op(
        # With kind "mean", `weights` is the log-sum-exp of every query.
        "token_scores_bwd(Tensor grad_scores, Tensor weights, Tensor norms, Tensor q, Tensor k, "
        f"Tensor? v, {SCHEMA}, {BIAS_SCHEMA}, bool need_bias, float scale, str kind) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
        module=__package__,
        fake=_fake_bwd,
        flops=_flops_bwd,
    )
)
library.define(
    library.Op(
        f"token_scores(Tensor? q, Tensor k, Tensor? v, Tensor? lse, {SCHEMA}, {BIAS_SCHEMA}, "
        "float scale, str kind) -> (Tensor scores, Tensor weights, Tensor norms)",
        module=__package__,
        fake=_fake,
        flops=_flops,
        reference=reference.token_scores,
        torch=pytorch.token_scores,
        only_for_backward=2,
        limits=_limits,
        adapt=_adapt,
        setup_context=_setup_context,
        backward=_backward,
    )
)


def cls_attention_scores(
    q: Tensor,
    k: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    positions: Positions | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention that each key receives from the first query of its group (CLS).

        scores[j] = mean over heads: softmax_j(scale q_first . k_j + bias)

    Equal to the "cls" scores of `space_time_attention`. Higher is more important. With
    `Groups.cross` the first token of a caption scores the patches of its clip. Deterministic,
    forward and backward. NaN or infinity in one group never reaches another. A group without
    queries gives zeros, and so does a query that sees no key.

    Args:
        q: [num_queries, H, D] float32, float16 or bfloat16. The last dimension is contiguous, or
            copied; the others have any stride. "triton" and "native" on CUDA take D up to 128, and
            the latter float16 and bfloat16 only; it pads D to 32, 64, 96 or 128, a copy.
        k: [num_keys, H, D], the same dtype and device.
        groups: which queries attend to which keys, as for `space_time_attention`.
        bias, positions, key_bias: what is added to the logits, as for `space_time_attention`.
        scale: finite factor of the logits before the softmax; default 1 / sqrt(D).
        backend: "auto", "native", "triton", "torch" or "reference".

    Returns:
        The scores, float32, [E] in the order of the groups' entries (the rows of k if
        `groups.key_rows` is None). Gradients flow to q, k and bias.

    Raises:
        TypeError: a dtype is not one of those above, or `groups` is something else.
        ValueError: shapes or devices do not fit together.
        RuntimeError: a backend asked for by name cannot run here; or, on the CPU, the groups'
            offsets or rows are out of range. On CUDA see `space_time_attention`.

    Sources: EViT, arXiv 2202.07800, 3.1; SViTT, arXiv 2304.08809, 3.2.
    """
    added = bias, positions, key_bias
    return _score("cls", groups, backend, scale, added=added, q=q, k=k)


def mean_attention_scores(
    q: Tensor,
    k: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    positions: Positions | None = None,
    key_bias: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention that each key receives from the queries of its group, on average.

        scores[j] = mean over heads and queries i: softmax_j(scale q_i . k_j + bias)

    Equal to the "mean" scores of `space_time_attention`; everything else as in
    `cls_attention_scores`.

    Args:
        q, k, groups, bias, positions, key_bias, scale, backend: see `cls_attention_scores`.
        lse: the log-sum-exp of every query's logits, [H, num_queries] float32, if the attention
            returned it: saves a pass. It counts as a function of q, k and bias: the gradient of
            the scores is the same with and without it.

    Returns:
        The scores, see `cls_attention_scores`.

    Raises:
        TypeError, ValueError, RuntimeError: see `cls_attention_scores`.
    """
    added = bias, positions, key_bias
    return _score("mean", groups, backend, scale, lse, added, q=q, k=k)


def value_weighted_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    positions: Positions | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention from the first query of a group, weighted by the norm of the values.

        scores[j] = cls[j] |v_j| / sum over the keys i of the group: cls[i] |v_i|

    As in the authors' code of ATS: `cls` are the `cls_attention_scores`, and the norm is over all
    heads. The scores of a group sum to one, or are zeros if all its values are. ATS excludes the
    class token: drop the first entry and divide by the sum of the others.

    Args:
        q, k, groups, bias, positions, key_bias, scale, backend: see `cls_attention_scores`.
        v: [num_keys, H, Dv], the same dtype and device; Dv is at most D. Narrower values are padded
            to D: a copy.

    Returns:
        The scores, see `cls_attention_scores`. Gradients flow to q, k, v and bias.

    Raises:
        TypeError, ValueError, RuntimeError: see `cls_attention_scores`.

    Source: ATS, arXiv 2111.15667, 3.1.
    """
    check_tensors(k=k, v=v)
    if k.ndim == v.ndim == 3 and v.shape[2] < k.shape[2]:
        v = F.pad(v, (0, k.shape[2] - v.shape[2]))  # zeros add nothing to a norm
    added = bias, positions, key_bias
    return _score("value", groups, backend, scale, added=added, q=q, k=k, v=v)


def key_similarity_scores(k: Tensor, groups: Groups, *, backend: str = "auto") -> Tensor:
    """Minus the redundancy by which ToMe merges tokens: a lower score means more redundant.

        scores[j] = - max over odd keys i of the group: cosine(k_j, k_i), for even j

    The keys are averaged over heads; even and odd are positions in the group. The score is +inf at
    odd positions and in a group without them, since ToMe never merges such tokens into others.
    (ToMe also protects the class token: set its score to +inf.) Not differentiable.

    Args:
        k, groups, backend: see `cls_attention_scores`; the queries of the groups, and their
            limits, do not matter.

    Returns:
        The scores, float32, [E], without a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: see `cls_attention_scores`.

    Source: ToMe, arXiv 2210.09461, 3.
    """
    return _score("similarity", groups, backend, k=k)


def _score(
    kind: str,
    groups: Groups,
    backend: str,
    scale: float | None = None,
    lse: Tensor | None = None,
    added: tuple[Tensor | None, Positions | None, Tensor | None] = (None, None, None),
    **tensors: Tensor,
) -> Tensor:
    _check(groups, tensors, lse)
    dtype, head_size = library.autocast_dtype(tensors["k"]), tensors["k"].shape[2]
    scale = head_size**-0.5 if scale is None else finite("scale", scale)
    q, k, v = (in_dtype(tensors[name], dtype) if name in tensors else None for name in "qkv")
    if kind == "similarity":  # not differentiable
        k = in_dtype(tensors["k"], dtype).detach()
        if groups.query_limits is not None:
            groups = replace(groups, query_limits=None, is_causal=False, checked=True)
    bias = bias_of(*added, groups, tensors["k"].shape[1])
    facts: dict[str, Any] = {"head_size": head_size, "bias": is_given(bias)}
    facts["query_limits"] = groups.query_limits is not None
    device = groups.query_offsets.device.type

    def key() -> choices.Key | None:
        return choices.key(
            "token_scores",
            device,
            dtype,
            (q, k, v, bias.table),
            {
                "queries": groups.max_queries if kind == "mean" else 1,
                "keys": groups.max_keys,
                "rows": tensors["k"].shape[0] * tensors["k"].shape[1],
            },
            groups=groups.layout,
            kind=kind,
            **facts,
        )

    backend = library.choose(backend, "token_scores", device, dtype, key, kind=kind, **facts)
    lse = None if lse is None else lse.detach().contiguous()
    args = (q, k, v, lse, *groups.arguments(), *bias, scale, kind)
    return library.run("token_scores", backend, *args)


def _check(groups: Groups, tensors: dict[str, Tensor], lse: Tensor | None) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(f"need groups made by vidl.ops.Groups, got {type(groups).__name__}")
    check_tensors(optional=("lse",), groups=groups.query_offsets, **tensors, lse=lse)
    k = tensors["k"]
    if any(x.ndim != 3 or x.shape[1:] != k.shape[1:] for x in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(
            "need q [num_queries, H, D], k [num_keys, H, D] and v [num_keys, H, at most D], got "
            f"{shapes}"
        )
    if not k.is_floating_point() or any(x.dtype != k.dtype for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise TypeError(f"need one floating dtype, got {dtypes}")
    for name, x in tensors.items():
        rows = groups.num_queries if name == "q" else groups.num_keys
        if x.shape[0] != rows:
            raise ValueError(f"need {name} of {rows} rows for these groups, got {x.shape[0]}")
    if lse is not None:
        if lse.shape != (k.shape[1], groups.num_queries):
            wanted = [k.shape[1], groups.num_queries]
            raise ValueError(f"need lse {wanted}, got {tuple(lse.shape)}")
        if lse.dtype != torch.promote_types(k.dtype, torch.float32):
            raise TypeError(f"need lse in float32, got {lse.dtype}")
