"""Convert a batch of the loader to the arguments of a model."""

import hashlib
from typing import Any

import torch

from vidl.data.dataset import Batch
from vidl.models import Recipe
from vidl.nn.captions import rounded_words


def arguments(
    batch: Batch,
    recipe: Recipe,
    step: int,
    *,
    match: str = "clip",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The arguments of a model's `forward`.

    Args:
        batch: has `ids`. Images are clips of one frame, or repeated; see `recipe.stills`.
        recipe: recipe of the model.
        step: step of the run.
        match: samples with the same "clip", or the same "caption", are not negatives of each other.
        device: device of the model.
    """
    assert batch.ids is not None and batch.attention_mask is not None
    names = batch.text if match == "caption" else [row.media for row in batch.rows]
    clip_ids = torch.tensor([_number(name) for name in names])
    device = torch.device(device)
    options: dict[str, Any] = {"clip_ids": clip_ids.to(device, non_blocking=True)}
    if device.type == "cuda":
        options["words"] = rounded_words(int(batch.attention_mask.sum()), batch.ids.numel())
    batch = batch.to(device)
    assert batch.ids is not None and batch.attention_mask is not None
    video = batch.video
    if video.shape[2] == 1 and recipe.stills == "repeat":
        video = video.expand(-1, -1, recipe.training_frames, -1, -1)
    return {
        "video": video,
        "ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "samples": batch.index,
        "step": step,
        **options,
    }


def _number(name: str) -> int:
    """A 63-bit hash of a name, equal on every rank."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
