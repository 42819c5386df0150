"""Pack the ops as a kernel of the Hugging Face Hub, which needs no installation of vidl.

    python hub/pack.py cpu build/hub    # or cuda, or none: Triton and PyTorch only

The folder is a repository in the format of Hugging Face's package `kernels`: each call adds the
variant that it built. `kernels.get_local_kernel(Path("build/hub"))` loads the one that fits.
"""

import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"^(\s*)from vidl\b([\w.]*) import ", re.MULTILINE)


def sources() -> dict[str, str]:
    """The Python files of the kernel by their path in it, with relative imports."""
    files = {"__init__.py": ROOT / "vidl/ops.py", "files.py": ROOT / "vidl/files.py"}
    for file in sorted(ROOT.glob("kernels/**/*.py")):
        files[file.relative_to(ROOT).as_posix()] = file
    return {path: relative(path, file.read_text()) for path, file in files.items()}


def relative(path: str, text: str) -> str:
    """Import from the top of the kernel, whose name is not known, instead of from `vidl`."""
    dots = "." * (path.count("/") + 1)

    def top(match: re.Match[str]) -> str:
        return f"{match[1]}from {dots}{match[2].removeprefix('.')} import "

    return IMPORT.sub(top, text)


def build(kind: str, name: str, folder: Path) -> dict[str, object]:
    """Build the library for the ops `torch.ops.<name>` into a folder; returns its record."""
    record: dict[str, object] = {"cpu": False, "cuda": False, "reason": "VIDL_BUILD=none"}
    if kind == "none":
        (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        return record
    out = ROOT / f"build/cmake-hub-{kind}"
    options = [f"-DVIDL_CUDA={'ON' if kind == 'cuda' else 'OFF'}", "-G", "Ninja"]
    options += [f"-DPython3_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_CXX_FLAGS=-DTORCH_EXTENSION_NAME={name}"]
    run("cmake", "-S", ROOT, "-B", out, *options)
    run("cmake", "--build", out)
    run("cmake", "--install", out, "--prefix", folder)
    return json.loads((folder / "_build.json").read_text())


def run(*command: object) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True)
    except FileNotFoundError:
        sys.exit(f"hub/pack.py: need {command[0]}; install cmake and ninja, or pack 'none'")
    except subprocess.CalledProcessError as error:
        sys.exit(f"hub/pack.py: {command[0]} failed with exit status {error.returncode}")


def digest(folder: Path) -> dict[str, object]:
    """The checksums of the files of a variant, in the format of its metadata."""
    files = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        checksum = hashlib.sha256(file.read_bytes()).digest()
        files[file.relative_to(folder).as_posix()] = base64.b64encode(checksum).decode()
    return {"algorithm": "sha256", "files": files}


def architectures(record: dict[str, object]) -> list[str]:
    """ "80-real;90" of CMake as ["8.0", "9.0+PTX"]."""
    parts = str(record["cuda_architectures"]).split(";")
    numbers = [re.sub(r"(\d)(a?)(-.*)?$", r".\1\2", part) for part in parts]
    return [n if p.endswith("-real") else f"{n}+PTX" for n, p in zip(numbers, parts, strict=True)]


def pack(kind: str, backend: str, repository: Path) -> Path:
    """Add a variant to a repository; returns its folder."""
    # tomllib is of Python 3.11.
    text = (ROOT / "hub/build.toml").read_text()
    settings = dict(re.findall(r'^(\w+) = "?([\w.-]+)"?$', text, re.MULTILINE))
    texts = sources()
    # Several versions may be loaded in one process: each needs a namespace of its own.
    content = hashlib.sha256(json.dumps([kind, backend, texts]).encode())
    for file in sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file()):
        content.update(file.read_bytes())
    name = f"_{settings['name']}_{backend}_{content.hexdigest()[:10]}"

    unfinished = repository / "build/unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for path, text in texts.items():
        (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / path).write_text(text)
    shutil.copy(ROOT / "kernels/shipped.json", unfinished / "kernels")
    record = build(kind, name, unfinished)

    about: dict[str, object] = {"type": backend}
    variant = f"torch-{backend}"
    if kind != "none":
        abi = settings[backend].replace(".", "")
        system = backend
        if kind == "cuda":
            about["archs"] = architectures(record)
            major, minor = re.findall(r"\d+", str(record["cuda_compiler"]))[:2]
            system = f"cu{major}{minor}"
        variant = f"torch-stable-abi{abi}-{system}-{platform.machine()}-linux"
    metadata: dict[str, object] = {key: settings[key] for key in ("name", "license")}
    metadata |= {"id": name, "version": int(settings["version"]), "python-depends": []}
    metadata |= {"backend": about, "digest": digest(unfinished)}
    (unfinished / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")

    folder = repository / "build" / variant
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for file in ("hub/build.toml", "hub/README.md", "LICENSE"):
        shutil.copy(ROOT / file, repository)
    return folder


def main() -> None:
    kinds = {"cpu": ["cpu"], "cuda": ["cuda"], "none": ["cpu", "cuda"]}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        sys.exit(f"need {' or '.join(kinds)} and a folder, got {sys.argv[1:]}\n\n{__doc__}")
    for backend in kinds[sys.argv[1]]:
        print(f"wrote {pack(sys.argv[1], backend, Path(sys.argv[2]))}")


if __name__ == "__main__":
    main()
