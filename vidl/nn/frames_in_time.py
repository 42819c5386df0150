"""Attention over time: the tokens at one place of a frame, in all frames of a clip."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
    require,
)
from vidl.kernels.groups import Groups
from vidl.kernels.library import check_backend
from vidl.nn.arguments import check_dropout, check_groups, check_heads
from vidl.nn.bert import EPS, BertLayer, initialise
from vidl.nn.block import Attention, DropPath, attend

LAYER_NORM = functools.partial(nn.LayerNorm, eps=EPS)  # as in VindLU and BERT


def groups_in_time(ids: Tensor, frames: int, patches: int, *, every: bool = False) -> Groups:
    """The tokens at one place attend to one another across frames, and so do the CLS tokens.

    Frames may show or keep different patches: a group has the frames that have its patch.

    Args:
        ids: the patches of each frame after its CLS, [B T, K] int64; frame t of clip b is row b T +
            t.
        frames: T.
        patches: P, the number of patches of a whole frame.
        every: all frames have the same patches in the same order, such as all patches. The groups
            then have equal sizes, which is faster.

    Returns:
        Groups of the B T (1 + K) rows.

    Raises:
        TypeError, ValueError: ids are not whole clips of integers, or a number is out of range; on
            the CPU also if a frame has a patch twice, or one that is not in [0, P).
    """
    check_tensors(ids=ids)
    check_dtype("ids", ids, torch.int64)
    check_shape("ids", ids, "B T", "K")
    check_count("frames", frames, 1)
    check_count("patches", patches)
    check_flag("every", every)
    if ids.shape[0] % frames:
        raise ValueError(f"need ids of whole clips of {frames} frames, got {tuple(ids.shape)}")
    device, clips, n = ids.device, ids.shape[0] // frames, 1 + ids.shape[1]
    if frames == 1:
        return Groups.equal(ids.numel() + ids.shape[0], 1, device=device)
    ends = torch.arange(clips + 1, device=device, dtype=torch.int32) * (frames * n)
    clip = torch.arange(clips, device=device)
    options: dict[str, Any] = dict(row_offsets=ends, max_rows=frames * n)
    if not every:
        inside = ((ids >= 0) & (ids < patches)).all()
        require(inside, "need ids in [0, {patches}), the patches of a frame", patches=patches)
        place = clip.repeat_interleave(frames)[:, None] * (1 + patches) + F.pad(ids + 1, (1, 0))
        count = clips * (1 + patches)
        sample = clip.repeat_interleave(1 + patches)
        return Groups.labelled(place.flatten(), count, frames, group_sample=sample, **options)
    rows = torch.arange(clips * frames * n, device=device, dtype=torch.int32)
    rows = rows.view(clips, frames, n).transpose(1, 2).flatten()
    offsets = torch.arange(clips * n + 1, device=device, dtype=torch.int32) * frames
    return Groups(
        offsets, offsets, rows, rows, frames, frames, rows.shape[0], rows.shape[0], uniform=True,
        group_sample=clip.repeat_interleave(n), checked=True, **options,
    )  # fmt: skip


class FramesInTime(nn.Module):
    """Attention over time at each place of a frame, with a residual and a gate.

        out = x + gate * drop_path(attention(norm(x)))

    The gate is a learned number that begins at 0, so a new module does nothing at first. A clip of
    one frame is returned as it is. Source: VindLU, arXiv 2212.05051, 3.1; the gate is that of the
    authors' code.

    Args:
        dim: channels of a token, C.
        num_heads: number of heads, H.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        norm_layer: as in timm; default: LayerNorm with eps 1e-12, as in the authors' code.
        gate: whether there is a gate; without one the attention counts from the first step on.
        drop_path: share of the clips whose attention is left out in training.
        backend: of the attention.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        gate: bool = True,
        drop_path: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads("dim", dim, num_heads)
        check_flag("qkv_bias", qkv_bias)
        if not callable(norm_layer):
            raise TypeError(f"need norm_layer that makes a module, got {norm_layer!r}")
        check_flag("gate", gate)
        check_backend(backend)
        self.dim, self.backend = dim, backend
        self.norm = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        # One-dimensional: FSDP2 cannot shard scalars.
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, time: Groups) -> Tensor:
        """Attend to the other frames.

        Args:
            x: CLS and K tokens of each frame, [B T, 1 + K, C].
            time: from `groups_in_time`.

        Returns:
            [B T, 1 + K, C].

        Raises:
            TypeError, ValueError: x and the groups do not fit.
        """
        _check(x, time, self.dim)
        if time.max_queries == 1:
            return x + zero_of(self.parameters())
        out, _ = attend(self.attn, self.norm(x), time, None, self.backend)
        out = self.drop_path(out, time.max_queries)
        return x + (out if self.gate is None else self.gate * out)

    def extra_repr(self) -> str:
        return f"gate={self.gate is not None}, backend={self.backend!r}"


class BertInTime(nn.Module):
    """Layers of BERT over time at each place of a frame, after an encoder of frames.

    Parameters are named as in the `BertEncoder` of transformers. A clip of one frame is returned as
    it is. Source: Singularity, arXiv 2206.03428, 3.1 (Singularity-temporal).

    Args:
        width: channels of a token, C.
        layers: the number of layers; 2 in Singularity.
        num_heads: number of heads, H.
        mlp_width: width of the MLP's hidden layer; default 4 C.
        dropout: rate for hidden states.
        backend: of the attention.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 2,
        num_heads: int = 12,
        mlp_width: int | None = None,
        dropout: float = 0.1,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads("width", width, num_heads)
        check_count("layers", layers)
        if mlp_width is not None:
            check_count("mlp_width", mlp_width, 1)
        check_dropout(dropout)
        check_backend(backend)
        self.width, self.backend = width, backend
        hidden = 4 * width if mlp_width is None else mlp_width
        self.layer = nn.ModuleList(
            _LayerInTime(width, num_heads, hidden, dropout, None) for _ in range(layers)
        )
        self.apply(functools.partial(initialise, width=width))

    def forward(self, x: Tensor, time: Groups) -> Tensor:
        """Run the layers.

        Args:
            x: CLS and K tokens of each frame, [B T, 1 + K, C]; the caller adds a time embedding.
            time: from `groups_in_time`.

        Returns:
            [B T, 1 + K, C].

        Raises:
            TypeError, ValueError: x and the groups do not fit.
        """
        _check(x, time, self.width)
        shape, x = x.shape, x.flatten(0, 1)
        for layer in self.layer:
            x = layer(x, time, self.backend)
        return x.view(shape)


class _LayerInTime(BertLayer):
    """A layer of BERT that leaves clips of one frame as they are."""

    def forward(self, x: Tensor, groups: Groups, backend: str) -> Tensor:  # type: ignore[override]
        if groups.max_queries == 1:
            return x + zero_of(self.parameters())
        rows: Any = super().forward(x, groups, backend)
        return rows


def zero_of(parameters: Iterable[Tensor]) -> Tensor:
    """The number 0, whose gradient is zero for each of the parameters, which were not used.

    A batch of stills does not use attention over time. DDP waits for the gradient of each
    parameter, and FSDP2 for the backward pass of each unit: without a gradient the ranks of a job
    would wait for one another for ever, and the optimizer would skip parameters on some ranks only.
    So the parameters must be part of the loss within the forward of the module that holds them. The
    sum of no elements is 0 even if a parameter is infinite.
    """
    return torch.stack([p.flatten()[:0].sum() for p in parameters]).sum()


def _check(x: Tensor, time: Groups, width: int) -> None:
    check_tensors(x=x)
    check_floating(x=x)
    check_shape("x", x, "B T", "1 + K", width)
    check_groups("time", time, x.flatten(0, 1))
    if x.shape[0] % max(time.max_queries, 1):
        raise ValueError(
            f"need x of whole clips of {time.max_queries} frames, the longest group in time, got "
            f"{tuple(x.shape)}"
        )
