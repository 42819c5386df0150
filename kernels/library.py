"""Where ops meet PyTorch: schemas, the native library, and the choice of a backend.

An op is declared once, in Python. C++ attaches to it by name (`csrc/`), Triton as an opaque op of
its own; both share the fake kernel, the autograd formula and the FLOP formula. They have a first
derivative in reverse mode, and refuse the rest. Two backends are written in PyTorch, which
differentiates them itself: "reference" is the op's definition, any number of times and in both
modes; "torch" is the fastest composition of PyTorch's own operations that we know, on any device.
"""

import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vidl.kernels import choices, gpu
from vidl.kernels.constant import assume_constant

BACKENDS = ("native", "triton", "torch", "reference")
PYTORCH = ("torch", "reference")  # those written in PyTorch: any device, any floating dtype
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The namespace of the ops: "vidl", or the name of a kernel of the Hugging Face Hub (hub/pack.py).
NAMESPACE = __name__.partition(".")[0]

# The rule of "auto" where nothing was measured, for each device type: the first that can run.
RULE = {"cpu": ("native", "torch")}
RULE_ELSEWHERE = ("torch",)

# Backends whose kernels are ops of their own, and the suffix of those ops.
_suffixes = {"native": "", "triton": "_triton"}


@dataclass(frozen=True)
class Op:
    """One declared op: what all its backends share."""

    schema: str  # name, arguments and results, in PyTorch's schema language
    module: str  # the op's package; its triton_kernels.py has a function of the op's name
    fake: Callable[..., Any]  # empty results of the right shape, dtype and device
    flops: Callable[..., int]  # useful floating-point operations, from the arguments
    # The definition in plain PyTorch: the schema's arguments and results, without the last
    # `only_for_backward` results. None for the backward op of another.
    reference: Callable[..., Any] | None = None
    # The fastest composition of PyTorch's operations: arguments and results as of `reference`.
    torch: Callable[..., Any] | None = None
    only_for_backward: int = 0  # so many results at the end serve `backward` alone
    # Adapts arguments that the kernels of a backend cannot take: adapt(call, backend, *arguments)
    # returns what `call` returns for these arguments.
    adapt: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None  # as torch.library.register_autograd has it
    backward: Callable[..., Any] | None = None  # backward(<name>_bwd of this backend, ctx, *grads)
    # The reason why a backend cannot take arguments with these facts (see why_not), or None.
    limits: Callable[..., str | None] = lambda backend, **facts: None

    @property
    def name(self) -> str:
        return self.schema.split("(")[0]


OPS: dict[str, Op] = {}
# The ops with kernels by name and backend, and those of them with a formula as nodes of autograd.
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}
_nodes: dict[tuple[str, str], type[torch.autograd.Function]] = {}
_library = torch.library.Library(NAMESPACE, "DEF")


def _library_files() -> Sequence[Path]:
    # Beside this package, or in a regular install that a source tree hides on sys.path.
    files = [Path(__file__).parents[1] / "_C.so"]
    for installed in metadata.distributions(name="vidl-kernels") if NAMESPACE == "vidl" else ():
        files.append(Path(str(installed.locate_file("vidl/_C.so"))))
    return files


@functools.cache
def build_record() -> dict[str, Any]:
    """What was built, by which compiler, for which devices; or why nothing was built.

    Returns:
        "file" (str or None), "error" (str or None) and what `CMakeLists.txt` or `setup.py` wrote
        to `_build.json` beside the library.
    """
    record: dict[str, Any] = {
        "file": None,
        "error": "not built: this is a source tree that was never installed (README, Install)",
    }
    for file in _library_files():
        notes = file.with_name("_build.json")
        if notes.is_file():
            record |= {"error": None} | json.loads(notes.read_text())
        if file.is_file():
            return record | {"file": str(file), "error": None}
        if record["error"] is None:
            record["error"] = "not built"
    return record


def _load() -> str | None:
    """Load the native library; return the reason if it cannot be loaded."""
    record = build_record()
    if record["file"] is None:
        return str(record.get("reason") or record["error"])
    try:
        torch.ops.load_library(record["file"])
    except OSError as error:
        reason = f"{record['file']} does not load under torch {torch.__version__}: "
        reason += str(error.__cause__ or error)
        warnings.warn(f"vidl: {reason}; see `vidl info`", stacklevel=2)
        return reason
    return None


LOAD_ERROR = _load()


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU in Triton's interpreter (slow; for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def define(op: Op) -> None:
    """Declare the op and its twin `<name>_triton`; `<name>_bwd` comes before them."""
    OPS[op.name] = op
    for backend in _suffixes:
        _declare(op, backend)


def add_backend(backend: str) -> None:
    """Declare every op again for a backend that tests provide (the emulated CUDA kernels)."""
    _suffixes[backend] = f"_{backend}"
    _has_kernel.cache_clear()
    for op in OPS.values():
        _declare(op, backend)


def kernel(name: str, backend: str) -> Callable[..., Any]:
    """The registered op that runs `name` on a backend with kernels; returns all results."""
    return _kernels[name, backend]


def run(name: str, backend: str, *args: Any, **hints: Any) -> Any:
    """Run the op `name` on any backend.

    Args:
        hints: what else the backend "torch" should know: whether the caller needs a result that
            it would have to compute separately, and what the host knows of the arguments.

    Returns:
        The results of the schema without those that serve the backward pass alone: one tensor, or
        a tuple of several.

    Raises:
        RuntimeError: an argument has a tangent of forward-mode AD, for a backend with kernels.
    """
    op = OPS[name]
    if choices.recorder is not None and not torch.compiler.is_compiling():
        choices.recorder.ran(name, args, hints)
    if backend == "torch":
        assert op.torch is not None
        return op.torch(*args, **hints)
    if backend == "reference":
        assert op.reference is not None
        return op.reference(*args)
    if op.adapt is None:
        results = _call(name, backend, *args)
    else:
        results = op.adapt(functools.partial(_call, name, backend), backend, *args)
    if op.only_for_backward:
        results = results[: -op.only_for_backward]
        return results[0] if len(results) == 1 else results
    return results


def _declare(op: Op, backend: str) -> None:
    name = op.name + _suffixes[backend]
    _library.define(op.schema.replace(op.name, name, 1))
    torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet, get_raw=True)(op.flops)
    _kernels[op.name, backend] = packet.default
    backward: Callable[..., Any] | None = None
    if op.backward is not None:
        bwd = functools.partial(_call, f"{op.name}_bwd", backend)
        backward = functools.partial(op.backward, bwd)
    elif op.reference is None:
        # Without it, PyTorch would take the results of a backward op for constants.
        backward = functools.partial(_no_second_derivative, op.name.removesuffix("_bwd"))
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=op.setup_context, lib=_library
        )
        _nodes[op.name, backend] = _node(packet.default, op.setup_context, backward)
    if backend == "triton":
        for key in ("CUDA", "CPU"):  # the CPU only in Triton's interpreter: see why_not()
            _library.impl(name, functools.partial(_run_triton, op), key)


def _node(
    kernel: Any, setup_context: Callable[..., None] | None, formula: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """What torch.library.register_autograd makes of a formula, without its layers: see `_call`."""

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = kernel(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Any) -> Any:  # torch.compile cannot trace a partial as a method
        return formula(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(kernel._opname, (torch.autograd.Function,), methods)


def _call(name: str, backend: str, *args: Any) -> Any:
    """Call an op, without the autograd layer of torch.library.

    That layer is written in Python and takes several times as long as a small kernel: PyTorch
    enters Python twice in it. It also has no formula for forward-mode AD, and would drop the
    tangents. Only tracers and transforms, which replace the op or its arguments, need it.
    """
    op = _kernels[name, backend]
    if forward_ad._current_level >= 0:
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{name}: no forward-mode derivative: use backend='torch' or 'reference', or "
                    "reverse mode"
                )
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        if (name, backend) in _nodes and not torch.jit.is_tracing():
            return _nodes[name, backend].apply(*args)
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _no_second_derivative(name: str, ctx: Any, *grads: Any) -> None:
    raise RuntimeError(f"{name}: no second derivative: use backend='reference'")


def _run_triton(op: Op, *args: Any) -> Any:
    return getattr(importlib.import_module(f"{op.module}.triton_kernels"), op.name)(*args)


def why_not(backend: str, name: str, device: str, dtype: torch.dtype, **facts: Any) -> str | None:
    """The reason why `backend` cannot run the op `name` there, or None if it can.

    It serves the choice of a backend, error messages, `vidl info`, and the skips of tests and
    benchmarks.

    Args:
        device: "cpu", "cuda" or another device type.
        dtype: of the computation.
        facts: the numbers that the op's own limits depend on.
    """
    if backend in PYTORCH:
        return None
    return _why_not_here(backend, name, device, dtype) or OPS[name].limits(
        backend, device=device, dtype=dtype, **facts
    )


@assume_constant
def _why_not_here(backend: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"it computes in {', '.join(map(_short, DTYPES))}, not in {_short(dtype)}"
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device == "cuda" and interpreting():
            return "TRITON_INTERPRET=1 is set: kernels run on CPU tensors only"
        if device == "cpu" and not interpreting():
            return "Triton kernels run on CUDA tensors (on the CPU only under TRITON_INTERPRET=1)"
        if device == "cpu" and dtype == torch.bfloat16:
            return "Triton's interpreter computes wrongly in bfloat16"
    elif not _has_kernel(name, backend, device):
        return f"no {device} kernel was built ({LOAD_ERROR or 'see `vidl info`'})"
    if device not in DEVICES:
        return f"there are no kernels for {device}"
    if device == "cuda" and (card := gpu.current()) is not None:
        built = str(build_record().get("cuda_architectures") or "")
        return card.why_not(built if backend == "native" else "")
    return None


@functools.cache  # every call asks
def _has_kernel(name: str, backend: str, device: str) -> bool:
    op = f"{NAMESPACE}::{name}{_suffixes[backend]}"
    known: bool = torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())
    return known


def check_backend(backend: str) -> None:
    """Raise unless there is a backend of this name."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if not (backend == "auto" or backend in PYTORCH or backend in _suffixes):
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")


def choose(
    backend: str,
    name: str,
    device: str,
    dtype: torch.dtype,
    key: Callable[[], choices.Key | None] | None = None,
    **facts: Any,
) -> str:
    """The backend to run the op `name` with; a backend asked for by name never falls back.

    Args:
        key: makes the key of the call, with which "auto" finds what was measured; called only if
            something looks for it. None: by the rule alone.
        device, dtype, facts: see `why_not`.

    Raises:
        TypeError, ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run here; the text lists every backend with the
            reason why it cannot.
    """
    if backend == "auto":
        asked = choices.asked(device)
        if not asked and device == "cpu" and not choices.forced():
            return by_rule(name, device, dtype, **facts)  # nothing to look up: most calls on a CPU
        wanted = key() if asked and key is not None else None
        return automatic(name, device, dtype, wanted, **facts)[0]
    check_backend(backend)
    if why_not(backend, name, device, dtype, **facts) is not None:
        reasons = {b: why_not(b, name, device, dtype, **facts) for b in BACKENDS}
        raise RuntimeError(
            f"{name}: backend {backend!r} cannot run on {device} in {_short(dtype)}\n"
            + "\n".join(f"  {b}: {reason or 'can run'}" for b, reason in reasons.items())
        )
    return backend


def automatic(
    name: str, device: str, dtype: torch.dtype, key: choices.Key | None = None, **facts: Any
) -> tuple[str, str]:
    """What "auto" takes, and why: "VIDL_BACKEND", "tuned", "shipped" or "rule".

    The environment's VIDL_BACKEND counts as a backend asked for by name. An entry whose backend
    cannot run here is a miss.

    Raises:
        ValueError, RuntimeError: VIDL_BACKEND is unknown or cannot run, see `choose`.
    """
    if choices.recorder is not None and not torch.compiler.is_compiling():
        choices.recorder.chosen(key, facts)
    for named in choices.lookup(device, None if key is None else tuple(key)).split():
        source, backend = named.split("=", 1)
        if source == "VIDL_BACKEND":
            return choose(backend, name, device, dtype, **facts), source
        known = backend in BACKENDS or backend in _suffixes
        if known and why_not(backend, name, device, dtype, **facts) is None:
            return backend, source
    backend = by_rule(name, device, dtype, **facts)
    if device == "cuda":
        choices.say_untuned(device, backend)
    return backend, "rule"


def by_rule(name: str, device: str, dtype: torch.dtype, **facts: Any) -> str:
    """The backend where nothing was measured."""
    *kernels, composition = RULE.get(device, RULE_ELSEWHERE)
    for backend in kernels:
        if why_not(backend, name, device, dtype, **facts) is None:
            return backend
    if device == "cpu":
        _say_not_built()
    return composition  # it runs everywhere


@assume_constant
@functools.cache
def _say_not_built() -> None:
    """Say once, at the first op on the CPU, that an installation has no kernels for it."""
    record = build_record()
    if record["file"] is None and record.get("reason") != "VIDL_BUILD=none":
        reason = record.get("reason") or record["error"]
        choices.log.warning(f"vidl: using torch on the CPU, {reason}; see `vidl info`")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if it is enabled and `x` is float32, else that of x."""
    if torch._C._is_any_autocast_enabled() and x.dtype == torch.float32:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return x.dtype
