"""What the families share: convolutions that cut a picture or a clip into patches."""

from torch import nn

from vidl.nn.patch_embed import cuts_patches


def whole_patches(projection: nn.Module) -> str | None:
    """Why `masked_patch_embed` cannot take a projection's place; None if it can."""
    if type(projection) not in (nn.Conv2d, nn.Conv3d):
        return f"its projection is {type(projection).__name__}, neither nn.Conv2d nor nn.Conv3d"
    assert isinstance(projection, nn.Conv2d | nn.Conv3d)
    if not cuts_patches(projection):
        return "its patches overlap, are padded, have holes, or see only some of the channels"
    return None
