"""Step time, memory and GPU-hours of a recipe on a card, estimated without the card.

A step of two clips runs on the CPU. Every operation of its forward and backward contributes FLOPs
and bytes to its part of the model; published rates of the card, with a range of efficiencies, turn
them into a range of times. Nothing is measured on a GPU.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidl import models
from vidl.bench.training import savings
from vidl.bench.training.breakdown import PARTS, Clock, marked
from vidl.bench.training.steps import batch_of
from vidl.models.summary import flop_counter, saved_bytes
from vidl.progress import Bar


@dataclasses.dataclass(frozen=True)
class Card:
    """Published rates of a GPU.

    Attributes:
        matmul: FLOP/s in bfloat16 on the tensor cores, without sparsity.
        bandwidth: bytes per second of its memory.
        memory: bytes.
        link: bytes per second to other GPUs of the machine, in one direction.
    """

    name: str
    matmul: float
    bandwidth: float
    memory: float
    link: float


CARDS = {
    "h200": Card("H200 SXM", 989e12, 4.8e12, 141e9, 450e9),
    "h100": Card("H100 SXM", 989e12, 3.35e12, 80e9, 450e9),
    "a100": Card("A100 SXM 80 GB", 312e12, 2.039e12, 80e9, 300e9),
    "a6000": Card("RTX A6000", 154.8e12, 0.768e12, 48e9, 32e9),
}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a run reaches: parts of the published rates, and seconds of the host per operation."""

    matmul: float
    bandwidth: float
    link: float
    host: float


BEST = Efficiency(0.7, 0.9, 0.8, 0.0)
WORST = Efficiency(0.35, 0.6, 0.4, 8e-6)
COUNTED = 2  # clips of the counted step
# Bytes of the optimizer per parameter in float32: AdamW reads four numbers and writes three, and
# clipping reads and writes the gradient.
UPDATE_BYTES = 4 * (4 + 3 + 2)
STATE_BYTES = 4 * 4  # parameter, gradient and two moments


@dataclasses.dataclass
class Count:
    """An operation: its part of the model, FLOPs, and bytes of activations and of weights."""

    part: str
    flops: float
    activations: float
    weights: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What was counted in a step of `COUNTED` clips."""

    name: str
    operations: list[Count]
    parameters: int
    saved: int  # bytes for the backward, in float32


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The range of a row on a card: (best, worst) of seconds by part, bytes and GPU-hours."""

    row: Row
    parts: dict[str, tuple[float, float]]
    step: tuple[float, float]
    memory: tuple[float, float]
    hours: tuple[float, float]


class _Part(Clock):
    """Knows the part of the model that runs, without times."""

    def enter(self, part: str) -> str:
        before, self.part = self.part, part
        return before


class _Meter(TorchDispatchMode):
    """Counts FLOPs and bytes of every operation."""

    def __init__(self, model: Any, clock: _Part) -> None:
        super().__init__()
        self.clock, self.counts = clock, list[Count]()
        self.formulas = flop_counter().flop_registry
        # A tensor of these shapes is a weight, its transpose or its gradient: its bytes do not grow
        # with the batch.
        weights = [p for p in model.parameters() if p.ndim > 1]
        self.shapes = {shape for p in weights for shape in (p.shape, p.flatten(1).shape)}
        self.shapes |= {shape[::-1] for shape in self.shapes}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view
        formula = self.formulas.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        count = Count(self.clock.part, flops, 0, 0)
        for x in tree_leaves((args, kwargs, out)):
            if not isinstance(x, Tensor):
                continue
            size = x.numel() * (2 if x.is_floating_point() else x.element_size())
            if x.shape in self.shapes:
                count.weights += size
            else:
                count.activations += size
        self.counts.append(count)
        return out


def count(name: str, recipe: Any) -> Row:
    """Count a step of a recipe on the CPU."""
    model: Any = models.MODELS[models.name_of(recipe)].model(recipe).train()
    inputs = batch_of(recipe, COUNTED, "cpu")
    clock = _Part("cpu")
    meter = _Meter(model, clock)
    with saved_bytes(model) as saved, marked(model, clock), meter:
        loss = model(**inputs)["loss"]
        clock.enter("losses")
        loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    return Row(name, meter.counts, parameters, sum(saved.values()))


def estimate(row: Row, card: Card, plan: savings.Plan, gpus: int) -> Estimate:
    """The range of times, memory and GPU-hours of a row."""
    clips = plan.batch / COUNTED
    parts = {
        part: (_seconds(row, part, card, BEST, clips), _seconds(row, part, card, WORST, clips))
        for part in PARTS
    }
    update = row.parameters * UPDATE_BYTES / card.bandwidth
    parts["optimizer"] = (update / BEST.bandwidth, update / WORST.bandwidth)
    gradients = 4 * row.parameters * 2 * (gpus - 1) / gpus / card.link
    # At best the exchange of gradients is hidden behind the backward.
    best = sum(best for best, _ in parts.values())
    worst = sum(worst for _, worst in parts.values()) + gradients / WORST.link
    step = (max(best, gradients / BEST.link), worst)
    state = row.parameters * STATE_BYTES
    saved = row.saved * clips
    # In bfloat16 half of the saved float32; at worst all, and as much again for temporary tensors.
    memory = (state + saved / 2, state + 2 * saved)
    scale = plan.epochs * plan.clips / plan.batch / 3600
    return Estimate(row, parts, step, memory, (scale * step[0], scale * step[1]))


def _seconds(row: Row, part: str, card: Card, efficiency: Efficiency, clips: float) -> float:
    total = 0.0
    for x in row.operations:
        if x.part == part:
            compute = x.flops * clips / (card.matmul * efficiency.matmul)
            size = x.activations * clips + x.weights
            memory = size / (card.bandwidth * efficiency.bandwidth)
            total += max(compute, memory, efficiency.host)
    return total


def rows(plan: savings.Plan) -> Iterator[Row]:
    """The dense recipe and, unless it is the same, the sparse one, counted."""
    variants = list(plan.recipe.variants().values())
    named = {"dense": variants[0]}
    if variants[-1] != variants[0]:
        named["sparse"] = variants[-1]
    with Bar(len(named)) as bar:
        for number, (name, variant) in enumerate(named.items(), 1):
            bar.begin(number, f"{plan.shape}: counting a step, {name}")
            yield count(name, variant)


def table(plan: savings.Plan, card: Card, gpus: int, estimates: Sequence[Estimate]) -> str:
    """The estimates with every assumption, for a terminal."""

    def line(label: str, values: Sequence[tuple[float, float]], scale: float, digits: int) -> str:
        cells = (f"{a * scale:,.{digits}f} - {b * scale:,.{digits}f}" for a, b in values)
        return f"{label:32}" + "".join(f"{cell:>24}" for cell in cells)

    lines = [
        f"{plan.shape} per GPU · {gpus} x {card.name} · an ESTIMATE: nothing was measured on a GPU",
        "",
        f"{'best - worst':32}" + "".join(f"{e.row.name:>24}" for e in estimates),
    ]
    flops = (sum(x.flops for x in e.row.operations) / COUNTED / 1e9 for e in estimates)
    lines.append(f"{'GFLOP of a clip':32}" + "".join(f"{x:>24,.1f}" for x in flops))
    lines.append(line("step, ms", [e.step for e in estimates], 1e3, 0))
    for part in PARTS:
        if any(e.parts[part][1] for e in estimates):
            lines.append(line(f"  {part}", [e.parts[part] for e in estimates], 1e3, 1))
    lines.append(line("memory of a GPU, GB", [e.memory for e in estimates], 1e-9, 1))
    label = f"GPU-hours, {plan.epochs:g} epochs of {plan.clips / 1e6:g} M"
    lines.append(line(label, [e.hours for e in estimates], 1, 1))
    for e in estimates:
        if e.memory[0] > card.memory:
            lines.append(f"{e.row.name} needs more than the {card.memory / 1e9:g} GB of the card")
    return "\n".join([*lines, "", *_assumptions(card, gpus)])


def _assumptions(card: Card, gpus: int) -> Iterator[str]:
    yield "assumptions:"
    yield (
        f"  published rates: {card.matmul / 1e12:g} TFLOP/s in bfloat16, "
        f"{card.bandwidth / 1e12:g} TB/s, {card.link / 1e9:g} GB/s to other GPUs"
    )
    yield (
        f"  reached: {WORST.matmul:.0%} to {BEST.matmul:.0%} of the FLOP/s, {WORST.bandwidth:.0%} "
        f"to {BEST.bandwidth:.0%} of the bandwidth"
    )
    yield "  every operation takes the longer of its FLOPs and its bytes; none is fused with others"
    yield f"  the host needs 0 to {WORST.host * 1e6:g} us for an operation"
    yield "  floating-point tensors have 2 bytes a number; weights are read in 2 bytes"
    yield f"  AdamW and clipping move {UPDATE_BYTES} bytes per parameter; 16 bytes are its state"
    if gpus > 1:
        yield "  gradients are exchanged in float32 by a ring, at best behind the backward"
    yield "  no waiting for data, evaluation, checkpoints or compilation; captions of 8 to 24 words"
