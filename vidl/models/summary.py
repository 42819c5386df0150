"""The cost of a model: tokens at each stage, parameters, FLOPs, memory and step time."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from vidl.kernels.arguments import check_count
from vidl.models.system import check_model


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a training step, per clip with its caption.

    Attributes:
        tokens: tokens of a clip at each stage of the model.
        forward_flops, backward_flops: floating-point operations; a multiply-add counts as two.
        activations: bytes saved for the backward pass, without parameters.
        seconds: time of forward and backward, if measured.
    """

    tokens: dict[str, int]
    forward_flops: int
    backward_flops: int
    activations: int
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cost of a model with and without its sparsity.

    Attributes:
        name: name of the model.
        parameters: number of parameters, by part.
        costs: "dense", "masked" and, where the recipe prunes, "masked and pruned".
    """

    name: str
    parameters: dict[str, int]
    costs: dict[str, Cost]

    def realised_saving(self, name: str) -> float | None:
        """The speedup over "dense" divided by the reduction of FLOPs, if times were measured."""
        dense, cost = self.costs["dense"], self.costs[name]
        if dense.seconds is None or cost.seconds is None:
            return None
        before, after = (c.forward_flops + c.backward_flops for c in (dense, cost))
        return (dense.seconds / cost.seconds) / (before / after)

    def __str__(self) -> str:
        rows = [(f"{self.name}: parameters", [f"{sum(self.parameters.values()) / 1e6:.1f} M"])]
        rows += [(f"  {part}", [f"{n / 1e6:.1f} M"]) for part, n in self.parameters.items()]
        rows += [("", []), ("one clip of a step", list(self.costs))]
        costs, dense = list(self.costs.values()), self.costs["dense"]
        for stage in costs[-1].tokens:
            # Empty for a variant without this stage: it has as many tokens as before.
            rows.append((f"  tokens, {stage}", [str(cost.tokens.get(stage, "")) for cost in costs]))
        for label, field, unit, scale in (
            ("forward", "forward_flops", "GFLOP", 1e9),
            ("backward", "backward_flops", "GFLOP", 1e9),
            ("activations", "activations", "MB", 1e6),
            ("time", "seconds", "ms", 1e-3),
        ):
            values = [getattr(cost, field) for cost in costs]
            if None not in values:
                most = getattr(dense, field)
                cells = [f"{x / scale:,.1f} {unit}  {x / most:4.0%}" for x in values]
                rows.append((f"  {label}", cells))
        savings = [self.realised_saving(name) for name in self.costs]
        if None not in savings:
            rows.append(("  realised saving", [f"{x:.0%}" for x in savings if x is not None]))
        return "\n".join(
            (f"{label:<30}" + "".join(f"{cell:>22}" for cell in cells)).rstrip()
            for label, cells in rows
        )


def summarize(model: Any, *, batch: int = 2, words: int = 32, steps: int = 0) -> Summary:
    """Count the cost of a model: dense, masked, and masked and pruned.

    Runs one step of each variant on random inputs on the model's device, on the CPU without its
    arithmetic; see `Skipping`. A large model takes seconds.

    Args:
        model: a model of `vidl.models`; its variants are built anew, the model is not changed.
        batch: batch size.
        words: tokens of each caption.
        steps: steps to time for each variant, in turns; a step is forward and backward.

    Raises:
        ValueError: a number is out of range.
    """
    check_model(model)
    check_count("batch", batch, 2)
    check_count("words", words, 1)
    check_count("steps", steps)
    limits = [m.max_positions for m in model.modules() if hasattr(m, "max_positions")]
    if words > (longest := min(limits, default=words)):
        raise ValueError(f"need words <= {longest}, the longest caption, got {words}")
    device = next(model.parameters()).device
    variants = {name: type(model)(r).to(device) for name, r in model.recipe.variants().items()}
    costs = {name: count(variant, batch, words) for name, variant in variants.items()}
    if steps:
        for name, seconds in _time(variants, batch, words, steps).items():
            costs[name] = dataclasses.replace(costs[name], seconds=seconds / batch)
    parameters = {name: _size(child) for name, child in model.named_children()}
    parameters |= {name: p.numel() for name, p in model.named_parameters(recurse=False)}
    parameters = {name: n for name, n in parameters.items() if n}
    return Summary(type(model).__name__, parameters, costs)


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of FLOPs, with attention on the CPU, which torch 2.11 does not count."""
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: (
            sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad_out, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad_out, q, k, v)
        ),
    }
    missing = {op: formula for op, formula in formulas.items() if op not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


class Skipping(TorchDispatchMode):
    """Returns zeros in place of the results of operations whose FLOPs a counter knows.

    Shapes, FLOPs and saved bytes of a step stay as they are, within what follows from the values:
    if all scores are 0, frames prune the same patches. Operations that return integers run, since
    others need their values: the ids of tokens.

    Args:
        counter: the operations are those that it has a formula for.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.known = counter.flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in self.known and not func._schema.is_mutable:
            empty, options = tree_map_only(Tensor, _on_meta, (args, kwargs))
            out = func(*empty, **options)
            results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            if all(x.is_floating_point() for x in results):
                return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device="cpu"), out)
        return func(*args, **kwargs)


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count(model: Any, batch: int = 2, words: int = 32) -> Cost:
    """The cost of a step of a model, without its time; arguments are those of `summarize`."""
    device = next(model.parameters()).device
    counter = flop_counter()
    skipping = Skipping(counter) if device.type == "cpu" else nullcontext()
    with skipping, counter as flops:
        with saved_bytes(model) as sizes:
            loss = model(**model.recipe.example(batch, words, device))["loss"]
        forward = flops.get_total_flops()
        loss.backward()
        backward = flops.get_total_flops() - forward
    model.zero_grad()
    kept = sum(sizes.values())
    return Cost(model.recipe.tokens(), forward // batch, backward // batch, kept // batch)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of each storage saved for the backward pass, without parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # so that no freed address is used again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield sizes


def _time(variants: dict[str, Any], batch: int, words: int, steps: int) -> dict[str, float]:
    """The median seconds of a step of each variant, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(steps + 1):
        for name, model in variants.items():
            device = next(model.parameters()).device
            inputs = model.recipe.example(batch, words, device)
            begin = time.perf_counter()
            model(**inputs, step=step)["loss"].backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
            model.zero_grad()
    return {name: statistics.median(times) for name, times in seconds.items()}
