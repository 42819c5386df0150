"""Arranges the rows of a model in groups of attention, as the baselines need them.

Baselines need groups of one size in a batch, or all groups one after the other. A layout copies the
rows into that order and the results back, with as few copies as possible.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.groups import Grid, Groups

Part = tuple[Tensor, Tensor, Tensor, Tensor | None]  # q, k, v [G, H, N, D] and a mask


class Layout:
    """The groups of the rows of a batch, for vidl and for the baselines."""

    batch: str  # describes the batches of `split`
    groups: Groups
    sequences: int = 1  # sequences of equally many rows, with the same groups
    labels: Tensor | None = None  # group of each row of a sequence, -1: all; None: equal groups

    def __init__(self, device: str, queries: list[list[int]], keys: list[list[int]]) -> None:
        """Take the numbers of queries and keys of all groups, one list per part of `split`."""
        self.parts = queries
        self.queries, self.keys = sum(queries, []), sum(keys, [])
        q, k = (torch.tensor([0, *itertools.accumulate(s)]) for s in (self.queries, self.keys))
        self.offsets = q.int().to(device), k.int().to(device)
        self.rows = sum(self.queries)
        self.pairs = sum(q * k for q, k in zip(self.queries, self.keys, strict=True))

    def split(self, qkv: Tensor) -> list[Part]:
        """Batches of groups of one size, from qkv [rows, 3, H, D]."""
        raise NotImplementedError

    def join(self, outs: list[Tensor]) -> Tensor:
        """Merge the results [G, H, N, D] of the batches into [rows, H, D]."""
        raise NotImplementedError

    def packed(self, qkv: Tensor) -> list[Tensor]:
        """q, k and v, [entries, H, D], group after group."""
        parts = [[x.transpose(1, 2).flatten(0, 1) for x in part[:3]] for part in self.split(qkv)]
        return [torch.cat(xs) if len(xs) > 1 else xs[0] for xs in zip(*parts, strict=True)]

    def unpack(self, out: Tensor) -> Tensor:
        """Reorder the result of packed queries into [rows, H, D]."""
        pieces = zip(out.split([sum(sizes) for sizes in self.parts]), self.parts, strict=True)
        return self.join([x.unflatten(0, (len(s), s[0])).transpose(1, 2) for x, s in pieces])


class Windows(Layout):
    """Clips in windows of one size: frames, positions through time, blocks, or the whole clip."""

    def __init__(self, B: int, device: str, grid: Grid, window: Grid) -> None:
        self.B, self.grid, self.window = B, grid, window
        self.counts = tuple(n // w for n, w in zip(grid, window, strict=True))
        self.G, self.N = B * math.prod(self.counts), math.prod(window)
        super().__init__(device, [[self.N] * self.G], [[self.N] * self.G])
        first = next((i for i, n in enumerate(window) if n > 1), 2)
        if window[first + 1 :] == grid[first + 1 :]:  # the rows of a window are contiguous
            self.batch = "one batch"
            self.groups = Groups.equal(self.G, self.N, device=device)
        else:
            self.batch = "copied batch"
            ids = torch.arange(math.prod(grid), device=device).expand(B, -1)
            self.groups = Groups.window(ids, grid, window)

    def split(self, qkv: Tensor) -> list[Part]:
        (T, H, W), (t, h, w) = self.counts, self.window
        rows = qkv.unflatten(0, (self.B, T, t, H, h, W, w)).permute(0, 1, 3, 5, 2, 4, 6, 7, 8, 9)
        q, k, v = rows.reshape(self.G, self.N, *qkv.shape[1:]).transpose(1, 3).unbind(2)
        return [(q, k, v, None)]

    def join(self, outs: list[Tensor]) -> Tensor:
        rows = outs[0].transpose(1, 2).flatten(0, 1)
        cut = rows.unflatten(0, (self.B, *self.counts, *self.window))
        return cut.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).reshape(rows.shape)


class Ragged(Layout):
    """Contiguous groups of different sizes: frames under random masks, or clips of any length."""

    batch = "padded with mask"

    def __init__(self, B: int, device: str, groups: int, shortest: int, longest: int) -> None:
        sizes = [shortest + 17 * i % (longest - shortest + 1) for i in range(B * groups)]
        super().__init__(device, [sizes], [sizes])
        self.N, lengths = max(sizes), torch.tensor(sizes, device=device)
        self.groups = Groups.joint(self.offsets[0], self.rows, self.N)
        self.labels = torch.arange(B * groups, device=device).repeat_interleave(lengths)
        real = torch.arange(self.N, device=device) < lengths[:, None]
        self.mask, self.positions = real[:, None, None, :], real.flatten().nonzero().flatten()

    def split(self, qkv: Tensor) -> list[Part]:
        padded = qkv.new_zeros(len(self.queries) * self.N, *qkv.shape[1:])
        padded = padded.index_copy(0, self.positions, qkv).unflatten(0, (-1, self.N))
        q, k, v = padded.transpose(1, 3).unbind(2)
        return [(q, k, v, self.mask)]

    def join(self, outs: list[Tensor]) -> Tensor:
        return outs[0].transpose(1, 2).flatten(0, 1).index_select(0, self.positions)

    def packed(self, qkv: Tensor) -> list[Tensor]:
        return list(qkv.unbind(1))

    def unpack(self, out: Tensor) -> Tensor:
        return out


class Divided(Layout):
    """Frozen in Time: each frame also attends to the global token, which attends to all rows."""

    batch = "frames, then global"

    def __init__(self, B: int, device: str, frames: int, size: int) -> None:
        G, N = B * frames, 1 + frames * size
        super().__init__(device, [[size] * G, [1] * B], [[size + 1] * G, [N] * B])
        self.sequences, self.T = B, frames
        ids = torch.arange(N - 1, device=device)
        self.labels = F.pad(ids // size, (1, 0), value=-1)
        self.groups = Groups.spatial(ids.expand(B, -1), (frames, 1, size)).with_global()

    def split(self, qkv: Tensor) -> list[Part]:
        q, k, v = qkv.unflatten(0, (self.sequences, -1)).transpose(1, 3).unbind(2)  # [B, H, N, D]
        first = [x[:, None, :, :1].expand(-1, self.T, -1, -1, -1) for x in (k, v)]
        keys = [torch.cat([x, self._frames(y)], 3) for x, y in zip(first, (k, v), strict=True)]
        frames = [x.flatten(0, 1) for x in (self._frames(q), *keys)]
        return [(frames[0], frames[1], frames[2], None), (q[:, :, :1], k, v, None)]

    def join(self, outs: list[Tensor]) -> Tensor:
        frames, first = (x.transpose(1, 2) for x in outs)
        rows = [first, frames.unflatten(0, (self.sequences, -1)).flatten(1, 2)]
        return torch.cat(rows, 1).flatten(0, 1)

    def _frames(self, x: Tensor) -> Tensor:
        """Split [B, H, N, D] without its first row into frames, [B, T, H, P, D]."""
        return x[:, :, 1:].unflatten(2, (self.T, -1)).transpose(1, 2)


@functools.lru_cache(maxsize=4)  # shared by the check, the modes and the limit of a case
def layout_of(form: str, B: int, device: str, **sizes: Any) -> Layout:
    forms: dict[str, Callable[..., Layout]]
    forms = {"windows": Windows, "ragged": Ragged, "divided": Divided}
    return forms[form](B, device, **sizes)
