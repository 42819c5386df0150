"""Whole steps of pre-training: forward, backward, clipping and AdamW on a batch in memory."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidl import models
from vidl.bench.measure.check import SLACK
from vidl.bench.training.baseline import baseline_of
from vidl.models.summary import flop_counter
from vidl.nn.captions import rounded_words

# Words of a caption, with [CLS] and [SEP]; typical of WebVid and CC3M.
SHORTEST, LONGEST = 8, 24
# Clips on which losses and gradients are compared with float64: the default batch on a CPU, so that
# torch.compile compiles one shape only.
CHECKED = 4
COMPILED = {"pytorch": "torch.compile", "vidl": "vidl, torch.compile"}
PARTS = ("vision", "text")  # parts with their own comparison of gradients; the rest is "others"


@dataclasses.dataclass
class Cell:
    """A model and its optimizer: a row, dense or sparse, and a column of `digest.COLUMNS`.

    Attributes:
        row, column: its place in the table, "dense" or "sparse", and "pytorch" or so.
        model: the module; the models of a row share their parameters.
        run: the forward: the module, or its compiled version.
        optimizer: AdamW over the parameters of the row.
        inputs: a batch on the model's device.
        dtype: the dtype of autocast, or None without autocast.
        kind: "ours" or "baseline".
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
    def compiled(self) -> bool:
        return "torch.compile" in self.column

    @property
    def device(self) -> str:
        return self.inputs["video"].device.type

    def forward(self, inputs: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The losses, computed in the cell's precision."""
        with self.autocast():
            return self.run(**(self.inputs if inputs is None else inputs))

    def autocast(self) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def update(self) -> None:
        """Clip the gradients and update the parameters."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """One training step: forward, backward and update."""
        self.forward()["loss"].backward()
        self.update()


def cells(recipe: Any, batch: int, device: str, compiled: bool = False) -> Iterator[Cell]:
    """The cells of the table, row after row.

    Args:
        recipe: a recipe of `vidl.models`.
        batch: clips per step.
        device: "cpu" (float32) or "cuda" (bfloat16 autocast).
        compiled: also yield the baseline and vidl under `torch.compile`.
    """
    variants = list(recipe.variants().values())
    dtype = torch.bfloat16 if device == "cuda" else None
    for row, variant in (("dense", variants[0]), ("sparse", variants[-1])):
        torch.manual_seed(0)
        model = models.MODELS[models.name_of(recipe)].model(variant).to(device).train()
        baseline = baseline_of(model)
        adam = fused_adamw(model)
        inputs = batch_of(variant, batch, device)
        words = {"words": rounded_words(int(inputs["attention_mask"].sum()), inputs["ids"].numel())}
        ours = inputs | (words if device == "cuda" else {})
        for name, module, kind, given in (
            ("pytorch", baseline, "baseline", inputs),
            ("vidl", model, "ours", ours),
        ):
            yield Cell(row, name, module, module, adam, given, dtype, kind)
            if compiled:
                # As a tensor, so that another step number does not recompile.
                step = {"step": torch.zeros((), dtype=torch.int64, device=device)}
                # Static shapes: a check of fewer clips would make the timed ones dynamic.
                run: Any = torch.compile(module, dynamic=False)
                column = COMPILED[name]
                yield Cell(row, column, module, run, adam, given | step, dtype, kind)


def batch_of(recipe: Any, batch: int, device: str) -> dict[str, Any]:
    """A random batch; captions have 8 to 24 words and are padded to the longest."""
    lengths = [SHORTEST + 5 * i % (LONGEST - SHORTEST + 1) for i in range(batch)]
    torch.manual_seed(1)
    inputs = recipe.example(batch, max(lengths), device)
    column = torch.arange(max(lengths), device=device)
    mask = column < torch.tensor(lengths, device=device)[:, None]
    return inputs | {"attention_mask": mask.to(torch.int64)}


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW with weight decay for matrices only; the learning rate hardly moves a weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), fused=True)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Relative errors of losses and gradients against float64.

    Attributes:
        baseline, ours: the float32 errors of each part; see `agreement_of`.
        allowed: the bound for `ours`: `SLACK` times the largest error of `baseline`, plus one
            rounding.
    """

    baseline: dict[str, float]
    ours: dict[str, float]
    allowed: float

    @property
    def ok(self) -> bool:
        return all(error <= self.allowed for error in self.ours.values())  # False for NaN

    def __str__(self) -> str:
        parts = [f"{p} {self.ours[p]:.1e} (baseline {self.baseline[p]:.1e})" for p in self.ours]
        return f"{', '.join(parts)}; allowed {self.allowed:.1e}"


def agreement_of(baseline: Cell) -> Callable[[Cell], Agreement]:
    """A function that compares the losses and gradients of a cell with those of the baseline.

    The comparison runs in float32 on the first clips of the batch, without dropout, because every
    cell draws its dropout in another order. In lower precision, rounding decides which tokens are
    kept where scores are close, so the comparison would say little. The reference is the baseline
    in float64. A single error measurement is a poor estimate of sensitivity, since it may be small
    by chance; the error of the baseline is therefore the larger of two: its own, and that of a copy
    whose weights are moved by one rounding each.
    """
    truth, inputs = true_answers(baseline), first(baseline.inputs)
    own = _errors(answers(baseline.run, baseline.model, inputs), truth)
    moved = rounded_otherwise(baseline.model)
    for part, error in _errors(answers(moved, moved, inputs), truth).items():
        own[part] = max(own[part], error)
    largest, eps = max(own.values()), torch.finfo(torch.float32).eps

    def compare(cell: Cell) -> Agreement:
        errors = _errors(answers(cell.run, cell.model, first(cell.inputs)), truth)
        # torch.compile sums in another order, as a baseline of an op may.
        slack = SLACK["baseline" if cell.compiled else cell.kind]
        return Agreement(own, errors, slack * largest + eps)

    return compare


def rounded_otherwise(model: Any) -> Any:
    """A copy in which each weight is one rounding larger or smaller."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
            p.mul_(1 + torch.finfo(p.dtype).eps * signs.to(p))
    return moved


def true_answers(baseline: Cell) -> dict[str, Tensor]:
    """Losses and gradients of the baseline in float64."""
    model = copy.deepcopy(baseline.model).double()
    return answers(model, model, first(baseline.inputs))


def first(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first clips of a batch."""
    part = {n: x[:CHECKED] if isinstance(x, Tensor) and x.ndim else x for n, x in inputs.items()}
    if "words" in part:
        part["words"] = min(part["words"], part["ids"].numel())
    return part


def answers(
    run: Callable[..., dict[str, Tensor]], model: Any, inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Losses, and the gradients of each part as one vector; without dropout."""
    with without_dropout(model):
        losses = run(**inputs)
        losses["loss"].backward()
    results = {"losses": torch.stack([x.detach() for x in losses.values()])}
    for part in (*PARTS, "others"):
        grads = [p.grad.flatten() for name, p in model.named_parameters()
                 if p.grad is not None and _part(name) == part]  # fmt: skip
        if grads:
            results[f"gradients of {part}"] = torch.cat(grads)
    model.zero_grad()
    return results


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this context the dropout rates are 0; the model stays in training mode."""
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


def _errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((x.to(truth[name].dtype) - truth[name]).norm() / truth[name].norm())
        for name, x in results.items()
    }


def loss_of(cell: Cell) -> float:
    """The loss of the batch in the cell's precision, without dropout."""
    with torch.no_grad(), without_dropout(cell.model):
        return float(cell.forward()["loss"])


def flops(cell: Cell) -> int:
    """FLOPs of forward and backward, as PyTorch counts them; vidl's ops register their formulas."""
    with flop_counter() as counter:
        cell.forward()["loss"].backward()
    cell.optimizer.zero_grad()
    return counter.get_total_flops()
