"""frame_difference: how much each tubelet of a clip differs from the one before it, from pixels.

    out[b, (s, i, j)] = mean over channels and pixels of patch (i, j):
                        |last frame of tubelet s - first frame of tubelet s - 1|
    out[b, (0, i, j)] = inf

A tubelet that shows no motion has difference 0 and needs no token of its own.
Source: Run-Length Tokenization, arXiv 2411.05222, 3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vidl.kernels import choices, library
from vidl.kernels.arguments import check_counts
from vidl.kernels.patches import check_divides, check_normalisation, check_video

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
        reference=reference.frame_difference,
        # The definition is also the fastest composition that we know.
        torch=reference.frame_difference,
    )
)


def frame_difference(
    video: Tensor, patch: Patch, *, std: Sequence[float] | None = None, backend: str = "auto"
) -> Tensor:
    """Score every tubelet by its difference from the tubelet before it.

    The last frame of a tubelet is compared with the first frame of the tubelet before, so that the
    difference spans both. Tubelets of the first slice are always new: +inf. `run_length_ids` turns
    these scores into ids of visible patches. uint8 differences are summed exactly, as integers, and
    divided at the end. Deterministic. Not differentiable.

    Args:
        video: [B, C, T, H, W], any strides; uint8 (0 to 255) or floating point.
        patch: t, h, w: frames, height and width of a tubelet, which divide T, H, W.
        std: C positive numbers that divide the pixels of a uint8 clip after division by 255;
            default 1. (A mean cancels in the difference.) A floating-point clip is taken as
            normalised.
        backend: "auto", "native", "triton", "torch" or "reference".

    Returns:
        The scores [B, N] float32, N = T/t * H/h * W/w, in the order (time, row, column) of
        `masked_patch_embed`.

    Raises:
        TypeError: the clip is of another dtype.
        ValueError: shapes or options do not fit together.
        RuntimeError: a backend asked for by name cannot run here.
    """
    check_video(video)
    check_counts("patch", patch, 3)
    check_divides(video, patch)
    scale = [] if std is None else check_normalisation(video, None, std)[1]
    dtype = torch.float32 if video.dtype == torch.uint8 else video.dtype
    kind = video.device.type

    def key() -> choices.Key | None:
        rows = video.shape[0] * math.prod(_grid(video.shape, patch))
        sizes = {"rows": rows, "pixels": math.prod(patch)}
        facts = {"bytes": video.dtype == torch.uint8}
        return choices.key("frame_difference", kind, dtype, (), sizes, **facts)

    backend = library.choose(backend, "frame_difference", kind, dtype, key)
    return library.run("frame_difference", backend, video.detach(), list(patch), scale)
