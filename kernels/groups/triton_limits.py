"""Queries that see the first keys of their group only, in Triton: `query_limits` of the groups.

Without limits these functions give their arguments back, and kernels are compiled as if they were
not called. Limits may be any numbers: they are limited to the keys of the group.
"""

import triton
import triton.language as tl

from vidl.kernels.triton_offsets import within

from .triton_rows import rows_at


@triton.jit
def key_limits(limits_ptr, query, real, keys):
    """How many keys of its group each query sees; zeros without limits, and beyond the group."""
    if limits_ptr is None:
        return tl.zeros(query.shape, tl.int32)
    else:
        return within(tl.load(limits_ptr + query, mask=real, other=0), keys)


@triton.jit
def seen_by(limits_ptr, seen, j, limit):
    """Which keys each query sees: the first `limit` of its group, unless they are hidden.

    Args:
        seen, j, limit: whether keys are not hidden, their numbers in the group, and key_limits();
            they broadcast to the result.
    """
    if limits_ptr is None:
        return seen
    else:
        return seen & (j < limit)


@triton.jit
def has_seen(limits_ptr, has_keys, seen):
    """Whether each query sees a key; `has_keys` without limits.

    Args:
        seen: from seen_by(), [queries, keys], or a batch of them.
    """
    if limits_ptr is None:
        return has_keys
    else:
        return tl.max(seen.to(tl.int32), len(seen.shape) - 1) > 0


@triton.jit
def zero_unseeing(limits_ptr, out, sees):
    """Zeros in the rows of queries that see no key: 0 times a value that is not finite is NaN."""
    if limits_ptr is None:
        return out
    else:
        return tl.where(tl.expand_dims(sees, -1), out, 0.0)


@triton.jit
def zero_single(limits_ptr, grad_logits, limit):
    """Zeros in the gradients of the logits of queries that see one key: its weight is always 1."""
    if limits_ptr is None:
        return grad_logits
    else:
        return tl.where(limit == 1, 0.0, grad_logits)


@triton.jit
def queries_of_keys(limits_ptr, query_rows_ptr, first_query, queries, num_queries, start):
    """The first query of a group that sees key number `start` or a later one, and the last plus 1.

    Without limits, and for those that ascend as causal ones do, no query between them sees less.
    """
    if limits_ptr is None:
        return queries * 0, queries
    else:
        STEP: tl.constexpr = 1024
        begin, end = queries, queries * 0
        for at in range(0, queries, STEP):
            i = at + tl.arange(0, STEP)
            real = i < queries
            query = rows_at(query_rows_ptr, first_query + i, real, num_queries)
            sees = real & (tl.load(limits_ptr + query, mask=real, other=0) > start)
            begin = tl.minimum(begin, tl.min(tl.where(sees, i, queries), 0))
            end = tl.maximum(end, tl.max(tl.where(sees, i + 1, 0), 0))
        return begin, end
