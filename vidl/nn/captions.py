"""Padded captions as packed words, and the attention groups of these words."""

import torch
from torch import Tensor

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_flag,
    check_shape,
    check_tensors,
)
from vidl.kernels.groups import Groups, group_of


class Captions:
    """Packs, unpacks and groups the words of padded captions.

    The number of words of a batch is known on the device, but PyTorch needs the number of packed
    rows on the host. The caller passes it as `words`, exact or as an upper bound, which a data
    loader knows without a synchronisation. For captions of 10 to 20 words padded to 32, packing
    halves the work of every layer. Rows after the last word hold padding, in groups of their own
    that no word attends to; if `words` is rounded up to a multiple, `torch.compile` and CUDA graphs
    see few shapes. Without `words` the number is read from a mask on the CPU, which costs nothing
    there; on a GPU, and under `torch.compile`, all B L rows are computed, still without attention
    to padding and without a host synchronisation.

    Args:
        padded: ids or hidden states, [B, L, ...]; only the shape and the device are used.
        attention_mask: [B, L] bool or integer, nonzero at words; None: no padding.
        words: number of packed rows, at least the number of words and at most B L.

    Raises:
        ValueError: shapes, devices or numbers do not fit.
        RuntimeError: the batch has more words than `words` (on CUDA as a device-side assertion).
    """

    def __init__(
        self, padded: Tensor, attention_mask: Tensor | None = None, words: int | None = None
    ) -> None:
        optional = ("attention_mask",)
        check_tensors(optional, padded=padded, attention_mask=attention_mask)
        if padded.ndim < 2:
            raise ValueError(f"need padded [B, L, ...], got {tuple(padded.shape)}")
        self.batch, self.length = padded.shape[:2]
        self.device = padded.device
        self.rows = self.batch * self.length
        if words is not None:
            check_count("words", words)
        if words is not None and words > self.rows:
            raise ValueError(f"need words from 0 to {self.rows} (B * L), got {words}")
        self.order: Tensor | None = None  # [rows], the position in [B * L] of each packed row
        if attention_mask is not None:
            self._read(attention_mask, words)
        elif words not in (None, self.rows):
            raise ValueError(f"need an attention_mask if words={words} is not B * L={self.rows}")

    def _read(self, attention_mask: Tensor, words: int | None) -> None:
        check_shape("attention_mask", attention_mask, self.batch, self.length)
        mask = attention_mask != 0
        sizes = mask.sum(1, dtype=torch.int32)
        self.total = sizes.sum(dtype=torch.int32)
        read = words is None and self.device.type == "cpu" and not torch.compiler.is_compiling()
        if read:
            self.rows = int(self.total)
        elif words is not None:
            self.rows = words
            torch._assert_async(self.total <= words, "the batch has more words than `words`")
        # Words first, in order, then padding.
        self.order = torch.argsort((~mask).flatten().byte(), stable=True)[: self.rows]
        # Rows after the words are in groups of up to L rows.
        self.tails = -(-self.rows // self.length) if self.length and not read else 0
        ends = sizes.cumsum(0, dtype=torch.int32)
        steps = torch.arange(1, self.tails + 1, dtype=torch.int32, device=self.device)
        beyond = (self.total + steps * self.length).clamp(max=self.rows)
        self.offsets = torch.cat([ends.new_zeros(1), ends, beyond])

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, ...] to [rows, ...]."""
        self._check(x)
        if x.shape[:2] != (self.batch, self.length):
            raise ValueError(f"need x [{self.batch}, {self.length}, ...], got {tuple(x.shape)}")
        x = x.flatten(0, 1)
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """[rows, C] to [B, L, C], with zeros at padding."""
        self._check(x)
        check_shape("x", x, self.rows, "C")
        if self.order is not None:
            beyond = torch.arange(self.rows, device=x.device) >= self.total
            x = x.masked_fill(beyond[:, None], 0)
            x = x.new_zeros(self.batch * self.length, x.shape[1]).index_copy(0, self.order, x)
        return x.unflatten(0, (self.batch, self.length))

    def _check(self, x: Tensor) -> None:
        check_tensors(x=x)
        if x.device != self.device:
            raise ValueError(f"need x on {self.device} as the captions are, got {x.device}")

    def columns(self) -> Tensor:
        """The position of each packed row in its padded caption, [rows] int64."""
        order = torch.arange(self.rows, device=self.device) if self.order is None else self.order
        return order % self.length if self.length else order

    def lengths(self) -> Tensor:
        """The number of words of each caption, [B] int32."""
        if self.order is None:
            return torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        return self.offsets[: self.batch + 1].diff()

    def joint(self) -> Groups:
        """Groups in which the words of a caption attend to one another."""
        if self.order is None:
            return Groups.equal(self.batch, self.length, device=self.device)
        return Groups.joint(self.offsets, self.rows, self.length)

    def causal(self) -> Groups:
        """Groups in which a word attends to itself and to the words of its caption before it."""
        return self.joint().causal()

    def cu_words(self) -> Tensor:
        """Where the words of each caption begin among the packed rows, [B + 1] int32."""
        if self.order is None:
            steps = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
            return steps * self.length
        return self.offsets[: self.batch + 1]

    def cross(
        self, cu_keys: Tensor, num_keys: int, max_keys: int, partner: Tensor | None, equal: bool
    ) -> Groups:
        """Groups in which the words of a caption attend to one sequence of keys.

        Args:
            cu_keys: offsets of the S sequences of keys, [S + 1] int32.
            num_keys: total number of keys; with `partner`, keys after the last sequence are not
                used.
            max_keys: an upper bound of the keys of any sequence.
            partner: the sequence of each caption, [B] int64; several captions may share a sequence,
                and a sequence may have none. None: caption b attends to sequence b.
            equal: whether every sequence has exactly `max_keys` keys.
        """
        check_tensors(optional=("partner",), cu_keys=cu_keys, partner=partner)
        check_dtype("cu_keys", cu_keys, torch.int32)
        check_shape("cu_keys", cu_keys, "S + 1")
        check_count("num_keys", num_keys)
        check_count("max_keys", max_keys)
        check_flag("equal", equal)
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, self.batch)
        padded = self.order is not None
        offsets, tails = (self.offsets, self.tails) if padded else (self.cu_words(), 0)
        if partner is None:
            if equal and self.order is None:
                return Groups.equal(self.batch, self.length, keys=max_keys, device=self.device)
            return Groups.cross(
                offsets,
                torch.cat([cu_keys, cu_keys[-1:].expand(tails)]),  # padding has no keys
                num_queries=self.rows,
                num_keys=num_keys,
                max_queries=self.length,
                max_keys=max_keys,
            )
        starts, key_rows, unused = _keys_of(partner, cu_keys, max_keys, equal)
        return Groups(
            torch.cat([offsets, offsets[-1:].expand(unused.shape[0])]),
            torch.cat([starts, starts[-1:].expand(tails), unused]),
            None,
            key_rows,
            max_queries=self.length,
            max_keys=max_keys,
            num_queries=self.rows,
            num_keys=num_keys,
            uniform=equal and self.order is None,
            checked=True,
        ).with_entries()


def rounded_words(words: int, most: int) -> int:
    """Round up to one of eight sizes, so that few shapes occur and their memory is reused.

    Args:
        words: number of words of a batch.
        most: the largest possible number, B L.
    """
    unit = -(-most // 8)
    return min(-(-words // unit) * unit, most)


def _keys_of(
    partner: Tensor, cu_keys: Tensor, max_keys: int, equal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each caption's sequence, caption after caption.

    There are B times `max_keys` entries, so that their number is known on the host; if sequences
    are shorter, the last entries belong to no caption.

    Returns:
        The offsets of the captions' entries, [B + 1]; the rows of all entries; and the offsets of
        groups of the entries without a caption. All int32.
    """
    B, device = partner.shape[0], partner.device
    ends = cu_keys.diff()[partner].cumsum(0, dtype=torch.int32)
    starts = torch.cat([ends.new_zeros(1), ends])
    caption = group_of(starts, B * max_keys)
    entry = torch.arange(B * max_keys, device=device)
    owner = caption.clamp(max=B - 1)
    rows = torch.where(caption < B, cu_keys[partner[owner]] + entry - starts[owner], 0)
    steps = torch.arange(1, 1 + (0 if equal else B), device=device, dtype=torch.int32)
    return starts, rows.int(), (starts[-1] + steps * max_keys).clamp(max=B * max_keys)
