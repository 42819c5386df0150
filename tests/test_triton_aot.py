"""Every Triton kernel compiles for sm_80, 89 and 90 without a GPU and without register spills.

Each kernels/<op>/triton_kernels.py has a function `ahead_of_time()`. It calls the op on small CPU
tensors, once for every kind of argument that makes Triton compile another variant of a kernel (the
most common first): dtypes, absent tensors, strides that are 1 or a multiple of 16, block sizes. The
test records the launches in place of executing them, then compiles them as Triton would.

`python tests/test_triton_aot.py [module ...]` prints registers and shared memory of every variant.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"vidl.kernels.{file.parent.name}.triton_kernels"
    for file in (ROOT / "kernels").glob("*/triton_kernels.py")
)
TYPES = {
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes, the limit of a block


@dataclass(frozen=True)
class Variant:
    """A kernel and what Triton specializes it for."""

    kernel: Any
    types: dict[str, Any]  # of every parameter; "constexpr" for constants
    constants: dict[str, Any]
    divisible: dict[tuple[int, ...], Any]  # parameters that are multiples of 16
    options: dict[str, Any]


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("module", MODULES)
def test_common_variants(module: str, arch: int) -> None:
    check(module, arch, "--most=3")


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant(module: str, arch: int) -> None:
    check(module, arch)


def check(module: str, arch: int, *flags: str) -> None:
    pytest.importorskip("triton")
    # Within a process, the interpreter, which other tests use, replaces the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__, "--json", f"--arch={arch}", *flags, module]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    variants = [json.loads(line) for line in run.stdout.splitlines()]
    assert variants
    for variant in variants:
        assert variant["stack"] == 0 and variant["local"] == 0, f"registers spill: {variant}"
        assert variant["shared"] <= SHARED_MEMORY[arch], f"too much shared memory: {variant}"


def variant_of(kernel: Any, *args: Any, **kwargs: Any) -> Variant:
    """The variant that Triton would compile for a launch of a kernel with these arguments."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {k: given.pop(k) for k in kwargs if k not in kernel.arg_names}
    types: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and is_int(value) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = type_of(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if free and is_int(number) and number % 16 == 0:
            divisible[(parameter.num,)] = [["tt.divisibility", 16]]
    return Variant(kernel, types, constants, divisible, options)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def type_of(value: Any) -> Any:
    """The type that Triton gives to an argument."""
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if is_int(value):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def variants_of(module: str, most: int | None) -> list[Variant]:
    """What `ahead_of_time()` of a module launches; at most `most` variants of each kernel."""
    from triton import JITFunction

    recorded: dict[str, Variant] = {}

    def record(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        variant = variant_of(kernel, *args, **kwargs)
        recorded.setdefault(repr(variant), variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        importlib.import_module(module).ahead_of_time()
    seen: Counter[str] = Counter()
    chosen = []
    for variant in recorded.values():
        seen[variant.kernel.__name__] += 1
        if most is None or seen[variant.kernel.__name__] <= most:
            chosen.append(variant)
    return chosen


def compile_for(arch: int, variant: Variant) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=variant.kernel,
        signature=variant.types,
        constexprs=variant.constants,
        attrs=variant.divisible,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers, bytes of stack and of local memory a thread, and bytes of shared memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    assert usage.keys() == {"REG", "STACK", "LOCAL"}, run.stdout + run.stderr
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
    }


def main(arguments: list[str]) -> None:
    flags = dict(a.lstrip("-").partition("=")[::2] for a in arguments if a.startswith("--"))
    modules = [a for a in arguments if not a.startswith("--")] or MODULES
    most = int(flags["most"]) if "most" in flags else None
    for module in modules:
        for variant in variants_of(module, most):
            for arch in [int(flags["arch"])] if "arch" in flags else SHARED_MEMORY:
                types = {k: v for k, v in variant.types.items() if k.endswith("_ptr")}
                report = {
                    "kernel": variant.kernel.__name__,
                    "arch": arch,
                    **resources(compile_for(arch, variant)),
                    "types": " ".join(f"{k}={v}" for k, v in types.items() if v != "constexpr"),
                }
                print(
                    json.dumps(report) if "json" in flags else "\t".join(map(str, report.values()))
                )


if __name__ == "__main__":
    main(sys.argv[1:])
