"""The mathematics of space_time_attention, for one pair of a group and a head, or for several.

The same functions take matrices [rows, columns] and batches [pairs, rows, columns].
"""

import triton
import triton.language as tl

# softmax works with powers of two, which the hardware has.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def transpose(x):
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.trans(x)


@triton.jit
def multiply(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax(logits, some):
    """Numerators, denominators and the log-sum-exp of rows of base-2 logits; where `some` keys."""
    highest = tl.where(some, tl.max(logits, len(logits.shape) - 1), 0.0)
    weights = tl.exp2(logits - tl.expand_dims(highest, -1))
    total = tl.where(some, tl.sum(weights, len(logits.shape) - 1), 1.0)
    lse = tl.where(some, (highest + tl.log2(total)) * LN_2, float("-inf"))
    return weights, total, lse


@triton.jit
def key_scores(weights, total, i, real_query, queries, SCORES: tl.constexpr):
    """What these queries add to the scores of their keys, of one head."""
    share = tl.where(real_query, 1.0 / total, 0.0)
    share = tl.where(i == 0, share, 0.0) if SCORES == "cls" else share / tl.maximum(queries, 1)
    return tl.sum(weights * tl.expand_dims(share, -1), len(weights.shape) - 2)


@triton.jit
def products(queries, keys, KEYS_FIRST: tl.constexpr, SAME_BITS: tl.constexpr):
    """Of every query's and key's row; with SAME_BITS rounded in either order as without KEYS_FIRST.

    That takes more registers.
    """
    if not KEYS_FIRST:
        return multiply(queries, transpose(keys))
    elif SAME_BITS:
        return transpose(multiply(queries, transpose(keys)))
    else:
        return multiply(keys, transpose(queries))


@triton.jit
def weights_back(
    q,
    k,
    v,
    grad_out,
    lse,
    grad_score,
    first_query,
    real,
    scale,
    SCORES: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    SAME_BITS: tl.constexpr = False,
):
    """The weights, from the log-sum-exp, and the gradient that reaches them.

    Both are [queries, keys] or, with KEYS_FIRST, [keys, queries]. So are `lse`, `grad_score`,
    `first_query` and `real`, with 1 in place of a length where all are the same.
    """
    logits = products(q, k, KEYS_FIRST, SAME_BITS) * (scale * LOG2_E)
    weights = tl.where(real, tl.exp2(logits - lse * LOG2_E), 0.0)
    grads = products(grad_out, v, KEYS_FIRST, SAME_BITS)
    if SCORES == "cls":
        grads += tl.where(first_query, grad_score, 0.0)
    elif SCORES == "mean":
        grads += grad_score
    return weights, grads


@triton.jit
def one_over(total):
    """What makes weights of this sum, from the log-sum-exp, sum to one again.

    Rounding in the log-sum-exp lets them stray, and the gradient of a softmax is a difference that
    shows it in float32. Half floats round the weights far more than that. 0: there are no keys.
    """
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def slope(keys, scale):
    """Of the logits, in q and k. One key always has all the weight, whatever rounding says."""
    return tl.where(keys == 1, 0.0, scale)
