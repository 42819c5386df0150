"""Checks of `Groups`, without a host sync, and the entries of keys in several groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, require

if TYPE_CHECKING:
    from .membership import Groups


def check_rows(name: str, count: int) -> None:
    if count >= 2**31:
        raise ValueError(f"need fewer than 2^31 rows, got {count} {name}")


def require_offsets(name: str, offsets: Tensor, members: int, longest: int | None = None) -> None:
    if offsets.dtype != torch.int32:
        raise TypeError(f"need {name} in int32, got {offsets.dtype}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"need {name} [B + 1], got {tuple(offsets.shape)}")
    steps = offsets.diff()
    ascend = (offsets[0] == 0) & (offsets[-1] == members) & (steps >= 0).all()
    require(ascend, f"need {name} that ascend from 0 to {{members}}", members=members)
    if longest is not None:
        message = f"need groups of at most {{longest}} rows in {name}"
        require((steps <= longest).all(), message, longest=longest)


def on_host(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def check_types(groups: Groups) -> None:
    """Check whatever is known without the values of the tensors."""
    for name in ("max_queries", "max_keys", "num_queries", "num_keys"):
        check_count(name, getattr(groups, name))
    device, G = groups.query_offsets.device, groups.query_offsets.shape[0] - 1
    E = groups.num_keys if groups.key_rows is None else groups.key_rows.shape[0]
    for name, size in (
        ("query_offsets", G + 1),
        ("key_offsets", G + 1),
        ("query_rows", groups.num_queries),
        ("key_rows", E),
        ("entry_offsets", groups.num_keys + 1),
        ("entries", E),
        ("query_limits", groups.num_queries),
    ):
        x = getattr(groups, name)
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise TypeError(f"need {name} in int32, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"need {name} on {device}, got {x.device}")
        if x.shape != (size,):
            raise ValueError(f"need {name} [{size}], got {tuple(x.shape)}")
    if (groups.entry_offsets is None) != (groups.entries is None):
        raise ValueError("need entry_offsets and entries, or neither")
    if groups.is_causal and groups.query_limits is None:
        raise ValueError("need query_limits of causal groups, got None")


def require_valid(groups: Groups) -> None:
    """What `Groups.check` checks, as assertions on the device."""
    for name, offsets, rows, count, longest in (
        ("query", groups.query_offsets, groups.query_rows, groups.num_queries, groups.max_queries),
        ("key", groups.key_offsets, groups.key_rows, groups.num_keys, groups.max_keys),
    ):
        members = count if rows is None else rows.shape[0]
        require_offsets(f"{name}_offsets", offsets, members, longest)
        if rows is not None:
            inside = ((rows >= 0) & (rows < count)).all()
            require(inside, f"need {name}_rows in [0, {{count}})", count=count)
    if groups.query_rows is not None:
        once = _times(groups.query_rows, groups.num_queries) == 1
        require(once.all(), "need every query in exactly one group")
    if groups.entries is not None:
        require(entries_fit(groups), "need entry_offsets and entries of these key_rows")
    if groups.query_limits is not None:
        message = "need query_limits between 0 and the number of keys of the group"
        require(limits_fit(groups), message)


def _times(rows: Tensor, count: int) -> Tensor:
    """How often each of `count` rows is listed, [count] int32."""
    times = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    inside = torch.where((rows >= 0) & (rows < count), rows, count).long()
    return times.scatter_add_(0, inside, torch.ones_like(rows))[:count]


def may_repeat(groups: Groups) -> bool:
    """Whether a key may be in several groups, as far as the host knows."""
    rows = groups.key_rows
    if rows is None or rows is groups.query_rows:
        return False
    return not on_host(rows) or bool((_times(rows, groups.num_keys) > 1).any())


def entries_fit(groups: Groups) -> Tensor:
    """Whether the entries of every key are the places of `key_rows` that hold it."""
    offsets, entries = entries_of(groups)
    assert groups.entry_offsets is not None and groups.entries is not None
    return (offsets == groups.entry_offsets).all() & (entries == groups.entries).all()


def limits_fit(groups: Groups) -> Tensor:
    """Whether the limit of every query is between 0 and the number of keys of its group."""
    assert groups.query_limits is not None
    limits = groups.query_limits
    if groups.query_rows is not None:  # by place in the list of queries
        inside = (groups.query_rows >= 0) & (groups.query_rows < groups.num_queries)
        limits = limits[groups.query_rows.where(inside, 0)] if limits.shape[0] else limits
    place = torch.arange(groups.num_queries, device=limits.device, dtype=torch.int32)
    ends = groups.query_offsets[1:].contiguous()
    last = max(groups.key_offsets.shape[0] - 2, 0)
    group = torch.searchsorted(ends, place, right=True).clamp(max=last)
    keys = groups.key_offsets.diff()
    return ((limits >= 0) & (limits <= (keys[group] if keys.shape[0] else 0))).all()


def entries_of(groups: Groups) -> tuple[Tensor, Tensor]:
    """`entry_offsets` and `entries`; a row that is out of range has none."""
    rows, count = groups.key_rows, groups.num_keys
    if rows is None:
        rows = torch.arange(count, dtype=torch.int32, device=groups.key_offsets.device)
    inside = torch.where((rows >= 0) & (rows < count), rows, count).long()
    offsets = offsets_of(inside, count + 1)
    return offsets[:-1].contiguous(), torch.argsort(inside, stable=True).int()


def offsets_of(labels: Tensor, count: int) -> Tensor:
    """Where each label begins in the sorted labels, [count + 1] int32, without a host sync."""
    sizes = torch.zeros(count + 1, dtype=torch.int32, device=labels.device)
    sizes.scatter_add_(0, labels + 1, torch.ones_like(labels, dtype=torch.int32))
    return sizes.cumsum(0, dtype=torch.int32)
