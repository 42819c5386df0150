"""Step time, memory and GPU-hours of a recipe on a card, estimated without training on it.

A step of two clips runs on the CPU, in plain PyTorch and with vidl. Every operation of its forward
and backward contributes FLOPs and bytes to its part of the model; the rates of the card
(`bench/training/cards.py`), with a range of efficiencies, turn them into a range of times.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidl import models
from vidl.bench.training import savings
from vidl.bench.training.baseline import baseline_of
from vidl.bench.training.breakdown import PARTS, Clock, marked
from vidl.bench.training.cards import Card, Efficiency, is_view
from vidl.bench.training.steps import batch_of
from vidl.models.summary import flop_counter, saved_bytes
from vidl.progress import Bar

COLUMNS = ("torch", "vidl")
COUNTED = 2  # clips of the counted step
# Bytes of the optimizer per parameter in float32: AdamW reads four numbers and writes three, and
# clipping reads and writes the gradient.
UPDATE_BYTES = 4 * (4 + 3 + 2)
STATE_BYTES = 4 * 4  # parameter, gradient and two moments


@dataclasses.dataclass
class Count:
    """An operation: its part of the model, FLOPs, and bytes of activations and of weights."""

    part: str
    attention: bool
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

    def __init__(self, model: Any, clock: _Part, number: int) -> None:
        super().__init__()
        self.clock, self.number, self.counts = clock, number, list[Count]()
        self.formulas = flop_counter().flop_registry
        # A tensor of these shapes is a weight, its transpose or its gradient: its bytes do not grow
        # with the batch.
        weights = [p for p in model.parameters() if p.ndim > 1]
        self.shapes = {shape for p in weights for shape in (p.shape, p.flatten(1).shape)}
        self.shapes |= {shape[::-1] for shape in self.shapes}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_view(func):
            return out
        formula = self.formulas.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        count = Count(self.clock.part, "attention" in func.name(), flops, 0, 0)
        for x in tree_leaves((args, kwargs, out)):
            if not isinstance(x, Tensor):
                continue
            size = x.numel() * (self.number if x.is_floating_point() else x.element_size())
            if x.shape in self.shapes:
                count.weights += size
            else:
                count.activations += size
        self.counts.append(count)
        return out


def count(name: str, recipe: Any, column: str, number: int) -> Row:
    """Count a step of a recipe on the CPU.

    Args:
        column: "torch", the baseline in plain PyTorch, or "vidl".
        number: bytes of a floating-point number.
    """
    model: Any = models.MODELS[models.name_of(recipe)].model(recipe).train()
    if column == "torch":
        model = baseline_of(model)
    inputs = batch_of(recipe, COUNTED, "cpu")
    clock = _Part("cpu")
    meter = _Meter(model, clock, number)
    with saved_bytes(model) as saved, marked(model, clock), meter:
        loss = model(**inputs)["loss"]
        clock.enter("losses")
        loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    return Row(name, meter.counts, parameters, sum(saved.values()))


def estimate(row: Row, card: Card, plan: savings.Plan, gpus: int) -> Estimate:
    """The range of times, memory and GPU-hours of a row."""
    clips = plan.batch / COUNTED
    reached = (card.best, card.worst)
    parts = {part: _pair(_seconds(row, part, card, e, clips) for e in reached) for part in PARTS}
    update = row.parameters * UPDATE_BYTES / card.bandwidth
    parts["optimizer"] = _pair(update / e.bandwidth for e in reached)
    best, worst = (sum(times) for times in zip(*parts.values(), strict=True))
    if gpus > 1:
        gradients = 4 * row.parameters * 2 * (gpus - 1) / gpus / card.link
        # At best the exchange of gradients is hidden behind the backward.
        best, worst = max(best, gradients / card.best.link), worst + gradients / card.worst.link
    state = row.parameters * STATE_BYTES
    saved = row.saved * clips
    # Saved in the dtype of the card; at worst all in float32, and as much again for temporaries.
    memory = (state + saved * card.number / 4, state + 2 * saved)
    scale = plan.epochs * plan.clips / plan.batch / 3600
    return Estimate(row, parts, (best, worst), memory, (scale * best, scale * worst))


def _pair(values: Iterator[float]) -> tuple[float, float]:
    best, worst = values
    return best, worst


def _seconds(row: Row, part: str, card: Card, e: Efficiency, clips: float) -> float:
    total = 0.0
    for x in row.operations:
        if x.part == part:
            flops = card.attention * e.attention if x.attention else card.matmul * e.matmul
            size = x.activations * clips + x.weights
            times = (x.flops * clips / flops, size / (card.bandwidth * e.bandwidth), e.host)
            total += sum(times) if card.waits else max(times)
    return total


def rows(plan: savings.Plan, card: Card) -> Iterator[Row]:
    """The dense recipe and, unless it is the same, the sparse one, counted in both columns."""
    variants = list(plan.recipe.variants().values())
    named = {"dense": variants[0]}
    if variants[-1] != variants[0]:
        named["sparse"] = variants[-1]
    cells = [(row, column) for row in named for column in COLUMNS]
    with Bar(len(cells)) as bar:
        for number, (row, column) in enumerate(cells, 1):
            name = f"{row}, {column}"
            bar.begin(number, f"{plan.shape}: counting a step, {name}")
            yield count(name, named[row], column, card.number)


def table(plan: savings.Plan, card: Card, gpus: int, estimates: Sequence[Estimate]) -> str:
    """The estimates with every assumption, for a terminal."""

    def line(label: str, values: Sequence[tuple[float, float]], scale: float, digits: int) -> str:
        cells = (f"{a * scale:,.{digits}f} - {b * scale:,.{digits}f}" for a, b in values)
        return f"{label:32}" + "".join(f"{cell:>24}" for cell in cells)

    lines = [
        f"{plan.shape} per GPU · {gpus} x {card.name} · an ESTIMATE: no step ran on it",
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
    best, worst = card.best, card.worst
    yield "assumptions:"
    yield (
        f"  {card.source} rates: {card.matmul / 1e12:.3g} TFLOP/s of matmuls and "
        f"{card.attention / 1e12:.3g} of attention in {8 * card.number} bits, "
        f"{card.bandwidth / 1e12:.3g} TB/s of memory"
    )
    yield (
        f"  reached: {worst.matmul:.0%} to {best.matmul:.0%} of the FLOP/s of matmuls, "
        f"{worst.attention:.0%} to {best.attention:.0%} of those of attention, "
        f"{worst.bandwidth:.0%} to {best.bandwidth:.0%} of the bandwidth"
    )
    yield f"  the host needs {best.host * 1e6:.2g} to {worst.host * 1e6:.2g} us for an operation"
    yield (
        f"  every operation takes the {'sum' if card.waits else 'longest'} of its FLOPs, its bytes "
        "and the host; none is fused with others"
    )
    yield f"  floating-point tensors and weights have {card.number} bytes a number"
    yield f"  AdamW and clipping move {UPDATE_BYTES} bytes per parameter; 16 bytes are its state"
    if gpus > 1:
        yield (
            f"  gradients are exchanged in float32 by a ring at {worst.link:.0%} to "
            f"{best.link:.0%} of {card.link / 1e9:g} GB/s, at best behind the backward"
        )
    yield "  no waiting for data, evaluation, checkpoints or compilation; captions of 8 to 24 words"
