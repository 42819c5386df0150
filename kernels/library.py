"""Where ops meet PyTorch: schemas, the native library, and the choice of a backend.

An op is declared once, in Python. C++ attaches to it by name (`csrc/`), Triton as an opaque op of
its own; both share the fake kernel, the autograd formula and the FLOP formula. The backend
"reference" is the op's definition in plain PyTorch, which PyTorch differentiates itself, any number
of times and in both modes. The others have a first derivative in reverse mode, and refuse the rest.
"""

import functools
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("native", "triton", "reference")
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
    only_for_backward: int = 0  # so many results at the end serve `backward` alone
    # Backends that "auto" tries before "reference", for each device type. A backend is listed once
    # a committed result (bench/results/) from such a device shows that it is right and fastest.
    auto: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"cpu": ("native",)})
    setup_context: Callable[..., None] | None = None  # as torch.library.register_autograd has it
    backward: Callable[..., Any] | None = None  # backward(<name>_bwd of this backend, ctx, *grads)
    # The reason why a backend cannot take arguments with these facts (see why_not), or None.
    limits: Callable[..., str | None] = lambda backend, **facts: None

    @property
    def name(self) -> str:
        return self.schema.split("(")[0]


OPS: dict[str, Op] = {}
_library = torch.library.Library("vidl", "DEF")


def _library_files() -> Sequence[Path]:
    # Beside this package, or in a regular install that a source tree hides on sys.path.
    files = [Path(__file__).parents[1] / "_C.so"]
    for installed in metadata.distributions(name="vidl-kernels"):
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
    """Declare `vidl::<name>` and its twin `vidl::<name>_triton`; `<name>_bwd` comes before them."""
    OPS[op.name] = op
    for backend in _suffixes:
        _declare(op, backend)


def add_backend(backend: str) -> None:
    """Declare every op again for a backend that tests provide (the emulated CUDA kernels)."""
    _suffixes[backend] = f"_{backend}"
    for op in OPS.values():
        _declare(op, backend)


def kernel(name: str, backend: str) -> Callable[..., Any]:
    """The registered op that runs `name` on a backend with kernels; returns all results."""
    return getattr(torch.ops.vidl, name + _suffixes[backend]).default


def run(name: str, backend: str, *args: Any) -> Any:
    """Run the op `name` on any backend.

    Returns:
        The results of the schema without those that serve the backward pass alone: one tensor, or
        a tuple of several.

    Raises:
        RuntimeError: an argument has a tangent of forward-mode AD, for another backend than
            "reference".
    """
    op = OPS[name]
    if backend == "reference":
        assert op.reference is not None
        return op.reference(*args)
    results = _call(kernel(name, backend), *args)
    if op.only_for_backward:
        results = results[: -op.only_for_backward]
        return results[0] if len(results) == 1 else results
    return results


def _declare(op: Op, backend: str) -> None:
    name = op.name + _suffixes[backend]
    _library.define(op.schema.replace(op.name, name, 1))
    torch.library.register_fake(f"vidl::{name}", op.fake, lib=_library)
    register_flop_formula(getattr(torch.ops.vidl, name), get_raw=True)(op.flops)
    if op.backward is not None:
        torch.library.register_autograd(
            f"vidl::{name}",
            functools.partial(
                op.backward, functools.partial(_call, kernel(f"{op.name}_bwd", backend))
            ),
            setup_context=op.setup_context,
            lib=_library,
        )
    elif op.reference is None:
        # Without it, PyTorch would take the results of a backward op for constants.
        refuse = functools.partial(_no_second_derivative, op.name.removesuffix("_bwd"))
        torch.library.register_autograd(f"vidl::{name}", refuse, lib=_library)
    if backend == "triton":
        for key in ("CUDA", "CPU"):  # the CPU only in Triton's interpreter: see why_not()
            _library.impl(name, functools.partial(_run_triton, op), key)


def _call(op: Any, *args: Any) -> Any:
    """Call an op that has no formula for forward-mode AD: PyTorch would drop the tangents."""
    if forward_ad._current_level >= 0:
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{op._opname}: no forward-mode derivative: use backend='reference', or "
                    "reverse mode"
                )
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
    if backend == "reference":
        return None
    return _why_not_here(backend, name, device, dtype) or OPS[name].limits(
        backend, device=device, dtype=dtype, **facts
    )


@torch.compiler.assume_constant_result  # so that torch.compile need not trace it
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
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"vidl::{name}{_suffixes[backend]}", device.upper()
    ):
        return f"no {device} kernel was built ({LOAD_ERROR or 'see `vidl info`'})"
    if device not in DEVICES:
        return f"there are no kernels for {device}"
    if device == "cuda" and (gpu := current_gpu()) is not None:
        return _why_not_on(gpu, backend)
    return None


@dataclass(frozen=True)
class Gpu:
    """What the choice of kernels for an NVIDIA GPU depends on."""

    capability: tuple[int, int]
    shared_memory: int  # bytes that a block of threads can have


def current_gpu() -> Gpu | None:
    """The current NVIDIA GPU, or None without one."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return _gpu(torch.cuda.current_device())


@functools.cache
def _gpu(index: int) -> Gpu:
    card = torch.cuda.get_device_properties(index)
    return Gpu((card.major, card.minor), card.shared_memory_per_block_optin)


@torch.compiler.assume_constant_result
def shared_memory() -> int | None:
    """The bytes of shared memory that a block can have on the current NVIDIA GPU, or None."""
    gpu = current_gpu()
    return None if gpu is None else gpu.shared_memory


def _why_not_on(gpu: Gpu, backend: str) -> str | None:
    given = "this GPU has {}.{}".format(*gpu.capability)
    if gpu.capability < (8, 0):
        return f"its kernels need compute capability 8.0 or later, {given}"
    built = str(build_record().get("cuda_architectures") or "")
    if backend == "native" and not _runs(built, gpu.capability):
        return f"its kernels were built for compute capability {built}, {given}"
    return None


def _runs(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs kernels built for these architectures, in CMake's notation.

    Machine code (80-real, and a part of 80) runs on later GPUs of the same major version, PTX
    (80-virtual, and a part of 80) on all later ones.
    """
    parts = [re.fullmatch(r"(\d+)(\d)(-real|-virtual)?", x) for x in architectures.split(";")]
    if None in parts:  # names as "all", or features of one GPU only: let CUDA say
        return True
    major = capability[0]
    return any(
        (int(part[1]), int(part[2])) <= capability and (int(part[1]) == major or part[3] != "-real")
        for part in parts
        if part is not None
    )


def choose(backend: str, name: str, device: str, dtype: torch.dtype, **facts: Any) -> str:
    """The backend to run the op `name` with; a backend asked for by name never falls back.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run here; the text lists every backend with the
            reason why it cannot.
    """
    if backend == "auto":
        order = (*OPS[name].auto.get(device, ()), "reference")
        return next(b for b in order if why_not(b, name, device, dtype, **facts) is None)
    if backend != "reference" and backend not in _suffixes:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if why_not(backend, name, device, dtype, **facts) is not None:
        reasons = {b: why_not(b, name, device, dtype, **facts) for b in BACKENDS}
        raise RuntimeError(
            f"{name}: backend {backend!r} cannot run on {device} in {_short(dtype)}\n"
            + "\n".join(f"  {b}: {reason or 'can run'}" for b, reason in reasons.items())
        )
    return backend


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if it is enabled and `x` is float32, else that of x."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
