"""Whole steps of pre-training: forward, backward, clipping and AdamW on a batch in memory."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidl import models
from vidl.bench.measure.check import SLACK
from vidl.bench.training.baseline import stock
from vidl.models.summary import example
from vidl.nn.captions import rounded_words

# Words of captions, [CLS] and [SEP] among them, as those of WebVid and CC3M mostly have them.
SHORTEST, LONGEST = 8, 24
CHECKED = 3  # clips of the batch on which losses and gradients are compared, in float64 too
PARTS = ("vision", "text")  # whose gradients are compared by themselves; the others are one part


@dataclasses.dataclass
class Cell:
    """One of {dense, sparse} x {stock, vidl}: a model and what makes a step of it.

    Attributes:
        row, column: its place in the table.
        model: those of a row share their parameters.
        run: what is called for a forward: the model, perhaps compiled.
        optimizer: that of the row.
        inputs: a batch on the model's device.
        dtype: of autocast; None: there is none.
        kind: "ours" or "peer".
    """

    row: str
    column: str
    model: Any
    run: Callable[..., dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    inputs: dict[str, Any]
    dtype: torch.dtype | None
    kind: str

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}"

    @property
    def device(self) -> str:
        return self.inputs["video"].device.type

    def forward(self, inputs: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The losses, in the cell's precision."""
        with self.autocast():
            return self.run(**(self.inputs if inputs is None else inputs))

    def autocast(self) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def update(self) -> None:
        """Clip the gradients, and make a step of the optimizer."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """All of it."""
        self.forward()["loss"].backward()
        self.update()


def cells(recipe: Any, batch: int, device: str, compiled: bool = False) -> Iterator[Cell]:
    """The table's cells, row after row.

    Args:
        recipe: of `vidl.models`.
        batch: clips of a step.
        device: "cpu", in float32, or "cuda", with bfloat16 by autocast.
        compiled: also the stock model under `torch.compile`.
    """
    ways = list(recipe.variants().values())
    dtype = torch.bfloat16 if device == "cuda" else None
    for row, way in (("dense", ways[0]), ("sparse", ways[-1])):
        torch.manual_seed(0)
        model = models.MODELS[name_of(recipe)][0](way).to(device).train()
        peer = stock(model)
        adam = fused_adamw(model)
        inputs = batch_of(way, batch, device)
        words = {"words": rounded_words(int(inputs["attention_mask"].sum()), inputs["ids"].numel())}
        ours = inputs | (words if device == "cuda" else {})
        yield Cell(row, "stock", peer, peer, adam, inputs, dtype, "peer")
        if compiled:
            # As a tensor the number of the step does not compile anew when it changes.
            step = {"step": torch.zeros((), dtype=torch.int64, device=device)}
            # Shapes as they are: after the check on fewer clips the timed ones would be dynamic.
            run: Any = torch.compile(peer, dynamic=False)
            yield Cell(row, "stock, compiled", peer, run, adam, inputs | step, dtype, "peer")
        yield Cell(row, "vidl", model, model, adam, ours, dtype, "ours")


def name_of(recipe: Any) -> str:
    """The name of the model that a recipe is of."""
    return next(
        n for n, (_, presets) in models.MODELS.items() if type(recipe) is type(presets["base"])
    )


def batch_of(recipe: Any, batch: int, device: str) -> dict[str, Any]:
    """A batch of noise; captions have 8 to 24 words and are padded to the longest."""
    lengths = [SHORTEST + 5 * i % (LONGEST - SHORTEST + 1) for i in range(batch)]
    torch.manual_seed(1)
    inputs = example(recipe, batch, max(lengths), device)
    column = torch.arange(max(lengths), device=device)
    mask = column < torch.tensor(lengths, device=device)[:, None]
    return inputs | {"attention_mask": mask.to(torch.int64)}


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in one kernel, in the usual two groups, with a rate that moves no weight far."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), fused=True)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far losses and gradients are from those computed in float64, relative to their norm.

    Attributes:
        stock, ours: the errors of each part, in float32; see `agreement_of`.
        allowed: what ours may have: `SLACK` times the largest of stock, plus one rounding.
    """

    stock: dict[str, float]
    ours: dict[str, float]
    allowed: float

    @property
    def ok(self) -> bool:
        return all(error <= self.allowed for error in self.ours.values())  # NaN is wrong too

    def __str__(self) -> str:
        parts = [f"{p} {self.ours[p]:.1e} (stock {self.stock[p]:.1e})" for p in self.ours]
        return f"{', '.join(parts)}; allowed {self.allowed:.1e}"


def agreement_of(peer: Cell) -> Callable[[Cell], Agreement]:
    """What compares losses and gradients of cells with those of the stock one of their row.

    In float32, on the first clips of the batch, and without dropout, which each draws in its own
    order. Which tokens are kept is a matter of rounding where scores are close, so that low
    precision says little here; the truth is the stock model in float64. How sensitive an answer is
    to rounding, one error alone tells badly: it may be small by chance. So the error of stock is
    the larger of two, its own and that with weights of which each was rounded the other way.
    """
    truth, inputs = true_answers(peer), first(peer.inputs)
    plain = _errors(answers(peer.run, peer.model, inputs), truth)
    moved = rounded_otherwise(peer.model)
    for part, error in _errors(answers(moved, moved, inputs), truth).items():
        plain[part] = max(plain[part], error)
    largest, eps = max(plain.values()), torch.finfo(torch.float32).eps

    def compare(cell: Cell) -> Agreement:
        found = _errors(answers(cell.run, cell.model, first(cell.inputs)), truth)
        return Agreement(plain, found, SLACK[cell.kind] * largest + eps)

    return compare


def rounded_otherwise(model: Any) -> Any:
    """A copy in which each weight is one rounding larger or smaller."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
            p.mul_(1 + torch.finfo(p.dtype).eps * signs.to(p))
    return made


def true_answers(peer: Cell) -> dict[str, Tensor]:
    """The answers of the stock model in float64."""
    model = copy.deepcopy(peer.model).double()
    return answers(model, model, first(peer.inputs))


def first(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first clips of a batch."""
    found = {n: x[:CHECKED] if isinstance(x, Tensor) and x.ndim else x for n, x in inputs.items()}
    if "words" in found:
        found["words"] = min(found["words"], found["ids"].numel())
    return found


def answers(
    run: Callable[..., dict[str, Tensor]], model: Any, inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Losses, and gradients by part, each as one vector; without dropout."""
    with without_dropout(model):
        losses = run(**inputs)
        losses["loss"].backward()
    found = {"losses": torch.stack([x.detach() for x in losses.values()])}
    for part in (*PARTS, "others"):
        grads = [p.grad.flatten() for name, p in model.named_parameters()
                 if p.grad is not None and _part(name) == part]  # fmt: skip
        if grads:
            found[f"gradients of {part}"] = torch.cat(grads)
    model.zero_grad()
    return found


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this nothing is dropped out; the model stays in training otherwise."""
    rates = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    try:
        for module in rates:
            module.p = 0.0
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate


def _part(name: str) -> str:
    return name.split(".")[0] if name.split(".")[0] in PARTS else "others"


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((x.to(truth[name].dtype) - truth[name]).norm() / truth[name].norm())
        for name, x in found.items()
    }


def loss_of(cell: Cell) -> float:
    """The loss of the batch in the cell's own precision, without dropout."""
    with torch.no_grad(), without_dropout(cell.model):
        return float(cell.forward()["loss"])


def flops(cell: Cell) -> int:
    """Floating-point operations of forward and backward that PyTorch and our ops count."""
    with FlopCounterMode(display=False) as counter:
        cell.forward()["loss"].backward()
    cell.optimizer.zero_grad()
    return counter.get_total_flops()
