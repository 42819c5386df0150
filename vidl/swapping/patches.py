"""What the families share: convolutions that cut a picture or a clip into patches."""

from torch import nn


def whole_patches(projection: nn.Module) -> str | None:
    """Why `masked_patch_embed` cannot take a projection's place; None if it can."""
    if type(projection) not in (nn.Conv2d, nn.Conv3d):
        return f"its projection is {type(projection).__name__}, neither nn.Conv2d nor nn.Conv3d"
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    padded = projection.padding not in ("valid", (0,) * len(projection.kernel_size))
    if projection.stride != projection.kernel_size or padded or projection.groups != 1:
        return "its patches overlap, are padded, or see only some of the channels"
    if set(projection.dilation) != {1}:
        return "its patches have holes"
    return None
