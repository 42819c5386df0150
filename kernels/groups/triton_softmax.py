"""The softmax of attention in Triton, for one pair of a group and a head, or for several.

Unless a shape says otherwise, functions take matrices [rows, columns] and batches of them
[pairs, rows, columns].
"""

import triton
import triton.language as tl

from .triton_bias import LOG2_E as LOG2_E
from .triton_bias import add_bias

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
def softmax(logits, has_keys):
    """Numerators, denominators and log-sum-exp of rows of base-2 logits; -inf without keys."""
    highest = tl.where(has_keys, tl.max(logits, len(logits.shape) - 1), 0.0)
    weights = tl.exp2(logits - tl.expand_dims(highest, -1))
    total = tl.where(has_keys, tl.sum(weights, len(logits.shape) - 1), 1.0)
    lse = tl.where(has_keys, (highest + tl.log2(total)) * LN_2, float("-inf"))
    return weights, total, lse


@triton.jit
def online_softmax(logits, highest, total, BASE_2: tl.constexpr, HIDDEN: tl.constexpr = False):
    """One step of the online softmax, over a block of keys.

    Args:
        logits: of the block, [queries, keys], to base 2 or to base e.
        highest, total: the maximum and the denominator of the blocks before, [queries].
        HIDDEN: whether a block may have no key that counts, so that its logits are all -inf.

    Returns:
        The numerators of the block, the factor that rescales earlier sums to them, and the new
        `highest` and `total`.
    """
    higher = tl.maximum(highest, tl.max(logits, 1))
    level = higher
    if HIDDEN:
        level = tl.where(higher == float("-inf"), 0.0, higher)
    if BASE_2:
        weights = tl.exp2(logits - level[:, None])
        rescale = tl.exp2(highest - level)
    else:
        weights = tl.exp(logits - level[:, None])
        rescale = tl.exp(highest - level)
    return weights, rescale, higher, total * rescale + tl.sum(weights, 1)


@triton.jit
def key_scores(weights, total, i, real_query, queries, SCORES: tl.constexpr):
    """What a block of queries adds to the scores of its keys, for one head."""
    share = tl.where(real_query, 1.0 / total, 0.0)
    share = tl.where(i == 0, share, 0.0) if SCORES == "cls" else share / tl.maximum(queries, 1)
    return tl.sum(weights * tl.expand_dims(share, -1), len(weights.shape) - 2)


@triton.jit
def dot_products(queries, keys, KEYS_FIRST: tl.constexpr, SAME_BITS: tl.constexpr):
    """Dot products of all queries with all keys: [queries, keys], or transposed with KEYS_FIRST.

    With SAME_BITS both orders round alike, which costs registers.
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
    bias,
    SCORES: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    SAME_BITS: tl.constexpr = False,
):
    """The weights, recomputed from the log-sum-exp, and their gradients.

    Both are [queries, keys] or, with KEYS_FIRST, [keys, queries]. `lse`, `grad_score`,
    `first_query` and `real` broadcast to that shape. `bias` are the arguments of add_bias().
    """
    logits = dot_products(q, k, KEYS_FIRST, SAME_BITS) * (scale * LOG2_E)
    logits = add_bias(logits, *bias)
    weights = tl.where(real, tl.exp2(logits - lse * LOG2_E), 0.0)
    grads = dot_products(grad_out, v, KEYS_FIRST, SAME_BITS)
    if SCORES == "cls":
        grads += tl.where(first_query, grad_score, 0.0)
    elif SCORES == "mean":
        grads += grad_score
    return weights, grads


@triton.jit
def normalizer(total):
    """The factor by which recomputed weights of this sum add up to 1; 1 without keys.

    The log-sum-exp is rounded, so the sum of the weights differs from 1 slightly. In float32 the
    gradient of a softmax, a difference, shows that. In 16 bits the rounding of the weights
    themselves is far larger.
    """
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def logit_slope(keys, scale):
    """d logit / d (q . k): `scale`, or 0 for a single key, whose weight is always exactly 1."""
    return tl.where(keys == 1, 0.0, scale)
