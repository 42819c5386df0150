"""Which queries attend to which keys: the groups of space_time_attention.

Every row of q belongs to exactly one group; a row of k and v may belong to several. Groups are
built on the device from the coordinates of the visible tokens, without a host sync, once for a
mask; every layer, forward and backward, then shares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups of queries and the keys that each sees.

    The queries of group g are `query_rows[query_offsets[g]:query_offsets[g + 1]]`, rows of q; its
    keys are the entries `key_rows[key_offsets[g]:key_offsets[g + 1]]`, rows of k and v.

    Attributes:
        query_offsets: [G + 1] int32, ascending from 0 to the number of rows of q.
        key_offsets: [G + 1] int32, ascending from 0 to the number of entries E.
        query_rows: [rows of q] int32, each row once; None: the rows in their order.
        key_rows: [E] int32; None: the rows in their order, each in one group.
        max_queries, max_keys: of any group; upper bounds, known on the host.
        num_queries, num_keys: rows of q, rows of k and v.
        uniform: every group has exactly `max_queries` queries and `max_keys` keys.
        row_offsets: [B + 1] int32, where the rows of each sample begin; None if not known.
        group_sample: [G] int64, the sample of each group; None if not known.
        entry_offsets, entries: for keys in several groups, [num_keys + 1] and [E] int32: the
            entries that are row r, in ascending order, are
            `entries[entry_offsets[r]:entry_offsets[r + 1]]`. None: every row is in one group.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    query_rows: Tensor | None
    key_rows: Tensor | None
    max_queries: int
    max_keys: int
    num_queries: int
    num_keys: int
    uniform: bool = False
    row_offsets: Tensor | None = None
    group_sample: Tensor | None = None
    entry_offsets: Tensor | None = None
    entries: Tensor | None = None

    @property
    def num_groups(self) -> int:
        """G."""
        return self.query_offsets.shape[0] - 1

    def to(self, device: torch.device | str) -> "Groups":
        """The same groups on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: Any = {name: x.to(device) for name, x in values if isinstance(x, Tensor)}
        return replace(self, **moved)

    # ---- Builders -------------------------------------------------------------------------------

    @staticmethod
    def equal(
        groups: int, size: int, *, keys: int | None = None, device: torch.device | str = "cpu"
    ) -> "Groups":
        """`groups` groups of `size` neighbouring rows; static shapes throughout.

        Frames of a dense clip in (time, row, column) order, or whole clips of equal length.

        Args:
            groups: G.
            size: queries of each group.
            keys: keys of each group, if k and v are another sequence (cross-attention).
        """
        keys = size if keys is None else keys
        step = torch.arange(groups + 1, dtype=torch.int32, device=device)
        return Groups(
            step * size,
            step * keys,
            None,
            None,
            max_queries=size,
            max_keys=keys,
            num_queries=groups * size,
            num_keys=groups * keys,
            uniform=True,
            row_offsets=step * size,
            group_sample=torch.arange(groups, device=device),
        )

    @staticmethod
    def joint(cu_seqlens: Tensor, total: int, longest: int) -> "Groups":
        """All tokens of a sample attend to one another.

        Args:
            cu_seqlens: [B + 1] int32, where each sample begins.
            total: rows in all.
            longest: an upper bound of a sample's length.
        """
        samples = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        return Groups(
            cu_seqlens,
            cu_seqlens,
            None,
            None,
            max_queries=longest,
            max_keys=longest,
            num_queries=total,
            num_keys=total,
            row_offsets=cu_seqlens,
            group_sample=samples,
        )

    @staticmethod
    def cross(
        cu_queries: Tensor,
        cu_keys: Tensor,
        *,
        num_queries: int,
        num_keys: int,
        max_queries: int,
        max_keys: int,
    ) -> "Groups":
        """The queries of a sample attend to the keys of the same sample, of another sequence.

        Args:
            cu_queries, cu_keys: [B + 1] int32, where each sample begins in q, and in k and v.
            num_queries, num_keys: rows of q, rows of k and v.
            max_queries, max_keys: upper bounds of a sample's lengths.
        """
        return Groups(
            cu_queries,
            cu_keys,
            None,
            None,
            max_queries=max_queries,
            max_keys=max_keys,
            num_queries=num_queries,
            num_keys=num_keys,
            row_offsets=cu_queries,
            group_sample=torch.arange(cu_queries.shape[0] - 1, device=cu_queries.device),
        )

    @staticmethod
    def labelled(
        labels: Tensor,
        num_groups: int,
        longest: int,
        *,
        row_offsets: Tensor | None = None,
        group_sample: Tensor | None = None,
    ) -> "Groups":
        """Rows of one label attend to one another.

        Args:
            labels: [rows] int64, in [0, num_groups).
            num_groups: G.
            longest: an upper bound of a group's size.
        """
        offsets = _offsets(labels, num_groups)
        rows = torch.argsort(labels, stable=True).int()
        return Groups(
            offsets,
            offsets,
            rows,
            rows,
            max_queries=longest,
            max_keys=longest,
            num_queries=labels.shape[0],
            num_keys=labels.shape[0],
            row_offsets=row_offsets,
            group_sample=group_sample,
        )

    @staticmethod
    def spatial(
        ids: Tensor, grid: Grid, cu_seqlens: Tensor | None = None, *, longest: int | None = None
    ) -> "Groups":
        """The tokens of one frame attend to one another.

        Args:
            ids: the visible patches in (time, row, column) order, [B, K] or packed [total].
            grid: frames, rows and columns of patches in the whole clip.
            cu_seqlens: [B + 1] int32 for packed `ids`.
            longest: an upper bound of the tokens in a frame; default all patches of a frame.
        """
        (T, H, W), tokens = grid, _Tokens(ids, grid, cu_seqlens)
        return tokens.groups(
            tokens.time, T, min(H * W, tokens.most) if longest is None else longest
        )

    @staticmethod
    def temporal(
        ids: Tensor, grid: Grid, cu_seqlens: Tensor | None = None, *, longest: int | None = None
    ) -> "Groups":
        """The tokens at one position attend to one another through time (arguments: `spatial`)."""
        (T, H, W), tokens = grid, _Tokens(ids, grid, cu_seqlens)
        place = tokens.row * W + tokens.column
        return tokens.groups(place, H * W, min(T, tokens.most) if longest is None else longest)

    @staticmethod
    def window(
        ids: Tensor,
        grid: Grid,
        size: Grid,
        shift: Grid = (0, 0, 0),
        cu_seqlens: Tensor | None = None,
    ) -> "Groups":
        """The tokens of one window of frames, rows and columns attend to one another.

        A shift moves the windows' borders; windows at the edge are then smaller, as Video Swin's
        masked cyclic shift makes them.

        Args:
            ids, grid, cu_seqlens: as for `spatial`.
            size: frames, rows and columns of a window.
            shift: how far the first border lies inside the clip, 0 <= shift < size.

        Raises:
            ValueError: a size is not positive, or a shift is out of its range.

        Source: Video Swin Transformer, arXiv 2106.13230, 3.2.
        """
        if any(n < 1 for n in size) or any(
            not 0 <= s < n for s, n in zip(shift, size, strict=True)
        ):
            raise ValueError(f"need size >= 1 and 0 <= shift < size, got {size} and {shift}")
        tokens = _Tokens(ids, grid, cu_seqlens)
        label = torch.zeros_like(tokens.time)
        count = 1
        for place, whole, part, moved in zip(
            (tokens.time, tokens.row, tokens.column), grid, size, shift, strict=True
        ):
            first = part - moved if moved else 0  # the border inside the clip
            windows = -(-(whole + first) // part)
            label = label * windows + (place + first) // part
            count *= windows
        most = min(size[0], grid[0]) * min(size[1], grid[1]) * min(size[2], grid[2])
        return tokens.groups(label, count, min(most, tokens.most))

    @staticmethod
    def block_sparse(
        batch: int,
        length: int,
        block: int,
        *,
        local: int = 1,
        random: int = 3,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Groups":
        """Blocks of neighbouring tokens attend to themselves, to neighbours, and to random blocks.

        Block i sees the `local` blocks around it (in a circle) and `random` others, drawn from
        `seed` and the same for all samples and heads. The last block may be shorter.

        Args:
            batch, length: samples, and tokens of each.
            block: tokens of a block.
            local: an odd number of blocks, itself among them.
            random: a number of further blocks; at most as many as there are.

        Raises:
            ValueError: a number is out of range.

        Source: SViTT, arXiv 2304.08809, 3.2.
        """
        blocks = -(-length // block) if block > 0 else 0
        if block < 1 or length < 1 or local < 1 or local % 2 == 0 or random < 0:
            raise ValueError(
                "need block >= 1, length >= 1, odd local >= 1, random >= 0, "
                f"got {block}, {length}, {local}, {random}"
            )
        local = min(local, blocks)
        if local + random > blocks:
            raise ValueError(f"need local + random <= {blocks} blocks, got {local} + {random}")
        seen = []  # the pattern is small and drawn on the host: the same on every device
        generator = torch.Generator().manual_seed(seed)
        for i in range(blocks):
            near = [(i + j - local // 2) % blocks for j in range(local)]
            others = [j for j in range(blocks) if j not in near]
            drawn = torch.randperm(len(others), generator=generator)[:random].tolist()
            seen.append(sorted(near + [others[j] for j in drawn]))
        starts = [min(b * block, length) for b in range(blocks + 1)]
        rows = [torch.cat([torch.arange(starts[b], starts[b + 1]) for b in s]) for s in seen]
        keys = torch.tensor([0, *map(len, rows)]).cumsum(0)
        one = torch.cat(rows)
        step = torch.arange(batch)[:, None]
        key_rows = (step * length + one).flatten()
        key_offsets = torch.cat([(step * len(one) + keys[:-1]).flatten(), keys[-1:] * batch])
        query_offsets = torch.cat(
            [(step * length + torch.tensor(starts[:-1])).flatten(), torch.tensor([batch * length])]
        )
        sizes = {len(r) for r in rows}
        return Groups(
            query_offsets.int().to(device),
            key_offsets.int().to(device),
            None,
            key_rows.int().to(device),
            max_queries=min(block, length),
            max_keys=max(sizes),
            num_queries=batch * length,
            num_keys=batch * length,
            uniform=len(sizes) == 1 and length % block == 0,
            row_offsets=(torch.arange(batch + 1) * length).int().to(device),
            group_sample=torch.arange(batch).repeat_interleave(blocks).to(device),
        ).with_entries()

    def with_global(self) -> "Groups":
        """Add one global token a sample, before the sample's other rows.

        Every group of the sample sees it as a key; its own query sees every row of the sample.
        Row r of sample b becomes row r + b + 1; the global token is the first row of its sample.

        Raises:
            ValueError: the groups are not of self-attention, or do not know their samples.

        Source: Frozen in Time, arXiv 2104.00650, 3.1 (VarAttention).
        """
        if self.row_offsets is None or self.group_sample is None:
            raise ValueError("need groups that know their samples (row_offsets, group_sample)")
        if self.num_queries != self.num_keys:
            raise ValueError(
                f"need as many keys as queries, got {self.num_queries} and {self.num_keys}"
            )
        device = self.query_offsets.device
        B = self.row_offsets.shape[0] - 1
        samples = torch.arange(B, device=device)
        total = self.num_queries
        firsts = self.row_offsets[:-1] + samples.int()  # the rows of the global tokens
        row = torch.arange(total, device=device, dtype=torch.int32)
        sample = torch.searchsorted(self.row_offsets[1:].contiguous(), row, right=True)
        moved = row + sample.int() + 1

        query_rows = moved if self.query_rows is None else moved[self.query_rows]
        # A group's first key is the global one; the global queries' groups follow, of all rows.
        inner, keys = lead(self.key_offsets, self.key_rows, moved, firsts[self.group_sample])
        everything = torch.arange(total + B, device=device, dtype=torch.int32)
        row_offsets = self.row_offsets + torch.arange(B + 1, device=device, dtype=torch.int32)
        steps = torch.arange(1, B + 1, device=device, dtype=torch.int32)
        return replace(
            self,
            query_offsets=torch.cat([self.query_offsets, self.query_offsets[-1:] + steps]),
            key_offsets=torch.cat([inner, inner[-1:] + row_offsets[1:]]),
            query_rows=torch.cat([query_rows, firsts]),
            key_rows=torch.cat([keys, everything]),
            max_queries=max(self.max_queries, 1),
            max_keys=total + 1 if B else 0,
            num_queries=total + B,
            num_keys=total + B,
            uniform=False,
            row_offsets=row_offsets,
            group_sample=torch.cat([self.group_sample, samples]),
        ).with_entries()

    def with_entries(self) -> "Groups":
        """Add, for every row of k and v, the list of its entries; for keys in several groups."""
        assert self.key_rows is not None
        rows = self.key_rows.long()
        return replace(
            self,
            entry_offsets=_offsets(rows, self.num_keys),
            entries=torch.argsort(rows, stable=True).int(),
        )

    # ---- Checks ---------------------------------------------------------------------------------

    def check(self) -> "Groups":
        """Look at every index, on the host: slow, for tests and for debugging.

        Returns:
            The groups themselves.

        Raises:
            ValueError: offsets do not ascend from 0 to their end, a row is out of range, or a query
                is in no group or in two.
        """
        for name, offsets, rows, count in (
            ("query", self.query_offsets, self.query_rows, self.num_queries),
            ("key", self.key_offsets, self.key_rows, self.num_keys),
        ):
            end = count if rows is None else rows.shape[0]
            steps = offsets.tolist()
            if steps[0] != 0 or steps[-1] != end or steps != sorted(steps):
                raise ValueError(f"need {name}_offsets that ascend from 0 to {end}, got {steps}")
            longest = max((b - a for a, b in zip(steps, steps[1:], strict=False)), default=0)
            bound = self.max_queries if name == "query" else self.max_keys
            if longest > bound:
                raise ValueError(f"need {name} groups of at most {bound} rows, got {longest}")
            if rows is not None and rows.numel() and not 0 <= rows.min() <= rows.max() < count:
                raise ValueError(f"need {name}_rows in [0, {count}), got {rows.tolist()}")
        if self.query_rows is not None:
            times = torch.bincount(self.query_rows.long(), minlength=self.num_queries)
            if wrong := (times != 1).nonzero().flatten().tolist():
                raise ValueError(f"need every query in exactly one group, not so: rows {wrong}")
        return self


class _Tokens:
    """The visible tokens: of which sample, and where in the clip."""

    def __init__(self, ids: Tensor, grid: Grid, cu_seqlens: Tensor | None) -> None:
        if (ids.ndim != 2) if cu_seqlens is None else (ids.ndim != 1):
            raise ValueError(f"need ids [B, K], or [total] with cu_seqlens, got {tuple(ids.shape)}")
        if len(grid) != 3 or any(n < 1 for n in grid):
            raise ValueError(f"need a grid of frames, rows and columns, got {grid}")
        _, H, W = grid
        device = ids.device
        if cu_seqlens is None:
            self.samples, K = ids.shape
            self.row_offsets = torch.arange(self.samples + 1, device=device, dtype=torch.int32) * K
            self.sample = torch.arange(self.samples, device=device).repeat_interleave(
                K, output_size=self.samples * K
            )
            self.most = K
        else:
            self.samples, self.row_offsets = cu_seqlens.shape[0] - 1, cu_seqlens
            row = torch.arange(ids.shape[0], device=device, dtype=torch.int32)
            self.sample = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
            self.most = ids.shape[0]
        ids = ids.reshape(-1)
        self.time, self.row, self.column = ids // (H * W), ids // W % H, ids % W

    def groups(self, label: Tensor, count: int, longest: int) -> Groups:
        """Groups of the tokens of one sample and one label of `count`."""
        samples = torch.arange(self.samples, device=label.device)
        return Groups.labelled(
            self.sample * count + label,
            self.samples * count,
            longest,
            row_offsets=self.row_offsets,
            group_sample=samples.repeat_interleave(count, output_size=self.samples * count),
        )


def _offsets(labels: Tensor, count: int) -> Tensor:
    """Where each label begins after sorting, [count + 1] int32, without a host sync."""
    sizes = torch.zeros(count + 1, dtype=torch.int32, device=labels.device)
    sizes.scatter_add_(0, labels + 1, torch.ones_like(labels, dtype=torch.int32))
    return sizes.cumsum(0, dtype=torch.int32)


def lead(
    offsets: Tensor, rows: Tensor | None, moved: Tensor, leaders: Tensor
) -> tuple[Tensor, Tensor]:
    """Put one more row before the rows of each group.

    Args:
        offsets, rows: of G groups, as `Groups` has them.
        moved: the new number of every row.
        leaders: [G], the row that comes first in each group.

    Returns:
        The new offsets [G + 1] and rows, int32.
    """
    G, members = leaders.shape[0], moved if rows is None else moved[rows]
    device = offsets.device
    found = torch.empty(members.shape[0] + G, dtype=torch.int32, device=device)
    # Row i of group g moves by the g + 1 leaders before it.
    place = torch.arange(members.shape[0], device=device)
    found[place + group_of(offsets, members.shape[0]) + 1] = members.int()
    found[offsets[:-1].long() + torch.arange(G, device=device)] = leaders.int()
    return offsets + torch.arange(G + 1, device=device, dtype=torch.int32), found


def group_of(offsets: Tensor, count: int) -> Tensor:
    """The group of each of `count` positions, [count] int64."""
    place = torch.arange(count, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True)


def _flatten(groups: Groups) -> tuple[list[Any], Any]:
    values = [getattr(groups, f.name) for f in fields(Groups)]
    tensors = [v if isinstance(v, Tensor) else None for v in values]
    return tensors, tuple(None if isinstance(v, Tensor) else v for v in values)


def _unflatten(tensors: Iterable[Any], others: Any) -> Groups:
    values: list[Any] = [o if t is None else t for t, o in zip(tensors, others, strict=True)]
    return Groups(*values)


torch.utils._pytree.register_pytree_node(
    Groups, _flatten, _unflatten, serialized_type_name="vidl.Groups"
)
