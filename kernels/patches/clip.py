"""The patches of a clip, and checks of the arguments that describe them, for several ops.

Patches are numbered in the order (time, row, column). A row of an op's input or result is one patch
of one sample: ids are [B, K], or packed [total] with the offsets `cu_seqlens` of the samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidl.kernels import library
from vidl.kernels.arguments import check_tensors, numbers

FLOATING = (*library.DTYPES, torch.float64)  # float64 only for the references


def check_video(video: Tensor) -> None:
    """A clip is [B, C, T, H, W] with a channel or more, in uint8 or floating point."""
    check_tensors(video=video)
    if video.ndim != 5 or video.shape[1] == 0:
        raise ValueError(f"need video [B, C, T, H, W] with C > 0, got {tuple(video.shape)}")
    if video.dtype not in (torch.uint8, *FLOATING):
        raise TypeError(f"need a video in uint8 or one of {FLOATING}, got {video.dtype}")


def check_divides(video: Tensor, patch: Sequence[int]) -> None:
    """Patches t, h, w divide T, H, W of the clip."""
    (T, H, W), (t, h, w) = video.shape[2:], patch
    if t <= 0 or h <= 0 or w <= 0 or T % t or H % h or W % w:
        raise ValueError(
            f"need video [B, C, T, H, W] with T, H, W that the patch {tuple(patch)} divides, got "
            f"{tuple(video.shape)}"
        )


def check_ids(name: str, video: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> None:
    """Ids are [B, K], or packed [total] with offsets [B + 1], on the device of the clip."""
    check_tensors(optional=("cu_seqlens",), **{"video": video, name: ids, "cu_seqlens": cu_seqlens})
    B = video.shape[0]
    if ids.dtype != torch.int64:
        raise TypeError(f"need {name} in int64, got {ids.dtype}")
    if cu_seqlens is None:
        if ids.ndim != 2 or ids.shape[0] != B:
            raise ValueError(
                f"need {name} [{B}, K], or [total] with cu_seqlens, got {tuple(ids.shape)}"
            )
        return
    if ids.ndim != 1:
        raise ValueError(f"need {name} [total] with cu_seqlens, got {tuple(ids.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"need cu_seqlens in int32, got {cu_seqlens.dtype}")
    if cu_seqlens.shape != (B + 1,):
        raise ValueError(f"need cu_seqlens [{B + 1}], got {tuple(cu_seqlens.shape)}")


def per_channel(
    C: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each channel; by default 0 and 1."""
    mean = [0.0] * C if mean is None else numbers("mean", mean)
    std = [1.0] * C if std is None else numbers("std", std)
    for name, given in (("mean", mean), ("std", std)):
        if len(given) != C:
            raise ValueError(f"need {C} numbers in {name}, got {len(given)}")
    if not all(s > 0 for s in std):
        raise ValueError(f"need positive numbers in std, got {std}")
    return mean, std


def check_normalisation(
    video: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """The mean and std of each channel of a uint8 clip; none for a floating-point clip."""
    if video.dtype == torch.uint8:
        return per_channel(video.shape[1], mean, std)
    if mean is not None or std is not None:
        raise ValueError(
            f"mean and std are for uint8 clips; a {video.dtype} clip is taken as normalised"
        )
    return [], []


def cut(video: Tensor, patch: Sequence[int]) -> Tensor:
    """The patches t, h, w of a clip, [B, T / t, H / h, W / w, C, t, h, w]; a view."""
    (B, C, T, H, W), (t, h, w) = video.shape, patch
    patches = video.view(B, C, T // t, t, H // h, h, W // w, w)
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7)


def gather(
    name: str,
    video: Tensor,  # [B, C, T, H, W]
    patch: Sequence[int],  # t, h, w
    ids: Tensor | None,  # [B, K] or [total]; None: all
    cu_seqlens: Tensor | None,  # [B + 1]
) -> tuple[Tensor, Tensor]:
    """Gather patches in plain PyTorch.

    Args:
        name: of the op and its ids, for the error message.

    Returns:
        The patches [rows, C, t, h, w], and the id of each, [rows].
    """
    patches = cut(video, patch)  # a view, so that only the patches in `ids` are copied
    slices, rows, columns = patches.shape[1:4]
    N = slices * rows * columns
    sample, ids = _rows(name, video.shape[0], N, ids, cu_seqlens, video.device)
    torch._assert_async(((ids >= 0) & (ids < N)).all(), f"{name} must lie in [0, {N})")
    time, row, column = ids // (rows * columns), ids // columns % rows, ids % columns
    return patches[sample, time, row, column], ids


def _rows(
    name: str,
    B: int,
    N: int,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The sample and the patch of every row, int64 [rows] each."""
    if ids is None:
        ids = torch.arange(N, device=device).expand(B, N)
    if cu_seqlens is None:
        sample = torch.arange(B, device=device)[:, None].expand(ids.shape)
        return sample.reshape(-1), ids.reshape(-1)
    total = ids.shape[0]
    torch._assert_async(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all(),
        f"{name.split(':')[0]}: cu_seqlens must ascend from 0 to {total}",
    )
    row = torch.arange(total, device=device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], row, right=True), ids


_constants: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def constants(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The numbers as a tensor, copied to the device once: a copy synchronises with the host."""
    if torch.compiler.is_compiling():  # constants of the graph
        return torch.tensor(values, device=device, dtype=dtype)
    key = (tuple(values), device, dtype)
    if key in _constants:
        return _constants[key]
    with torch.inference_mode(False):  # otherwise training could not use it later
        tensor = torch.tensor(values, device=device, dtype=dtype)
    if type(tensor) is Tensor:  # not the tensor of a FakeTensorMode
        _constants[key] = tensor
    return tensor
