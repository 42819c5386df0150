"""Patch embeddings of swapped models: convolutions that cut images or clips into patches."""

import torch
from torch import nn

from vidl.kernels import library
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


def stays(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `backend` keeps PyTorch's convolution, because it is faster on this device."""
    chosen = library.choose(backend, "masked_patch_embed", device, dtype)
    return backend == "auto" and chosen in library.PYTORCH


def speed(projection: nn.Conv2d, backend: str) -> str:
    """The report's note on a convolution that does not become faster; "" if a vidl kernel runs."""
    weight = projection.weight
    if not stays(backend, weight.device.type, weight.dtype):
        return ""
    return f"not faster: backend='auto' keeps PyTorch's convolution on {weight.device.type}"
