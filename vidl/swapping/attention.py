"""Attention of swapped models: samples of equal length, and groups that are built only once."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vidl.kernels import library
from vidl.kernels.groups import Groups, Positions
from vidl.nn.pruning import Scores, scored_attention

Window = tuple[int, int]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: Groups | None = None,
    scores: Scores | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each sample, or within groups of tokens.

    Args:
        q: [B, N, H, D], any strides of the first three: slices of a fused buffer need no copy.
        k, v: [B, M, H, D].
        groups: of the B N queries and B M keys; default: each sample is a group.
        scores: also return the importance of each key, as in `vidl.nn.Pruning`; groups must then be
            samples.
        options: of `vidl.nn.pruning.scored_attention`.

    Returns:
        The output, [B, N, H D], and the scores, [B, M] float32, or None.
    """
    B, N, M = q.shape[0], q.shape[1], k.shape[1]
    if groups is None:
        groups = equal_groups(B, N, M, q.device)
    # Norms of q and k return float32 under autocast.
    q, k, v = (x.to(v.dtype).flatten(0, 1) for x in (q, k, v))
    out, importance = scored_attention(q, k, v, groups, scores, **options)
    return out.view(B, N, -1), None if importance is None else importance.view(B, M)


T = TypeVar("T", Groups, Positions, Tensor)


def cached(build: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function builds from numbers and, as its last argument, a device."""

    @functools.lru_cache(maxsize=64)
    def build_once(*numbers: Any) -> T:
        with torch.inference_mode(False):  # training cannot use tensors of inference mode
            return build(*numbers)

    @functools.wraps(build)
    def built(*numbers: Any) -> T:
        capturing = numbers[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
        if tracing() or capturing:
            # Tensors built here belong to a graph or are fake: they must not outlive it.
            return build(*numbers)
        return build_once(*numbers)

    return built


def tracing() -> bool:
    """Whether tensors may have no data, as under `torch.compile` or FakeTensorMode."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


@cached
def equal_groups(B: int, N: int, M: int, device: torch.device) -> Groups:
    """B samples of N queries and M keys."""
    return Groups.equal(B, N, keys=M, device=device)


def speed(device: torch.device, dtype: torch.dtype, head_size: int, backend: str) -> str:
    """The report's note on attention that does not become faster; "" if a vidl kernel runs it."""
    if backend != "auto":
        return ""
    op = "space_time_attention"
    if library.choose(backend, op, device.type, dtype, head_size=head_size) not in library.PYTORCH:
        return ""
    reason = library.why_not("native", op, device.type, dtype, head_size=head_size)
    if reason is None:
        reason = f"no vidl kernel is known to be faster on {device.type}"
    return f"not faster: backend='auto' keeps PyTorch's attention, because {reason}"


def positions_of(window: Window, x: Tensor, ids: Tensor | None) -> Positions:
    """The positions of CLS and patches in a grid, for attention in one group a sample.

    Args:
        window: height and width of the grid.
        x: tokens, CLS first, [B, N, C].
        ids: which patches the others are, [B, N - 1] int64; None: all, in order.
    """
    if ids is None:
        return all_positions(*window, x.shape[0], x.device)
    rows = F.pad(ids + 1, (1, 0))  # CLS comes first
    return all_positions(*window, 1, x.device).select(rows.flatten())


@cached
def all_positions(height: int, width: int, samples: int, device: torch.device) -> Positions:
    """CLS and all patches of each sample."""
    patches = torch.arange(height * width, device=device)[None]
    return Positions.grid(patches, (1, height, width)).with_global().repeat(samples)
