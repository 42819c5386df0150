"""Do visible patches become tokens as fast as the multiplication alone allows?

Every candidate gets the uint8 clip as a loader gives it, and answers with the embedded visible
tokens. The baselines are what a careful user writes today; `gather + linear` is the one to beat, since
it skips the masked patches too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.kernels.masked_patch_embed.op import masked_patch_embed

OP = "masked_patch_embed"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# B clips of T frames, of SIDE x SIDE pixels and 3 channels; tubelets of t frames and p x p pixels;
# K of the (SIDE / p)^2 patches of each tubelet slice are kept, all of them where K is None.
_SMAUG = dict(B={"cuda": 64, "cpu": 8}, T=4, SIDE=224, t=1, p=16, D=768)
_VIDEOMAE = dict(B={"cuda": 64, "cpu": 2}, T=16, SIDE=224, t=2, p=16, D=768)
_FLIP = dict(B={"cuda": 256, "cpu": 8}, T=1, SIDE=224, t=1, p=14, D=1024)
SHAPES = {
    "G1 SMAUG ViT-B/16, mask 0.65": _SMAUG | dict(K=68),
    "G1 SMAUG ViT-B/16, mask 0.9": _SMAUG | dict(K=20),
    "G1 SMAUG ViT-B/16, dense": _SMAUG | dict(K=None),
    "G2 VideoMAE-B, mask 0.9": _VIDEOMAE | dict(K=20),
    "G2 VideoMAE-B, mask 0.65": _VIDEOMAE | dict(K=68),
    "G2 VideoMAE-B, dense": _VIDEOMAE | dict(K=None),
    "G4 FLIP ViT-L/14, mask 0.5": _FLIP | dict(K=128),
}
PARAMETERS = ("weight", "bias", "position")


@dataclass(frozen=True)
class Inputs:
    """A batch and the parameters; the harness casts and differentiates what it finds here."""

    video: (
        Tensor  # [B, C, T, H, W] uint8; conv and unfold baselines read it in the layout they like
    )
    weight: Tensor  # [D, C, t, p, p]
    bias: Tensor  # [D]
    position: Tensor  # [N, D]
    ids_keep: Tensor | None  # [B, K]
    scale: Tensor  # [C, 1, 1, 1]: a normalised pixel is pixel * scale + shift
    shift: Tensor  # [C, 1, 1, 1]
    grad: Tensor  # of the result, [B, K, D]


def make(
    B: int,
    T: int,
    SIDE: int,
    t: int,
    p: int,
    D: int,
    K: int | None,
    *,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> Inputs:
    """Draw a batch. Frames are stored [B, T, C, H, W], tubelet models' clips [B, C, T, H, W]."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    S, C = (SIDE // p) ** 2, 3
    slices = T // t
    stored = (B, T, C, SIDE, SIDE) if t == 1 else (B, C, T, SIDE, SIDE)
    video = torch.randint(0, 256, stored, dtype=torch.uint8, generator=generator).to(device)
    ids = None
    if K is not None:  # a random subset of every slice, as tube-less masking draws it
        order = torch.rand(B, slices, S, generator=generator).argsort(-1)[..., :K]
        ids = (order + S * torch.arange(slices)[:, None]).flatten(1).to(device)
    mean, std = (torch.tensor(each, device=device).view(C, 1, 1, 1) for each in (MEAN, STD))
    return Inputs(
        video=video.transpose(1, 2) if t == 1 else video,
        weight=normal(D, C, t, p, p, scale=(C * t * p * p) ** -0.5),
        bias=normal(D, scale=0.02),
        position=normal(slices * S, D, scale=0.02),
        ids_keep=ids,
        scale=1 / (255 * std),
        shift=-mean / std,
        grad=normal(B, slices * (K or S), D),
    )


def work(
    B: int, T: int, SIDE: int, t: int, p: int, D: int, K: int | None, *, dtype: torch.dtype
) -> dict[str, Work]:
    """Read the visible bytes, the parameters and the ids once; write the tokens once."""
    N, row = T // t * (SIDE // p) ** 2, 3 * t * p * p
    M = B * (N if K is None else T // t * K)
    pixels, ids = M * row, 0 if K is None else 8 * M
    parameters, tokens = (D * row + D + N * D) * dtype.itemsize, M * D * dtype.itemsize
    one = Work(pixels + ids + parameters + tokens, 2 * M * row * D)
    # backward reads the tokens' gradient and the pixels again, and writes the parameters' gradients
    return {"forward": one, "backward": one}


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
    """[..., C, t, h, w] uint8 to the weight's dtype; two passes over float32, none needless."""
    if pixels.is_floating_point():  # given for free
        return pixels
    return (pixels * inputs.scale).add_(inputs.shift).to(inputs.weight.dtype)


def patches(video: Tensor, weight: Tensor) -> Tensor:
    """The clip as [B, T', H', W', C, t, h, w], without a copy."""
    t, h, w = weight.shape[2:]
    cut = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def visible_patches(inputs: Inputs) -> Tensor:
    """The patches of `ids_keep` and no others: [M, C, t, h, w]."""
    cut = patches(inputs.video, inputs.weight)
    H, W = cut.shape[2:4]
    ids = inputs.ids_keep
    assert ids is not None, "a dense shape has nothing to gather"
    sample = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return cut[sample, ids // (H * W), ids // W % H, ids % W].flatten(0, 1)


def pick(tokens: Tensor, inputs: Inputs) -> Tensor:
    """The visible tokens of [B, N, D], as MAE and VideoMAE do it: `position` first, then gather."""
    tokens = tokens + inputs.position
    if inputs.ids_keep is None:
        return tokens
    return tokens.gather(1, inputs.ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))


def conv_gather(inputs: Inputs) -> Tensor:
    weight, bias = inputs.weight, inputs.bias
    if weight.shape[2] > 1:
        tokens = F.conv3d(normalise(inputs.video, inputs), weight, bias, weight.shape[2:])
        return pick(tokens.flatten(2).transpose(1, 2), inputs)
    frames = inputs.video.transpose(1, 2)  # [B, T, C, H, W], as it is stored: no copy below
    images = normalise(frames.flatten(0, 1)[:, :, None], inputs).squeeze(2)
    tokens = F.conv2d(images, weight.squeeze(2), bias, weight.shape[3:])
    return pick(
        tokens.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2]).flatten(1, 2), inputs
    )


def unfold_linear_gather(inputs: Inputs) -> Tensor:
    cut = patches(inputs.video, inputs.weight)
    rows = (
        normalise(cut.contiguous(), inputs).flatten(4).flatten(1, 3)
    )  # bytes are moved, not floats
    return pick(F.linear(rows, inputs.weight.flatten(1), inputs.bias), inputs)


def gather_linear(inputs: Inputs) -> Tensor:
    rows = normalise(visible_patches(inputs), inputs).flatten(1)
    tokens = F.linear(rows, inputs.weight.flatten(1), inputs.bias)
    return tokens.view(inputs.grad.shape) + inputs.position[inputs.ids_keep]


def in_float32(run: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The same, multiplied in float32: the way round for a CPU without bfloat16 units."""

    def detour(inputs: Inputs) -> Tensor:
        upcast = {name: getattr(inputs, name).float() for name in PARAMETERS}
        return run(replace(inputs, **upcast)).to(inputs.weight.dtype)

    return detour


def clip_given(inputs: Inputs) -> Inputs:
    """The whole clip already normalised and in the weight's dtype."""
    return replace(inputs, video=normalise(inputs.video, inputs))


def rows_given(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The visible patches already cut out, normalised and in the dtype of the multiplication."""
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


def multiply(inputs: Inputs) -> Tensor:
    return F.linear(inputs.video, inputs.weight, inputs.bias)


def candidates(sizes: dict, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Ours, the baselines, and the multiplication alone."""
    dense = "every patch is visible: this is unfold + linear" if sizes["K"] is None else None
    conv = "conv2d + gather" if sizes["t"] == 1 else "conv3d + gather"
    found = ours(OP, embed, device, dtype)
    found += [
        Candidate(conv, "baseline", conv_gather),
        Candidate(f"{conv}, float clip", "given", conv_gather, prepare=clip_given),
        Candidate("unfold + linear + gather", "baseline", unfold_linear_gather),
        Candidate("gather + linear", "baseline", gather_linear, reason=dense),
        Candidate(
            "gather + linear, torch.compile",
            "baseline",
            torch.compile(gather_linear) if device == "cuda" else gather_linear,
            reason="timed on CUDA only" if device == "cpu" else dense,
        ),
    ]
    multiplications = [dtype]
    if device == "cpu" and dtype != torch.float32:
        multiplications.append(torch.float32)
        run = unfold_linear_gather if dense else gather_linear
        name = "unfold + linear + gather" if dense else "gather + linear"
        found.append(Candidate(f"{name}, in float32", "baseline", in_float32(run)))
    for each in multiplications:
        found.append(
            Candidate(
                f"GEMM alone, {str(each).removeprefix('torch.')}",
                "floor",
                multiply,
                prepare=functools.partial(rows_given, dtype=each),
                gradients=("weight", "bias"),
            )
        )
    return found
