"""TimeSformer's global token (CLS): a replica in every group, averaged after the attention."""

import torch
from torch import Tensor

from vidl.kernels.arguments import check_tensors
from vidl.kernels.groups import Groups, prepend_row


class ReplicatedGlobal:
    """Groups with a replica each of the sample's global token, both as a query and as a key.

    The global query of `Groups.with_global` attends to the whole sample. Here every group (frame)
    has a replica that attends to its own group only:

        x = replicated.replicate(x)  # before the projection to q, k and v
        out = space_time_attention(q, k, v, replicated.groups)
        out = replicated.average(out)

    Args:
        groups: of self-attention, without a global token, sample after sample and equally many
            for every sample, as `spatial`, `temporal` and `window` return them.

    Raises:
        ValueError: the groups lack row_offsets, or the samples differ in their number of groups.

    Source: TimeSformer, arXiv 2102.05095, 3 (divided attention, as in the authors' code).
    """

    def __init__(self, groups: Groups) -> None:
        if not isinstance(groups, Groups):
            raise TypeError(f"need groups made by vidl.ops.Groups, got {type(groups).__name__}")
        if groups.row_offsets is None or groups.num_queries != groups.num_keys:
            raise ValueError("need groups of self-attention with row_offsets")
        B, G, total = groups.row_offsets.shape[0] - 1, groups.num_groups, groups.num_queries
        if B and G % B:
            raise ValueError(f"need equally many groups in every sample, got {G} for {B} samples")
        replicas = G // B if B else 0  # of a sample
        device = groups.query_offsets.device
        sample = torch.arange(B, device=device)
        row_offsets = groups.row_offsets[:-1].long()
        row = torch.arange(total, device=device)
        sample_of_row = torch.searchsorted(groups.row_offsets[1:].long(), row, right=True)

        # Rows of the input and output of the block, with one global token a sample.
        self.global_rows, self.token_rows = row_offsets + sample, row + sample_of_row + 1
        # Rows of the attention, with a replica for every group.
        first = row_offsets + sample * replicas
        replica_rows = (first[:, None] + torch.arange(replicas, device=device)).flatten()
        new_rows = row + (sample_of_row + 1) * replicas
        self.replica_rows, self.new_rows = replica_rows, new_rows
        self.num_samples, self.replicas = B, replicas

        offsets, query_rows = prepend_row(
            groups.query_offsets, groups.query_rows, new_rows, replica_rows
        )
        _, key_rows = prepend_row(groups.key_offsets, groups.key_rows, new_rows, replica_rows)
        limits = groups.query_limits
        if limits is not None:  # of a replica, which comes first: all rows of its group
            members = groups.query_offsets.diff()
            limits = limits.new_zeros(total + G).index_copy(0, new_rows, limits + 1)
            limits = limits.index_copy(0, replica_rows, members + 1)
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
            + torch.arange(B + 1, device=device, dtype=torch.int32) * replicas,
            group_sample=groups.group_sample,
            query_limits=limits,
            checked=True,
        )

    def replicate(self, x: Tensor) -> Tensor:
        """Copy the global token of each sample into all groups of the sample.

        Args:
            x: [B + tokens, ...], each sample's global token before its other rows.

        Returns:
            [B x groups of a sample + tokens, ...], each sample's replicas before its other rows.
        """
        self._check_rows(x, self.num_samples + self.token_rows.shape[0])
        replicas = x.index_select(0, self.global_rows)[:, None]
        replicas = replicas.expand(-1, self.replicas, *x.shape[1:]).flatten(0, 1)
        rows = torch.cat([replicas, x.index_select(0, self.token_rows)])
        return _place(rows, torch.cat([self.replica_rows, self.new_rows]))

    def average(self, x: Tensor) -> Tensor:
        """Undo `replicate`: the mean of a sample's replicas becomes its global token."""
        self._check_rows(x, self.groups.num_queries)
        replicas = x.index_select(0, self.replica_rows)
        means = replicas.unflatten(0, (self.num_samples, self.replicas)).mean(1)
        rows = torch.cat([means, x.index_select(0, self.new_rows)])
        return _place(rows, torch.cat([self.global_rows, self.token_rows]))

    def _check_rows(self, x: Tensor, rows: int) -> None:
        check_tensors(x=x, groups=self.groups.query_offsets)
        if x.ndim < 1 or x.shape[0] != rows:
            raise ValueError(f"need {rows} rows of x for these groups, got {tuple(x.shape)}")


def _place(x: Tensor, rows: Tensor) -> Tensor:
    """Move x[i] to row `rows[i]`, by a gather with the inverse: its gradient is a gather too."""
    return x.index_select(0, torch.argsort(rows))
