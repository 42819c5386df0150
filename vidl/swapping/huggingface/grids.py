"""Models of transformers that need the features of a whole grid of patches: they cannot prune."""

import re

from torch import nn

DENSE = re.compile(
    r"BackboneMixin|.*For(\w*Segmentation|\w*ObjectDetection|DepthEstimation|\w*Keypoint\w*"
    r"|PoseEstimation|ImageMatting|ImageToImage|ImageSuperResolution|MaskedImageModeling)"
)


def needs_grid(module: nn.Module) -> str | None:
    """The reason why a module around a transformer needs all of its patches, or None."""
    if any(DENSE.fullmatch(kind.__name__) for kind in type(module).__mro__):
        return f"{type(module).__name__} needs the features of a whole grid of patches"
    return None
