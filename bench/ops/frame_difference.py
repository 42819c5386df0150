"""Do differences between frames cost what reading the frames costs?

Every candidate gets the uint8 clip as a loader gives it, and answers with the float32 score of
every tubelet after the first slice. The baselines are the authors' way, pooled differences in float,
and what a careful user writes: patches cut out in integers, or without leaving uint8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.kernels.frame_difference.op import frame_difference

OP = "frame_difference"

# B clips of T frames, of SIDE x SIDE pixels and 3 channels; tubelets of t frames and p x p pixels.
_CLIPS = dict(SIDE=224, p=16, stored="BCTHW")
SHAPES: dict[str, dict[str, Any]] = {
    "VideoMAE, 16 frames": _CLIPS | dict(B={"cuda": 64, "cpu": 4}, T=16, t=2),
    "RLT, 64 frames": _CLIPS | dict(B={"cuda": 16, "cpu": 1}, T=64, t=2),
    "8 frames, one a token": _CLIPS | dict(B={"cuda": 64, "cpu": 4}, T=8, t=1),
    "16 frames, channels last": _CLIPS | dict(B={"cuda": 64, "cpu": 4}, T=16, t=2, stored="BTHWC"),
}
PARAMETERS = ()


@dataclass(frozen=True)
class Inputs:
    """A batch of clips."""

    video: Tensor  # [B, C, T, H, W] uint8
    t: int
    p: int
    grad: Tensor  # unused: nothing is differentiated


def make(
    B: int,
    T: int,
    SIDE: int,
    t: int,
    p: int,
    stored: str,
    *,
    dtype: torch.dtype,
    device: str,
    generator: Any,
) -> Inputs:
    """Draw a batch, stored [B, C, T, H, W] or [B, T, H, W, C]."""
    sizes = (B, 3, T, SIDE, SIDE) if stored == "BCTHW" else (B, T, SIDE, SIDE, 3)
    video = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator).to(device)
    video = video if stored == "BCTHW" else video.permute(0, 4, 1, 2, 3)
    return Inputs(video, t, p, torch.zeros((), device=device, dtype=dtype))


def work(
    B: int, T: int, SIDE: int, t: int, p: int, stored: str, *, dtype: torch.dtype
) -> dict[str, Work]:
    """Read each frame that is compared once, write the scores once."""
    compared = 2 * (T // t - 1) if t > 1 else T
    pixels = B * 3 * SIDE * SIDE
    tokens = B * T // t * (SIDE // p) ** 2
    forward = Work(compared * pixels + 4 * tokens, 2 * (T // t - 1) * pixels)
    return {"forward": forward, "backward": Work(0, 0)}


def truth(inputs: Inputs) -> Tensor:
    return score(inputs, backend="reference")


def score(inputs: Inputs, backend: str) -> Tensor:
    scores = frame_difference(inputs.video, (inputs.t, inputs.p, inputs.p), backend=backend)
    return scores[:, (inputs.video.shape[3] // inputs.p) * (inputs.video.shape[4] // inputs.p) :]


def pairs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The frames that are compared, [B, C, T' - 1, H, W] each: last ones, and first ones."""
    t = inputs.t
    return inputs.video[:, :, 2 * t - 1 :: t], inputs.video[:, :, : -t or None : t]


def pooled_floats(inputs: Inputs) -> Tensor:
    """As the authors of RLT do it: the whole clip in float, then pooling, then channels."""
    video = inputs.video.float()
    t = inputs.t
    pixels = (video[:, :, 2 * t - 1 :: t] - video[:, :, :-t:t]).abs()
    return F.avg_pool3d(pixels, (1, inputs.p, inputs.p)).mean(1).flatten(1) / 255


def patch_means(pixels: Tensor, p: int) -> Tensor:
    return pixels.unflatten(3, (-1, p)).unflatten(5, (-1, p)).float().mean((1, 4, 6)).flatten(1)


def cut_floats(inputs: Inputs) -> Tensor:
    last, first = (x.float() for x in pairs(inputs))
    return patch_means((last - first).abs(), inputs.p) / 255


def cut_integers(inputs: Inputs) -> Tensor:
    last, first = (x.short() for x in pairs(inputs))
    return patch_means((last - first).abs(), inputs.p) / 255


def cut_bytes(inputs: Inputs) -> Tensor:
    """Differences that never leave uint8: the greater less the smaller."""
    last, first = pairs(inputs)
    return patch_means(torch.maximum(last, first) - torch.minimum(last, first), inputs.p) / 255


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, and the baselines, on CUDA also compiled."""
    found = ours(OP, score, device, torch.float32)
    baselines: list[tuple[str, Callable[[Inputs], Tensor]]] = [
        ("float, avg_pool3d (RLT)", pooled_floats),
        ("float, cut and mean", cut_floats),
        ("int16, cut and mean", cut_integers),
        ("uint8, cut and mean", cut_bytes),
    ]
    for name, run in baselines:
        found.append(Candidate(name, "baseline", run))
        found.append(
            Candidate(
                f"{name}, torch.compile",
                "baseline",
                torch.compile(run) if device == "cuda" else run,
                reason="timed on CUDA only" if device == "cpu" else None,
            )
        )
    return found
