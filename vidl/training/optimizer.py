"""AdamW or Muon with parameter groups, and schedules that depend on the step only."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidl.training.config import Optimizer, Schedule
from vidl.training.muon import Muon

# Temperatures, and embeddings and tables of positions, times and special tokens.
NO_DECAY = re.compile(
    r"(^|\.)(time|temperature|\w*pos_embed|temporal_embed|cls_token|mask_token"
    r"|relative_position_bias_table|(position|token_type)_embeddings\.weight)$"
)


def make(model: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """AdamW or Muon; norms, biases, positions, tokens and temperatures have no weight decay.

    Muon updates the matrices that decay, except word embeddings: a lookup table is not a linear
    map. Parameters with a factor are in groups of their own, which have it as "factor".
    """
    words = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or NO_DECAY.search(name):
            kind = "other"
        elif options.name == "muon" and parameter not in words:
            kind = "orthogonal"
        else:
            kind = "decayed"
        groups.setdefault((kind, factor_of(name, options.factors)), []).append(parameter)
    order = ("decayed", "other", "orthogonal")
    parts: list[dict[str, Any]] = []
    for (kind, factor), parameters in sorted(groups.items(), key=lambda x: order.index(x[0][0])):
        decay = 0.0 if kind == "other" else options.weight_decay
        group: dict[str, Any] = {"params": parameters, "weight_decay": decay}
        group |= {"orthogonal": True} if kind == "orthogonal" else {}
        parts.append(group | ({} if factor == 1 else {"factor": factor}))
    algorithm = Muon if options.name == "muon" else torch.optim.AdamW
    return algorithm(parts, lr=options.lr, betas=options.betas, eps=options.eps)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """The factor of a parameter's learning rate: that of the longest beginning of its name."""
    name = name.removeprefix("module.")  # of DDP
    parts = [part for part in factors if name == part or name.startswith(f"{part}.")]
    return factors[max(parts, key=len)] if parts else 1.0


def freeze(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Freeze the parameters whose factor is 0.

    Raises:
        ValueError: a factor is of no parameter that learns.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for part in factors:
        if not any(factor_of(name, {part: -1.0}) < 0 for name, _ in named):
            known = sorted({name.partition(".")[0] for name, _ in named})
            raise ValueError(
                f"need optimizer.factors of parts that learn, such as {', '.join(known)}, got "
                f"{part!r}"
            )
    for name, parameter in named:
        parameter.requires_grad_(factor_of(name, factors) > 0)


def learning_rate(step: int, highest: float, schedule: Schedule) -> float:
    """Linear warm-up, then decay to `schedule.final` times the peak.

    With p the progress after the warm-up, from 0 to 1, the share above the final one is

        cosine: (1 + cos(pi p)) / 2,  linear: 1 - p,  poly: (1 - p)^power
    """
    if step < schedule.warmup:
        return highest * (step + 1) / schedule.warmup
    left = max(schedule.steps - schedule.warmup, 1)
    progress, final = (step - schedule.warmup) / left, schedule.final
    if schedule.shape == "cosine":
        return highest * _cosine(progress, final)
    power = 1.0 if schedule.shape == "linear" else schedule.power
    return highest * (final + (1 - final) * max(1 - progress, 0.0) ** power)


def keep_rate(step: int, final: float, schedule: Schedule) -> float:
    """The keep rate of pruning layers: cosine decay from 1 to its final value.

    Source: EViT, arXiv 2202.07800, 4 (training from scratch).
    """
    if step >= schedule.prune_over:
        return final
    return _cosine(step / schedule.prune_over, final)


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
