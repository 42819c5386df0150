"""vidl.mask: an existing model hides random patches from itself while it trains."""

from torch import nn

from vidl.swapping import families
from vidl.swapping.registry import full_name
from vidl.swapping.report import Change, Report, summary
from vidl.swapping.swap import swap, swapped_modules, unswap_whatever


def mask(model: nn.Module, ratio: float, *, backend: str = "auto") -> Report:
    """Hide random patches of each image in training, and embed only the others, in place.

    As FLIP trains, and as timm's `patch_drop_rate` does after it embedded all patches. In
    evaluation nothing is hidden. The model is swapped as `vidl.swap` does, unless it is already;
    `vidl.unswap` undoes both. Call it again to choose another ratio.

    Args:
        model: with a `VisionTransformer` of timm in it, or ViT, ViViT, CLIP or SigLIP of
            transformers.
        ratio: of the patches, hidden, in [0, 1); at least one stays.
        backend: of `vidl.swap`, if that was not called before, and of the embedding.

    Returns:
        What became of each module.

    Raises:
        ValueError: there is no such model, or it has options with which this is not possible; it
            is as it was.

    Source: FLIP, arXiv 2212.00794, 3.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"need a ratio in [0, 1), got {ratio}")
    fresh = next(swapped_modules(model), None) is None
    changes = swap(model, backend=backend).changes if fresh else ()
    found: list[Change] = []
    for family in families.of(model):
        found += family.mask(model, ratio, backend) if family.mask else ()
    if not any(change.became for change in found):
        if fresh:
            unswap_whatever(model)
        reasons = "".join("\n" + line for line in summary(tuple(found)))
        raise ValueError(
            "need a VisionTransformer of timm, or ViT, ViViT, CLIP or SigLIP of transformers, that "
            "can hide patches, found none in "
            f"{full_name(type(model))}{reasons}"
        )
    return Report(changes + tuple(found))
