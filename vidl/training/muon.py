"""Muon for weight matrices and AdamW for all other parameters, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic that maps singular values in (0, 1] to about 1; after five steps they
# are 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal=True` use Muon: orthogonalised momentum.

    Muon updates are scaled to the root mean square of AdamW updates, about 0.2, so that both kinds
    of groups share one learning rate and weight decay. `torch.optim.Muon` computes in bfloat16
    everywhere, which most CPUs emulate; this class does so on CUDA only, and batches matrices of
    the same shape. Sources: Muon, https://kellerjordan.github.io/posts/muon; the scale: Muon is
    Scalable for LLM Training, arXiv 2502.16982, 2.2.

    Args:
        params: parameter groups, see `torch.optim.AdamW`. Groups with `orthogonal=True` need
            parameters of two or more dimensions; more than two are flattened to [first, others].
            `momentum` (0.95) is the Nesterov momentum of these groups.
        lr, betas, eps, weight_decay, ...: of AdamW; `lr` and `weight_decay` apply to all groups.

    Raises:
        ValueError: an orthogonal group has a vector.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with default values for the options that it does not set."""
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
                pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
                self._orthogonal_step(group, pairs)
                taken += pairs
        for parameter, _ in taken:
            parameter.grad = None  # AdamW skips parameters without a gradient
        super().step()
        for parameter, gradient in taken:
            parameter.grad = gradient
        return loss

    def _orthogonal_step(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        momentum = group["momentum"]
        batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, gradient in pairs:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(0.0)  # AdamW expects it when it loads a state
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
    """Approximate orthogonal factor of the polar decomposition, by five Newton-Schulz steps.

    Args:
        matrices: [B, rows, columns], floating point.

    Returns:
        [B, rows, columns], same dtype, singular values about 0.7 to 1.2; a zero matrix stays zero.
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
