"""Recorded calls of ops: what is stored of the arguments, and how they are drawn again.

Indices and offsets are stored. Of a floating-point tensor only its shape, strides, mean and
standard deviation are: a call that is measured in another process has random numbers like them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidl.kernels import choices, library


@dataclass(frozen=True)
class Recorded:
    """A call of an op with backend "auto".

    Attributes:
        key: of its entry.
        device: type of device.
        facts: of `library.why_not`.
        arguments: of the op; tensors as `describe` returns them.
        hints: of `library.run`.
        label: where it comes from, for people.
        work: minimal bytes and FLOPs of each phase, where the benchmarks know them.
    """

    key: choices.Key
    device: str
    facts: dict[str, Any]
    arguments: list[Any]
    hints: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    work: list[tuple[int, int]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.key.dtype)
        return dtype

    def candidates(self) -> tuple[list[str], dict[str, str]]:
        """The backends to measure, the baseline first, and the reasons against the others.

        The baseline is "torch"; nobody needs the time of the definition.
        """
        names, reasons = [], {}
        for backend in library.BACKENDS:
            reason = library.why_not(backend, self.key.op, self.device, self.dtype, **self.facts)
            if backend == "triton" and library.interpreting():
                reason = "TRITON_INTERPRET=1 is set: the interpreter is not timed"
            if reason is None:
                names.append(backend)
            else:
                reasons[backend] = reason
        return ["torch", *(name for name in names if name not in library.PYTORCH)], reasons

    def draw(self, seed: int = 0) -> list[Any]:
        """The arguments, with tensors that require gradients as leaves."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            _draw(x, self.device, generator) if isinstance(x, dict) else x for x in self.arguments
        ]

    def as_values(self) -> dict[str, Any]:
        """What `torch.save` stores, without pickled code."""
        return {
            "key": choices.key_as_json(self.key),
            "device": self.device,
            "facts": self.facts,
            "arguments": self.arguments,
            "hints": self.hints,
            "work": self.work,
        }

    @staticmethod
    def from_values(values: dict[str, Any]) -> "Recorded":
        key = choices.key_from_json(values.pop("key"))
        return Recorded(key, **values)


@contextmanager
def recorded(calls: dict[choices.Key, Recorded], label: str = "") -> Iterator[None]:
    """Add the first call of every key within the block to `calls`."""

    def note(
        key: choices.Key, facts: dict[str, Any], arguments: Sequence[Any], hints: dict[str, Any]
    ) -> None:
        # Reading a tensor would end the capture of a graph; both policies are measured together.
        if key.policy == "graph" or key in calls:
            return
        names = (argument.name for argument in schema_of(key.op).arguments)
        with torch.no_grad():
            # A random log-sum-exp would not be that of the random queries and keys.
            described = [
                None if name == "lse" else describe(x)
                for name, x in zip(names, arguments, strict=True)
            ]
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        calls[key] = Recorded(key, device, facts, described, hints, label)

    with choices.recording(note):
        yield


def describe(x: Any) -> Any:
    """What is stored of an argument: other values than tensors as they are."""
    if not isinstance(x, Tensor):
        return list(x) if isinstance(x, (list, tuple)) else x
    facts: dict[str, Any] = {
        "shape": list(x.shape),
        "stride": list(x.stride()),
        "dtype": str(x.dtype).removeprefix("torch."),
        "gradient": x.requires_grad,
    }
    if x.is_floating_point():
        sample = x.detach().float()
        sample = sample[sample.isfinite()]
        spread = float(sample.std()) if sample.numel() > 1 else 0.0
        return facts | {"mean": float(sample.mean()) if sample.numel() else 0.0, "std": spread}
    if x.dtype == torch.uint8:
        return facts
    return facts | {"values": x.detach().cpu().clone()}


def _draw(facts: dict[str, Any], device: str, generator: torch.Generator) -> Tensor:
    if "values" in facts:
        values: Tensor = facts["values"].to(device)
        return values
    shape, stride = facts["shape"], facts["stride"]
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = size if math.prod(shape) else 0
    if facts["dtype"] == "uint8":
        flat = torch.randint(256, (size,), dtype=torch.uint8, device=device, generator=generator)
    else:
        flat = torch.randn(size, device=device, generator=generator)
        flat = flat.mul_(facts["std"]).add_(facts["mean"]).to(getattr(torch, facts["dtype"]))
    return flat.as_strided(shape, stride).detach().requires_grad_(facts["gradient"])


def schema_of(op: str) -> Any:
    """The names of an op's arguments and results."""
    kernel: Any = library.kernel(op, "native")
    return kernel._schema


def outputs(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The results of `library.run` as a list."""
    return [out] if isinstance(out, Tensor) else list(out)


def differentiable(call: Recorded, outs: Sequence[Tensor]) -> list[int]:
    """The places of the results that have gradients; the ops detach the log-sum-exp."""
    returned = schema_of(call.key.op).returns
    return [i for i, x in enumerate(outs) if x.requires_grad and returned[i].name != "lse"]


def results(
    call: Recorded, backend: str, arguments: Sequence[Any], draw: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The results of a call by name, and its gradients by the name of the argument.

    Args:
        draw: the gradient of a result.
    """
    schema = schema_of(call.key.op)
    with torch.set_grad_enabled(call.key.gradient):
        outs = outputs(library.run(call.key.op, backend, *arguments, **call.hints))
    names = [returned.name or f"result {i}" for i, returned in enumerate(schema.returns)]
    values = {
        name: x.detach() for name, x in zip(names, outs, strict=False) if call.hints.get(name, True)
    }
    if call.key.gradient:
        inputs = {
            argument.name: x
            for argument, x in zip(schema.arguments, arguments, strict=True)
            if isinstance(x, Tensor) and x.requires_grad
        }
        trained = [outs[place] for place in differentiable(call, outs)]
        gradients = torch.autograd.grad(
            trained,
            list(inputs.values()),
            [draw(x) for x in trained],
            allow_unused=True,
            materialize_grads=True,
        )
        values |= {f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}
    return values
