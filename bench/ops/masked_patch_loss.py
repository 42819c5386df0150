"""Does the loss of masked patches cost as much as reading them, and nothing for the others?

Every candidate gets the uint8 clip as a loader gives it and the prediction of the masked patches,
and answers with the loss. `whole clip` is how MAE and VideoMAE make their targets; `gather, then
normalise` is the one to beat, since it skips the visible patches too.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.kernels.masked_patch_loss.op import Target, masked_patch_loss

OP = "masked_patch_loss"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# B clips of T frames, of SIDE x SIDE pixels and 3 channels; tubelets of t frames and p x p pixels;
# M of the (SIDE / p)^2 patches of each tubelet slice are masked.
SHAPES = {
    "VideoMAE-B, mask 0.9": dict(
        B={"cuda": 64, "cpu": 2}, T=16, SIDE=224, t=2, p=16, M=176, target="videomae"
    ),
    "SMAUG, 4 frames, mask 0.65": dict(
        B={"cuda": 64, "cpu": 8}, T=4, SIDE=224, t=1, p=16, M=128, target="mae"
    ),
    "MAE, mask 0.75": dict(
        B={"cuda": 256, "cpu": 16}, T=1, SIDE=224, t=1, p=16, M=147, target="mae"
    ),
}
PARAMETERS = ("prediction",)


@dataclass(frozen=True)
class Inputs:
    """A batch; the harness casts and differentiates what it finds here."""

    prediction: Tensor  # [B, M, t * p * p * C]
    video: Tensor  # [B, C, T, H, W] uint8
    ids_masked: Tensor  # [B, M]
    mask: Tensor  # [B, N], what `ids_masked` names
    patch: tuple[int, int, int]
    target: Target
    grad: Tensor  # of the loss


def make(
    B: int,
    T: int,
    SIDE: int,
    t: int,
    p: int,
    M: int,
    target: Target,
    *,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> Inputs:
    """Draw a batch. Frames are stored [B, T, C, H, W], tubelet models' clips [B, C, T, H, W]."""
    S, C, slices = (SIDE // p) ** 2, 3, T // t
    stored = (B, T, C, SIDE, SIDE) if t == 1 else (B, C, T, SIDE, SIDE)
    video = torch.randint(0, 256, stored, dtype=torch.uint8, generator=generator).to(device)
    order = torch.rand(B, slices, S, generator=generator).argsort(-1)[..., :M].sort().values
    ids = (order + S * torch.arange(slices)[:, None]).flatten(1).to(device)
    mask = torch.zeros(B, slices * S, dtype=torch.bool, device=device).scatter_(1, ids, True)
    prediction = torch.randn(B, slices * M, t * p * p * C, generator=generator)
    return Inputs(
        prediction=prediction.to(device, dtype),
        video=video.transpose(1, 2) if t == 1 else video,
        ids_masked=ids,
        mask=mask,
        patch=(t, p, p),
        target=target,
        grad=torch.ones((), dtype=dtype, device=device),
    )


def work(
    B: int, T: int, SIDE: int, t: int, p: int, M: int, target: str, *, dtype: torch.dtype
) -> dict[str, Work]:
    """Read the masked bytes, the prediction and the ids once; write the gradient once."""
    rows = B * T // t * M
    numbers = rows * 3 * t * p * p
    read = numbers * (1 + dtype.itemsize) + 8 * rows
    # mean, variance, normalisation and square: 8 operations a number; without the statistics 4
    return {
        "forward": Work(read, 8 * numbers),
        "backward": Work(read + numbers * dtype.itemsize, 4 * numbers),
    }


def truth(inputs: Inputs) -> Tensor:
    return loss(inputs, backend="reference")


def loss(inputs: Inputs, backend: str) -> Tensor:
    t, *sides = inputs.patch
    return masked_patch_loss(
        inputs.prediction,
        inputs.video,
        inputs.ids_masked,
        patch_size=sides,
        tubelet_size=t,
        target=inputs.target,
        mean=MEAN if inputs.target == "mae" else None,
        std=STD if inputs.target == "mae" else None,
        backend=backend,
    ).to(inputs.prediction.dtype)


def pixels(x: Tensor, target: str) -> Tensor:
    """uint8 [..., C] to the pixels that a target is made of, in float32."""
    if target == "videomae":
        return x / 255
    mean, std = (torch.tensor(each, device=x.device) for each in (MEAN, STD))
    return (x / 255 - mean) / std


def normalise(x: Tensor, target: str) -> Tensor:
    """[..., pixels, C] to targets [..., pixels * C], as MAE and VideoMAE write it."""
    if target == "mae":
        x = x.flatten(-2)
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True)
        return (x - mean) / (var + 1.0e-6) ** 0.5
    mean, var = x.mean(dim=-2, keepdim=True), x.var(dim=-2, unbiased=True, keepdim=True)
    return ((x - mean) / (var.sqrt() + 1e-6)).flatten(-2)


def compare(prediction: Tensor, labels: Tensor) -> Tensor:
    """The loss, in the dtype of the prediction as the harness expects every result."""
    return F.mse_loss(prediction.float(), labels).to(prediction.dtype)


def cut(inputs: Inputs) -> Tensor:
    """The clip as [B, T', H', W', t, p, p, C], without a copy."""
    t, h, w = inputs.patch
    every = inputs.video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return every.permute(0, 2, 4, 6, 3, 5, 7, 1)


def whole_clip(inputs: Inputs) -> Tensor:
    """Every patch becomes a target; a mask then picks."""
    with torch.no_grad():
        every = pixels(cut(inputs), inputs.target).flatten(4, 6).flatten(1, 3)
        labels = normalise(every, inputs.target)[inputs.mask]
    return compare(inputs.prediction, labels.view(inputs.prediction.shape))


def labels_of_masked(inputs: Inputs) -> Tensor:
    """The targets of the masked patches; only those are copied, as bytes."""
    every, ids = cut(inputs), inputs.ids_masked
    H, W = every.shape[2:4]
    sample = torch.arange(ids.shape[0], device=ids.device)[:, None]
    masked = every[sample, ids // (H * W), ids // W % H, ids % W].flatten(2, 4)
    return normalise(pixels(masked, inputs.target), inputs.target)


def gather_first(inputs: Inputs) -> Tensor:
    with torch.no_grad():
        labels = labels_of_masked(inputs)
    return compare(inputs.prediction, labels)


def labels_given(inputs: Inputs) -> Inputs:
    """The targets already made, in place of the clip."""
    return replace(inputs, video=labels_of_masked(inputs))


def compare_alone(inputs: Inputs) -> Tensor:
    return compare(inputs.prediction, inputs.video)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, the baselines, and the comparison alone."""
    found = ours(OP, loss, device, dtype)
    found += [
        Candidate("whole clip, then mask", "baseline", whole_clip),
        Candidate("gather, then normalise", "baseline", gather_first),
        Candidate(
            "gather, then normalise, torch.compile",
            "baseline",
            torch.compile(gather_first),
            reason="timed on CUDA only" if device == "cpu" else None,
        ),
        Candidate("mse_loss alone", "given", compare_alone, prepare=labels_given),
    ]
    return found
