"""masked_patch_loss: the error of the reconstruction of a clip's masked patches.

    loss = mean over masked patches m of mean((prediction[m] - normalise(patch[ids_masked[m]]))^2)

Sources: normalised pixels of MAE (arXiv 2111.06377, 3; facebookresearch/mae, models_mae.py) and of
VideoMAE (arXiv 2203.12602, 3.1; MCG-NJU/VideoMAE, engine_for_pretraining.py).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from vidl.kernels import choices, library
from vidl.kernels.arguments import check_count, check_flag, check_tensors, pair
from vidl.kernels.patches import FLOATING, check_divides, check_ids, check_video, per_channel

from . import reference

Target = Literal["mae", "videomae"]
EPS = 1e-6


def statistics_of(patch_statistics: str, channels: int) -> int:
    """The number of means and variances of a patch."""
    return {"none": 0, "patch": 1, "channel": channels}[patch_statistics]


def _fake(prediction, video, ids_masked, cu_seqlens, patch, statistics, scale, shift, eps):
    rows, count = prediction.shape[:-1], statistics_of(statistics, video.shape[1])
    losses = prediction.new_empty(rows, dtype=torch.float32)
    return losses, prediction.new_empty((*rows, count, 2), dtype=torch.float32)


def _fake_bwd(grad, moments, prediction, *args):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _no_flops(*args, **kwargs) -> int:
    return 0  # PyTorch's counter counts matmuls only


def _setup_context(ctx, inputs, output) -> None:
    prediction, video, ids_masked, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(output[1], prediction, video, ids_masked, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(bwd: Callable[..., Any], ctx, grad, grad_moments):
    grad_prediction = None if grad is None else bwd(grad, *ctx.saved_tensors, *ctx.options)
    return grad_prediction, *(None,) * 8


def _limits(
    backend: str, device: str, dtype: torch.dtype, pixels: int = 1, channels: int = 1
) -> str | None:
    if (backend, device) == ("native", "cpu"):
        return None
    if pixels > 8192:
        return f"a patch may have at most 8192 pixels, got {pixels}"
    if backend != "triton" and channels > 64:
        return f"a clip may have at most 64 channels, got {channels}"
    return None


library.define(
    library.Op(
        "masked_patch_loss_bwd(Tensor grad, Tensor moments, Tensor prediction, Tensor video, "
        "Tensor ids_masked, Tensor? cu_seqlens, int[] patch, str statistics, float[] scale, "
        "float[] shift, float eps) -> Tensor",
        module=__package__,
        fake=_fake_bwd,
        flops=_no_flops,
        limits=_limits,
    )
)
library.define(
    library.Op(
        "masked_patch_loss(Tensor prediction, Tensor video, Tensor ids_masked, "
        "Tensor? cu_seqlens, int[] patch, str statistics, float[] scale, float[] shift, float eps) "
        "-> (Tensor, Tensor)",
        module=__package__,
        fake=_fake,
        flops=_no_flops,
        reference=reference.masked_patch_loss,
        # The definition is also the fastest composition that we know.
        torch=reference.masked_patch_loss,
        only_for_backward=1,
        setup_context=_setup_context,
        backward=_backward,
        limits=_limits,
    )
)


def masked_patch_loss(
    prediction: Tensor,
    video: Tensor,
    ids_masked: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    patch_size: int | Sequence[int],
    tubelet_size: int = 1,
    target: Target = "mae",
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """Mean squared error of the predicted pixels of the masked patches.

    Equal to cutting the whole clip into patches, normalising each, and comparing the masked ones
    with the prediction; but the pixels are read from the clip, and no target is stored. Targets:

    ============ ========================== ==================================================
    target       pixels                     normalised (`norm_pix`), with unbiased variances
    ============ ========================== ==================================================
    "mae"        as the model sees them     over the patch: (x - mean) / sqrt(var + 1e-6)
    "videomae"   from 0 to 1                over each of its channels: (x - mean) / (sd + 1e-6)
    ============ ========================== ==================================================

    MAE-ST predicts one frame per tubelet: pass `video[:, :, ::t]` (a view) and `tubelet_size=1`.

    Args:
        prediction: [B, masked, t * p * p * C], the pixels of a patch in the order (t, p, p, C), or
            [total, t * p * p * C] with `cu_seqlens`; float32, float16 or bfloat16. Rows may have
            any stride, so that the last tokens of a decoder need no copy.
        video: [B, C, T, H, W], any strides: `permute` a [B, T, C, H, W] or a channels-last
            [B, T, H, W, C] clip. uint8 (0 to 255) or floating point.
        ids_masked: int64, the masked patches in [0, N), [B, masked] or [total]; numbered and
            packed as `ids_keep` of `masked_patch_embed`.
        cu_seqlens: [B + 1] int32, where each sample begins in a packed `ids_masked`.
        patch_size: p, or (height, width).
        tubelet_size: t.
        target: "mae" or "videomae".
        norm_pix: whether the pixels of a patch are normalised by their own mean and variance.
        mean, std: C numbers each, the model's normalisation of pixels from 0 to 1. "mae" applies it
            to a uint8 clip, and takes a floating-point clip as normalised; "videomae" inverts it in
            a floating-point clip, and ignores it for a uint8 clip.
        reduction: "mean", or "none" for the loss of each patch.
        backend: "auto", "native", "triton", "torch" or "reference".

    Returns:
        The mean over all pixels of all masked patches of the batch, a float32 scalar: zero, with
        zero gradient, if no patch is masked. With "none" the mean of each patch, [B, masked] or
        [total]. float64 if an input is. The gradient flows to `prediction` only, in its dtype.
        Deterministic.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes, devices or options do not fit together; `video` requires a gradient.
        RuntimeError: a backend asked for by name cannot run here; or, on the CPU, an id or an
            offset is out of range. On CUDA the kernels read nothing out of range: the loss of
            such an id is NaN, and some are NaN if `cu_seqlens` do not ascend. "torch" and
            "reference" assert them on the device, as PyTorch does.
    """
    check_options(patch_size, tubelet_size, target, norm_pix)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    patch = (tubelet_size, *pair("patch_size", patch_size))
    check_tensors(video=video, prediction=prediction)
    check_video(video)
    check_divides(video, patch)
    check_ids("ids_masked", video, ids_masked, cu_seqlens)
    _check_prediction(prediction, video, ids_masked, patch)
    statistics = {"mae": "patch", "videomae": "channel"}[target] if norm_pix else "none"
    _check_variance(video, patch, statistics)
    scale, shift = _affine(video, target, mean, std)
    dtype = torch.float64 if video.dtype == torch.float64 else prediction.dtype
    kind, pixels = video.device.type, prediction.shape[-1]

    def key() -> choices.Key | None:
        return choices.key(
            "masked_patch_loss",
            kind,
            dtype,
            (prediction,),
            {"rows": ids_masked.numel(), "pixels": pixels},
            bytes=video.dtype == torch.uint8,
            statistics=statistics,
            packed=cu_seqlens is not None,
        )

    facts = {"pixels": pixels, "channels": video.shape[1]}
    backend = library.choose(backend, "masked_patch_loss", kind, dtype, key, **facts)
    args = (prediction, video, ids_masked, cu_seqlens, list(patch), statistics, scale, shift, EPS)
    losses = library.run("masked_patch_loss", backend, *args)
    return losses if reduction == "none" else losses.sum() / max(losses.numel(), 1)


def _affine(
    video: Tensor, target: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """`scale` and `shift`: a pixel of channel c becomes pixel * scale[c] + shift[c]."""
    given = mean is not None or std is not None
    means, stds = per_channel(video.shape[1], mean, std)
    if video.dtype == torch.uint8:
        if target == "mae":
            shift = [-m / s for m, s in zip(means, stds, strict=True)]
            return [1 / (255 * s) for s in stds], shift
        return [1 / 255] * len(stds), [0.0] * len(stds)
    if target == "mae" and given:
        raise ValueError(
            f"mean and std are for uint8 clips with target 'mae'; a {video.dtype} clip is taken "
            "as normalised"
        )
    return stds, means


def check_options(
    patch_size: int | Sequence[int], tubelet_size: int, target: Target, norm_pix: bool
) -> None:
    """What `MaskedPatchLoss` checks when it is built."""
    pair("patch_size", patch_size)
    check_count("tubelet_size", tubelet_size, 1)
    if target not in ("mae", "videomae"):
        raise ValueError(f"target must be 'mae' or 'videomae', got {target!r}")
    check_flag("norm_pix", norm_pix)


def _check_prediction(
    prediction: Tensor, video: Tensor, ids_masked: Tensor, patch: Sequence[int]
) -> None:
    if prediction.dtype not in FLOATING:
        raise TypeError(f"need a prediction in one of {FLOATING}, got {prediction.dtype}")
    shape = (*ids_masked.shape, video.shape[1] * prod(patch))
    if prediction.shape != shape:
        raise ValueError(
            f"need prediction {list(shape)}, the pixels of patches {tuple(patch)} in "
            f"{video.shape[1]} channels, got {tuple(prediction.shape)}"
        )
    if video.requires_grad:
        raise ValueError("need a video without gradient (no gradient flows to it): detach it")


def _check_variance(video: Tensor, patch: Sequence[int], statistics: str) -> None:
    pixels = prod(patch) * (video.shape[1] if statistics == "patch" else 1)
    if statistics != "none" and pixels < 2:
        raise ValueError(
            f"need two pixels or more for the variance of a {statistics}, or norm_pix=False, got "
            f"patches {tuple(patch)}"
        )
