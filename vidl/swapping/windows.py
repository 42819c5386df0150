"""Attention of Swin in windows of a map, without rolling and partitioning it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.groups import Groups, Positions
from vidl.swapping.attention import attend, cached

Size = tuple[int, int, int]


def attend_in_windows(
    qkv: Tensor, table: Tensor, size: Size, shift: Size, reach: Size, **options: Any
) -> Tensor:
    """Attention within the windows of a map, [B, T, H, W, H D].

    Args:
        qkv: queries, keys and values of whole windows, [B, T, H, W, 3, H, D].
        table: of relative positions, [rows, H].
        size: frames, rows and columns of a window.
        shift: how far the first border lies inside the map.
        reach: the window that the table is for; `size` may be smaller, where it is cut off.
        options: of `vidl.swapping.attention.attend`.
    """
    B, grid, device = qkv.shape[0], qkv.shape[1:4], qkv.device
    q, k, v = qkv.flatten(1, 3).unbind(2)
    groups = windows(B, *grid, *size, *shift, device)
    positions = positions_in(B, *grid, *size, *shift, *reach, device)
    out, _ = attend(q, k, v, groups=groups, bias=table, positions=positions, **options)
    return out.unflatten(1, grid)


@cached
def windows(B: int, *numbers: Any) -> Groups:
    """The groups of `attend_in_windows`."""
    grid, size, shift = (numbers[i : i + 3] for i in (0, 3, 6))
    return Groups.window(all_ids(B, grid, numbers[-1]), grid, size, shift)


@cached
def positions_in(B: int, *numbers: Any) -> Positions:
    """The positions of `attend_in_windows`."""
    grid, size, shift, reach = (numbers[i : i + 3] for i in (0, 3, 6, 9))
    ids = all_ids(1, grid, numbers[-1])
    return Positions.first(ids, grid, size, reach=reach, shift=shift).repeat(B)


def all_ids(B: int, grid: Sequence[int], device: torch.device) -> Tensor:
    """The ids of the tokens of B whole maps."""
    T, H, W = grid
    return torch.arange(T * H * W, device=device).expand(B, -1)


def pad_to_windows(x: Tensor, size: Size) -> Tensor:
    """A map [B, T, H, W, C] with zeros at its ends, so that windows divide it."""
    T, H, W = (-n % m for n, m in zip(x.shape[1:4], size, strict=True))
    return F.pad(x, (0, 0, 0, W, 0, H, 0, T)) if T or H or W else x
