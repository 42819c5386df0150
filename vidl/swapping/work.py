"""The work of a training step: FLOPs and tokens of a swapped model and of the original one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vidl.models.summary import flop_counter
from vidl.swapping.registry import original
from vidl.swapping.swap import swapped_modules, unswap

# Samples of the first batch that are counted. Counting computes them twice, and keeps a copy of the
# weights meanwhile.
COUNTED = 8


@dataclass(frozen=True)
class Work:
    """The work of a training step, per sample.

    Attributes:
        flops: floating-point operations of forward and backward; a multiply-add counts as two.
        tokens: tokens that enter the transformer layers, summed over the layers.
    """

    flops: float
    tokens: float


@dataclass(eq=False)
class Part:
    """A module whose calls in training are counted.

    Attributes:
        module: the module.
        samples: how many it computed.
        swapped: its work for a sample, counted at its first call.
        original: the work of the original module for the same sample.
        reason: why nothing was counted.
    """

    module: nn.Module
    samples: int = 0
    swapped: Work | None = None
    original: Work | None = None
    reason: str = "no training step was seen"

    def watch(self) -> Any:
        """Count the calls in training from now on; returns the handle of the hook."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling() or module is not self.module:
                return  # a compiled step is not counted, nor is the copy that `count` runs
            if module.training and torch.is_grad_enabled():
                first = self.samples == 0
                self.samples += _batch_size(args, kwargs)
                if first:
                    self._count(args, kwargs)

        return self.module.register_forward_pre_hook(note, with_kwargs=True)

    def _count(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        try:
            self.swapped, self.original = count(self.module, args, kwargs)
        except Exception as error:  # training goes on without the count
            self.reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@dataclass(eq=False)
class Savings:
    """What a swap saved in training so far: counted FLOPs and tokens, not time.

    Attributes:
        parts: the modules that are counted.
        ranks: processes that each compute as many samples.
    """

    parts: list[Part] = field(default_factory=list)
    ranks: int = 1

    @property
    def samples(self) -> int:
        """Training samples of all ranks."""
        return self.ranks * max((part.samples for part in self.parts), default=0)

    def totals(self) -> dict[str, float]:
        """FLOPs and tokens of all samples: computed, and those of the original model.

        Returns:
            "flops", "flops_original", "tokens" and "tokens_original"; nothing if the first step
            could not be counted.
        """
        totals: dict[str, float] = {}
        for part in self.parts:
            if part.swapped is None or part.original is None:
                continue
            for ending, work in (("", part.swapped), ("_original", part.original)):
                for name in ("flops", "tokens"):
                    value = getattr(work, name) * part.samples * self.ranks
                    totals[name + ending] = totals.get(name + ending, 0) + value
        return totals

    def __str__(self) -> str:
        totals = self.totals()
        if not totals:
            reasons = ", ".join(dict.fromkeys(part.reason for part in self.parts))
            return f"{self.samples:,} training samples; FLOPs and tokens not counted: {reasons}"
        lines = [f"{self.samples:,} training samples, forward and backward:"]
        for name, unit in (("flops", "FLOP"), ("tokens", "tokens in layers")):
            now, before = totals[name], totals[f"{name}_original"]
            if before:
                saved = f"{short(before - now)} saved ({1 - now / before:.0%})"
                lines.append(f"  {short(now)} of {short(before)} {unit}, {saved}")
        return "\n".join(lines)


def count(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Work, Work]:
    """The work of a swapped module for these inputs, and that of the original module.

    Both run on a copy of the module with a few samples; neither the module nor the state of random
    numbers changes.
    """
    batch = _batch_size(args, kwargs)
    few = min(batch, COUNTED)

    def cut(x: Tensor) -> Tensor:
        return x[:few].detach() if x.ndim and x.shape[0] == batch else x

    args, kwargs = tree_map_only(Tensor, cut, (args, kwargs))
    twin = copy.deepcopy(module)
    without_wrapper(twin)
    swapped = _work(twin, args, kwargs, few)
    if convert := getattr(twin, "original_arguments", None):
        args, kwargs = (), convert(*args, **kwargs)
    if next(swapped_modules(twin), None) is not None:
        unswap(twin)
    return swapped, _work(twin, args, kwargs, few)


def without_wrapper(model: nn.Module) -> None:
    """Remove the forward that accelerate puts on a model for mixed precision.

    It calls the forward of the class that the model had then, which must not outlive the swap.
    """
    if "_original_forward" in vars(model):
        del model.forward, model._original_forward


def layers(module: nn.Module) -> list[nn.Module]:
    """The transformer layers: lists of modules of one class, without lists of such lists."""
    inner = [layer for child in module.children() for layer in layers(child)]
    if inner or not isinstance(module, nn.ModuleList | nn.Sequential):
        return inner
    children = list(module)
    alike = len({original(child) for child in children}) == 1
    return children if alike and next(children[0].children(), None) is not None else []


def short(number: float) -> str:
    """A number with a unit of thousands, as in 12.3 G."""
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return f"{number / scale:.1f} {letter}"
    return f"{number:.0f}"


def _work(module: nn.Module, args: Any, kwargs: Any, batch: int) -> Work:
    tokens = 0

    def add(layer: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        x = _tensors(args, kwargs)[0]
        tokens += x.shape[:-1].numel()

    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers(module)]
    parameters = [x for x in module.parameters() if x.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), flop_counter() as flops:
        outputs = _tensors(module(*args, **kwargs))
        totals = [x.sum() for x in outputs if x.requires_grad]
        if totals:
            torch.autograd.grad(totals, parameters, allow_unused=True)
    for handle in handles:
        handle.remove()
    return Work(flops.get_total_flops() / batch, tokens / batch)


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _batch_size(args: Any, kwargs: Any) -> int:
    return next((x.shape[0] for x in _tensors(args, kwargs) if x.ndim), 0)
