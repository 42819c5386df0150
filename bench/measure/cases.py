"""What there is to time: the ops at their shapes, and the ways to compute each."""

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
SEVERAL = ("pruning", "swapped")  # descriptions of several ops at work together
Inputs = Any  # a description's own dataclass of tensors, with the result's gradient as `grad`


@dataclasses.dataclass(frozen=True)
class Work:
    """What one phase of an op cannot do without."""

    size: int  # bytes: each needed input read once, each result written once
    flops: int  # useful floating-point operations, nothing padded or masked


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute the op.

    `kind` is "ours"; "peer", which does all the work; "given", a peer spared a part of it; or
    "floor", a part of the work alone, which nothing can beat. Only a "peer" can be the strongest.
    """

    name: str
    kind: str
    run: Callable[[Inputs], Tensor]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs  # not timed
    gradients: Sequence[str] | None = None  # what it differentiates; None: the op's PARAMETERS
    reason: str | None = None  # why it cannot run here
    forward_only: str | None = None  # why it has no gradients here


def ours(
    op: str | Sequence[str], call: Callable[..., Tensor], device: str, dtype: torch.dtype
) -> list[Candidate]:
    """A candidate for each backend but the reference: `call(inputs, backend=...)`.

    Args:
        op: what `call` needs: an op, or several.
    """
    ops = [op] if isinstance(op, str) else op
    found = []
    for backend in library.BACKENDS:
        if backend == "reference":
            continue
        reasons = (library.why_not(backend, name, device, dtype) for name in ops)
        reason = next((reason for reason in reasons if reason is not None), None)
        if backend == "triton" and library.interpreting():
            reason = "TRITON_INTERPRET=1 is set: the time of an interpreter says nothing"
        run = functools.partial(call, backend=backend)
        found.append(Candidate(f"vidl {backend}", "ours", run, reason=reason))
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype on one device."""

    op: str
    shape: str
    sizes: dict[str, Any]  # what make() and work() take
    dtype: torch.dtype
    device: str
    peers: str | None = None  # a pattern

    @property
    def description(self) -> ModuleType:
        return importlib.import_module(f"vidl.bench.ops.{self.op}")

    def candidates(self) -> list[Candidate]:
        """Ours, and those of the others that the pattern asks for."""
        every = self.description.candidates(self.sizes, self.device, self.dtype)
        return [c for c in every if c.kind == "ours" or _matches(c.name, self.peers)]

    def make(self) -> Inputs:
        """The inputs, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        options = {"dtype": self.dtype, "device": self.device, "generator": generator}
        return self.description.make(**self.sizes, **options)

    def gradients(self, candidate: Candidate) -> Sequence[str]:
        """The inputs by which `candidate` differentiates."""
        if candidate.forward_only is not None:
            return ()
        if candidate.gradients is not None:
            return candidate.gradients
        return self.description.PARAMETERS

    def modes(self, wanted: Sequence[str]) -> list[str]:
        """Those that there are: an op without parameters has no backward."""
        return [mode for mode in wanted if mode == "forward" or self.description.PARAMETERS]

    def work(self, mode: str) -> list[Work]:
        """What each phase of `mode` needs, in order."""
        phases = self.description.work(**self.sizes, dtype=self.dtype)
        return [phases[phase] for phase in MODES[mode]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of the suite does."""

    cases: list[Case]
    modes: list[str]
    threads: list[int]
    quick: bool


def operations() -> list[str]:
    """What has a description: ops, and several of them together."""
    ops = [name for name in info.op_names() if (BENCH / "ops" / f"{name}.py").is_file()]
    return [*ops, *SEVERAL]


def plan(
    ops: Sequence[str] = (),
    *,
    shapes: str | None = None,
    peers: str | None = None,
    device: str | None = None,
    dtypes: Sequence[str] | None = None,
    threads: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
) -> Plan:
    """Choose what to run; every default is what this machine would train with.

    Args:
        shapes, peers: patterns with `*`, or a part of a name.
        dtypes: default bfloat16 on CUDA, float32 on the CPU.
        threads: of the CPU; ignored on CUDA.
        quick: one sample a batch and few repetitions.

    Raises:
        ValueError: an argument names nothing that exists here.
    """
    _known("ops", ops, operations())
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("need a CUDA device for device 'cuda', found none")
    dtypes = dtypes or (["bfloat16"] if device == "cuda" else ["float32"])
    _known("dtype", dtypes, list(DTYPES))
    modes = list(modes or MODES)
    _known("modes", modes, list(MODES))
    counts = [torch.get_num_threads()]
    if threads is not None and device == "cpu":
        if not all(text.isdecimal() and int(text) > 0 for text in threads) or not threads:
            raise ValueError(f"need positive numbers of threads, got {','.join(threads)!r}")
        counts = [int(text) for text in threads]

    cases = []
    for op in ops or operations():
        for name, shape in importlib.import_module(f"vidl.bench.ops.{op}").SHAPES.items():
            if _matches(name, shapes):
                sizes = shape | {"B": 1 if quick else shape["B"][device]}
                cases += [Case(op, name, sizes, DTYPES[d], device, peers) for d in dtypes]
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
    """The inputs with every tensor changed."""
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    tensors = {name: change(x) for name, x in fields.items() if isinstance(x, Tensor)}
    return dataclasses.replace(inputs, **tensors)


def leaves(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The inputs with the named ones ready to be differentiated by."""
    found = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    return dataclasses.replace(inputs, **found)
