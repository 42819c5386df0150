"""vidl.mask: train an existing model on a random part of its patches."""

from torch import nn

from vidl.kernels.library import check_backend
from vidl.swapping import registry
from vidl.swapping.arguments import check_model, check_number
from vidl.swapping.registry import full_name
from vidl.swapping.report import Change, Report, summary
from vidl.swapping.swap import restore, swap, swapped_modules


def mask(model: nn.Module, ratio: float, *, backend: str = "auto") -> Report:
    """Mask random patches of each image in training, and embed only the visible ones, in place.

    FLIP trains like this, and so does timm's `patch_drop_rate`, which embeds all patches first. In
    evaluation no patch is masked. The model is swapped as by `vidl.swap`, unless it already is;
    `vidl.unswap` undoes both. Call it again to change the ratio.

    Args:
        model: contains a `VisionTransformer` of timm, or ViT, ViViT, CLIP or SigLIP of
            transformers.
        ratio: share of the patches that is masked, in [0, 1); at least one patch stays visible.
        backend: of `vidl.swap`, if the model is not swapped yet, and of the embedding.

    Returns:
        What changed in each module.

    Raises:
        TypeError: `model` is not a module, or `ratio` not a number.
        ValueError: the model contains no such transformer, or one with unsupported options; the
            model is unchanged.

    Source: FLIP, arXiv 2212.00794, 3.
    """
    check_model(model)
    check_backend(backend)
    check_number("ratio", ratio)
    if not 0 <= ratio < 1:
        raise ValueError(f"need a ratio in [0, 1), got {ratio}")
    fresh = next(swapped_modules(model), None) is None
    changes = swap(model, backend=backend).changes if fresh else ()
    masked: list[Change] = []
    for family in registry.families_of(model):
        masked += family.mask(model, ratio, backend) if family.mask else ()
    if not any(change.became for change in masked):
        if fresh:
            restore(model)
        reasons = "".join("\n" + line for line in summary(tuple(masked)))
        raise ValueError(
            "need a VisionTransformer of timm, or ViT, ViViT, CLIP or SigLIP of transformers, that "
            f"can mask patches, found none in {full_name(type(model))}{reasons}"
        )
    return Report(changes + tuple(masked))
