"""Does `frame_difference` cost no more than reading the compared frames?

Every candidate receives the uint8 clip as a loader returns it, and computes the float32 score of
every tubelet after the first slice. The baselines are the implementation of RLT, which pools the
differences of float frames, and variants that cut patches in float, int16 or uint8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, compiled, ours
from vidl.bench.ops.clips import Clips, sizes
from vidl.kernels.frame_difference.op import frame_difference

OP = "frame_difference"

_CLIPS = dict(stored="BCTHW")
SHAPES: dict[str, dict[str, Any]] = {
    "VideoMAE, 16 frames": sizes(64, 4, T=16, tubelet_size=2) | _CLIPS,
    "RLT, 64 frames": sizes(16, 1, T=64, tubelet_size=2) | _CLIPS,
    "8 frames, one a token": sizes(64, 4, T=8) | _CLIPS,
    OVERHEAD: sizes(1, 1, T=4, tubelet_size=2) | _CLIPS | dict(image_size=32),
    "16 frames, channels last": sizes(64, 4, T=16, tubelet_size=2) | dict(stored="BTHWC"),
}
PARAMETERS = ()


@dataclass(frozen=True)
class Inputs:
    """A batch of clips."""

    video: Tensor  # [B, C, T, H, W] uint8
    tubelet_size: int
    patch_size: int
    grad: Tensor  # unused: the op has no gradients


def make(stored: str, *, dtype: torch.dtype, device: str, generator: Any, **sizes: int) -> Inputs:
    """Draw a batch whose dimensions are in memory in the order `stored`."""
    clips = Clips(**sizes)
    grad = torch.zeros((), device=device, dtype=dtype)
    video = clips.draw(generator, stored).to(device)
    return Inputs(video, clips.tubelet_size, clips.patch_size, grad)


def work(stored: str, *, dtype: torch.dtype, **sizes: int) -> dict[str, Work]:
    """Reads each compared frame once, writes the scores once."""
    clips = Clips(**sizes)
    compared = 2 * (clips.slices - 1) if clips.tubelet_size > 1 else clips.T
    pixels = clips.B * 3 * clips.image_size**2
    tokens = clips.B * clips.slices * clips.P
    forward = Work(compared * pixels + 4 * tokens, 2 * (clips.slices - 1) * pixels)
    return {"forward": forward, "backward": Work(0, 0)}


def truth(inputs: Inputs) -> Tensor:
    return score(inputs, backend="reference")


def score(inputs: Inputs, backend: str) -> Tensor:
    p, (H, W) = inputs.patch_size, inputs.video.shape[3:]
    scores = frame_difference(inputs.video, (inputs.tubelet_size, p, p), backend=backend)
    return scores[:, (H // p) * (W // p) :]


def pairs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The compared frames, [B, C, T' - 1, H, W] each: last of a slice, first of the one before."""
    t = inputs.tubelet_size
    return inputs.video[:, :, 2 * t - 1 :: t], inputs.video[:, :, : -t or None : t]


def pooled_floats(inputs: Inputs) -> Tensor:
    """The implementation of RLT: converts the whole clip to float, then pools."""
    video, t, p = inputs.video.float(), inputs.tubelet_size, inputs.patch_size
    pixels = (video[:, :, 2 * t - 1 :: t] - video[:, :, :-t:t]).abs()
    return F.avg_pool3d(pixels, (1, p, p)).mean(1).flatten(1) / 255


def patch_means(pixels: Tensor, size: int) -> Tensor:
    return (
        pixels.unflatten(3, (-1, size)).unflatten(5, (-1, size)).float().mean((1, 4, 6)).flatten(1)
    )


def cut_floats(inputs: Inputs) -> Tensor:
    last, first = (x.float() for x in pairs(inputs))
    return patch_means((last - first).abs(), inputs.patch_size) / 255


def cut_integers(inputs: Inputs) -> Tensor:
    last, first = (x.short() for x in pairs(inputs))
    return patch_means((last - first).abs(), inputs.patch_size) / 255


def cut_bytes(inputs: Inputs) -> Tensor:
    """Differences in uint8: the larger minus the smaller."""
    last, first = pairs(inputs)
    pixels = torch.maximum(last, first) - torch.minimum(last, first)
    return patch_means(pixels, inputs.patch_size) / 255


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl and the baselines, which on CUDA are also compiled."""
    baselines: list[tuple[str, Callable[[Inputs], Tensor]]] = [
        ("float, avg_pool3d (RLT)", pooled_floats),
        ("float, cut and mean", cut_floats),
        ("int16, cut and mean", cut_integers),
        ("uint8, cut and mean", cut_bytes),
    ]
    result = ours(OP, score, device, torch.float32)
    for name, run in baselines:
        result += [Candidate(name, "baseline", run), compiled(name, run, device)]
    return result
