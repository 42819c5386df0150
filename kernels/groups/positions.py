"""Where tokens stand, for attention with a table of relative positions.

The logits of query i and key j get the number `bias[row, h]` of a learned table [rows, H], where

    row = clamp(query_codes[i] - key_codes[j], -wrap, rows - 1 - wrap) modulo rows

So one int32 a token is enough, and tokens that are pruned, masked or in windows need nothing else.
The clamp keeps every row inside the table.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vidl.kernels.arguments import (
    check_count,
    check_counts,
    check_dtype,
    check_shape,
    check_tensors,
)

from .checks import require_offsets
from .membership import Grid, Groups, Tokens
from .pytree import register

GLOBAL_ROWS = 3  # of a table, for the displacements to, from and between global tokens


@dataclass(frozen=True, eq=False)
class Positions:
    """Codes of the rows of q and of k, whose difference is a row of a table of biases.

    Made once for a mask, on the device; shared by all layers and heads.

    Attributes:
        query_codes: [num_queries] int32, by row of q.
        key_codes: [num_keys] int32, by row of k.
        rows: the rows of the table.
        wrap: so many of the table's last rows stand before its first.
        row_offsets: [B + 1] int32, where the rows of each sample begin; None if unknown.
        period: the codes repeat after so many rows of q, those of a sample; 0: not known.
    """

    query_codes: Tensor
    key_codes: Tensor
    rows: int
    wrap: int = 0
    row_offsets: Tensor | None = None
    period: int = 0
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if checked:
            return
        check_count("rows", self.rows, least=1)
        check_count("wrap", self.wrap)
        if self.wrap >= self.rows:
            raise ValueError(f"need wrap < rows, got {self.wrap} and {self.rows}")
        for name in ("query_codes", "key_codes"):
            codes = getattr(self, name)
            if not isinstance(codes, Tensor):
                raise TypeError(f"need {name} as a tensor, got {type(codes).__name__}")
            check_dtype(name, codes, torch.int32)
            check_shape(name, codes, "rows")
            object.__setattr__(self, name, codes.contiguous())
        if self.query_codes.device != self.key_codes.device:
            raise ValueError(
                "need query_codes and key_codes on one device, got "
                f"{self.query_codes.device} and {self.key_codes.device}"
            )

    @staticmethod
    def grid(
        ids: Tensor,
        grid: Grid,
        *,
        reach: Grid | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> "Positions":
        """Patches of a clip, by their displacement in time, height and width.

        Row (dt + t - 1, dy + y - 1, dx + x - 1) of a table [2 t - 1, 2 y - 1, 2 x - 1] belongs to
        the displacement (dt, dy, dx) from a key to a query, where (t, y, x) is the reach. Windows
        of `Groups.window`, shifted or not, share the positions of the clip.

        Args:
            ids, grid, cu_seqlens: as for `Groups.spatial`.
            reach: frames, rows and columns that the table was made for; default: the grid. With
                one frame, the table counts for the patches of one frame.

        Source: Swin Transformer, arXiv 2103.14030, 3.2; Video Swin, arXiv 2106.13230, 3.2.
        """
        reach = grid if reach is None else reach
        tokens = Tokens(ids, grid, cu_seqlens)
        codes = _codes(tokens, reach)
        return Positions(codes + _centre(reach), codes, _rows(reach), 0, tokens.row_offsets)

    @staticmethod
    def first(
        ids: Tensor,
        grid: Grid,
        size: Grid,
        *,
        reach: Grid,
        shift: Grid = (0, 0, 0),
        cu_seqlens: Tensor | None = None,
    ) -> "Positions":
        """Patches of windows that the clip cuts off: token i counts as token i of a whole window.

        torchvision and Video Swin number them so. It equals `grid` where only time is cut off.

        Args:
            ids, grid, size, shift, cu_seqlens: as for `Groups.window`.
            reach: the whole window, which the table was made for.

        Raises:
            ValueError: a window exceeds the reach.
        """
        check_counts("size", size, 3)
        check_counts("reach", reach, 3)
        check_counts("shift", shift, 3, least=0)
        if any(n > whole for n, whole in zip(size, reach, strict=True)):
            raise ValueError(f"need size <= reach, got {size} and {reach}")
        tokens = Tokens(ids, grid, cu_seqlens)
        number = torch.zeros_like(tokens.time)
        for place, n, offset in zip(
            (tokens.time, tokens.row, tokens.column), size, shift, strict=True
        ):
            number = number * n + (place + (n - offset if offset else 0)) % n
        whole = Tokens(number[None], reach, None)
        codes = _codes(whole, reach)
        return Positions(codes + _centre(reach), codes, _rows(reach), 0, tokens.row_offsets)

    @staticmethod
    def cross(
        query_ids: Tensor,
        query_grid: Grid,
        key_ids: Tensor,
        key_grid: Grid,
        *,
        reach: Grid | None = None,
        cu_queries: Tensor | None = None,
        cu_keys: Tensor | None = None,
    ) -> "Positions":
        """Queries of one grid of patches and keys of another, as `grid` has them.

        Args:
            query_ids, query_grid, cu_queries: of the queries, as for `Groups.spatial`.
            key_ids, key_grid, cu_keys: of the keys.
            reach: see `grid`; default: in each dimension the larger of the two grids.
        """
        queries = Tokens(query_ids, query_grid, cu_queries, of="query_")
        keys = Tokens(key_ids, key_grid, cu_keys, of="key_")
        if reach is None:
            (t, y, x), (u, z, w) = query_grid, key_grid
            reach = max(t, u), max(y, z), max(x, w)
        codes = _codes(queries, reach) + _centre(reach)
        return Positions(codes, _codes(keys, reach), _rows(reach))

    @staticmethod
    def sequence(cu_seqlens: Tensor, total: int, reach: int) -> "Positions":
        """Words, by their distance, which is cut off at `reach`.

        Row d + reach of a table [2 reach + 1] belongs to the distance d from a key to a query.

        Args:
            cu_seqlens: [B + 1] int32, where each sample begins.
            total: the number of rows.
            reach: the greatest distance with a row of its own.

        Source: Shaw et al., arXiv 1803.02155, 3.2.
        """
        check_count("total", total)
        check_count("reach", reach)
        check_tensors(cu_seqlens=cu_seqlens)
        require_offsets("cu_seqlens", cu_seqlens, total)
        place = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
        return Positions(place + reach, place, 2 * reach + 1, 0, cu_seqlens)

    def with_global(self) -> "Positions":
        """Add a global token (CLS) to every sample, as `Groups.with_global` does.

        The table has three more rows at its end: from the global query to a key, from a query to
        the global key, and from the global token to itself.

        Raises:
            ValueError: the positions have a global token already, or lack row_offsets.

        Source: BEiT, arXiv 2106.08254 (the code's relative_position_index).
        """
        if self.row_offsets is None or self.wrap:
            raise ValueError("need positions with row_offsets and without a global token")
        B = self.row_offsets.shape[0] - 1
        device = self.query_codes.device
        steps = torch.arange(B + 1, dtype=torch.int32, device=device)
        total = self.query_codes.shape[0]
        row = torch.arange(total, dtype=torch.int32, device=device)
        sample = torch.searchsorted(self.row_offsets[1:].contiguous(), row, right=True)
        place = row + sample + 1
        # Beyond every difference: those to and from a global token are clamped to an end.
        far = 4 * self.rows
        query_codes = self.query_codes.new_full((total + B,), far)
        key_codes = self.key_codes.new_full((total + B,), far + 1)
        return Positions(
            query_codes.index_copy(0, place, self.query_codes),
            key_codes.index_copy(0, place, self.key_codes),
            self.rows + GLOBAL_ROWS,
            GLOBAL_ROWS - 1,
            self.row_offsets + steps,
        )

    def select(self, rows: Tensor, row_offsets: Tensor | None = None) -> "Positions":
        """The positions of some rows, as after `select_tokens`.

        Args:
            rows: [new rows] int64 or int32, rows of q and of k.
            row_offsets: [B + 1] int32, where each sample begins in them; None if unknown.
        """
        check_tensors(query_codes=self.query_codes, rows=rows)
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"need rows in int64 or int32, got {rows.dtype}")
        check_shape("rows", rows, "rows")
        return replace(
            self,
            query_codes=self.query_codes[rows],
            key_codes=self.key_codes[rows],
            row_offsets=row_offsets,
            period=0,
        )

    def repeat(self, samples: int) -> "Positions":
        """The same positions for each of so many samples.

        The backend "torch" then makes one mask for all samples of equal length.

        Raises:
            TypeError, ValueError: the number is not an int, or is negative.
        """
        check_count("samples", samples)
        rows = self.query_codes.shape[0]
        steps = torch.arange(samples + 1, dtype=torch.int32, device=self.query_codes.device)
        return replace(
            self,
            query_codes=self.query_codes.repeat(samples),
            key_codes=self.key_codes.repeat(samples),
            row_offsets=steps * rows,
            period=rows,
            checked=True,
        )

    def to(self, device: torch.device | str) -> "Positions":
        """The same positions on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: Any = {name: x.to(device) for name, x in values if isinstance(x, Tensor)}
        return replace(self, **moved, checked=True)

    def index(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The rows of the table for codes of queries and keys that broadcast to one shape, int64.

        Kernels never make this tensor.
        """
        difference = queries.long() - keys.long()
        return difference.clamp(-self.wrap, self.rows - 1 - self.wrap) % self.rows

    def check(self, groups: Groups) -> "Positions":
        """Check that the keys of a query have rows of their own, on the host: slow.

        Rows at the two ends of the table may repeat, as those of global tokens do.

        Returns:
            The positions themselves.

        Raises:
            ValueError: the codes do not fit the groups, or two keys of one query have one row.
        """
        self.require_fit(groups)
        query_rows, key_rows = (
            torch.arange(count) if rows is None else rows.long().cpu()
            for rows, count in (
                (groups.query_rows, groups.num_queries),
                (groups.key_rows, groups.num_keys),
            )
        )
        query_steps, key_steps = groups.query_offsets.tolist(), groups.key_offsets.tolist()
        query_codes, key_codes = self.query_codes.cpu(), self.key_codes.cpu()
        for g in range(groups.num_groups):
            queries = query_codes[query_rows[query_steps[g] : query_steps[g + 1]]]
            keys = key_codes[key_rows[key_steps[g] : key_steps[g + 1]]]
            place = (self.index(queries[:, None], keys) + self.wrap) % self.rows
            place = place.sort(1).values
            inner = (place[:, 1:] > 0) & (place[:, 1:] < self.rows - 1)
            if bool((inner & (place[:, 1:] == place[:, :-1])).any()):
                raise ValueError(f"need keys with distinct rows of the table, group {g} has others")
        return self

    def require_fit(self, groups: Groups) -> None:
        """Raise unless there is a code for every row of the groups, on their device."""
        for name, codes, count in (
            ("query_codes", self.query_codes, groups.num_queries),
            ("key_codes", self.key_codes, groups.num_keys),
        ):
            check_shape(f"positions.{name}", codes, count)
            if codes.device != groups.query_offsets.device:
                raise ValueError(
                    f"need positions on {groups.query_offsets.device} as groups are, got "
                    f"{codes.device}"
                )


def _strides(reach: Sequence[int]) -> tuple[int, int, int]:
    """How far apart the codes of neighbours in time, height and width are."""
    check_counts("reach", reach, 3)
    _, height, width = reach
    return (2 * height - 1) * (2 * width - 1), 2 * width - 1, 1


def _codes(tokens: Tokens, reach: Grid) -> Tensor:
    frame, row, column = _strides(reach)
    return (tokens.time * frame + tokens.row * row + tokens.column * column).int()


def _centre(reach: Grid) -> int:
    """The row of no displacement."""
    frame, row, column = _strides(reach)
    return (reach[0] - 1) * frame + (reach[1] - 1) * row + (reach[2] - 1) * column


def _rows(reach: Grid) -> int:
    return (2 * reach[0] - 1) * _strides(reach)[0]


register(Positions)
