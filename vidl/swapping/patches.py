"""What the families share: convolutions that cut a picture or a clip into patches."""

import torch
from torch import nn

from vidl.kernels import library
from vidl.nn.patch_embed import cuts_patches


def whole_patches(projection: nn.Module) -> str | None:
    """Why `masked_patch_embed` cannot take a projection's place; None if it can."""
    if type(projection) not in (nn.Conv2d, nn.Conv3d):
        return f"its projection is {type(projection).__name__}, neither nn.Conv2d nor nn.Conv3d"
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    if not cuts_patches(projection):
        return "its patches overlap, are padded, have holes, or see only some of the channels"
    return None


def stays(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own convolution is faster than what `backend` means there."""
    chosen = library.choose(backend, "masked_patch_embed", device, dtype)
    return backend == "auto" and chosen == "reference"


def speed(projection: nn.Conv2d, backend: str) -> str:
    """What the report says of a projection that gains nothing; "" where our kernels run."""
    weight = projection.weight
    if not stays(backend, weight.device.type, weight.dtype):
        return ""
    return f"as fast as before: it stays with the convolution on {weight.device.type}"
