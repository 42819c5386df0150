"""The members of each group as a batch: for compositions of PyTorch's own operations.

Unlike `Padded`, nothing is copied where the groups are equal and the rows in their order, and
padding is written once by row. So the gradients need no sums, but for rows in several groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bias import NO_BIAS, Bias
from .indices import kept_index
from .membership import Arguments, group_of


class Batched:
    """The queries, or the keys, of each group as a batch [G, longest, ...].

    Args:
        offsets: [G + 1], where the members of each group begin in the list of all members.
        rows: the row of each member; None if member i is row i.
        longest: an upper bound of the members of a group.
        count: the number of all members.
        repeated: whether a row may be a member of several groups.
        made_of: the tensors and numbers that these lists are made of; default: the lists.
    """

    def __init__(
        self,
        offsets: Tensor,
        rows: Tensor | None,
        longest: int,
        count: int,
        repeated: bool = False,
        made_of: Sequence[Any] | None = None,
    ) -> None:
        self.offsets, self.rows, self.repeated = offsets, rows, repeated
        self.made_of = (offsets, rows, longest) if made_of is None else (*made_of, longest)
        # At least one member, of zeros: an operation over nothing is an error or NaN.
        self.shape = (offsets.shape[0] - 1, max(longest, 1))
        # All groups have exactly `longest` members if so many fill them.
        self.equal = longest > 0 and self.shape[0] * longest == count
        self.in_order = self.equal and rows is None  # group g has the g-th `longest` rows
        self.slot: Tensor | None = None  # of every member in the flat batch
        if not self.equal:
            group = group_of(offsets, count)
            member = torch.arange(count, device=offsets.device)
            self.slot = group * self.shape[1] + member - offsets[group]

    def gather(self, x: Tensor) -> Tensor:
        """[rows, ...] to the list of all members [count, ...]."""
        if self.rows is None:
            return x
        # The gradient of index_select adds in any order on CUDA; that of an index sorts first.
        sort = self.repeated and x.device.type != "cpu"
        return x[self.rows] if sort else x.index_select(0, self.rows)

    def batch(self, x: Tensor) -> Tensor:
        """[rows, ...] to [G, longest, ...], with zeros beyond a group's end."""
        x = self.gather(x)
        if self.slot is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.slot, x)
        return x.view(*self.shape, *x.shape[1:])  # unflatten, which is written in Python

    def members(self, x: Tensor) -> Tensor:
        """[G, longest, ...] to the list of all members [count, ...]."""
        x = x.flatten(0, 1)
        return x if self.slot is None else x.index_select(0, self.slot)

    def mask(self) -> Tensor | None:
        """Which members exist, [G, longest]; the first of an empty group as well. None: all do."""
        if self.equal:
            return None
        place = torch.arange(self.shape[1], device=self.offsets.device)
        return place < self.offsets.diff().clamp(min=1)[:, None]

    def first(self, x: Tensor) -> Tensor:
        """The first member of each group, [G, 1, ...]; zeros for an empty group."""
        if self.equal:
            return self.batch(x)[:, :1]
        x = self.gather(x)
        if x.shape[0] == 0:
            return x.new_zeros(self.shape[0], 1, *x.shape[1:])
        first = x.index_select(0, self.offsets[:-1].clamp(max=x.shape[0] - 1))[:, None]
        return first.masked_fill(self.empty()[(...,) + (None,) * x.ndim], 0)

    def cleared(self, x: Tensor) -> Tensor:
        """x, [G, longest, H, D], with zeros in groups that have no members here."""
        return x if self.equal else x.masked_fill(self.empty()[:, None, None, None], 0)

    def empty(self) -> Tensor:
        """Which groups have no members, [G]."""
        return self.offsets.diff() == 0


def batched(groups: Arguments, num_queries: int, num_keys: int) -> tuple[Batched, Batched]:
    """The queries and the keys of the groups."""
    queries = Batched(groups.query_offsets, groups.query_rows, groups.max_queries, num_queries)
    entries, repeated = groups.num_entries(num_keys), groups.entries is not None
    keys = Batched(groups.key_offsets, groups.key_rows, groups.max_keys, entries, repeated)
    return queries, keys


def batched_parts(
    groups: Arguments, num_queries: int, num_keys: int, num_global: int, max_local_keys: int
) -> list[tuple[Batched, Batched]]:
    """The queries and the keys of the groups before the global ones, and of the global ones.

    Padded together, every group would have as many keys as a global query. The lists of members of
    the parts, one after the other, are those of all groups.

    Args:
        num_global, max_local_keys: see `Groups`.
    """
    if num_global == 0:
        return [batched(groups, num_queries, num_keys)]
    assert groups.query_rows is not None and groups.key_rows is not None
    G = groups.query_offsets.shape[0] - 1 - num_global
    Q, E = num_queries - num_global, groups.num_entries(num_keys) - num_keys
    of_queries = groups.query_offsets, groups.query_rows, num_global
    of_keys = groups.key_offsets, groups.key_rows, num_global
    offsets = groups.query_offsets[: G + 1], groups.key_offsets[: G + 1]
    local = (
        Batched(
            *(offsets[0], groups.query_rows[:Q], groups.max_queries, Q),
            made_of=("local", *of_queries),
        ),
        Batched(
            *(offsets[1], groups.key_rows[:E], max_local_keys, E),
            repeated=True,
            made_of=("local", *of_keys),
        ),
    )
    offsets = groups.query_offsets[G:] - Q, groups.key_offsets[G:] - E
    whole = (
        Batched(
            *(offsets[0], groups.query_rows[Q:], 1, num_global), made_of=("whole", *of_queries)
        ),
        # All rows, in order.
        Batched(*(offsets[1], None, groups.max_keys, num_keys), made_of=("whole", *of_keys)),
    )
    return [local, whole]


def put_back(x: Tensor, rows: Tensor | None) -> Tensor:
    """The list of all members [count, ...] to their rows; every row is a member once."""
    return x if rows is None else torch.empty_like(x).index_copy_(0, rows.long(), x)


def mask_of(
    queries: Batched,
    keys: Batched,
    limits: Tensor | None = None,
    bias: Bias = NO_BIAS,
    period: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the logits, and the queries that see no key.

    Args:
        limits: `query_limits` of the groups.
        period: of `Positions`; if it is that of the groups, they share one mask.

    Returns:
        The keys that are seen, [G, 1, queries or 1, longest], or with a bias what is added to the
        logits, [G or 1, H or 1, queries or 1, longest] in float32; None if all are seen. A softmax
        of nothing is NaN: where no key is seen, the mask has some. And these queries [G, queries
        or 1], None without any.
    """
    real = keys.mask()
    seen = None if real is None else real[:, None]
    unseen = None if keys.equal else keys.empty()[:, None]
    if limits is not None:  # at most the number of keys
        limit = queries.batch(limits)
        place = torch.arange(keys.shape[1], device=limits.device)
        seen, unseen = place < limit.clamp(min=1)[:, :, None], limit == 0
    mask: Tensor | None = None
    if bias.table is not None:
        mask = bias.of(_index_of(queries, keys, bias, period)).transpose(0, 1)
    if bias.key_bias is not None:
        added = keys.batch(bias.key_bias)[:, None]
        visible = added > float("-inf")
        if seen is not None and unseen is not None:
            visible = visible & seen & ~unseen[..., None]
        unseen = ~visible.any(-1)
        added = added.masked_fill(unseen[..., None], 0)[:, None]
        mask = added if mask is None else mask + added
    seen = None if seen is None else seen[:, None]
    if mask is None:
        return seen, unseen
    return mask if seen is None else mask.masked_fill(~seen, float("-inf")), unseen


def _index_of(queries: Batched, keys: Batched, bias: Bias, period: int) -> Tensor:
    """The rows of the table, [G or 1, longest queries, longest keys]."""
    codes, key_codes, table = bias.query_codes, bias.key_codes, bias.table
    assert codes is not None and key_codes is not None and table is not None
    once = queries.in_order and keys.in_order and period == queries.shape[1]

    def make() -> Tensor:
        of_queries, of_keys = queries.batch(codes), keys.batch(key_codes)
        if once:
            of_queries, of_keys = of_queries[:1], of_keys[:1]
        return bias.rows_of(of_queries[:, :, None], of_keys[:, None])

    of_table = table.shape[1], bias.shift
    return kept_index(codes, [key_codes, *of_table, once, *queries.made_of, *keys.made_of], make)


def logits_of(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The logits of q [G, n, H, D] and k [G, longest, H, D]: [G, H, n, longest] in float32.

    Args:
        mask: see `mask_of`.
    """
    high = torch.promote_types(k.dtype, torch.float32)
    logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).to(high) * scale
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask


def cls_attention(
    q: Tensor,
    k: Tensor,
    queries: Batched,
    mask: Tensor | None,
    unseen: Tensor | None,
    scale: float,
) -> Tensor:
    """The attention of the first query of each group, averaged over heads.

    Args:
        q: [num_queries, H, D].
        k: the keys as a batch, [G, longest, H, D].
        mask, unseen: see `mask_of`.

    Returns:
        [G, longest] in float32; zeros without queries, and for a query that sees no key.
    """
    first = None if mask is None else mask[:, :, :1]
    weights = logits_of(queries.first(q), k, first, scale).softmax(-1).mean((1, 2))
    if unseen is not None:
        weights = weights.masked_fill(unseen[:, :1], 0)
    return weights if queries.equal else weights.masked_fill(queries.empty()[:, None], 0)


def mean_attention(weights: Tensor, queries: Batched) -> Tensor:
    """The attention that each key receives, averaged over heads and queries: [G, longest].

    Args:
        weights: [G, H, longest queries, longest keys].
    """
    mask = queries.mask()
    if mask is None:
        return weights.mean((1, 2))
    # The mask has a query in an empty group too: its weights do not count.
    real = mask & ~queries.empty()[:, None]
    total = torch.where(real[:, None, :, None], weights, 0).sum(2).mean(1)
    return total / real.sum(1, keepdim=True).clamp(min=1)
