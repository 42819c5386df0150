"""TimeSformer's global token: one replica in every group, and the mean of what they find."""

import torch
from torch import Tensor

from vidl.kernels.groups import Groups, lead


class ReplicatedGlobal:
    """Groups of which each has a replica of its sample's global token, as query and as key.

    Where `Groups.with_global` lets one query see the whole sample, here every group (frame) has a
    replica that sees this group alone:

        x = replicated.replicate(x)  # before the projection to q, k and v
        out = space_time_attention(q, k, v, replicated.groups)
        out = replicated.average(out)

    Args:
        groups: of self-attention, as many of every sample, sample after sample, as `spatial`,
            `temporal` and `window` make them; without a global token.

    Raises:
        ValueError: the groups do not know their samples, or samples differ in their number.

    Source: TimeSformer, arXiv 2102.05095, 3 (divided attention, as in the authors' code).
    """

    def __init__(self, groups: Groups) -> None:
        if groups.row_offsets is None or groups.num_queries != groups.num_keys:
            raise ValueError("need groups of self-attention that know their samples (row_offsets)")
        B, G, total = groups.row_offsets.shape[0] - 1, groups.num_groups, groups.num_queries
        if B and G % B:
            raise ValueError(f"need as many groups of every sample, got {G} for {B} samples")
        each = G // B if B else 0
        device = groups.query_offsets.device
        sample = torch.arange(B, device=device)
        before = groups.row_offsets[:-1].long()
        row = torch.arange(total, device=device)
        of_row = torch.searchsorted(groups.row_offsets[1:].long(), row, right=True)

        # With one global token a sample: where those are, and where the other rows are.
        self.global_rows, self.token_rows = before + sample, row + of_row + 1
        # With its replicas instead: the same.
        first = before + sample * each
        replicas = (first[:, None] + torch.arange(each, device=device)).flatten()
        moved = row + (of_row + 1) * each
        self.replica_rows, self.moved_rows = replicas, moved
        self.num_samples, self.each = B, each

        offsets, query_rows = lead(groups.query_offsets, groups.query_rows, moved, replicas)
        _, key_rows = lead(groups.key_offsets, groups.key_rows, moved, replicas)
        self.groups = Groups(
            offsets,
            offsets,
            query_rows,
            key_rows,
            max_queries=groups.max_queries + 1,
            max_keys=groups.max_keys + 1,
            num_queries=total + G,
            num_keys=total + G,
            uniform=groups.uniform,
            row_offsets=groups.row_offsets
            + torch.arange(B + 1, device=device, dtype=torch.int32) * each,
            group_sample=groups.group_sample,
        )

    def replicate(self, x: Tensor) -> Tensor:
        """Rows with one global token before each sample's others -> with one for each group.

        Args:
            x: [B + tokens, ...].

        Returns:
            [B x groups of a sample + tokens, ...]: each sample's replicas, then its other rows.
        """
        _check_rows(x, self.num_samples + self.token_rows.shape[0])
        whole = x.index_select(0, self.global_rows)[:, None]
        whole = whole.expand(-1, self.each, *x.shape[1:]).flatten(0, 1)
        rows = torch.cat([whole, x.index_select(0, self.token_rows)])
        return _place(rows, torch.cat([self.replica_rows, self.moved_rows]))

    def average(self, x: Tensor) -> Tensor:
        """The inverse of `replicate`, with the mean of a sample's replicas as its global token."""
        _check_rows(x, self.groups.num_queries)
        replicas = x.index_select(0, self.replica_rows)
        whole = replicas.unflatten(0, (self.num_samples, self.each)).mean(1)
        rows = torch.cat([whole, x.index_select(0, self.moved_rows)])
        return _place(rows, torch.cat([self.global_rows, self.token_rows]))


def _place(x: Tensor, rows: Tensor) -> Tensor:
    """Put x[i] into row `rows[i]`; a gather by the inverse, so that its gradient is one, too."""
    return x.index_select(0, torch.argsort(rows))


def _check_rows(x: Tensor, rows: int) -> None:
    if x.ndim < 1 or x.shape[0] != rows:
        raise ValueError(f"need {rows} rows for these groups, got {tuple(x.shape)}")
