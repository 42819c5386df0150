"""Losses of masked words (MLM) and masked pixels (MVM)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import check_dtype, check_floating, check_tensors, numbers
from vidl.kernels.library import check_backend
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.kernels.masked_patch_loss.op import Target, check_options
from vidl.kernels.patches import per_channel


def masked_word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of masked words.

    Args:
        logits: [M, vocabulary], from `Bert.predict_words`.
        labels: [M] int64, from `vidl.masking.mask_words`; -100 is ignored.

    Returns:
        The mean over the words, zero if there are none; a scalar, float32 (float64 for float64
        logits).

    Raises:
        ValueError: the shapes do not fit.
    """
    check_tensors(logits=logits, labels=labels)
    check_floating(logits=logits)
    check_dtype("labels", labels, torch.int64)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"need logits [M, words], labels [M], got {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class MaskedPatchLoss(nn.Module):
    """Mean squared error of the pixels of masked patches; `vidl.ops.masked_patch_loss` as a module.

    Args:
        patch_size: height and width of a patch in pixels, one number or (height, width).
        tubelet_size, target, norm_pix, backend: as in `vidl.ops.masked_patch_loss`.
        mean, std: normalisation of the model; with target "mae" a floating-point clip is taken as
            already normalised.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        tubelet_size: int = 1,
        *,
        target: Target = "mae",
        norm_pix: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(patch_size, tubelet_size, target, norm_pix)
        check_backend(backend)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None:
                per_channel(len(numbers(name, values)), **{name: values})
        self.options: dict[str, Any] = {
            "patch_size": patch_size,
            "tubelet_size": tubelet_size,
            "target": target,
            "norm_pix": norm_pix,
        }
        self.mean, self.std, self.backend = mean, std, backend

    def forward(self, prediction: Tensor, video: Tensor, ids_mask: Tensor) -> Tensor:
        """The loss.

        Args:
            prediction: [B, M, pixels], where pixels = tubelet_size * height * width * C.
            video: [B, C, T, H, W], uint8 or floating point.
            ids_mask: [B, M] int64, the masked patches.

        Returns:
            The mean over all pixels of all masked patches, a float32 scalar.

        Raises:
            TypeError, ValueError, RuntimeError: see `vidl.ops.masked_patch_loss`.
        """
        check_tensors(prediction=prediction, video=video, ids_mask=ids_mask)
        check_dtype("ids_mask", ids_mask, torch.int64)
        if ids_mask.ndim != 2 or ids_mask.shape != prediction.shape[:2]:
            raise ValueError(
                f"need ids_mask [B, M] and prediction [B, M, pixels], got {tuple(ids_mask.shape)} "
                f"and {tuple(prediction.shape)}"
            )
        # A floating-point clip is already normalised, as the target "mae" needs it.
        known = video.dtype == torch.uint8 or self.options["target"] == "videomae"
        mean, std = (self.mean, self.std) if known else (None, None)
        options: dict[str, Any] = {"mean": mean, "std": std, "backend": self.backend}
        return masked_patch_loss(prediction, video, ids_mask, **options, **self.options)
