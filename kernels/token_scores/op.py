"""token_scores: how important each token is, where the attention itself is computed elsewhere.

    cls:         scores[j] = mean over heads: softmax_j(scale q_first . k_j)
    mean:        scores[j] = mean over heads and queries i: softmax_j(scale q_i . k_j)
    value:       scores[j] = cls[j] |v_j| / sum over the keys i of the group: cls[i] |v_i|
    similarity:  scores[j] = - the greatest cosine of key j to a key at an odd place, j even

Attention that comes from scaled_dot_product_attention or from flash attention keeps its weights to
itself. These scores need the queries and keys only, and no tensor of queries x keys is made.
Sources: EViT (arXiv 2202.07800, 3.1), SViTT (arXiv 2304.08809, 3.2) and Unmasked Teacher (arXiv
2303.16058, 3) for "cls"; ATS (arXiv 2111.15667, 3.1) for "value"; ToMe (arXiv 2210.09461, 3) for
"similarity".
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vidl.kernels import library
from vidl.kernels.groups import Groups

from . import reference

Kind = Literal["cls", "mean", "value", "similarity"]
KINDS = get_args(Kind)
LARGEST_HEAD = 128


def _limits(backend: str, device: str, dtype: torch.dtype, head_size: int = 64) -> str | None:
    if backend == "triton" and head_size > LARGEST_HEAD:
        return f"its heads have at most {LARGEST_HEAD} channels, not {head_size}"
    return None


def _fake(
    q, k, v, lse, query_offsets, key_offsets, query_rows, key_rows, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    kind, (K, H, _) = rest[-1], k.shape
    entries = K if key_rows is None else key_rows.shape[0]
    high = torch.promote_types(k.dtype, torch.float32)
    kept = {"cls": (H, entries), "value": (H, entries), "similarity": (0,)}
    if kind == "mean":
        kept["mean"] = (H, q.shape[0]) if lse is None else (0,)
    return (
        k.new_empty(entries, dtype=high),
        k.new_empty(kept[kind], dtype=high),
        k.new_empty(K if kind == "value" else 0, dtype=high),
    )


def _fake_bwd(grad_scores, weights, norms, q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        k.new_empty(0 if v is None else v.shape),
    )


def _products(k, query_offsets, key_offsets, key_rows, kind: str) -> int:
    """Multiplications and additions of all products of queries and keys."""
    queries, keys = query_offsets.diff().long(), key_offsets.diff().long()
    _, H, D = k.shape
    if kind == "similarity":  # of the heads' mean
        return 2 * int(((keys + 1) // 2 * (keys // 2)).sum()) * D
    met = queries if kind == "mean" else queries.clamp(max=1)
    return 2 * int((met * keys).sum()) * H * D


def _flops(q, k, v, lse, query_offsets, key_offsets, query_rows, key_rows, *rest, **_: Any) -> int:
    return _products(k, query_offsets, key_offsets, key_rows, rest[-1])


def _flops_bwd(
    grad, weights, norms, q, k, v, query_offsets, key_offsets, query_rows, key_rows, *rest, **_: Any
) -> int:
    again = 3 if rest[-1] == "mean" else 2  # the weights once more, and both gradients
    return again * _products(k, query_offsets, key_offsets, key_rows, rest[-1])


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, lse, *index, ctx.max_queries, ctx.max_keys, ctx.scale, ctx.kind = inputs
    _, weights, norms = output
    ctx.save_for_backward(weights if lse is None else lse, norms, q, k, v, *index)
    ctx.set_materialize_grads(False)


def _backward(bwd: Callable[..., Any], ctx, grad_scores, grad_weights, grad_norms):
    nothing = (None,) * 11
    if grad_scores is None or ctx.kind == "similarity":
        return None, None, None, *nothing
    grad_q, grad_k, grad_v = bwd(
        grad_scores.contiguous(),
        *ctx.saved_tensors,
        ctx.max_queries,
        ctx.max_keys,
        ctx.scale,
        ctx.kind,
    )
    return grad_q, grad_k, grad_v if ctx.kind == "value" else None, *nothing


_GROUPS = (
    "Tensor query_offsets, Tensor key_offsets, Tensor? query_rows, Tensor? key_rows, "
    "Tensor? entry_offsets, Tensor? entries, SymInt max_queries, SymInt max_keys, "
    "float scale, str kind"
)
library.define(
    library.Op(
        # `weights` is the log-sum-exp of every query where the kind is "mean".
        "token_scores_bwd(Tensor grad_scores, Tensor weights, Tensor norms, Tensor q, Tensor k, "
        f"Tensor? v, {_GROUPS}) -> (Tensor, Tensor, Tensor)",
        module=__package__,
        fake=_fake_bwd,
        flops=_flops_bwd,
    )
)
library.define(
    library.Op(
        f"token_scores(Tensor? q, Tensor k, Tensor? v, Tensor? lse, {_GROUPS}) "
        "-> (Tensor scores, Tensor weights, Tensor norms)",
        module=__package__,
        fake=_fake,
        flops=_flops,
        limits=_limits,
        setup_context=_setup_context,
        backward=_backward,
    )
)


def token_scores(
    q: Tensor | None,
    k: Tensor,
    groups: Groups,
    kind: Kind = "cls",
    *,
    v: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score how important each key is to the queries of its group; higher is more important.

    With the groups of a model's self-attention this scores its own tokens. With `Groups.cross` it
    scores the patches of a clip for its caption: "cls" by the attention of the caption's first
    token, "mean" by that of all its words.

    "cls" and "mean" are what `space_time_attention` returns as scores. "value" follows the authors'
    code of ATS: the attention of the first query, averaged over heads, times the length of the
    value over all heads, and normalised to sum to one over all keys of the group. ATS leaves the
    class token out: leave out the first entry and divide by the sum of the rest. "similarity" is
    the redundancy by which ToMe merges tokens, with its sign turned round: for a key at an even
    place in its group minus the greatest cosine to a key at an odd place, of the keys averaged over
    heads; +inf at odd places, and where there is no odd place, since ToMe never merges such a token
    away. (ToMe also keeps a class token: give it +inf.)

    Deterministic, forward and backward. NaN or infinity in one group never reaches another. A group
    without queries gives zeros; so does "value" where all values of a group are zero.

    Args:
        q: [queries, H, D] float32, float16 or bfloat16; D at most 128 for "triton". The last
            dimension is contiguous, or copied; the others have any stride. "similarity" does not
            use it: it may be None.
        k: [keys, H, D], the same dtype and device.
        groups: which queries attend to which keys, as for `space_time_attention`.
        kind: "cls", "mean", "value" or "similarity".
        v: [keys, H, D], for "value" only.
        lse: the log-sum-exp of every query's scaled products, [H, queries] float32, for "mean"
            only: saves a pass where the attention returned it. Taken as a function of `q` and `k`:
            the scores' gradient is the same with and without it.
        scale: of the products before the softmax; default 1 / sqrt(D).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        The scores, float32, [E] in the order of the groups' entries (the rows of k, unless
        `groups.key_rows` says otherwise). Gradients flow to q, k and v; none from "similarity".

    Raises:
        TypeError: a dtype is not one of those above, or `groups` is something else.
        ValueError: shapes, devices or options do not fit together; a kind lacks what it needs.
        RuntimeError: a backend asked for by name cannot run here; or, found by the kernel, the
            groups' offsets or rows are out of range. `groups.check()` finds more.
    """
    _check(q, k, groups, kind, v, lse)
    dtype = library.autocast_dtype(k)
    if kind == "similarity":
        q, k = None, k.detach()
    k = k.to(dtype)
    q, v = (None if x is None else x.to(dtype) for x in (q, v))
    backend = library.choose(backend, "token_scores", k.device.type, dtype, head_size=k.shape[2])
    scale = k.shape[2] ** -0.5 if scale is None else float(scale)
    index = (groups.query_offsets, groups.key_offsets, groups.query_rows, groups.key_rows)
    sizes = (groups.max_queries, groups.max_keys, scale, kind)
    if backend == "reference":
        return reference.token_scores(q, k, v, lse, *index, *sizes)
    if lse is not None:
        lse = lse.detach().contiguous()
    return library.kernel("token_scores", backend)(
        q, k, v, lse, *index, groups.entry_offsets, groups.entries, *sizes
    )[0]


def _check(
    q: Tensor | None, k: Tensor, groups: Groups, kind: Kind, v: Tensor | None, lse: Tensor | None
) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(f"need groups made by vidl.ops.Groups, got {type(groups).__name__}")
    if kind not in KINDS:
        raise ValueError(f"need kind {', '.join(map(repr, KINDS))}, got {kind!r}")
    if q is None and kind != "similarity":
        raise ValueError(f"need q for kind {kind!r}, got None")
    if (v is not None) != (kind == "value"):
        need = "v for kind 'value'" if kind == "value" else f"no v for kind {kind!r}"
        raise ValueError(f"need {need}, got {'None' if v is None else tuple(v.shape)}")
    if lse is not None and kind != "mean":
        raise ValueError(f"need no lse for kind {kind!r}, got {tuple(lse.shape)}")
    given = {"q": q, "k": k, "v": v}
    tensors = {name: x for name, x in given.items() if x is not None}
    if any(x.ndim != 3 or x.shape[1:] != k.shape[1:] for x in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"need q [queries, H, D] and k, v [keys, H, D], got {shapes}")
    if not k.is_floating_point() or any(x.dtype != k.dtype for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise TypeError(f"need one floating dtype, got {dtypes}")
    device = groups.query_offsets.device
    for name, x in (*tensors.items(), *([] if lse is None else [("lse", lse)])):
        if x.device != device:
            raise ValueError(f"need {name} on {device} as the groups are, got {x.device}")
        rows = groups.num_queries if name == "q" else groups.num_keys
        if name != "lse" and x.shape[0] != rows:
            raise ValueError(f"need {name} of {rows} rows for these groups, got {x.shape[0]}")
    if lse is not None:
        if lse.shape != (k.shape[1], groups.num_queries):
            wanted = [k.shape[1], groups.num_queries]
            raise ValueError(f"need lse {wanted}, got {tuple(lse.shape)}")
        if lse.dtype != torch.promote_types(k.dtype, torch.float32):
            raise TypeError(f"need lse in float32, got {lse.dtype}")
