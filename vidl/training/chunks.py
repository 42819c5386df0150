"""Contrastive batches larger than the memory: encode in chunks, contrast all of them.

Three parts: features of every chunk without a graph; the gradient of the contrastive loss with
respect to these features; then each chunk again, with a graph, and backward from its features.
Masks depend on step and sample, and each chunk has its own seed of dropout, so both passes compute
the same features. The gradients are those of the whole batch, at the price of a second forward
pass. Source: GradCache, arXiv 2101.06983, 3.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vidl.models import MODELS, System
from vidl.models.learning import contrast
from vidl.training import parallel

CONTRASTIVE = "vtc"
# Means with the same number of terms for every sample: their mean over equal chunks is exact.
SEPARABLE = ("mvm",)


def check(model: nn.Module) -> None:
    """Raise unless the losses of a model can be computed in chunks.

    Raises:
        ValueError: the model has no contrastive loss, or another loss that needs the whole batch.
    """
    if not isinstance(model, System) or not _contrasts(model) or not _weight(model, CONTRASTIVE):
        able = ", ".join(name for name, x in MODELS.items() if _contrasts(x.model))
        raise ValueError(
            f"need optimizer.chunk=0, or a model with a weight for its contrastive loss, "
            f"{CONTRASTIVE} ({able}), got {type(model).__name__}"
        )
    whole = [
        n for n in model.objectives if n not in (CONTRASTIVE, *SEPARABLE) and _weight(model, n)
    ]
    if whole:
        needed = " ".join(f"model.{name}=0" for name in whole)
        raise ValueError(
            f"need {needed} with optimizer.chunk, or optimizer.chunk=0: {', '.join(whole)} cannot "
            "be computed in chunks"
        )


def backward(
    model: Any,
    wrapped: nn.Module,
    inputs: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    scale: float = 1.0,
    last: bool = True,
) -> dict[str, Tensor]:
    """Add the gradients of a batch; every rank must call this.

    Args:
        model: a system that passes `check`.
        wrapped: the model, or what `parallel.wrap` made of it.
        inputs: the arguments of the model for each chunk; chunks have equally many samples.
        seeds: of the dropout of each chunk.
        autocast: makes the context of a forward pass.
        scale: factor of the gradients.
        last: whether this backward pass ends the step, so that ranks synchronise their gradients.

    Returns:
        The losses of the batch, as the model's.
    """
    loss, grads_v, grads_t, others = _contrasted(model, wrapped, inputs, seeds, autocast, scale)
    losses: dict[str, Any] = {CONTRASTIVE: loss}
    for number, (chunk, seed) in enumerate(zip(inputs, seeds, strict=True)):
        ends = number == len(inputs) - 1
        torch.manual_seed(seed)
        with parallel.synced(wrapped, last and ends):
            with autocast():
                seen = wrapped(**chunk, losses=SEPARABLE)
            grads = [(seen.pop("v"), grads_v[number]), (seen.pop("t"), grads_t[number])]
            for name, part in seen.items():
                losses[name] = losses.get(name, 0) + part.detach() / len(inputs)
                factor = scale * _weight(model, name) / len(inputs)
                grads.append((part, torch.full_like(part, factor)))
            if ends:  # DDP waits for the gradients of all parameters in one backward pass
                grads += others
            roots, slopes = zip(*grads, strict=True)
            torch.autograd.backward(roots, slopes)
    total = sum(_weight(model, name) * part for name, part in losses.items())
    return {"loss": total, **{name: losses[name] for name in model.objectives if name in losses}}


def _contrasted(
    model: Any,
    wrapped: nn.Module,
    inputs: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: float,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
    """The contrastive loss, and its gradients: by `v` and `t` of each chunk, by its parameters."""
    features = []
    for chunk, seed in zip(inputs, seeds, strict=True):
        torch.manual_seed(seed)
        with torch.no_grad(), autocast():
            seen = wrapped(**chunk, losses=())
        features.append((seen["v"], seen["t"]))
    v, t = (torch.cat(parts).requires_grad_() for parts in zip(*features, strict=True))
    clips = [ids for chunk in inputs if (ids := chunk.get("clip_ids")) is not None]
    with autocast():
        loss = model.contrast(v, t, torch.cat(clips) if clips else None)
    learned = [x for x in model.contrast.parameters() if x.requires_grad]
    factor = torch.full_like(loss, scale * _weight(model, CONTRASTIVE))
    grads = torch.autograd.grad(loss, [v, t, *learned], factor)
    sizes = [len(part) for part, _ in features]
    of_learned = list(zip(learned, grads[2:], strict=True))
    return loss.detach(), grads[0].split(sizes), grads[1].split(sizes), of_learned


def _contrasts(model: System | type[System]) -> bool:
    """Whether the contrastive loss depends on `v` and `t` of the batch only, not on a queue."""
    return model.objectives.get(CONTRASTIVE) is contrast


def _weight(model: System, objective: str) -> float:
    return model.weight(objective) if objective in model.objectives else 0.0
