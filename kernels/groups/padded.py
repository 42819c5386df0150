"""The members of each group, padded to the longest group: for definitions in plain PyTorch."""

import torch
from torch import Tensor

from .bias import NO_BIAS, Bias
from .membership import group_of


class Padded:
    """The queries, or the keys, of each group as a rectangle [G, longest].

    Args:
        offsets: [G + 1], where the members of each group begin in the list of all members.
        rows: the row of each member; None if member i is row i.
        longest: members of the longest group; with fewer, the rest of each group is left out.
    """

    def __init__(self, offsets: Tensor, rows: Tensor | None, longest: int) -> None:
        place = torch.arange(longest, device=offsets.device)
        self.offsets, self.rows, self.longest = offsets, rows, longest
        self.sizes = offsets.diff()
        self.real = place < self.sizes[:, None]  # [G, longest]
        self.member = offsets[:-1, None] + place

    def pad(self, x: Tensor) -> Tensor:
        """[rows, ...] to [G, longest, ...]; zeros beyond a group's end, since 0 x NaN is NaN."""
        end = x.shape[0]
        if self.rows is None:
            row = torch.where(self.real, self.member, end)
        else:
            member = torch.where(self.real, self.member, self.rows.shape[0])
            row = torch.cat([self.rows, self.rows.new_full((1,), end)])[member]
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[row]

    def unpad(self, x: Tensor, count: int) -> Tensor:
        """[G, longest, ...] to [count, ...]: the list of all `count` members, group by group."""
        group = group_of(self.offsets, count)
        place = torch.arange(count, device=x.device) - self.offsets[group]
        return x.reshape(-1, *x.shape[2:])[group * self.longest + place]


def attention_weights(
    q: Tensor,
    k: Tensor,
    queries: Padded,
    keys: Padded,
    scale: float,
    limits: Tensor | None = None,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor]:
    """The logits and their softmax over the keys of each group, [G, H, queries, keys] both.

    Args:
        limits: `query_limits` of the groups.
    """
    high = torch.promote_types(k.dtype, torch.float32)
    logits = torch.einsum("gqhd,gkhd->ghqk", queries.pad(q), keys.pad(k)).to(high) * scale
    # Not for queries beyond a group's end: NaN in a key would reach the gradient of the table.
    real = queries.real[:, :, None] & keys.real[:, None]
    if limits is not None:
        place = torch.arange(keys.longest, device=limits.device)
        real = real & (place < queries.pad(limits)[:, :, None])
    seen = real
    if bias.table is not None:
        assert bias.query_codes is not None and bias.key_codes is not None
        query_codes, key_codes = queries.pad(bias.query_codes), keys.pad(bias.key_codes)
        index = bias.rows_of(query_codes[:, :, None], key_codes[:, None])
        logits = logits + bias.of(index).transpose(0, 1)
    if bias.key_bias is not None:
        key_bias = keys.pad(bias.key_bias)
        logits = logits + key_bias[:, None, None, :]
        seen = seen & (key_bias > float("-inf"))[:, None]
    logits = logits.masked_fill(~real[:, None], float("-inf"))
    # A query without keys gives zeros: its row of -inf must not become NaN.
    empty = ~seen.any(-1)[:, None, :, None]
    return logits, torch.where(empty, 0, logits.masked_fill(empty, 0.0).softmax(-1))
