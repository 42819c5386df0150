"""torchvision's MViT and MViTv2: pooled attention, with relative positions as channels."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models.video.mvit as mvit
from torch import Tensor

from vidl.kernels.space_time_attention.op import HEAD_SIZES
from vidl.swapping.attention import attend, cached, speed
from vidl.swapping.registry import Family, Rule, state_of

Size = tuple[int, int, int]


class MultiscaleAttention(mvit.MultiscaleAttention):
    """torchvision's attention by `space_time_attention`."""

    def forward(self, x: Tensor, thw: Size) -> tuple[Tensor, Size]:
        state = state_of(self)
        assert state is not None
        B, N = x.shape[:2]
        # [B, H, N, D]
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).transpose(1, 3).unbind(2)
        k, size = (k, thw) if self.pool_k is None else self.pool_k(k, thw)
        v = v if self.pool_v is None else self.pool_v(v, thw)[0]
        q, thw = (q, thw) if self.pool_q is None else self.pool_q(q, thw)
        wide_q, wide_k = with_positions(self, q, k, thw, size) if has_positions(self) else (q, k)
        # Each head of a sample is a group of its own: pooling returns heads before tokens.
        rows = (x.flatten(0, 1)[:, :, None] for x in (wide_q, wide_k, v))
        out, _ = attend(*rows, scale=self.scaler, backend=state.backend)
        out = out.view(q.shape)
        if self.residual_pool:
            total = (out + q).to(out.dtype)
            if not self.residual_with_cls_embed:
                total = torch.cat([out[:, :, :1], total[:, :, 1:]], 2)
            out = total
        return self.project(out.transpose(1, 2).flatten(2)), thw


def has_positions(attention: Any) -> bool:
    """Whether the attention has tables of relative positions, as in MViTv2."""
    tables = (attention.rel_pos_t, attention.rel_pos_h, attention.rel_pos_w)
    return all(table is not None for table in tables)


def with_positions(
    attention: Any, q: Tensor, k: Tensor, queries: Size, keys: Size
) -> tuple[Tensor, Tensor]:
    """Queries and keys with relative positions as further channels.

    MViTv2 adds q . (T[t] + H[h] + W[w]) to the logit of a query and the key at (t, h, w), where
    the rows T[t], H[h] and W[w] of three tables depend on the place of the query. A query gets a
    channel for each frame, row and column of the keys, q . T[t] / scale and so on; a key has ones
    in the channels of its own. The class token, which comes first, has zeros.

    Args:
        q: [B, H, 1 + queries, D].
        k: [B, H, 1 + keys, D].
        queries, keys: frames, rows and columns of their grids.

    Returns:
        q and k, with as many channels as the kernels take.

    Source: MViTv2, arXiv 2112.01526, 4.1.
    """
    B, H, _, D = q.shape
    width = width_of(D, keys)
    patches = q[:, :, 1:].reshape(B, H, *queries, D)
    tables = (attention.rel_pos_t, attention.rel_pos_h, attention.rel_pos_w)
    axes = zip("thw", tables, queries, keys, strict=True)
    channels = [
        torch.einsum(f"bnthwc,{axis}kc->bnthwk", patches, rows_of(*table) / attention.scaler)
        for axis, *table in axes
    ]
    # The class token's, and those that fill up the width.
    added = F.pad(torch.cat(channels, -1).flatten(2, 4), (0, width - D - sum(keys), 1, 0))
    ones = places(*keys, width - D, k.device).to(k.dtype).expand(B, H, -1, -1)
    return torch.cat([q, added], -1), torch.cat([k, ones], -1)


def width_of(head_size: int, keys: Size) -> int:
    """How many channels q and k have, for keys of so many frames, rows and columns."""
    needed = head_size + sum(keys)
    return next((size for size in HEAD_SIZES if size >= needed), -(-needed // 8) * 8)


def rows_of(table: Tensor, queries: int, keys: int) -> Tensor:
    """The rows of a table for places of queries and keys along an axis, [queries, keys, D]."""
    table = mvit._interpolate(table, 2 * max(queries, keys) - 1)
    # The gradient of an embedding is deterministic.
    return F.embedding(distances(queries, keys, table.device), table)


@cached
def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """The rows of a table as torchvision computes them, in float32, [queries, keys] int64."""
    row = torch.arange(queries, device=device)[:, None] * max(keys / queries, 1.0)
    column = torch.arange(keys, device=device)[None] + (1.0 - keys)
    return (row - column * max(queries / keys, 1.0)).long()


@cached
def places(T: int, H: int, W: int, channels: int, device: torch.device) -> Tensor:
    """Ones in the channels of each key's frame, row and column, [1 + T H W, channels]."""
    axes = (torch.arange(n, device=device) for n in (T, H, W))
    ids = torch.cartesian_prod(*axes) + torch.tensor([0, T, T + H], device=device)
    ones = torch.zeros(len(ids), channels, device=device).scatter(1, ids, 1.0)
    return F.pad(ones, (0, 0, 1, 0))


def _note(attention: Any, backend: str) -> str:
    weight, width = attention.qkv.weight, attention.head_dim
    if has_positions(attention):
        width = width_of(width, _keys(attention))
    return speed(weight.device, weight.dtype, width, backend)


def _keys(attention: Any) -> Size:
    """Frames, rows and columns of the keys, for clips of the size that the tables were made for."""
    pools = (attention.pool_q, attention.pool_k)
    of_queries, of_keys = ((1, 1, 1) if p is None else p.pool.stride for p in pools)
    # A side has a row for each difference of places, on the larger of the two grids.
    frames, side = ((len(x) + 1) // 2 for x in (attention.rel_pos_t, attention.rel_pos_h))
    side = side * min(of_queries[1], of_keys[1]) // of_keys[1]
    return frames // of_keys[0], side, side


FAMILY = Family(rules=[Rule(mvit.MultiscaleAttention, MultiscaleAttention, note=_note)])
