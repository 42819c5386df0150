"""What the tests of vision modules share: a size that one core computes, clips, and weights."""

import copy
import re
from collections.abc import Callable, Sequence

import torch
from compare import gradients
from torch import Tensor, nn

SIZE = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2)
B, T, PATCHES, WIDTH, HEADS = 2, 3, 16, 64, 2
GRID = (T, 4, 4)


def clip(dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 3, T, 32, 32], always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, T, 32, 32, generator=generator).to(dtype)


def randomise(model: nn.Module) -> nn.Module:
    """Weights that make a difference everywhere: sharp attention, no parameter at 0 or 1."""
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
    """The output, and the gradients by `leaf` and by the parameters that learn, by their names."""
    model, leaf = copy.deepcopy(model).to(dtype), leaf.detach().to(dtype).requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return gradients(forward(model, leaf), [leaf, *(named[name] for name in sorted(named))])
