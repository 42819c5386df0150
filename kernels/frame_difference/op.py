"""frame_difference: how much each tubelet of a clip differs from the one before it, from pixels.

    out[b, (s, i, j)] = mean over channels and pixels of patch (i, j):
                        |last frame of tubelet s - first frame of tubelet s - 1|
    out[b, (0, i, j)] = inf

What stands still for two tubelets differs by nothing, and needs no token of its own.
Source: Run-Length Tokenization, arXiv 2411.05222, 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidl.kernels import library

from . import reference

Patch = tuple[int, int, int]


def _grid(video: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Patches along time, height and width of a clip [B, C, T, H, W]."""
    return video[2] // patch[0], video[3] // patch[1], video[4] // patch[2]


def _fake(video: Tensor, patch: Sequence[int], std: Sequence[float]) -> Tensor:
    frames, rows, columns = _grid(video.shape, patch)
    return video.new_empty(video.shape[0], frames * rows * columns, dtype=torch.float32)


def _flops(video, patch, std, **_) -> int:
    B, C, _, H, W = video.shape
    return 2 * B * C * max(_grid(video.shape, patch)[0] - 1, 0) * H * W


library.define(
    library.Op(
        "frame_difference(Tensor video, SymInt[] patch, float[] std) -> Tensor",
        module=__package__,
        fake=_fake,
        flops=_flops,
    )
)


def frame_difference(
    video: Tensor, patch: Patch, *, std: Sequence[float] | None = None, backend: str = "auto"
) -> Tensor:
    """Score every tubelet by how much it differs from the one before it.

    The last frame of a tubelet is compared with the first frame of the tubelet before, so that the
    whole of both counts. Tubelets of the first slice are always new: +inf. `run_length_ids` makes
    ids of visible patches of these scores. uint8 differences are summed as integers, exactly, and
    divided at the end. Deterministic. Not differentiable.

    Args:
        video: [B, C, T, H, W], any strides; uint8 (0 to 255) or floating point.
        patch: frames, height and width of a tubelet, which divide T, H, W.
        std: C positive numbers, the normalisation of a uint8 clip in 0 to 1; default 1. (Its mean
            would make no difference.) A floating-point clip is taken as normalised.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        The scores [B, N] float32, N = T/t * H/h * W/w, in the order (time, row, column) of
        `masked_patch_embed`.

    Raises:
        TypeError: the clip is of another dtype.
        ValueError: shapes or options do not fit together.
        RuntimeError: a backend asked for by name cannot run here.
    """
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"need a video in uint8 or a floating dtype, got {video.dtype}")
    if video.ndim != 5 or video.shape[1] == 0:
        raise ValueError(f"need video [B, C, T, H, W], got {tuple(video.shape)}")
    if len(patch) != 3 or any(p < 1 or n % p for n, p in zip(video.shape[2:], patch, strict=True)):
        raise ValueError(
            f"need a patch of three numbers that divide {tuple(video.shape[2:])}, got {patch}"
        )
    scale = _check_std(video, std)
    dtype = torch.float32 if video.dtype == torch.uint8 else video.dtype
    backend = library.choose(backend, "frame_difference", video.device.type, dtype)
    args = (video.detach(), list(patch), scale)
    if backend == "reference":
        return reference.frame_difference(*args)
    return library.kernel("frame_difference", backend)(*args)


def _check_std(video: Tensor, std: Sequence[float] | None) -> list[float]:
    if std is None:
        return []
    if video.dtype != torch.uint8:
        raise ValueError(f"std is for uint8 clips; a {video.dtype} clip is taken as normalised")
    if len(std) != video.shape[1]:
        raise ValueError(f"need {video.shape[1]} numbers in std, got {len(std)}")
    if not all(s > 0 for s in std):
        raise ValueError(f"need positive numbers in std, got {list(std)}")
    return [float(s) for s in std]
