"""Tables of relative positions for another grid than they were trained for."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.arguments import check_count, check_counts, check_floating
from vidl.kernels.groups import Grid
from vidl.kernels.groups.positions import GLOBAL_ROWS


def resize_table(
    table: Tensor, old: Grid, new: Grid, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Interpolate a table of relative positions for grids of another height and width.

    Args:
        table: [rows, H], as `Positions.grid` reads it; the three rows of a global token, if there
            are any, stay as they are.
        old, new: frames, rows and columns of patches, of as many frames.
        mode: "bicubic", as timm resizes Swin's tables, or "bilinear", as transformers BEiT's.

    Raises:
        TypeError, ValueError: the table is not of the old grid, or an argument is something else.
    """
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"need mode 'bicubic' or 'bilinear', got {mode!r}")
    sizes = _sizes(table, "old", old)
    check_counts("new", new, 3)
    if old[0] != new[0]:
        raise ValueError(f"need as many frames, got {old[0]} and {new[0]} (see inflate_table)")
    count = math.prod(sizes)
    planes = table[:count].unflatten(0, sizes).permute(0, 3, 1, 2)  # [2 T - 1, H, rows, columns]
    size = (2 * new[1] - 1, 2 * new[2] - 1)
    resized = F.interpolate(planes.float(), size, mode=mode).to(table.dtype)
    return torch.cat([resized.permute(0, 2, 3, 1).flatten(0, 2), table[count:]])


def inflate_table(table: Tensor, grid: Grid, frames: int) -> Tensor:
    """Repeat a table for the displacements in time of a longer clip.

    The displacements of the longer clip are spread over those of the table, and each gets the
    numbers of the nearest. So a table of one frame, as of a pretrained image model, is repeated.

    Args:
        table: [rows, H], as `Positions.grid` reads it, with or without the three rows of a global
            token.
        grid: frames, rows and columns of patches.
        frames: of the clip that the new table is for.

    Returns:
        The table for the grid (frames, rows, columns).

    Raises:
        TypeError, ValueError: the table is not of this grid.

    Source: SViTT, arXiv 2304.08809, 3.2; Video Swin, arXiv 2106.13230, 3.3. The authors' code of
    SViTT rounds displacements down, which favours those into the future.
    """
    sizes = _sizes(table, "grid", grid)
    check_count("frames", frames, least=1)
    count = math.prod(sizes)
    middle = 2 * torch.arange(2 * frames - 1, device=table.device) + 1  # of each, doubled
    nearest = middle * sizes[0] // (2 * (2 * frames - 1))
    planes = table[:count].unflatten(0, (sizes[0], -1))[nearest]
    return torch.cat([planes.flatten(0, 1), table[count:]])


def _sizes(table: Tensor, name: str, grid: Grid) -> tuple[int, int, int]:
    """The displacements in time, height and width."""
    if not isinstance(table, Tensor):
        raise TypeError(f"need table as a tensor, got {type(table).__name__}")
    check_floating(table=table)
    check_counts(name, grid, 3)
    frames, rows, columns = (2 * n - 1 for n in grid)
    count = frames * rows * columns
    if table.ndim != 2 or table.shape[0] not in (count, count + GLOBAL_ROWS):
        raise ValueError(
            f"need table [{count}, H], or {GLOBAL_ROWS} rows more, for {name} {grid}, got "
            f"{tuple(table.shape)}"
        )
    return frames, rows, columns
