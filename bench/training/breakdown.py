"""Where the time of a step goes: forward and backward of each part, told apart by marks.

A mark is an identity that autograd knows. Passing it forward begins a part; passing it backward
goes back to the part before it, since autograd computes what was recorded last first. Modules
have the same names in ours and in stock, so hooks on them put the marks of both in the same places.
On CUDA a mark is an event in the stream, and nothing waits.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidl.bench.training.steps import Cell

PARTS = (
    *("embed", "attention", "selection", "MLP", "text", "fusion", "decoder", "losses"),
    *("optimizer", "other"),
)


class Clock:
    """When which part began: times of the host, or events of CUDA."""

    def __init__(self, device: str) -> None:
        self.device, self.part = device, "other"
        self.marks: list[tuple[str, Any]] = []

    def enter(self, part: str) -> str:
        """From now on it is `part`; returns what it was."""
        before, self.part = self.part, part
        self.marks.append((part, self._now()))
        return before

    def seconds(self) -> dict[str, float]:
        """The time of each part, to the last mark."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            elapsed = begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin
            found[part] += elapsed
        return found

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
    """Seconds of a step by part, each the median of some steps; not to be added to real steps."""
    found = []
    for _ in range(steps):
        clock = Clock(cell.device)
        with _marked(cell.model, clock):
            clock.enter("other")
            loss = cell.forward()["loss"]
            clock.enter("losses")
            loss.backward()
            clock.enter("optimizer")
            cell.update()
            clock.enter("other")
        found.append(clock.seconds())
    return {part: statistics.median(each[part] for each in found) for part in PARTS}


@contextlib.contextmanager
def _marked(model: Any, clock: Clock) -> Iterator[None]:
    """Hooks on the modules at which a part begins or ends."""
    hooks = []

    def mark(part: str, value: Any) -> Any:
        before = clock.enter(part)
        tensors = isinstance(value, tuple)
        values = value if tensors else (value,)
        made = tuple(
            _Mark.apply(x, clock, before) if isinstance(x, Tensor) and x.requires_grad else x
            for x in values
        )
        return made if tensors else made[0]

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


def _place(model: Any, begins: Place, ends: Place) -> None:
    """Say where each part of a model begins and ends."""
    begins(model.vision.patch_embed, "embed")
    ends(model.vision.patch_embed, "other")
    for block in model.vision.blocks:
        begins(getattr(block, "norm3", block.norm1), "attention")
        if getattr(block, "pruning", None) is not None:
            ends(block.attn.proj, "selection")
        begins(block.norm2, "MLP")
        ends(block, "other")
    begins(model.text.embeddings, "text")
    for number, layer in enumerate(model.text.encoder.layer):
        begins(layer, "text" if number < model.text.text_layers else "fusion")
        ends(layer, "other")
    for name, part in (
        ("selector", "fusion"), ("decoder", "decoder"), ("pixels", "losses"),
        ("contrast", "losses"), ("matches", "losses"),
        ("project_clip", "losses"), ("project_text", "losses"),
    ):  # fmt: skip
        if hasattr(model, name):
            begins(getattr(model, name), part)
            ends(getattr(model, name), "other")
    head = getattr(model.text, "cls", None)
    if head is not None:
        begins(head.predictions, "losses")
