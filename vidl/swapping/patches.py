"""Patch embeddings of swapped models: convolutions that cut images or clips into patches."""

from torch import Tensor, nn

from vidl.kernels import choices, library
from vidl.kernels.masked_patch_embed import op as masked_patch_embed
from vidl.nn.patch_embed import cuts_patches, has_hooks
from vidl.swapping.registry import full_name


def why_not(projection: nn.Module) -> str | None:
    """The reason why `masked_patch_embed` cannot replace a convolution; None if it can."""
    if type(projection) not in (nn.Conv2d, nn.Conv3d):
        return f"its projection is a {full_name(type(projection))}, not nn.Conv2d or nn.Conv3d"
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    if not cuts_patches(projection):
        return "its convolution has overlapping patches, padding, dilation or groups"
    if has_hooks(projection):
        return "its convolution has hooks, which reading its parameters would skip"
    return None


def stays(projection: nn.Conv2d, x: Tensor, backend: str) -> bool:
    """Whether PyTorch's convolution of x [B, C_in, H, W] runs, because no vidl kernel is faster."""
    if backend != "auto" or choices.recorder is not None:  # tuning measures the kernels
        return False
    weight = projection.weight[:, :, None].to(library.autocast_dtype(projection.weight))
    images = x[:, :, None]
    chosen = masked_patch_embed.choose(backend, images, weight, projection.bias, convolution=True)
    return chosen in library.PYTORCH


def embed_images(projection: nn.Conv2d, x: Tensor, backend: str) -> Tensor:
    """What `projection` computes of images x [B, C_in, H, W], as tokens [B, N, C]."""
    weight, bias = projection.weight, projection.bias
    return masked_patch_embed.embed_as_convolution(x.unsqueeze(2), weight, bias, backend=backend)


def speed(projection: nn.Conv2d, backend: str) -> str:
    """The report's note on a convolution that does not become faster; "" if a vidl kernel runs."""
    if backend != "auto":
        return ""
    kind = projection.weight.device.type
    return f"PyTorch's convolution, unless `vidl tune` measures a faster kernel on this {kind}"
