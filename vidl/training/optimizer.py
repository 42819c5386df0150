"""AdamW with its groups, and what changes from step to step as a function of the step alone."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from vidl.training.config import Optimizer, Schedule

# Positions, times, and tokens that are no words.
NO_DECAY = re.compile(
    r"(^|\.)(time|temperature|\w*pos_embed|temporal_embed|cls_token|mask_token"
    r"|(position|token_type)_embeddings\.weight)$"
)


def make(model: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """AdamW in two groups: norms, biases, positions, tokens and temperatures do not decay."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.ndim < 2 or NO_DECAY.search(name)
            (others if kept else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def learning_rate(step: int, highest: float, schedule: Schedule) -> float:
    """Rises in a line over the warm-up, then falls along a half cosine to its final share."""
    if step < schedule.warmup:
        return highest * (step + 1) / schedule.warmup
    left = max(schedule.steps - schedule.warmup, 1)
    return highest * _cosine((step - schedule.warmup) / left, schedule.final)


def keep_rate(step: int, final: float, schedule: Schedule) -> float:
    """The share of tokens that a pruning layer keeps: falls along a half cosine from 1.

    Source: EViT, arXiv 2202.07800, 4 (training from scratch).
    """
    if step >= schedule.prune_over:
        return final
    return _cosine(step / schedule.prune_over, final)


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
