"""Muon: the update of a weight matrix, made orthogonal, beside AdamW for all that is no matrix."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of the quintic that takes singular values in (0, 1] to about 1; five steps reach 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `orthogonal=True` take the orthogonal factor of their momentum.

    An update has the root mean square of AdamW's, about 0.2, so that one learning rate and one
    weight decay serve both kinds of groups. `torch.optim.Muon` computes in bfloat16 everywhere,
    which most CPUs emulate; this one does so on CUDA only, and takes matrices of one shape as a
    batch. Sources: Muon, https://kellerjordan.github.io/posts/muon; the scale: Muon is Scalable for
    LLM Training, arXiv 2502.16982, 2.2.

    Args:
        params: groups, as `torch.optim.AdamW` has them. Those with `orthogonal=True` need
            parameters of two or more dimensions, and take more than two as [first, all others];
            `momentum` (0.95) is that of theirs, in Nesterov's form.
        lr, betas, eps, weight_decay, ...: of AdamW; `lr` and `weight_decay` of all groups.

    Raises:
        ValueError: an orthogonal group has a vector.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which takes the defaults of what it does not say."""
        super().add_param_group({"orthogonal": False, "momentum": 0.95, **param_group})
        added = self.param_groups[-1]
        if added["orthogonal"] and any(p.ndim < 2 for p in added["params"]):
            raise ValueError("need matrices in an orthogonal group, got a vector")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            if group["orthogonal"]:
                found = [(p, p.grad) for p in group["params"] if p.grad is not None]
                self._orthogonal_step(group, found)
                taken += found
        for parameter, _ in taken:
            parameter.grad = None  # AdamW leaves such parameters alone
        super().step()
        for parameter, gradient in taken:
            parameter.grad = gradient
        return loss

    def _orthogonal_step(self, group: dict[str, Any], found: list[tuple[Tensor, Tensor]]) -> None:
        momentum = group["momentum"]
        batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, gradient in found:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(0.0)  # Adam looks for it where it loads states
            state["step"] += 1
            mean = state["momentum"].lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp(mean, momentum).flatten(1)
            batches[ahead.shape, ahead.dtype, ahead.device].append((parameter, ahead))
        for (shape, *_), members in batches.items():
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            updates = orthogonalise(torch.stack([ahead for _, ahead in members]))
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the orthogonal factor of the polar decomposition, by five Newton-Schulz steps.

    Args:
        matrices: [B, M, N], floating point.

    Returns:
        [B, M, N], same dtype, singular values about 0.7 to 1.2; zeros where a matrix is zero.
        Computed in bfloat16 on CUDA, else in float32.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
