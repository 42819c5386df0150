"""Does `masked_patch_loss` read the masked patches once, and skip the visible ones?

Every candidate receives the uint8 clip as a loader returns it and the prediction of the masked
patches, and computes the loss. `whole clip, then mask` is how MAE and VideoMAE make their targets;
the strongest baseline is the backend `torch`, which gathers first and skips the visible patches as
well.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, compiled, ours
from vidl.bench.ops.clips import MEAN, STD, Clips, sizes
from vidl.kernels.masked_patch_loss.op import Target, masked_patch_loss

OP = "masked_patch_loss"

# Of the P patches of each tubelet slice `masked` are masked.
SHAPES = {
    "VideoMAE-B, mask 0.9": sizes(64, 2, T=16, tubelet_size=2)
    | dict(masked=176, target="videomae"),
    "SMAUG, 4 frames, mask 0.65": sizes(64, 8, T=4) | dict(masked=128, target="mae"),
    "MAE, mask 0.75": sizes(256, 16, T=1) | dict(masked=147, target="mae"),
    OVERHEAD: sizes(1, 1, T=1) | dict(image_size=32, masked=2, target="mae"),
}
PARAMETERS = ("prediction",)


@dataclass(frozen=True)
class Inputs:
    """A batch of clips and the prediction of their masked patches."""

    prediction: Tensor  # [B, masked, t * h * w * C]
    video: Tensor  # [B, C, T, H, W] uint8
    ids_masked: Tensor  # [B, masked]
    mask: Tensor  # [B, N], True at `ids_masked`
    patch: tuple[int, int, int]
    target: Target
    grad: Tensor  # of the loss


def make(
    masked: int, target: Target, *, dtype: torch.dtype, device: str, generator: Any, **sizes: int
) -> Inputs:
    """Draw a batch. Frames are stored [B, T, C, H, W], clips of tubelets [B, C, T, H, W]."""
    clips = Clips(**sizes)
    video = clips.draw(generator, "BTCHW" if clips.tubelet_size == 1 else "BCTHW").to(device)
    ids = clips.flat(clips.draw_ids(generator, masked).sort().values).to(device)
    mask = torch.zeros(clips.B, clips.slices * clips.P, dtype=torch.bool, device=device)
    prediction = torch.randn(*ids.shape, clips.pixels, generator=generator)
    return Inputs(
        prediction=prediction.to(device, dtype),
        video=video,
        ids_masked=ids,
        mask=mask.scatter_(1, ids, True),
        patch=clips.patch,
        target=target,
        grad=torch.ones((), dtype=dtype, device=device),
    )


def work(masked: int, target: str, *, dtype: torch.dtype, **sizes: int) -> dict[str, Work]:
    """Reads the masked bytes, the prediction and the ids once; writes the gradient once."""
    clips = Clips(**sizes)
    rows = clips.B * clips.slices * masked
    pixels = rows * clips.pixels
    read = pixels * (1 + dtype.itemsize) + 8 * rows
    # Mean, variance, normalisation and square: 8 operations per pixel; 4 without the statistics.
    return {
        "forward": Work(read, 8 * pixels),
        "backward": Work(read + pixels * dtype.itemsize, 4 * pixels),
    }


def truth(inputs: Inputs) -> Tensor:
    return loss(inputs, backend="reference")


def loss(inputs: Inputs, backend: str) -> Tensor:
    tubelet_size, *patch_size = inputs.patch
    return masked_patch_loss(
        inputs.prediction,
        inputs.video,
        inputs.ids_masked,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        target=inputs.target,
        mean=MEAN if inputs.target == "mae" else None,
        std=STD if inputs.target == "mae" else None,
        backend=backend,
    ).to(inputs.prediction.dtype)


def pixels(x: Tensor, target: str) -> Tensor:
    """Scale uint8 pixels [..., C] to float32 as a target requires."""
    if target == "videomae":
        return x / 255
    mean, std = (torch.tensor(y, device=x.device) for y in (MEAN, STD))
    return (x / 255 - mean) / std


def normalise(x: Tensor, target: str) -> Tensor:
    """Normalise the pixels [..., pixels, C] of each patch: targets [..., pixels * C]."""
    if target == "mae":
        x = x.flatten(-2)
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True)
        return (x - mean) / (var + 1.0e-6) ** 0.5
    mean, var = x.mean(dim=-2, keepdim=True), x.var(dim=-2, unbiased=True, keepdim=True)
    return ((x - mean) / (var.sqrt() + 1e-6)).flatten(-2)


def compare(prediction: Tensor, labels: Tensor) -> Tensor:
    """The loss in the dtype of the prediction, which the harness expects."""
    return F.mse_loss(prediction.float(), labels).to(prediction.dtype)


def cut(inputs: Inputs) -> Tensor:
    """The clip cut into patches [B, T', H', W', t, h, w, C]; a view."""
    t, h, w = inputs.patch
    patches = inputs.video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return patches.permute(0, 2, 4, 6, 3, 5, 7, 1)


def whole_clip(inputs: Inputs) -> Tensor:
    """Makes targets of all patches, then selects the masked ones."""
    with torch.no_grad():
        scaled = pixels(cut(inputs), inputs.target).flatten(4, 6).flatten(1, 3)
        labels = normalise(scaled, inputs.target)[inputs.mask]
    return compare(inputs.prediction, labels.view(inputs.prediction.shape))


def labels_of_masked(inputs: Inputs) -> Tensor:
    """The targets of the masked patches, which are gathered as bytes."""
    patches, ids = cut(inputs), inputs.ids_masked
    H, W = patches.shape[2:4]
    sample = torch.arange(ids.shape[0], device=ids.device)[:, None]
    masked = patches[sample, ids // (H * W), ids // W % H, ids % W].flatten(2, 4)
    return normalise(pixels(masked, inputs.target), inputs.target)


def labels_given(inputs: Inputs) -> Inputs:
    """Inputs with the targets instead of the clip."""
    return replace(inputs, video=labels_of_masked(inputs))


def compare_alone(inputs: Inputs) -> Tensor:
    return compare(inputs.prediction, inputs.video)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl, the baselines, and `mse_loss` alone."""
    return [
        *ours(OP, loss, device, dtype),
        Candidate("whole clip, then mask", "baseline", whole_clip),
        compiled("torch", functools.partial(loss, backend="torch"), device),
        Candidate("mse_loss alone", "given", compare_alone, prepare=labels_given),
    ]
