"""Prediction of what was hidden: words (MLM) and pixels (MVM)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.kernels.masked_patch_loss.op import Target


def masked_word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of hidden words.

    Args:
        logits: [M, V], of `Bert.predict_words`.
        labels: [M] int64, of `vidl.masking.mask_words`; -100 is left out.

    Returns:
        The mean over the words, zero if there are none; a scalar, float32 (float64 if the logits
        are).

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"need logits [M, V] and labels [M], got {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class MaskedPatchLoss(nn.Module):
    """Mean squared error of the pixels of masked patches; `vidl.ops.masked_patch_loss` as a module.

    Args:
        patch_size: pixels, one number or (height, width).
        tubelet_size, target, norm_pix, backend: as in `vidl.ops.masked_patch_loss`.
        mean, std: of the model's normalisation; where "mae" is given a floating-point clip, that is
            taken as normalised.
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
        self.options: dict[str, Any] = {
            "patch_size": patch_size,
            "tubelet_size": tubelet_size,
            "target": target,
            "norm_pix": norm_pix,
            "backend": backend,
        }
        self.mean, self.std = mean, std

    def forward(self, prediction: Tensor, video: Tensor, ids_mask: Tensor) -> Tensor:
        """The loss.

        Args:
            prediction: [B, M, t * p * p * C].
            video: [B, C, T, H, W], uint8 or floating point.
            ids_mask: [B, M] int64, the masked patches.

        Returns:
            The mean over all numbers of all masked patches, a float32 scalar.

        Raises:
            TypeError, ValueError, RuntimeError: as `vidl.ops.masked_patch_loss` does.
        """
        # A floating-point clip is as the model sees it, which is what "mae" compares with.
        known = video.dtype == torch.uint8 or self.options["target"] == "videomae"
        mean, std = (self.mean, self.std) if known else (None, None)
        return masked_patch_loss(prediction, video, ids_mask, mean=mean, std=std, **self.options)
