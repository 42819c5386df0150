"""Time of a step by part: attention, MLP, text and so on, forward and backward together.

Hooks on modules insert marks. A mark is an identity in the autograd graph: its forward starts a
part, and its backward returns to the previous part, because autograd runs in reverse order. The
baseline has the same module names as vidl, so both are marked in the same places. On CUDA a mark
records an event in the stream, without a synchronisation.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidl.bench.training.steps import Cell
from vidl.nn import Bert, MaskedPatchEmbed

PARTS = (
    *("embed", "attention", "selection", "MLP", "text", "fusion", "decoder", "losses"),
    *("optimizer", "other"),
)


class Clock:
    """Records when each part starts: host times, or CUDA events."""

    def __init__(self, device: str) -> None:
        self.device, self.part = device, "other"
        self.marks: list[tuple[str, Any]] = []

    def enter(self, part: str) -> str:
        """Start `part`; returns the part before it."""
        before, self.part = self.part, part
        self.marks.append((part, self._now()))
        return before

    def seconds(self) -> dict[str, float]:
        """The total time of each part, up to the last mark."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            elapsed = begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin
            totals[part] += elapsed
        return totals

    def _now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, before: str) -> Tensor:
        ctx.clock, ctx.before = clock, before
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.clock.enter(ctx.before)
        return grad, None, None


def breakdown(cell: Cell, steps: int = 3) -> dict[str, float]:
    """Seconds of a step by part, medians over `steps` steps; the marks make steps slower."""
    measured = []
    for _ in range(steps):
        clock = Clock(cell.device)
        with marked(cell.model, clock):
            clock.enter("other")
            loss = cell.forward()["loss"]
            clock.enter("losses")
            loss.backward()
            clock.enter("optimizer")
            cell.update()
            clock.enter("other")
        measured.append(clock.seconds())
    return {part: statistics.median(parts[part] for parts in measured) for part in PARTS}


@contextlib.contextmanager
def marked(model: Any, clock: Clock) -> Iterator[None]:
    """Within this context, modules at which a part starts or ends have hooks."""
    hooks = []

    def mark(part: str, value: Any) -> Any:
        before = clock.enter(part)
        tensors = isinstance(value, tuple)
        values = value if tensors else (value,)
        results = tuple(
            _Mark.apply(x, clock, before) if isinstance(x, Tensor) and x.requires_grad else x
            for x in values
        )
        return results if tensors else results[0]

    def begins(module: nn.Module, part: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda m, args: mark(part, args)))

    def ends(module: nn.Module, part: str) -> None:
        def after(m: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, Tensor | tuple):
                return mark(part, out)
            clock.enter(part)
            return None

        hooks.append(module.register_forward_hook(after))

    _place(model, begins, ends)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Place = Callable[[nn.Module, str], None]


# Parts of the modules beside the encoders, by the name of the model's attribute.
BESIDE = {
    "selector": "fusion", "late": "attention", "decoder": "decoder", "pixels": "losses",
    "contrast": "losses", "matches": "losses", "project_clip": "losses", "project_text": "losses",
}  # fmt: skip


def _place(model: nn.Module, begins: Place, ends: Place) -> None:
    """Call `begins` and `ends` with the modules at which each part starts and ends."""
    for name, module in model.named_modules():
        whole: Any = module
        if (first := name.partition(".")[0]) in BESIDE:
            if first == name:
                begins(module, BESIDE[name])
                ends(module, "other")
        elif isinstance(module, MaskedPatchEmbed):
            begins(module, "embed")
            ends(module, "other")
        elif all(hasattr(module, part) for part in ("norm1", "norm2", "attn", "mlp")):
            begins(getattr(module, "norm3", whole.norm1), "attention")
            if getattr(module, "pruning", None) is not None:
                ends(whole.attn.proj, "selection")
            begins(whole.norm2, "MLP")
            ends(module, "other")
        elif isinstance(module, Bert):
            begins(whole.embeddings, "text")
            for number, layer in enumerate(whole.encoder.layer):
                begins(layer, "text" if number < module.text_layers else "fusion")
                ends(layer, "other")
            if hasattr(module, "cls"):
                begins(whole.cls.predictions, "losses")
