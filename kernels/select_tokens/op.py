"""select_tokens: keep the tokens with the highest scores, pack them, and fuse the others into one.

    tokens = [x[prefix], x[n] for the K highest scores[n], sum over the other n: scores[n] x[n]]

Sources: EViT (arXiv 2202.07800, 3.2), which orders the kept tokens by score, and fuses the others;
SViTT (arXiv 2304.08809, 3.3), which keeps the tokens in their order.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vidl.kernels import choices, library
from vidl.kernels.arguments import (
    check_count,
    check_floating,
    check_shape,
    check_tensors,
    finite,
    in_dtype,
)

from . import pytorch, reference

Rounding = Literal["ceil", "floor", "floor_min_one", "drop_floor"]
Order = Literal["index", "score"]
Fuse = Literal["sum", "mean"]
ROUNDINGS = ("ceil", "floor", "floor_min_one", "drop_floor")
FLOATING = (*library.DTYPES, torch.float64)  # float64 only for the reference


def _limits(backend: str, device: str, dtype: torch.dtype, rows: int = 0) -> str | None:
    if backend == "triton" and rows >= 2**21:
        return f"a sample may have fewer than {2**21} rows, got {rows}"
    return None


class Selected(NamedTuple):
    """What `select_tokens` returns.

    Attributes:
        tokens: the prefix, the kept tokens and the fused token of every sample, [batch..., prefix +
            K (+ 1 if fused), rest...], or packed [rows, rest...]; in the dtype of x.
        ids_keep: the positions of the kept tokens, counted without the prefix, in the order of
            `tokens`; int64, [batch..., K], or packed [num_kept].
        inverse: for each score the index of its token in its sample's `ids_keep`; -1 for a dropped
            token, and for the prefix of a packed sample; int64, in the shape of `scores`.
        cu_seqlens: where each sample begins in the rows of `tokens`, from 0 to their number; int32,
            [samples + 1].
    """

    tokens: Tensor
    ids_keep: Tensor
    inverse: Tensor
    cu_seqlens: Tensor


def _fake(x, ranks, weights, cu_seqlens, cu_kept, keep, prefix, order, fuse):
    C, extra = x.shape[-1], prefix + (1 if fuse else 0)
    B = ranks.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is None:
        tokens, ids = x.new_empty(B, keep + extra, C), [B, keep]
    else:
        tokens, ids = x.new_empty(keep + B * extra, C), [keep]
    means = B * (C + 1) if fuse == "mean" else 0
    return (
        tokens,
        ranks.new_empty(ids, dtype=torch.int64),
        ranks.new_empty(ranks.shape, dtype=torch.int64),
        ranks.new_empty(B + 1, dtype=torch.int32),
        ranks.new_empty(means, dtype=torch.float32),
    )


def _flops(x, ranks, weights, cu_seqlens, cu_kept, keep, prefix, order, fuse, *a, **kw) -> int:
    if not fuse:
        return 0
    if cu_seqlens is None:
        dropped = ranks.numel() - ranks.shape[0] * keep
    else:
        dropped = ranks.numel() - (cu_seqlens.numel() - 1) * prefix - keep
    return 2 * dropped * x.shape[-1]


def _fake_bwd(
    grad_tokens, x, weights, inverse, cu_seqlens, offsets, means, prefix, fuse,
    need_x, need_weights,
):  # fmt: skip
    B, C = offsets.shape[0] - 1, grad_tokens.shape[-1]
    rows = (inverse.shape[0], C) if cu_seqlens is not None else (B, prefix + inverse.shape[1], C)
    return (
        grad_tokens.new_empty(rows if need_x else (0,)),
        grad_tokens.new_empty(inverse.shape if need_weights else (0,), dtype=torch.float32),
    )


def _flops_bwd(
    grad_tokens, x, weights, inverse, cu_seqlens, offsets, means, prefix, fuse,
    need_x, need_weights, *args, **kwargs,
) -> int:  # fmt: skip
    if not fuse:
        return 0
    B, C = offsets.numel() - 1, grad_tokens.shape[-1]
    rows = inverse.numel() - (0 if cu_seqlens is None else B * prefix)
    kept = grad_tokens.numel() // max(C, 1) - B * (prefix + 1)
    return (rows - kept) * C * (need_x + 2 * need_weights)


def _setup_context(ctx, inputs, output) -> None:
    x, _, weights, cu_seqlens, _, _, ctx.prefix, _, ctx.fuse = inputs
    _, _, inverse, offsets, means = output
    need_weights = weights is not None and ctx.needs_input_grad[2]
    # Only the gradient of the weights needs the tokens themselves.
    ctx.save_for_backward(
        x if need_weights else None,
        weights,
        inverse,
        cu_seqlens,
        offsets,
        means if ctx.fuse == "mean" else None,
    )
    ctx.set_materialize_grads(False)


def _backward(bwd: Callable[..., Any], ctx, grad_tokens, *_):
    need_x, _, need_weights, *_ = ctx.needs_input_grad
    nothing = (None,) * 6
    if grad_tokens is None:
        return None, None, None, *nothing
    grad_x, grad_weights = bwd(
        grad_tokens.contiguous(), *ctx.saved_tensors, ctx.prefix, ctx.fuse, need_x, need_weights
    )
    return grad_x if need_x else None, None, grad_weights if need_weights else None, *nothing


library.define(
    library.Op(
        "select_tokens_bwd(Tensor grad_tokens, Tensor? x, Tensor? weights, Tensor inverse, "
        "Tensor? cu_seqlens, Tensor offsets, Tensor? means, SymInt prefix, str fuse, "
        "bool need_x, bool need_weights) -> (Tensor grad_x, Tensor grad_weights)",
        module=__package__,
        fake=_fake_bwd,
        flops=_flops_bwd,
    )
)
library.define(
    library.Op(
        "select_tokens(Tensor x, Tensor ranks, Tensor? weights, Tensor? cu_seqlens, "
        "Tensor? cu_kept, SymInt keep, SymInt prefix, str order, str fuse) -> (Tensor tokens, "
        # The means [B, C] of the dropped tokens, then the sums [B] of their weights.
        "Tensor ids_keep, Tensor inverse, Tensor offsets, Tensor means)",
        module=__package__,
        fake=_fake,
        flops=_flops,
        reference=reference.select_tokens,
        torch=pytorch.select_tokens,
        only_for_backward=1,
        limits=_limits,
        setup_context=_setup_context,
        backward=_backward,
    )
)


def select_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int | float,
    *,
    rank_by: Tensor | None = None,
    rounding: Rounding = "ceil",
    order: Order = "index",
    fuse: Fuse | None = None,
    cu_seqlens: Tensor | None = None,
    num_kept: int | None = None,
    prefix: int = 0,
    backend: str = "auto",
) -> Selected:
    """Keep the tokens with the highest scores, and optionally fuse the others into one.

    The shape of `scores` determines what is selected. With x [B, T, P, C], scores [B, T, P] select
    tokens of each frame, and scores [B, T] select whole frames. The order is total: higher scores
    come first; of equal scores, the lower index; 0.0 and -0.0 are equal; NaN comes after -inf. The
    result is therefore the same on every backend, and deterministic.

    Args:
        x: float32, float16 or bfloat16, [batch..., prefix + N, rest...], any strides.
        scores: [batch..., N], floating point, converted to float32. Packed: [total], one for each
            row of x; the scores of the prefix are ignored.
        keep: an int is the number of kept tokens of each sample, in [1, N]; a float is a rate in
            (0, 1], so 1.0 keeps all.
        rank_by: what to rank by in place of `scores`, in the same shape, for instance if tokens
            are sampled; `scores` then only weigh the fused token.
        rounding: of a rate, as in `kept_count`: "ceil", "floor", "floor_min_one" or "drop_floor".
        order: of the kept tokens. "index": as in x (SViTT); "score": highest first (EViT).
        fuse: adds a token at the end of each sample. "sum": the sum of score times token over the
            dropped tokens (EViT); "mean": that sum divided by the sum of their scores, or zeros
            where the scores sum to 0. A token whose score is not finite adds nothing. Without
            dropped tokens it is zeros.
        cu_seqlens: [B + 1] int32, for packed x [total, rest...]: the rows where each sample
            begins, from 0 to total. The prefix of a sample comes first.
        num_kept: for packed x, the number of kept tokens of all samples without prefix, if known.
            Otherwise, if `keep` is a rate, it is read from the device: CUDA synchronizes, and
            `torch.compile(fullgraph=True)` raises an error.
        prefix: the number of tokens at the front of each sample (CLS) that have no score and are
            always kept, in front.
        backend: "auto", "native", "triton", "torch" or "reference".

    Returns:
        `Selected`: tokens, ids_keep, inverse and cu_seqlens. Gradients of `tokens` flow to x and,
        with `fuse`, to `scores`; the choice of the tokens counts as constant.

    Raises:
        TypeError: a dtype or the type of `keep` is not one of those above.
        ValueError: shapes, devices, numbers or options do not fit together.
        RuntimeError: a backend asked for by name cannot run here; or, on the CPU, the offsets or
            `num_kept` do not fit, or a packed sample has fewer tokens than `keep`. On CUDA the
            kernels never read or write out of range; the results of such samples are NaN or
            without meaning ("torch" and "reference" assert them on the device, as PyTorch does).
    """
    _check_options(rounding, order, fuse)
    _check_tensors(x, scores, rank_by, cu_seqlens, prefix)
    high = torch.promote_types(x.dtype, torch.float32)
    ranks = in_dtype((scores if rank_by is None else rank_by).detach(), high)
    weights = in_dtype(scores, high) if fuse else None
    backend = library.choose(
        backend,
        "select_tokens",
        x.device.type,
        x.dtype,
        lambda: _key(x, scores, order, fuse, cu_seqlens),
        rows=scores.shape[-1],
    )
    options = (prefix, order, fuse or "")
    if cu_seqlens is not None:
        cu_kept, num_kept = _packed_counts(cu_seqlens, keep, rounding, num_kept, prefix)
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        offsets = (cu_seqlens, cu_kept)
        tokens, ids, inverse, begins = library.run(
            "select_tokens", backend, rows, ranks, weights, *offsets, num_kept, *options
        )
        return Selected(tokens.view(tokens.shape[0], *x.shape[1:]), ids, inverse, begins)

    if num_kept is not None:
        raise ValueError(f"num_kept is for packed x with cu_seqlens, got {num_kept} without")
    *batch, N = scores.shape
    K = _count(N, keep, rounding)
    if len(batch) == 1 and x.ndim == 3:
        args = (x, ranks, weights, None, None, K, *options)
        return Selected(*library.run("select_tokens", backend, *args))
    B, rest = math.prod(batch), x.shape[scores.ndim :]
    tokens, ids, inverse, offsets = library.run(
        "select_tokens",
        backend,
        x.reshape(B, prefix + N, math.prod(rest)),
        ranks.reshape(B, N),
        None if weights is None else weights.reshape(B, N),
        None,
        None,
        K,
        *options,
    )
    return Selected(
        tokens.view(*batch, prefix + K + (1 if fuse else 0), *rest),
        ids.view(*batch, K),
        inverse.view(scores.shape),
        offsets,
    )


def _key(
    x: Tensor, scores: Tensor, order: Order, fuse: Fuse | None, cu_seqlens: Tensor | None
) -> choices.Key | None:
    # Without max(): torch.compile would guard it.
    samples = 1 if cu_seqlens is None else cu_seqlens.shape[0]
    return choices.key(
        "select_tokens",
        x.device.type,
        x.dtype,
        (x, scores) if fuse else (x,),
        {
            "tokens": scores.shape[-1] // samples,  # of a sample; about its average, if packed
            "rows": scores.numel(),
            "width": math.prod(x.shape[scores.ndim :]),
        },
        order=order,
        fuse=fuse or "",
        packed=cu_seqlens is not None,
    )


def kept_count(n: int, keep: float, rounding: Rounding = "ceil") -> int:
    """The number of tokens that a rate keeps of `n`, exactly as the sources compute it.

    They differ by one if the product is not an integer, and include the rounding errors of float64:

    - "ceil", EViT and SViTT: `math.ceil(keep * n)`.
    - "floor", MAE-ST, FLIP and VLC: `int(n * keep)` with `keep = 1 - mask_ratio`.
    - "floor_min_one", open_clip and timm: `max(1, int(n * keep))`, at most n.
    - "drop_floor", VideoMAE: `n - int(mask_ratio * n)`, where mask_ratio is 1 - keep rounded to 15
      decimal places, so that 0.9 and 1 - 0.1 mean the same ratio, 0.1.

    Args:
        n: the number of tokens, 0 or more.
        keep: the rate, in (0, 1].

    Raises:
        ValueError: a number is out of range, or the rounding is unknown.
    """
    _check_options(rounding)
    check_count("n", n)
    if not 0 < finite("keep", keep) <= 1:
        raise ValueError(f"need keep as a rate in (0, 1], got {keep}")
    return _round(n, keep, rounding, math.ceil, int, lambda count: min(n, max(1, count)))


def _round(
    n: Any,  # an int or a float64 tensor; so is the result
    keep: float,
    rounding: str,
    ceil: Callable[[Any], Any],
    floor: Callable[[Any], Any],  # of numbers that are not negative
    at_least_one: Callable[[Any], Any],
) -> Any:
    if rounding == "ceil":
        return ceil(keep * n)
    if rounding == "drop_floor":
        return n - floor(round(1 - keep, 15) * n)
    count = floor(n * keep)
    return count if rounding == "floor" else at_least_one(count)


def _count(n: int, keep: int | float, rounding: Rounding) -> int:
    """The number of tokens that a count or a rate keeps of `n`."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(f"need keep as an int (a count) or a float (a rate), got {keep!r}")
    if isinstance(keep, float):
        return kept_count(n, keep, rounding)
    if not 1 <= keep <= n:
        raise ValueError(f"need keep in [1, {n}] for {n} tokens, got {keep}")
    return keep


def _packed_counts(
    cu_seqlens: Tensor, keep: int | float, rounding: Rounding, num_kept: int | None, prefix: int
) -> tuple[Tensor, int]:
    """Where the kept tokens of each sample begin, [B + 1] int32, and their number."""
    B = cu_seqlens.shape[0] - 1
    if num_kept is not None:
        check_count("num_kept", num_kept)
    if not isinstance(keep, float):
        _count(2**31 - 1, keep, rounding)
        if num_kept not in (None, B * keep):
            raise ValueError(f"need num_kept {B * keep} for {B} x {keep} tokens, got {num_kept}")
        cu_kept = torch.arange(B + 1, dtype=torch.int32, device=cu_seqlens.device) * keep
        return cu_kept, B * keep
    kept_count(0, keep, rounding)  # checks the arguments
    n = cu_seqlens.diff().double() - prefix
    kept = _round(
        n, keep, rounding, torch.ceil, torch.floor, lambda count: count.clamp(min=1).minimum(n)
    )
    cu_kept = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).int()
    return cu_kept, int(cu_kept[-1]) if num_kept is None else num_kept


def _check_options(rounding: str, order: str = "index", fuse: str | None = None) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"need rounding among {', '.join(ROUNDINGS)}, got {rounding!r}")
    if order not in ("index", "score"):
        raise ValueError(f"need order 'index' or 'score', got {order!r}")
    if fuse not in (None, "sum", "mean"):
        raise ValueError(f"need fuse None, 'sum' or 'mean', got {fuse!r}")


def _check_tensors(
    x: Tensor, scores: Tensor, rank_by: Tensor | None, cu_seqlens: Tensor | None, prefix: int
) -> None:
    optional = ("rank_by", "cu_seqlens")
    check_tensors(optional, x=x, scores=scores, rank_by=rank_by, cu_seqlens=cu_seqlens)
    if x.dtype not in FLOATING:
        raise TypeError(f"need x in one of {FLOATING}, got {x.dtype}")
    check_count("prefix", prefix)
    check_floating(scores=scores)
    if rank_by is not None:
        check_floating(rank_by=rank_by)
        check_shape("rank_by", rank_by, *scores.shape)
    given, scored = x.shape, scores.shape
    nd = len(scored)
    if cu_seqlens is None:
        if not nd or given[:nd] != (*scored[:-1], prefix + scored[-1]):
            raise ValueError(
                f"need x [batch..., {prefix} + N, rest...] and scores [batch..., N], "
                f"got {tuple(given)} and {tuple(scored)}"
            )
        return
    if nd != 1 or len(given) < 1 or given[0] != scored[0]:
        raise ValueError(
            "need x [total, rest...] and scores [total] with cu_seqlens, "
            f"got {tuple(given)} and {tuple(scored)}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"need cu_seqlens in int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"need cu_seqlens [B + 1], got {tuple(cu_seqlens.shape)}")
