"""What the tests of vision modules share: small sizes, clips, weights, and scores of tokens."""

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from compare import gradients
from torch import Tensor, nn

from vidl import models

SIZE = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2)
B, T, PATCHES, WIDTH, HEADS = 2, 3, 16, 64, 2
GRID = (T, 4, 4)


def fitting(name: str, fields: dict) -> dict:
    """Those fields that the recipe of a system has."""
    own = {field.name for field in dataclasses.fields(models.recipe(name))}
    return {field: value for field, value in fields.items() if field in own}


def clip(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same random clip in every call, [B, 3, T, 32, 32]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, T, 32, 32, generator=generator).to(dtype)


def randomise(model: nn.Module) -> nn.Module:
    """Random weights with sharp attention, and no parameter at 0 or 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.15 if "qkv" in name else 0.1
        nn.init.normal_(parameter, 1.0 if re.search(r"norm.*weight|gamma", name) else 0.0, scale)
    return model


def results(
    model: nn.Module,
    forward: Callable[[nn.Module, Tensor], Tensor],
    dtype: torch.dtype,
    leaf: Tensor,
) -> Sequence[Tensor]:
    """The output, and the gradients by `leaf` and by the trained parameters, sorted by name."""
    model, leaf = copy.deepcopy(model).to(dtype), leaf.detach().to(dtype).requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return gradients(forward(model, leaf), [leaf, *(named[name] for name in sorted(named))])


def token_importance(scores: str, weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores of `vidl.nn.Pruning` in plain PyTorch.

    Args:
        scores: "cls", "mean", "value" or "similarity".
        weights: attention weights, [B, H, N, N].
        k, v: [B, H, N, D].

    Returns:
        [B, N].
    """
    if scores == "mean":
        return weights.mean((1, 2))
    if scores == "similarity":  # ToMe: cosine similarity to the best match at an odd position
        keys = F.normalize(k.mean(1), dim=-1)
        importance = keys.new_full(keys.shape[:2], torch.inf)
        importance[:, ::2] = -(keys[:, ::2] @ keys[:, 1::2].mT).amax(-1)
        return importance
    importance = weights[:, :, 0].mean(1)
    if scores == "value":  # ATS: times the norm of the value, without the class token
        norms = v.transpose(1, 2).flatten(2).norm(dim=-1)
        importance = F.pad(importance[:, 1:] * norms[:, 1:], (1, 0))
        importance = importance / importance.sum(1, keepdim=True)
    return importance
