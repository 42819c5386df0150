"""Does `masked_patch_embed` embed the visible patches as fast as the matmul alone allows?

Every candidate receives the uint8 clip as a loader returns it, and computes the embedded visible
tokens. The strongest baseline is usually the backend `torch`, gather + linear, which skips the
masked patches too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import OVERHEAD, Candidate, Work, compiled, ours, short
from vidl.bench.ops.clips import MEAN, STD, Clips, sizes
from vidl.kernels.masked_patch_embed.op import masked_patch_embed

OP = "masked_patch_embed"

# Of the P patches of each tubelet slice `kept` stay visible; all of them if it is None.
_SMAUG = sizes(64, 8, T=4) | dict(C=768)
_VIDEOMAE = sizes(64, 2, T=16, tubelet_size=2) | dict(C=768)
_FLIP = sizes(256, 8, T=1, patch_size=14) | dict(C=1024)
SHAPES: dict[str, dict[str, Any]] = {
    "G1 SMAUG ViT-B/16, mask 0.65": _SMAUG | dict(kept=68),
    "G1 SMAUG ViT-B/16, mask 0.9": _SMAUG | dict(kept=20),
    "G1 SMAUG ViT-B/16, dense": _SMAUG | dict(kept=None),
    "G2 VideoMAE-B, mask 0.9": _VIDEOMAE | dict(kept=20),
    "G2 VideoMAE-B, mask 0.65": _VIDEOMAE | dict(kept=68),
    "G2 VideoMAE-B, dense": _VIDEOMAE | dict(kept=None),
    OVERHEAD: sizes(1, 1, T=1) | dict(image_size=32, C=64, kept=2),
    "G4 FLIP ViT-L/14, mask 0.5": _FLIP | dict(kept=128),
}
PARAMETERS = ("weight", "bias", "position")


@dataclass(frozen=True)
class Inputs:
    """A batch of clips and the parameters of the embedding."""

    video: Tensor  # [B, C_in, T, H, W] uint8
    weight: Tensor  # [C, C_in, t, h, w]
    bias: Tensor  # [C]
    position: Tensor  # [N, C]
    ids_keep: Tensor | None  # [B, K]
    scale: Tensor  # [C_in, 1, 1, 1]: a normalised pixel is pixel * scale + shift
    shift: Tensor  # [C_in, 1, 1, 1]
    grad: Tensor  # of the result, [B, K, C]


def make(
    C: int, kept: int | None, *, dtype: torch.dtype, device: str, generator: Any, **sizes: int
) -> Inputs:
    """Draw a batch. Frames are stored [B, T, C_in, H, W], clips of tubelets [B, C_in, T, H, W]."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    clips = Clips(**sizes)
    video = clips.draw(generator, "BTCHW" if clips.tubelet_size == 1 else "BCTHW").to(device)
    ids = None
    if kept is not None:
        ids = clips.flat(clips.draw_ids(generator, kept)).to(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (MEAN, STD))
    return Inputs(
        video=video,
        weight=normal(C, 3, *clips.patch, scale=clips.pixels**-0.5),
        bias=normal(C, scale=0.02),
        position=normal(clips.slices * clips.P, C, scale=0.02),
        ids_keep=ids,
        scale=1 / (255 * std),
        shift=-mean / std,
        grad=normal(clips.B, clips.slices * (kept or clips.P), C),
    )


def work(C: int, kept: int | None, *, dtype: torch.dtype, **sizes: int) -> dict[str, Work]:
    """Reads the visible bytes, the parameters and the ids once; writes the tokens once."""
    clips = Clips(**sizes)
    rows, pixels = clips.B * clips.slices * (clips.P if kept is None else kept), clips.pixels
    ids = 0 if kept is None else 8 * rows
    parameters = (C * pixels + C + clips.slices * clips.P * C) * dtype.itemsize
    size = rows * pixels + ids + parameters + rows * C * dtype.itemsize
    # Backward reads the pixels and the gradient of the tokens, and writes those of the parameters.
    phase = Work(size, 2 * rows * pixels * C)
    return {"forward": phase, "backward": phase}


def truth(inputs: Inputs) -> Tensor:
    return embed(inputs, backend="reference")


def embed(inputs: Inputs, backend: str) -> Tensor:
    return masked_patch_embed(
        inputs.video,
        inputs.weight,
        inputs.bias,
        inputs.position,
        inputs.ids_keep,
        mean=MEAN,
        std=STD,
        backend=backend,
    )


def normalise(pixels: Tensor, inputs: Inputs) -> Tensor:
    """Normalise uint8 pixels [..., C_in, t, h, w] in float32, and cast to the weight's dtype."""
    if pixels.is_floating_point():  # already normalised, see clip_given
        return pixels
    return (pixels * inputs.scale).add_(inputs.shift).to(inputs.weight.dtype)


def patches(video: Tensor, weight: Tensor) -> Tensor:
    """The clip cut into patches [B, T', H', W', C_in, t, h, w]; a view."""
    t, h, w = weight.shape[2:]
    cut = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def visible_patches(inputs: Inputs) -> Tensor:
    """Gather the patches of `ids_keep`: [B * K, C_in, t, h, w]."""
    cut = patches(inputs.video, inputs.weight)
    H, W = cut.shape[2:4]
    ids = inputs.ids_keep
    assert ids is not None, "need a shape with a mask"
    sample = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return cut[sample, ids // (H * W), ids // W % H, ids % W].flatten(0, 1)


def pick(tokens: Tensor, inputs: Inputs) -> Tensor:
    """Gather the visible tokens of [B, N, C] after adding `position`, like MAE and VideoMAE."""
    tokens = tokens + inputs.position
    if inputs.ids_keep is None:
        return tokens
    return tokens.gather(1, inputs.ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))


def conv_gather(inputs: Inputs) -> Tensor:
    weight, bias = inputs.weight, inputs.bias
    if weight.shape[2] > 1:
        tokens = F.conv3d(normalise(inputs.video, inputs), weight, bias, weight.shape[2:])
        return pick(tokens.flatten(2).transpose(1, 2), inputs)
    frames = inputs.video.transpose(
        1, 2
    )  # [B, T, C_in, H, W], contiguous: the flatten below is a view
    images = normalise(frames.flatten(0, 1)[:, :, None], inputs).squeeze(2)
    tokens = F.conv2d(images, weight.squeeze(2), bias, weight.shape[3:])
    return pick(
        tokens.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2]).flatten(1, 2), inputs
    )


def unfold_linear_gather(inputs: Inputs) -> Tensor:
    cut = patches(inputs.video, inputs.weight)
    # The copy is one of bytes, not of floats.
    rows = normalise(cut.contiguous(), inputs).flatten(4).flatten(1, 3)
    return pick(F.linear(rows, inputs.weight.flatten(1), inputs.bias), inputs)


def torch_backend(inputs: Inputs) -> Tensor:
    return embed(inputs, backend="torch")


def in_float32(run: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """`run` with float32 parameters: faster on CPUs without bfloat16 units."""

    def upcast_and_run(inputs: Inputs) -> Tensor:
        upcast = {name: getattr(inputs, name).float() for name in PARAMETERS}
        return run(replace(inputs, **upcast)).to(inputs.weight.dtype)

    return upcast_and_run


def clip_given(inputs: Inputs) -> Inputs:
    """Inputs with the whole clip normalised and in the weight's dtype."""
    return replace(inputs, video=normalise(inputs.video, inputs))


def rows_given(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs with the visible patches gathered, normalised and in the dtype of the matmul."""
    if inputs.ids_keep is None:
        cut = patches(inputs.video, inputs.weight).flatten(0, 3)
    else:
        cut = visible_patches(inputs)
    return replace(
        inputs,
        video=normalise(cut, inputs).flatten(1).to(dtype),
        weight=inputs.weight.flatten(1).to(dtype),
        bias=inputs.bias.to(dtype),
        grad=inputs.grad.flatten(0, 1).to(dtype),
    )


def matmul(inputs: Inputs) -> Tensor:
    return F.linear(inputs.video, inputs.weight, inputs.bias)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl, the baselines, and the matmul alone."""
    conv = "conv2d + gather" if sizes["tubelet_size"] == 1 else "conv3d + gather"
    result = ours(OP, embed, device, dtype)
    result += [
        Candidate(conv, "baseline", conv_gather),
        Candidate(f"{conv}, float clip", "given", conv_gather, prepare=clip_given),
        Candidate("unfold + linear + gather", "baseline", unfold_linear_gather),
        compiled("torch", torch_backend, device),
    ]
    matmul_dtypes = [dtype]
    if device == "cpu" and dtype != torch.float32:
        matmul_dtypes.append(torch.float32)
        result.append(Candidate("torch, in float32", "baseline", in_float32(torch_backend)))
    for matmul_dtype in matmul_dtypes:
        result.append(
            Candidate(
                f"GEMM alone, {short(matmul_dtype)}",
                "floor",
                matmul,
                prepare=functools.partial(rows_given, dtype=matmul_dtype),
                gradients=("weight", "bias"),
            )
        )
    return result
