"""Which queries attend to which keys: the groups of space_time_attention.

Every row of q belongs to exactly one group; a row of k and v may belong to several. Groups are
built once per mask, on the device, from the coordinates of the visible tokens, without a host sync.
All layers share them, forward and backward.
"""

from dataclasses import InitVar, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidl.kernels.arguments import (
    check_count,
    check_counts,
    check_dtype,
    check_shape,
    check_tensors,
    require,
)

from .checks import (
    check_rows,
    check_types,
    entries_fit,
    entries_of,
    limits_fit,
    may_repeat,
    offsets_of,
    on_host,
    require_offsets,
    require_valid,
)
from .pytree import register

Grid = tuple[int, int, int]

# How the schema of an op declares its groups: what `Groups.arguments` returns.
SCHEMA = (
    "Tensor query_offsets, Tensor key_offsets, Tensor? query_rows, Tensor? key_rows, "
    "Tensor? entry_offsets, Tensor? entries, SymInt max_queries, SymInt max_keys, "
    "Tensor? query_limits"
)


class Arguments(NamedTuple):
    """What kernels need of `Groups`, in the order of `SCHEMA`."""

    query_offsets: Tensor
    key_offsets: Tensor
    query_rows: Tensor | None
    key_rows: Tensor | None
    entry_offsets: Tensor | None
    entries: Tensor | None
    max_queries: int
    max_keys: int
    query_limits: Tensor | None

    def num_entries(self, num_keys: int) -> int:
        """E."""
        return num_keys if self.key_rows is None else self.key_rows.shape[0]


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups of queries, and the keys that each group attends to.

    The queries of group g are `query_rows[query_offsets[g]:query_offsets[g + 1]]`, rows of q; its
    keys are the entries `key_rows[key_offsets[g]:key_offsets[g + 1]]`, rows of k and v.

    Attributes:
        query_offsets: [G + 1] int32, ascending from 0 to the number of rows of q.
        key_offsets: [G + 1] int32, ascending from 0 to the number of entries E.
        query_rows: [num_queries] int32, each row once; None: the rows in their order.
        key_rows: [E] int32; None: the rows in their order, each in one group.
        max_queries, max_keys: upper bounds of the queries and keys of a group, known on the host.
        num_queries, num_keys: rows of q, rows of k and v.
        uniform: every group has exactly `max_queries` queries and `max_keys` keys.
        row_offsets: [B + 1] int32, where the rows of each sample begin; None if unknown.
        max_rows: an upper bound of the rows of a sample; None if unknown.
        group_sample: [G] int64, the sample of each group; None if unknown.
        entry_offsets, entries: [num_keys + 1] and [E] int32, for keys in several groups: row r
            stands in the entries `entries[entry_offsets[r]:entry_offsets[r + 1]]`, in ascending
            order. None: no row is in two groups. They are added to groups whose `key_rows` repeat a
            row; where that is not known on the host, to all that have `key_rows`.
        num_global: so many groups at the end are of one query each, which attends to all rows of
            its sample, and together they list all rows in order: see `with_global`.
        max_local_keys: an upper bound of the keys of the groups before these.
        query_limits: [num_queries] int32, by row of q: the query sees so many keys of its group,
            the first in the order of `key_rows`; None: all keys. See `causal`, `prefix`, `padded`.
        is_causal: the limits are those of `causal`, for groups of self-attention.
        checked: whether all values are known to be valid. Otherwise the constructor checks them:
            on the CPU it raises a `ValueError`; on another device, and under `torch.compile`, it
            asserts them without a host sync.
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
    max_rows: int | None = None
    group_sample: Tensor | None = None
    entry_offsets: Tensor | None = None
    entries: Tensor | None = None
    num_global: int = 0
    max_local_keys: int = 0
    query_limits: Tensor | None = None
    is_causal: bool = False
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        for name in Arguments._fields:  # kernels read the lists as they lie in memory
            value = getattr(self, name)
            if isinstance(value, Tensor) and not value.is_contiguous():
                object.__setattr__(self, name, value.contiguous())
        if checked:
            return
        check_types(self)
        if self.entries is None and may_repeat(self):
            for name, tensor in zip(("entry_offsets", "entries"), entries_of(self), strict=True):
                object.__setattr__(self, name, tensor)
        if on_host(self.query_offsets):
            self.check()
        else:
            require_valid(self)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.query_offsets.shape[0] - 1

    @property
    def layout(self) -> str:
        """ "equal", "packed" or "gathered" rows, or "shared" if a row of keys is in two groups."""
        if self.entries is not None:
            return "shared"
        if self.query_rows is not None or self.key_rows is not None:
            return "gathered"
        return "equal" if self.uniform else "packed"

    def to(self, device: torch.device | str) -> "Groups":
        """The same groups on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: Any = {name: x.to(device) for name, x in values if isinstance(x, Tensor)}
        return replace(self, **moved, checked=True)

    def arguments(self) -> Arguments:
        """What the kernels of an op are given, in the order of `SCHEMA`."""
        return Arguments(
            self.query_offsets,
            self.key_offsets,
            self.query_rows,
            self.key_rows,
            self.entry_offsets,
            self.entries,
            self.max_queries,
            self.max_keys,
            self.query_limits,
        )

    @staticmethod
    def equal(
        groups: int, size: int, *, keys: int | None = None, device: torch.device | str = "cpu"
    ) -> "Groups":
        """`groups` groups of `size` consecutive rows; all shapes are static.

        Examples: the frames of a dense clip in (time, row, column) order; clips of equal length.

        Args:
            groups: number of groups.
            size: queries of each group.
            keys: keys of each group if k and v are another sequence (cross-attention).

        Raises:
            TypeError, ValueError: a number is not an int, is negative, or there are 2^31 rows.
        """
        keys = size if keys is None else keys
        for name, count in (("groups", groups), ("size", size), ("keys", keys)):
            check_count(name, count)
        check_rows("groups * size", groups * size)
        check_rows("groups * keys", groups * keys)
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
            max_rows=size,
            group_sample=torch.arange(groups, device=device),
            checked=True,
        )

    @staticmethod
    def joint(cu_seqlens: Tensor, total: int, longest: int) -> "Groups":
        """All tokens of a sample attend to one another.

        Args:
            cu_seqlens: [B + 1] int32, where each sample begins.
            total: the number of rows.
            longest: an upper bound of a sample's length.
        """
        check_count("total", total)
        check_count("longest", longest)
        require_offsets("cu_seqlens", cu_seqlens, total, longest)
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
            max_rows=longest,
            group_sample=samples,
            checked=True,
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
        """The queries of a sample attend to the keys of that sample in another sequence.

        Args:
            cu_queries, cu_keys: [B + 1] int32, where each sample begins in q, and in k and v.
            num_queries, num_keys: rows of q, rows of k and v.
            max_queries, max_keys: upper bounds of the queries and keys of a sample.
        """
        for name, offsets, count, most in (
            ("queries", cu_queries, num_queries, max_queries),
            ("keys", cu_keys, num_keys, max_keys),
        ):
            check_count(f"num_{name}", count)
            check_count(f"max_{name}", most)
            require_offsets(f"cu_{name}", offsets, count, most)
        if cu_queries.shape != cu_keys.shape or cu_queries.device != cu_keys.device:
            raise ValueError(
                "need cu_queries and cu_keys of one length, on one device, got "
                f"{tuple(cu_queries.shape)} on {cu_queries.device} and {tuple(cu_keys.shape)} on "
                f"{cu_keys.device}"
            )
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
            max_rows=max_queries,
            group_sample=torch.arange(cu_queries.shape[0] - 1, device=cu_queries.device),
            checked=True,
        )

    @staticmethod
    def prefix(cu_video: Tensor, cu_text: Tensor, total: int, longest: int) -> "Groups":
        """Prefix language modelling: the rows of a sample are those of its clip, then its words.

        A row of the clip sees the clip; a word sees the clip, the words before it and itself.

        Args:
            cu_video, cu_text: [B + 1] int32, where each sample begins among the rows of all clips,
                and among all words.
            total: the number of rows, of clips and words together.
            longest: an upper bound of the rows of a sample.

        Raises:
            TypeError, ValueError: as `joint`; or the two have other lengths or devices.

        Source: SimVLM, arXiv 2108.10904, 3.1 (PrefixLM).
        """
        check_tensors(cu_video=cu_video, cu_text=cu_text)
        check_shape("cu_video", cu_video, "B + 1")
        check_shape("cu_text", cu_text, cu_video.shape[0])
        for name, offsets in (("cu_video", cu_video), ("cu_text", cu_text)):
            check_dtype(name, offsets, torch.int32)
            ascend = (offsets[:1] == 0).all() & (offsets.diff() >= 0).all()
            require(ascend, f"need {name} that ascend from 0")
        groups = Groups.joint(cu_video + cu_text, total, longest)
        sample, place = groups._places()
        limits = torch.maximum(cu_video.diff()[sample], place + 1)
        return replace(groups, query_limits=limits.int(), checked=True)

    @staticmethod
    def labelled(
        labels: Tensor,
        num_groups: int,
        longest: int,
        *,
        row_offsets: Tensor | None = None,
        max_rows: int | None = None,
        group_sample: Tensor | None = None,
    ) -> "Groups":
        """Rows with the same label attend to one another.

        Args:
            labels: [rows] int64, in [0, num_groups).
            num_groups: the number of groups.
            longest: an upper bound of a group's size.
        """
        check_count("num_groups", num_groups)
        check_count("longest", longest)
        if labels.dtype != torch.int64:
            raise TypeError(f"need labels in int64, got {labels.dtype}")
        if labels.ndim != 1:
            raise ValueError(f"need labels [rows], got {tuple(labels.shape)}")
        check_rows("labels", labels.shape[0])
        inside = ((labels >= 0) & (labels < num_groups)).all()
        require(inside, "need labels in [0, {num_groups})", num_groups=num_groups)
        offsets = offsets_of(labels, num_groups)
        fits = (offsets.diff() <= longest).all()
        require(fits, "need groups of at most {longest} rows", longest=longest)
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
            max_rows=max_rows,
            group_sample=group_sample,
            checked=True,
        )

    @staticmethod
    def spatial(
        ids: Tensor, grid: Grid, cu_seqlens: Tensor | None = None, *, longest: int | None = None
    ) -> "Groups":
        """The tokens of a frame attend to one another.

        Args:
            ids: the visible patches in (time, row, column) order, [B, K] or packed [total].
            grid: frames, rows and columns of patches in the whole clip.
            cu_seqlens: [B + 1] int32 for packed `ids`.
            longest: an upper bound of the tokens in a frame; default: all patches of a frame.

        Raises:
            TypeError: a dtype is another, or a number is not an int.
            ValueError: shapes do not fit; or on the CPU, an id or an offset is out of range, or a
                frame has more tokens than `longest`. On another device, and under `torch.compile`,
                that is an assertion.
        """
        (T, H, W), tokens = grid, Tokens(ids, grid, cu_seqlens)
        return tokens.groups(
            tokens.time, T, min(H * W, tokens.most) if longest is None else longest
        )

    @staticmethod
    def temporal(
        ids: Tensor, grid: Grid, cu_seqlens: Tensor | None = None, *, longest: int | None = None
    ) -> "Groups":
        """The tokens at one position attend to one another across frames (see `spatial`)."""
        (T, H, W), tokens = grid, Tokens(ids, grid, cu_seqlens)
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
        """The tokens of a window of frames, rows and columns attend to one another.

        A shift moves the borders of the windows. Windows at the edge of the clip are then smaller,
        as with the masked cyclic shift of Video Swin.

        Args:
            ids, grid, cu_seqlens: as for `spatial`.
            size: frames, rows and columns of a window.
            shift: how far the first border lies inside the clip, 0 <= shift < size.

        Raises:
            ValueError: a size is not positive, or a shift is out of its range.

        Source: Video Swin Transformer, arXiv 2106.13230, 3.2.
        """
        for name, numbers in (("grid", grid), ("size", size), ("shift", shift)):
            if len(numbers) != 3:
                raise ValueError(f"need {name} of frames, rows and columns, got {numbers}")
            for number in numbers:
                check_count(name, number)
        if any(n < 1 for n in size) or any(
            not 0 <= s < n for s, n in zip(shift, size, strict=True)
        ):
            raise ValueError(f"need size >= 1 and 0 <= shift < size, got {size} and {shift}")
        tokens = Tokens(ids, grid, cu_seqlens)
        label = torch.zeros_like(tokens.time)
        count = 1
        for place, length, window, offset in zip(
            (tokens.time, tokens.row, tokens.column), grid, size, shift, strict=True
        ):
            before = window - offset if offset else 0  # of the first window, outside the clip
            windows = -(-(length + before) // window)
            label = label * windows + (place + before) // window
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
        """Blocks of consecutive tokens attend to themselves, their neighbours and random blocks.

        Block i attends to the `local` blocks around it (circularly) and to `random` other blocks,
        drawn with `seed`, the same for all samples and heads. The last block may be shorter.

        Args:
            batch: the number of samples.
            length: tokens of a sample.
            block: tokens of a block.
            local: the block itself and its nearest neighbours; an odd number of blocks.
            random: the number of random blocks; at most as many as remain.

        Raises:
            ValueError: a number is out of range.

        Source: SViTT, arXiv 2304.08809, 3.2.
        """
        counts = {"batch": batch, "length": length, "block": block, "local": local}
        for name, count in (counts | {"random": random}).items():
            check_count(name, count)
        blocks = -(-length // block) if block > 0 else 0
        if block < 1 or length < 1 or local < 1 or local % 2 == 0 or random < 0:
            raise ValueError(
                "need block >= 1, length >= 1, odd local >= 1, random >= 0, "
                f"got {block}, {length}, {local}, {random}"
            )
        local = min(local, blocks)
        if local + random > blocks:
            raise ValueError(f"need local + random <= {blocks} blocks, got {local} + {random}")
        attended = []  # small, and drawn on the host, so that all devices have the same pattern
        generator = torch.Generator().manual_seed(seed)
        for i in range(blocks):
            near = [(i + j - local // 2) % blocks for j in range(local)]
            others = [j for j in range(blocks) if j not in near]
            drawn = torch.randperm(len(others), generator=generator)[:random].tolist()
            attended.append(sorted(near + [others[j] for j in drawn]))
        starts = [min(b * block, length) for b in range(blocks + 1)]
        rows = [torch.cat([torch.arange(starts[b], starts[b + 1]) for b in i]) for i in attended]
        keys = torch.tensor([0, *map(len, rows)]).cumsum(0)
        sample_rows = torch.cat(rows)
        check_rows("keys of all blocks", batch * len(sample_rows))
        sample = torch.arange(batch)[:, None]
        key_rows = (sample * length + sample_rows).flatten()
        key_offsets = torch.cat(
            [(sample * len(sample_rows) + keys[:-1]).flatten(), keys[-1:] * batch]
        )
        query_offsets = torch.cat(
            [
                (sample * length + torch.tensor(starts[:-1])).flatten(),
                torch.tensor([batch * length]),
            ]
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
            max_rows=length,
            group_sample=torch.arange(batch).repeat_interleave(blocks).to(device),
            checked=True,
        ).with_entries()

    def with_global(self) -> "Groups":
        """Add a global token (CLS) to every sample, as the first row of the sample.

        Every group of the sample attends to the global token; the global token attends to every
        row of the sample. Row r of sample b becomes row r + b + 1.

        Raises:
            ValueError: the groups are not of self-attention, or lack row_offsets or group_sample.

        Source: Frozen in Time, arXiv 2104.00650, 3.1 (VarAttention).
        """
        if self.row_offsets is None or self.group_sample is None:
            raise ValueError("need groups with row_offsets and group_sample, got None")
        if self.num_queries != self.num_keys:
            raise ValueError(
                f"need as many keys as queries, got {self.num_queries} and {self.num_keys}"
            )
        device = self.query_offsets.device
        B = self.row_offsets.shape[0] - 1
        samples = torch.arange(B, device=device)
        total = self.num_queries
        longest = 1 + (total if self.max_rows is None else self.max_rows)
        global_rows = self.row_offsets[:-1] + samples.int()
        row = torch.arange(total, device=device, dtype=torch.int32)
        sample = torch.searchsorted(self.row_offsets[1:].contiguous(), row, right=True)
        new_rows = row + sample.int() + 1

        query_rows = new_rows if self.query_rows is None else new_rows[self.query_rows]
        # The global key comes first in each group; then follow the groups of the global queries.
        key_offsets, key_rows = prepend_row(
            self.key_offsets, self.key_rows, new_rows, global_rows[self.group_sample]
        )
        all_rows = torch.arange(total + B, device=device, dtype=torch.int32)
        row_offsets = self.row_offsets + torch.arange(B + 1, device=device, dtype=torch.int32)
        limits = self.query_limits
        if limits is not None:  # of the global token first: all rows of its sample
            limits = limits.new_zeros(total + B).index_copy(0, new_rows.long(), limits + 1)
            limits = limits.index_copy(0, global_rows.long(), row_offsets.diff())
        steps = torch.arange(1, B + 1, device=device, dtype=torch.int32)
        return replace(
            self,
            query_offsets=torch.cat([self.query_offsets, self.query_offsets[-1:] + steps]),
            key_offsets=torch.cat([key_offsets, key_offsets[-1:] + row_offsets[1:]]),
            query_rows=torch.cat([query_rows, global_rows]),
            key_rows=torch.cat([key_rows, all_rows]),
            max_queries=max(self.max_queries, 1),
            max_keys=longest if B else 0,
            num_queries=total + B,
            num_keys=total + B,
            uniform=False,
            row_offsets=row_offsets,
            max_rows=longest,
            group_sample=torch.cat([self.group_sample, samples]),
            num_global=B,
            max_local_keys=1 + self.max_keys,
            query_limits=limits,
            is_causal=False,
            checked=True,
        ).with_entries()

    def causal(self) -> "Groups":
        """Query i of a group sees its keys up to key i, in the order of `key_rows`.

        Limits that the groups already have stay in force.
        """
        _, place = self._places()
        equal = self.uniform and self.max_queries == self.max_keys
        own = self.query_rows is self.key_rows and (equal or self.query_offsets is self.key_offsets)
        return self._limited(place + 1, is_causal=own and self.query_limits is None)

    def padded(self, lengths: Tensor) -> "Groups":
        """Only the first keys of each group are real: its queries see no others.

        Queries beyond them are computed as all others. Limits that the groups already have stay in
        force.

        Args:
            lengths: [G] int32 or int64, the real keys of each group.

        Raises:
            TypeError, ValueError: the dtype, shape or device does not fit, or a length is negative.
        """
        check_tensors(query_offsets=self.query_offsets, lengths=lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"need lengths in int64 or int32, got {lengths.dtype}")
        check_shape("lengths", lengths, self.num_groups)
        require((lengths >= 0).all(), "need lengths >= 0")
        group, _ = self._places()
        return self._limited(lengths[group])

    def _places(self) -> tuple[Tensor, Tensor]:
        """The group of each query, and its place in the group, by row of q, [num_queries] both."""
        group = group_of(self.query_offsets, self.num_queries)
        place = torch.arange(self.num_queries, device=group.device) - self.query_offsets[group]
        if self.query_rows is None:
            return group, place
        rows = self.query_rows.long()
        return torch.empty_like(group).index_copy(0, rows, group), torch.empty_like(
            place
        ).index_copy(0, rows, place)

    def _limited(self, limits: Tensor, is_causal: bool = False) -> "Groups":
        """The groups with these limits of the queries, the number of keys and the limits so far."""
        keys = self.key_offsets.diff()[self._places()[0]]
        limits = torch.minimum(limits, keys).int()
        if self.query_limits is not None:
            limits = torch.minimum(limits, self.query_limits)
        return replace(self, query_limits=limits, is_causal=is_causal, checked=True)

    def with_entries(self) -> "Groups":
        """Add the list of entries of every row of k and v; for keys in several groups.

        Raises:
            ValueError: the groups have no key_rows.
        """
        if self.key_rows is None:
            raise ValueError("need groups with key_rows, got None")
        entry_offsets, entries = entries_of(self)
        return replace(self, entry_offsets=entry_offsets, entries=entries, checked=True)

    def check(self) -> "Groups":
        """Check every index on the host: slow, for tests and debugging.

        Returns:
            The groups themselves.

        Raises:
            ValueError: offsets do not ascend from 0 to the number of members, a group exceeds its
                bound, a row is out of range, a query is not in exactly one group, a key is in
                several groups without entries, or a limit is not between 0 and the keys of its
                group.
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
                raise ValueError(f"need every query in exactly one group, got rows {wrong} wrong")
        if self.entry_offsets is not None and not bool(entries_fit(self)):
            raise ValueError("need entry_offsets and entries of these key_rows (see with_entries)")
        if self.entry_offsets is None and may_repeat(self):
            raise ValueError("need every key in one group, or entries (see with_entries)")
        if self.query_limits is not None and not bool(limits_fit(self)):
            raise ValueError(
                "need query_limits between 0 and the number of keys of the group, got "
                f"{self.query_limits.tolist()}"
            )
        return self


class Tokens:
    """The sample of each visible token, and its frame, row and column in the clip.

    Args:
        ids, grid, cu_seqlens: as for `Groups.spatial`.
        of: what the names of the arguments begin with, for errors.
    """

    def __init__(self, ids: Tensor, grid: Grid, cu_seqlens: Tensor | None, of: str = "") -> None:
        check_tensors((f"{of}cu_seqlens",), **{f"{of}ids": ids, f"{of}cu_seqlens": cu_seqlens})
        if (ids.ndim != 2) if cu_seqlens is None else (ids.ndim != 1):
            raise ValueError(
                f"need {of}ids [B, K], or [total] with cu_seqlens, got {tuple(ids.shape)}"
            )
        check_counts(f"{of}grid", grid, 3)
        check_dtype(f"{of}ids", ids, torch.int64)
        T, H, W = grid
        device, N = ids.device, T * H * W
        check_rows(f"{of}ids", ids.numel())
        require(((ids >= 0) & (ids < N)).all(), f"need {of}ids in [0, {{N}}) for this grid", N=N)
        if cu_seqlens is None:
            self.samples, K = ids.shape
            self.row_offsets = torch.arange(self.samples + 1, device=device, dtype=torch.int32) * K
            self.sample = torch.arange(self.samples, device=device).repeat_interleave(
                K, output_size=self.samples * K
            )
            self.most = K
        else:
            require_offsets("cu_seqlens", cu_seqlens, ids.shape[0])
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
            max_rows=self.most,
            group_sample=samples.repeat_interleave(count, output_size=self.samples * count),
        )


def prepend_row(
    offsets: Tensor, rows: Tensor | None, new_rows: Tensor, first_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Renumber the rows, and add one more row in front of each group.

    Args:
        offsets, rows: of the queries or the keys of `Groups`.
        new_rows: the new number of every row.
        first_rows: [G], the row to add to each group.

    Returns:
        The new offsets [G + 1] and rows, int32.
    """
    G, members = first_rows.shape[0], new_rows if rows is None else new_rows[rows]
    device = offsets.device
    result = torch.empty(members.shape[0] + G, dtype=torch.int32, device=device)
    # A member of group g moves by the g + 1 rows that are added before it.
    place = torch.arange(members.shape[0], device=device)
    result[place + group_of(offsets, members.shape[0]) + 1] = members.int()
    result[offsets[:-1].long() + torch.arange(G, device=device)] = first_rows.int()
    return offsets + torch.arange(G + 1, device=device, dtype=torch.int32), result


def group_of(offsets: Tensor, count: int) -> Tensor:
    """The group of each of the `count` members of all groups, [count] int64."""
    place = torch.arange(count, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True)


register(Groups)
