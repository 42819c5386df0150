"""AdamW or Muon with parameter groups, and schedules that depend on the step only."""

import math
import re
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
    map.
    """
    words = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    matrices: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or NO_DECAY.search(name):
            others.append(parameter)
        elif options.name == "muon" and parameter not in words:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if options.name == "muon":
        groups += [{"params": matrices, "weight_decay": options.weight_decay, "orthogonal": True}]
    groups = [group for group in groups if group["params"]]
    kind = Muon if options.name == "muon" else torch.optim.AdamW
    return kind(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def learning_rate(step: int, highest: float, schedule: Schedule) -> float:
    """Linear warm-up, then cosine decay to `schedule.final` times the peak."""
    if step < schedule.warmup:
        return highest * (step + 1) / schedule.warmup
    left = max(schedule.steps - schedule.warmup, 1)
    return highest * _cosine((step - schedule.warmup) / left, schedule.final)


def keep_rate(step: int, final: float, schedule: Schedule) -> float:
    """The keep rate of pruning layers: cosine decay from 1 to its final value.

    Source: EViT, arXiv 2202.07800, 4 (training from scratch).
    """
    if step >= schedule.prune_over:
        return final
    return _cosine(step / schedule.prune_over, final)


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
