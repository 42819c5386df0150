"""The benchmark cases: ops at their shapes, and the candidates that compute each."""

import dataclasses
import fnmatch
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vidl import info
from vidl.kernels import library

MODES = {"forward": ("forward",), "full": ("forward", "backward")}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in library.DTYPES}
BENCH = Path(__file__).resolve().parents[1]
OVERHEAD = "overhead, one small sample"  # the shape at which calls cost more than their work
COMBINED = ("pruning", "relative_positions", "swapped")  # that use ops in other ways
Inputs = Any  # a dataclass of tensors, defined by the description; `grad` is that of the result


@dataclasses.dataclass(frozen=True)
class Work:
    """The minimal work of a forward or a backward."""

    size: int  # bytes: every needed input read once, every result written once
    flops: int  # useful floating-point operations, without padded or masked ones


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation of the op.

    `kind` is "ours"; "baseline", an implementation in PyTorch; "given", a baseline that receives a
    part of the work for free; or "floor", a part of the work alone, as a lower bound. Only a
    "baseline" can be the strongest baseline.
    """

    name: str
    kind: str
    run: Callable[[Inputs], Tensor]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs  # not timed
    gradients: Sequence[str] | None = None  # inputs with gradients; None: the op's PARAMETERS
    reason: str | None = None  # why it cannot run here
    forward_only: str | None = None  # why it has no backward here


def ours(
    op: str | Sequence[str], call: Callable[..., Tensor], device: str, dtype: torch.dtype
) -> list[Candidate]:
    """A candidate for every backend except the reference: `call(inputs, backend=...)`.

    The backend "torch" is PyTorch's own: it counts as a baseline.

    Args:
        op: the op or ops that `call` uses.
    """
    ops = [op] if isinstance(op, str) else op
    candidates = []
    for backend in library.BACKENDS:
        if backend == "reference":
            continue
        reasons = (library.why_not(backend, name, device, dtype) for name in ops)
        reason = next((reason for reason in reasons if reason is not None), None)
        if backend == "triton" and library.interpreting():
            reason = "TRITON_INTERPRET=1 is set: the interpreter is not timed"
        run = functools.partial(call, backend=backend)
        name, kind = ("torch", "baseline") if backend == "torch" else (f"vidl {backend}", "ours")
        candidates.append(Candidate(name, kind, run, reason=reason))
    return candidates


def compiled(name: str, run: Callable[[Inputs], Tensor], device: str, **options: Any) -> Candidate:
    """A baseline under `torch.compile`, timed on CUDA only."""
    if device == "cpu":
        options["reason"] = "timed on CUDA only"
    else:
        run = torch.compile(run)
    return Candidate(f"{name}, torch.compile", "baseline", run, **options)


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape, in one dtype, on one device."""

    op: str
    shape: str
    sizes: dict[str, Any]  # arguments of make() and work()
    dtype: torch.dtype
    device: str
    baselines: str | None = None  # a pattern of names; None: all

    @property
    def description(self) -> ModuleType:
        return importlib.import_module(f"vidl.bench.ops.{self.op}")

    def candidates(self) -> list[Candidate]:
        """Those of vidl, and the others whose names match the pattern."""
        candidates = self.description.candidates(self.sizes, self.device, self.dtype)
        return [c for c in candidates if c.kind == "ours" or _matches(c.name, self.baselines)]

    def make(self) -> Inputs:
        """The inputs; the same in every run."""
        generator = torch.Generator().manual_seed(0)
        options = {"dtype": self.dtype, "device": self.device, "generator": generator}
        return self.description.make(**self.sizes, **options)

    def gradients(self, candidate: Candidate) -> Sequence[str]:
        """The names of the inputs for which `candidate` computes gradients."""
        if candidate.forward_only is not None:
            return ()
        if candidate.gradients is not None:
            return candidate.gradients
        return self.description.PARAMETERS

    def modes(self, wanted: Sequence[str]) -> list[str]:
        """The wanted modes without the backward of an op that has no gradients."""
        return [mode for mode in wanted if mode == "forward" or self.description.PARAMETERS]

    def work(self, mode: str) -> list[Work]:
        """The work of forward, and in mode "full" also of backward."""
        phases = self.description.work(**self.sizes, dtype=self.dtype)
        return [phases[phase] for phase in MODES[mode]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases, modes and thread counts of a run."""

    cases: list[Case]
    modes: list[str]
    threads: list[int]
    quick: bool


def operations() -> list[str]:
    """The names of all descriptions: ops, and combinations of ops."""
    ops = [name for name in info.op_names() if (BENCH / "ops" / f"{name}.py").is_file()]
    return [*ops, *COMBINED]


def plan(
    ops: Sequence[str] = (),
    *,
    shapes: str | None = None,
    baselines: str | None = None,
    device: str | None = None,
    dtypes: Sequence[str] | None = None,
    threads: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
) -> Plan:
    """Plan a run; the defaults are what training on this machine would use.

    Args:
        ops: names of descriptions; default: all.
        shapes, baselines: patterns with `*`, or parts of names.
        device: "cpu" or "cuda"; default: CUDA if there is a GPU.
        dtypes: default bfloat16 on CUDA, float32 on the CPU.
        threads: numbers of CPU threads; ignored on CUDA.
        modes: "forward", "full"; default: both.
        quick: one sample per batch and few repetitions.

    Raises:
        ValueError: an argument names something that does not exist here.
    """
    _known("ops", ops, operations())
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("need a CUDA device for device 'cuda', but torch sees none")
    dtypes = dtypes or (["bfloat16"] if device == "cuda" else ["float32"])
    _known("dtype", dtypes, list(DTYPES))
    modes = list(modes or MODES)
    _known("modes", modes, list(MODES))
    counts = [torch.get_num_threads()]
    if threads is not None and device == "cpu":
        if not all(text.isdecimal() and int(text) > 0 for text in threads) or not threads:
            raise ValueError(f"need positive thread counts, got {','.join(threads)!r}")
        counts = [int(text) for text in threads]

    cases = []
    for op in ops or operations():
        for name, shape in importlib.import_module(f"vidl.bench.ops.{op}").SHAPES.items():
            if _matches(name, shapes):
                sizes = shape | {"B": 1 if quick else shape["B"][device]}
                cases += [Case(op, name, sizes, DTYPES[d], device, baselines) for d in dtypes]
    if not cases:
        raise ValueError(f"no shape matches {shapes!r}; `vidl bench --dry-run` lists them")
    cases = [case for case in cases if case.modes(modes)]
    if not cases:
        raise ValueError(f"need forward among the modes: {', '.join(ops)} has no gradients")
    return Plan(cases, modes, counts, quick)


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"need {what} among {', '.join(known)}; got {', '.join(unknown)}")


def _matches(name: str, pattern: str | None) -> bool:
    if pattern is None:
        return True
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    return fnmatch.fnmatchcase(name.lower(), pattern.lower())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def map_tensors(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with `change` applied to every tensor."""
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    tensors = {name: change(x) for name, x in fields.items() if isinstance(x, Tensor)}
    return dataclasses.replace(inputs, **tensors)


def leaves(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The inputs with the named tensors as leaves that require gradients."""
    named = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    return dataclasses.replace(inputs, **named)
