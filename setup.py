"""Build `vidl/_C.so` with CMake; the compiler flags are in CMakeLists.txt.

VIDL_BUILD=auto  CUDA and CPU kernels, or CPU kernels, or none, as the machine allows (default)
           cuda  CPU and CUDA kernels; the installation fails if they cannot be built
           cpu   CPU kernels; the installation fails if they cannot be built
           none  no compiled kernels: pure Python, and Triton if it is installed

`vidl/_build.json` records what was built, or why nothing was; `vidl info` shows it.
GPU architectures: CMAKE_CUDA_ARCHITECTURES or CUDAARCHS. Compilers: CXX, CUDACXX or CUDA_HOME.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
TRIES = {"auto": ("cuda", "cpu"), "cuda": ("cuda",), "cpu": ("cpu",), "none": ()}
WANTED = os.environ.get("VIDL_BUILD") or "auto"

if WANTED not in TRIES:
    sys.exit(f"vidl: need VIDL_BUILD to be one of {', '.join(TRIES)}, got {WANTED!r}")
for name in ("kernels", "bench"):
    if not (ROOT / "vidl" / name).is_dir():
        sys.exit(f"vidl/{name} must be a link to ../{name}; run: ln -sfn ../{name} vidl/{name}")


def find_torch() -> Path | None:
    """Folder of the installed torch, found by path: pip's isolated build cannot import it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    folders += [Path(sysconfig.get_path(scheme), "torch") for scheme in ("platlib", "purelib")]
    header = "include/torch/csrc/stable/library.h"
    return next((folder for folder in folders if (folder / header).is_file()), None)


def find_tool(name: str) -> str | None:
    """A program on PATH, or beside Python, if the virtual environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def find_compiler() -> str | None:
    compiler = shlex.split(os.environ.get("CXX", ""))
    return next(filter(None, map(shutil.which, compiler[:1] or ["c++", "g++", "clang++"])), None)


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def why_not(kind: str) -> str | None:
    """The reason why this machine cannot build `kind`; None: a build may succeed."""
    if sys.platform != "linux":
        return f"only Linux is supported, not {sys.platform}"
    if find_torch() is None:
        return "no torch >= 2.11 was found; install it first (uv: with --no-build-isolation)"
    if find_tool("cmake") is None or not (find_tool("ninja") or find_tool("make")):
        return "cmake and ninja were not found; install both with pip or with the system's packages"
    if find_compiler() is None:
        return f"no C++ compiler was found (CXX={os.environ.get('CXX', '')})"
    if kind == "cuda" and find_nvcc() is None:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    return None


def run(*command: object) -> str | None:
    """Run a command and show its output; returns None, or the line with the error."""
    # pip sets PYTHONPATH, which hides site-packages and thus a cmake installed by pip.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if nvcc := find_nvcc():
        env["CUDACXX"] = nvcc
    process = subprocess.Popen(
        [str(part) for part in command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait() == 0:
        return None
    mark = re.compile(r"CMake Error|\berror( #[\w-]+)?:", re.IGNORECASE)
    i = next((i for i, line in enumerate(lines) if mark.search(line)), -1)
    if i == -1:
        return f"exit status {process.returncode}: {lines[-1] if lines else ''}"
    return " ".join(lines[i : i + 2]) if lines[i].startswith("CMake Error") else lines[i]


def build(kind: str, temporary: Path, target: Path) -> str | None:
    """Build the library into `target`; returns None, or the reason why it failed."""
    folder = ROOT / "build" / f"cmake-{kind}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # the sources are read-only
        folder = temporary.resolve() / f"cmake-{kind}"
        folder.mkdir(parents=True, exist_ok=True)

    ninja = find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options = [*generator, f"-DVIDL_TORCH_DIR={find_torch()}"]
    options.append(f"-DVIDL_CUDA={'ON' if kind == 'cuda' else 'OFF'}")
    if os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['CMAKE_CUDA_ARCHITECTURES']}")

    # CMake cannot change compiler, generator or source folder: start over if one differs.
    names = ("CXX", "CXXFLAGS", "CUDAARCHS", "CUDAFLAGS", "LDFLAGS")
    settings = [str(ROOT), find_nvcc(), options, [os.environ.get(name) for name in names]]
    stamp = folder / "settings.json"
    if not stamp.is_file() or stamp.read_text() != json.dumps(settings):
        shutil.rmtree(folder)
        folder.mkdir()
        stamp.write_text(json.dumps(settings))

    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
    cmake = find_tool("cmake")
    return (
        run(cmake, "-S", ROOT, "-B", folder, *options)
        or run(cmake, "--build", folder, "--parallel", jobs)
        or run(cmake, "--install", folder, "--prefix", target)
    )


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:  # otherwise a wheel contains modules that were removed since
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    kind = "none"  # what was built

    def run(self):
        target = ROOT / "vidl" if self.inplace else Path(self.build_lib, "vidl").resolve()
        target.mkdir(parents=True, exist_ok=True)
        for file in ("_C.so", "_build.json"):
            (target / file).unlink(missing_ok=True)

        reasons = []
        for kind in TRIES[WANTED]:
            reason = why_not(kind) or build(kind, Path(self.build_temp), target)
            if reason is None:
                self.kind = kind
                break
            reasons.append(f"no {kind} kernels: {reason}")
            print(f"vidl: {reasons[-1]}", file=sys.stderr, flush=True)
        if WANTED in ("cpu", "cuda") and self.kind == "none":
            raise CompileError(f"vidl: VIDL_BUILD={WANTED} failed: {reason}")

        notes = target / "_build.json"
        record = json.loads(notes.read_text()) if notes.is_file() else {"cpu": False, "cuda": False}
        record["reason"] = "; ".join(reasons) or ("VIDL_BUILD=none" if WANTED == "none" else None)
        notes.write_text(json.dumps(record, indent=2) + "\n")
        print(f"vidl: built {self.kind} ({record['reason'] or 'all'})", file=sys.stderr)

    def get_outputs(self):
        return []  # the files are already in place

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):
        # The library does not use the Python ABI: one wheel serves all Python versions.
        self.root_is_pure = self.get_finalized_command("build_ext").kind == "none"
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(
    packages=find_namespace_packages(
        include=["vidl*"], exclude=["*.__pycache__", "vidl.bench.results*"]
    ),
    package_data={"vidl": ["py.typed", "kernels/shipped.json", "models/flops.json"]},
    include_package_data=False,
    ext_modules=[Extension("vidl._C", [])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
