"""The CUDA sources of csrc/ compiled with g++, for the emulator of tests/cuda_on_cpu/."""

import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vidl.kernels import library

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests/cuda_on_cpu"
BUILD = ROOT / "build/emulated"
CXX = os.environ.get("CXX", "g++")

FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread", "-fPIC"]
FLAGS += ["-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}"]
ONE_HEAD_SIZE = "-DVIDL_HEAD_SIZES=64"  # that of the profiles
KINDS = {
    "library": ["-O1"],  # compiled faster than with -O2
    "plain": ["-O2"],
    "ucontext": ["-O2", "-DCUDA_ON_CPU_UCONTEXT"],
    "quick": ["-O0"],
    "address": ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "trace": ["-O1", "-g"],
}
# The kernels of a trace build; trace.cpp takes the place of ThreadSanitizer's library.
TRACED = ["-fsanitize=thread", "-DCUDA_ON_CPU_TRACE"]


@functools.cache
def load() -> None:
    """Register the CUDA code of every op for CPU tensors as the backend "emulated"."""
    file = build()
    library.add_backend("emulated")
    torch.ops.load_library(file)


def build() -> Path:
    """The operator library: every cuda.cu, emulated, and the host code of its op."""
    torch_dir = Path(torch.__file__).parent
    host = [f"-isystem{torch_dir / 'include'}", f"-DVIDL_EMULATED={torch.__version__}"]
    host += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    kernels = sorted(ROOT.glob("csrc/*/cuda.cu"))
    sources = [(file.with_name("op.cpp"), host) for file in kernels]
    sources += [(file, ["-DVIDL_SPLIT"]) for file in kernels]
    sources += [(unit, []) for unit in _units_of_attention()]
    link = ["-shared", f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    return _link("library.so", sources, KINDS["library"], link)


def _units_of_attention() -> Iterator[Path]:
    """A source for every dtype, head size and kind, as in CMakeLists.txt, for parallel builds."""
    folder = ROOT / "csrc/space_time_attention"
    sizes = re.search(r"^#define VIDL_HEAD_SIZES (.+)$", (folder / "cuda.cu").read_text(), re.M)
    most = re.search(r"kMostBiased = (\d+)", (folder / "interface.h").read_text())
    assert sizes and most
    kinds = ("Plain", "Limited", "Biased")
    for D, kind, T in itertools.product(map(int, sizes[1].split(",")), kinds, ("bf16", "fp16")):
        if kind == "Biased" and int(most[1]) < D:
            continue
        yield unit_of_attention(T, D, kind)


def unit_of_attention(T: str, D: int, kind: str) -> Path:
    """A source with the kernels of attention for one dtype, head size and kind."""
    BUILD.mkdir(parents=True, exist_ok=True)
    options = f"<{T}, {D}, vidl::{kind}>(const vidl::SpaceTimeAttention&"
    file = BUILD / f"attention-{T}-{D}-{kind}.cu"
    unfinished = file.with_name(f"{os.getpid()}-{file.name}")
    unfinished.write_text(
        '#include "space_time_attention/launch.h"\n'
        f"template int vidl::forward{options}, const vidl::Forward&, void*);\n"
        f"template int vidl::backward{options}, const vidl::Backward&, void*);\n"
    )
    unfinished.replace(file)
    return file


def program(
    name: str, kind: str = "plain", bug: tuple[str, str] | None = None, head_size: int = 32
) -> Path:
    """The program of cuda_on_cpu/test_<name>.cpp, with the kernels of the op `name`, if any.

    Args:
        kind: a key of `KINDS`: an ordinary build, or one with sanitizers.
        bug: a part of the source of the kernels, which occurs once, and its replacement.
        head_size: the only one of the kernels, which compile in a fraction of the time then.
    """
    extra = TRACED if kind == "trace" else []
    extra = [*extra, f"-DVIDL_HEAD_SIZES={head_size}"]
    sources = [(EMULATOR / f"test_{name}.cpp", extra)]
    if (kernels := ROOT / f"csrc/{name}/cuda.cu").is_file():
        sources.append((_planted(kernels, *bug) if bug else kernels, extra))
    if kind == "trace":
        sources.append((EMULATOR / "trace.cpp", []))
    return _link(f"{name}-{head_size}-{kind}", sources, KINDS[kind], [])


def profiler(op: str, kind: str = "Plain") -> Path:
    """The program of cuda_on_cpu/profile_<op>.cpp, which counts what the kernels of an op ask for.

    Args:
        kind: of attention: Plain or Biased.
    """
    name = f"profile_{op}"
    watched = ["-fsanitize=thread", "-DCUDA_ON_CPU_PROFILE", "-Wno-unused-parameter"]
    kernels = [ROOT / f"csrc/{op}/cuda.cu"]
    if op == "space_time_attention":
        kernels = [unit_of_attention("bf16", 64, kind)]
        watched += ["-DVIDL_PROFILE_BIASED"] if kind == "Biased" else []
        name += f"-{kind}"
    if op == "token_scores":
        watched += [ONE_HEAD_SIZE]
    # Not optimised, so that an access of the source is one access. Without -fsanitize=thread for
    # the linker: profile.cpp takes the place of its library.
    sources: list[tuple[Path, list[str]]] = [(EMULATOR / "profile.cpp", ["-O2"])]
    sources += [
        (file, watched) for file in (EMULATOR / f"profile_{op}.cpp", *kernels) if file.is_file()
    ]
    return _link(name, sources, ["-O0", "-g"], ["-pie", "-ldl"])


def _planted(kernels: Path, right: str, wrong: str) -> Path:
    """A copy of the kernels of an op with inlined headers and a planted bug."""
    text = _inlined(kernels, set())
    assert text.count(right) == 1, f"{text.count(right)} times: {right}"
    text = text.replace(right, wrong)
    BUILD.mkdir(parents=True, exist_ok=True)
    copy = BUILD / f"{kernels.parent.name}-{_hash([], [text.encode()])}.cu"
    copy.write_text(text)
    return copy


def _inlined(source: Path, seen: set[Path]) -> str:
    """A source with every header of csrc/ inlined once."""

    def text(include: re.Match[str]) -> str:
        header = ROOT / "csrc" / include[1]
        if not header.is_file():
            return include[0]
        if header in seen:
            return ""
        seen.add(header)
        return _inlined(header, seen).replace("#pragma once\n", "")

    return re.sub(r'^#include "(.+)"$', text, source.read_text(), flags=re.MULTILINE)


def _link(
    name: str, sources: Sequence[tuple[Path, list[str]]], kind: list[str], link: list[str]
) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler, but {CXX} is not installed")
    with _locked(name):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(s[0], [*kind, *s[1]]), sources))
        key = _hash([*kind, *link], [file.name.encode() for file in objects])
        stem, dot, suffix = name.partition(".")
        file = BUILD / f"{stem}-{key}{dot}{suffix}"
        _make(file, [*FLAGS, *kind, *map(str, objects), *link])
    return file


def _compile(source: Path, flags: list[str]) -> Path:
    contents = [file.read_bytes() for file in sorted(with_headers(source))]
    key = _hash([str(source), *flags], contents)
    file = BUILD / f"{source.stem}-{key}.o"
    _make(file, [*FLAGS, *flags, "-x", "c++", "-c", str(source)])
    return file


def with_headers(file: Path) -> set[Path]:
    """A source and our headers that it includes, directly or indirectly."""
    files, todo = set(), [file]
    while todo:
        files.add(file := todo.pop())
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            headers = (folder / name for folder in (ROOT / "csrc", EMULATOR))
            todo += [header for header in headers if header.is_file() and header not in files]
    return files


def _hash(words: Sequence[str], contents: Sequence[bytes]) -> str:
    key = hashlib.sha256(repr([_compiler(), FLAGS, words]).encode())
    for content in contents:
        key.update(hashlib.sha256(content).digest())
    return key.hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def _make(file: Path, arguments: list[str]) -> None:
    """Compile `file` unless it exists. It appears atomically."""
    if file.exists():
        return
    unfinished = file.with_name(f"{os.getpid()}-{file.name}")
    run = subprocess.run([CXX, *arguments, "-o", unfinished], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join([CXX, *arguments])}\n{run.stderr[-8000:]}")
    unfinished.replace(file)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Let one process at a time build a file: all workers of pytest-xdist need it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
