"""Every Triton kernel compiles for sm_80, 89 and 90 without a GPU, without spills in a loop.

Each kernels/<op>/triton_kernels.py has a function `ahead_of_time()`. It calls the op on small CPU
tensors, once for every kind of argument that makes Triton compile another variant of a kernel (the
most common first): dtypes, absent tensors, strides that are 1 or a multiple of 16, block sizes. The
test names a GPU to Triton and stops each launch after the compilation.

`python tests/test_triton_aot.py [--arch=90] [module ...]` compiles every variant, in an hour, and
prints its registers and shared memory; the tests compile a sample of them.
The compiled kernels are in Triton's cache then, which a GPU of this architecture can use
(`make gpu-build`).
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"vidl.kernels.{file.parent.name}.triton_kernels"
    for file in (ROOT / "kernels").glob("*/triton_kernels.py")
)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes, the limit of a block


@pytest.mark.parametrize("module", MODULES)
def test_common_variants(module: str) -> None:
    check(module, 90, "--most=1")


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant(module: str, arch: int) -> None:
    """The first variant for every architecture, and a ninth of the others for each of them."""
    check(module, arch, "--divide")


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
        assert variant["local"] == 0, f"a variable in local memory: {variant}"
        # ptxas may keep one or two values in local memory while a loop runs, which costs nothing.
        assert variant["stack"] <= 8 and not variant["spills"], f"registers spill: {variant}"
        assert variant["shared"] <= SHARED_MEMORY[arch], f"too much shared memory: {variant}"


class AbsentGPU:
    """What Triton asks its driver for before a launch."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        arch: int = self.target.arch  # kernels remember the target of a device
        return arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(arch: int, module: str, most: int | None, divide: bool) -> Iterator[Any]:
    """What `ahead_of_time()` of a module launches.

    Args:
        most: compile at most so many variants of each kernel.
        divide: of the variants beyond the first, compile about a ninth: those that fall to `arch`.
    """
    from triton import JITFunction, knobs
    from triton.runtime import driver

    driver.set_active(AbsentGPU(arch))
    seen: Counter[str] = Counter()
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def stop(*, fn: Any, **kwargs: Any) -> bool:  # before a variant is compiled
        seen[fn.name] += 1
        count = seen[fn.name]
        if divide and count > 1:
            return arch != Random(f"{fn.name} {count}").choice([*SHARED_MEMORY, *[None] * 6])
        return most is not None and count > most

    def warm_up(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        variant = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if variant is not None:
            compiled.setdefault(variant.hash, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", warm_up)
        patch.setattr(knobs.runtime, "jit_cache_hook", stop)
        importlib.import_module(module).ahead_of_time()
    yield from compiled.values()


def resources(compiled: Any) -> dict[str, int]:
    """Registers, bytes of stack and of local memory a thread, and bytes of shared memory.

    "spills" counts the accesses of local memory within loops.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _cuobjdump("-res-usage", file.name)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
        assert usage.keys() == {"REG", "STACK", "LOCAL"}, listing
        spills = _spills_in_loops(_cuobjdump("-sass", file.name)) if usage["STACK"] != "0" else 0
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "spills": spills,
        "shared": compiled.metadata.shared,
    }


def _cuobjdump(flag: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


def _spills_in_loops(sass: str) -> int:
    """The loads and stores of local memory between the target of a branch back and the branch."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    assert code, sass
    loops = []
    spills = []
    for address, instruction, operands in code:
        at = int(address, 16)
        if instruction.startswith("BRA"):
            target = int(operands.split()[-1], 16)
            if target <= at:
                loops.append((target, at))
        elif instruction.startswith(("LDL", "STL")):
            spills.append(at)
    assert spills, "a stack without an access"
    return sum(any(start <= at <= end for start, end in loops) for at in spills)


def main(arguments: list[str]) -> None:
    flags = dict(a.lstrip("-").partition("=")[::2] for a in arguments if a.startswith("--"))
    modules = [a for a in arguments if not a.startswith("--")] or MODULES
    most = int(flags["most"]) if "most" in flags else None
    for module in modules:
        for arch in [int(flags["arch"])] if "arch" in flags else SHARED_MEMORY:
            for compiled in compile_for(arch, module, most, "divide" in flags):
                types = {k: v for k, v in compiled.src.signature.items() if k.endswith("_ptr")}
                report = {
                    "kernel": compiled.src.fn.__name__,
                    "arch": arch,
                    **resources(compiled),
                    "types": " ".join(f"{k}={v}" for k, v in types.items() if v != "constexpr"),
                }
                print(
                    json.dumps(report) if "json" in flags else "\t".join(map(str, report.values()))
                )


if __name__ == "__main__":
    main(sys.argv[1:])
