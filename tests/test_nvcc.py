"""Every CUDA source compiles with nvcc without a warning, and its kernels fit into registers.

`python tests/occupancy.py` prints registers, shared memory and occupancy of every kernel.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from vidl.kernels import library

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/*/cuda.cu"))
# What CMakeLists.txt defines for an architecture.
MACROS = {"sm_90a": ["-DVIDL_SM_90A"]}


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int  # bytes a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes a block, static


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(home / "bin/nvcc")


def kernels(source: Path, architecture: str, *macros: str) -> list[Kernel]:
    """Resources of every kernel of a source file, as ptxas reports them."""
    compiler = nvcc()
    assert compiler is not None
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    flags += ["-Xcompiler=-Wall,-Wextra", f"-I{ROOT / 'csrc'}", "-cubin"]
    flags += [*MACROS.get(architecture, []), *macros]
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags, str(source), "-o", f"{folder}/out.cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # C7510 and others: wgmma one after the other, for reasons that ptxas calls information.
    assert "(C75" not in run.stderr, run.stderr
    compiled = []
    for part in run.stderr.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]
        stack, stores, loads = map(
            int,
            re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3],
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None, part
        compiled.append(
            Kernel(
                demangled(symbol),
                int(registers[1]),
                stack,
                stores + loads,
                int(shared[1]) if shared else 0,
            )
        )
    return compiled


def version() -> str:
    """The version line that nvcc prints."""
    run = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-2]


def demangled(symbol: str) -> str:
    """The name of a kernel with its template arguments, without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return symbol
    name = subprocess.run([tool, symbol], capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("vidl::", "")
    return re.sub(r"\(.*", "", name.removeprefix("void "))


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.parent.name)
def test_kernels_compile_and_do_not_spill(source, architecture):
    if source.parent.name in ("space_time_attention", "token_scores"):
        pytest.skip("takes minutes: test_no_kernel_of_the_library_spills")
    compiled = kernels(source, architecture)
    assert compiled
    spilling = [kernel for kernel in compiled if kernel.stack or kernel.spills]
    assert not spilling


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
def test_wgmma_is_not_serialised(tmp_path):
    file = tmp_path / "hopper.cu"
    file.write_text(
        '#include "space_time_attention/hopper.h"\n'
        "template __global__ void vidl::hopper_backward_kernel<bf16>(\n"
        "    vidl::SpaceTimeAttention, vidl::Backward, unsigned);\n"
    )
    (kernel,) = kernels(file, "sm_90a")
    assert kernel.stack == kernel.spills == 0


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
def test_serialised_wgmma_is_detected(tmp_path):
    file = tmp_path / "serialised.cu"
    file.write_text(
        '#include "cuda/wgmma.h"\n'
        "__global__ void kernel(float* x, uint64_t a, bool more) {\n"
        "  float d[16] = {};\n"
        "  wgmma_fence(d);\n"
        "  wgmma<bf16, Major::kK, Major::kK>(d, a, a, false);\n"
        "  wgmma_commit();\n"
        "  x[0] = d[0];\n"
        "  wgmma_wait<0>(d);\n"
        "  x[threadIdx.x] = d[1];\n"
        "}\n"
    )
    with pytest.raises(AssertionError, match=r"\(C75"):
        kernels(file, "sm_90a")


@pytest.mark.slow
def test_no_kernel_of_the_library_spills():
    """For every architecture that the library was built for: CI builds it for sm_80 and sm_90a."""
    record = library.build_record()
    if not record.get("cuda"):
        pytest.skip("vidl was built without CUDA kernels: make test-slow VIDL_BUILD=cuda")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run(
        [tool, "-res-usage", record["file"]], capture_output=True, text=True, check=True
    ).stdout
    used = re.findall(r"Function (\S+):\n.*?STACK:(\d+)", listing)
    assert used
    spilling = {demangled(symbol) for symbol, stack in used if stack != "0"}
    assert not spilling


def test_every_kernel_is_in_the_table():
    sources = [*SOURCES, *ROOT.glob("csrc/**/*.h")]
    kernels = {name for file in sources for name in re.findall(r"(\w+_kernel)\(", file.read_text())}
    table = (ROOT / "docs/contributors/occupancy.md").read_text()
    missing = {name for name in kernels if f"`{name}" not in table}
    assert not missing, "run: python tests/occupancy.py > docs/contributors/occupancy.md"
