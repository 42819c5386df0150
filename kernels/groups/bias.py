"""What is added to the logits of attention: relative positions, and a number for each key."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidl.kernels.arguments import check_dtype, check_floating, check_shape, check_tensors

from .membership import Arguments, Groups
from .positions import Positions

# How the schema of an op declares it: the fields of `Bias`.
BIAS_SCHEMA = "Tensor? bias, Tensor? query_codes, Tensor? key_codes, SymInt shift, Tensor? key_bias"


class Bias(NamedTuple):
    """What kernels need, in the order of `BIAS_SCHEMA`.

    The logits of query i and key j of head h get `table[h, row] + key_bias[j]`, where row =
    clamp(key_codes[j] - query_codes[i] + shift, 0, rows - 1).
    """

    table: Tensor | None  # [H, rows] float32, from the greatest difference of codes to the least
    query_codes: Tensor | None  # [num_queries] int32
    key_codes: Tensor | None  # [num_keys] int32
    shift: int
    key_bias: Tensor | None  # [num_keys] float32

    def rows_of(self, query_codes: Tensor, key_codes: Tensor) -> Tensor:
        """The rows of the table for codes that broadcast to one shape, int32."""
        assert self.table is not None
        rows = key_codes.long() - query_codes.long() + self.shift
        return rows.clamp(0, self.table.shape[1] - 1).int()

    def of(self, rows: Tensor) -> Tensor:
        """The numbers of the table in rows of any shape: [H, shape...]."""
        assert self.table is not None
        # The gradient of an embedding is deterministic, and faster than that of an index. A table
        # whose rows are not contiguous takes ten times as long on the CPU.
        return torch.nn.functional.embedding(rows, self.table.t().contiguous()).movedim(-1, 0)


NO_BIAS = Bias(None, None, None, 0, None)


def split(arguments: Sequence[Any]) -> tuple[Arguments, Bias, list[Any]]:
    """The groups, the bias and what follows them in the arguments of an op."""
    groups, bias = len(Arguments._fields), len(Bias._fields)
    return (
        Arguments(*arguments[:groups]),
        Bias(*arguments[groups : groups + bias]),
        list(arguments[groups + bias :]),
    )


def is_given(bias: Bias) -> bool:
    """Whether anything is added to the logits."""
    return bias.table is not None or bias.key_bias is not None


def bias_of(
    bias: Tensor | None,
    positions: Positions | None,
    key_bias: Tensor | None,
    groups: Groups,
    heads: int,
) -> Bias:
    """The arguments of the kernels, from those of the public functions.

    Raises:
        TypeError, ValueError: they do not fit together, or key_bias requires a gradient.
    """
    if bias is None and positions is None and key_bias is None:
        return NO_BIAS
    if (bias is None) != (positions is None):
        raise ValueError("need bias and positions, or neither")
    tensors: dict[str, Any] = {"groups": groups.query_offsets, "bias": bias, "key_bias": key_bias}
    check_tensors(("bias", "key_bias"), **tensors)
    if key_bias is not None:
        check_dtype("key_bias", key_bias, torch.float32)
        check_shape("key_bias", key_bias, groups.num_keys)
        if key_bias.requires_grad:
            raise ValueError("need key_bias without a gradient: it is not differentiable")
        key_bias = key_bias.contiguous()
    if bias is None or positions is None:
        return Bias(None, None, None, 0, key_bias)
    if not isinstance(positions, Positions):
        raise TypeError(
            f"need positions made by vidl.ops.Positions, got {type(positions).__name__}"
        )
    positions.require_fit(groups)
    check_floating(bias=bias)
    check_shape("bias", bias, positions.rows, heads)
    table = bias if bias.dtype == torch.float64 else bias.float()
    if positions.wrap:
        table = table.roll(positions.wrap, 0)
    # A head's rows are contiguous, and reversed: neighbours in a row of patches read neighbours.
    table, shift = table.flip(0).t().contiguous(), positions.rows - 1 - positions.wrap
    return Bias(table, positions.query_codes, positions.key_codes, shift, key_bias)
