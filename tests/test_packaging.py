"""Building and installing vidl: one import package, which shadows no other package.

Packages are built offline by the hooks of setuptools, as pip calls them, and installed into
environments that also see the packages of the running environment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = (
    *("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md"),
    *("LICENSE", "CITATION.cff", "Makefile", "vidl", "kernels", "bench", "csrc"),
)
NO_COMPILER = {"CXX": "/nowhere/c++", "CUDACXX": "/nowhere/nvcc"}
CLEARED = ("CXX", "CUDACXX", "CUDA_HOME", "PYTHONPATH", "TRITON_INTERPRET", "VIDL_BUILD")
TOOLS = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
needs_compiler = pytest.mark.skipif(
    not shutil.which("cmake", path=TOOLS) or not (shutil.which("c++") or shutil.which("g++")),
    reason="needs cmake and a C++ compiler",
)

USE = """
import json, sys, torch
from vidl import ops
from vidl.kernels import library
import vidl
video = torch.arange(2 * 3 * 2 * 8 * 8, dtype=torch.uint8).view(2, 3, 2, 8, 8)
weight, ids = torch.ones(5, 3, 4, 4), torch.tensor([[0, 7], [3, 1]])
out = ops.masked_patch_embed(video, weight, ids_keep=ids)
assert out.shape == (2, 2, 5) and out.isfinite().all()
assert "kernels" not in sys.modules and "bench" not in sys.modules
print(json.dumps([vidl.__file__, library.__file__, library.build_record()]))
"""
NEIGHBOURS = """
from transformers import BertConfig, BertModel
from transformers.utils.import_utils import is_kernels_available
import timm, vidl.ops, sys
sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
BertModel(BertConfig(**sizes))
timm.create_model("vit_tiny_patch16_224", depth=1)
hub = sys.modules.get("kernels")
print(is_kernels_available(), getattr(hub, "__file__", None))
"""
# Stubs of the names that transformers imports from Hugging Face's package `kernels`.
HUB_KERNELS = """
def use_kernel_forward_from_hub(name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


def call(python, code, cwd, **variables):
    env = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return subprocess.run(
        [str(python), "-c", code], cwd=cwd, env=env | variables, capture_output=True, text=True
    )


def succeed_all(*args, **variables):
    done = call(*args, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def succeed(*args, **variables):
    return succeed_all(*args, **variables).splitlines()[-1]


def hook(name, tree, out, **variables):
    """Run a hook of setuptools on a source tree, as pip does."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{name}({str(out)!r}))"
    return call(sys.executable, code, tree, **variables)


def build(name, tree, out, **variables):
    done = hook(name, tree, out, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def copy_tree(target):
    """Copy the sources as in a fresh clone: links stay links, without build outputs."""
    target.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    for part in filter(lambda part: (ROOT / part).exists(), PARTS):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def environment(folder, *wheels):
    """A virtual environment with these wheels, which also sees the packages of this process."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(site)
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "zz_outer.pth").write_text("\n".join(outer) + "\n")
    return folder / "bin/python", site


def files_of(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("clone") / "vidl")


@pytest.fixture(scope="module")
def wheel(tree):
    return build("build_wheel", tree, tree.parent / "wheel", VIDL_BUILD="none")


@pytest.fixture(scope="module")
def sdist(tree):
    return build("build_sdist", tree, tree.parent / "sdist", VIDL_BUILD="none")


@pytest.fixture(scope="module")
def installed(tree, wheel):
    return tree, *environment(tree.parent / "installed", wheel)


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editable")
    built = build("build_editable", copy_tree(folder / "vidl"), folder / "wheel", VIDL_BUILD="none")
    return folder / "vidl", *environment(folder / "environment", built)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    return copy_tree(folder / "vidl"), *environment(folder / "environment")


def test_wheel_holds_vidl_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    entries = zipfile.ZipFile(wheel).infolist()
    tops = {entry.filename.split("/")[0] for entry in entries}
    assert tops == {"vidl", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [entry.filename for entry in entries if entry.external_attr >> 28 == 0o12]  # links
    files = files_of(wheel)
    assert {"vidl/py.typed", "vidl/_build.json", "vidl/kernels/library.py"} <= files
    assert "vidl/kernels/masked_patch_embed/op.py" in files
    data = ("py.typed", "_build.json", "kernels/shipped.json", "models/flops.json")
    assert not [file for file in files if not file.endswith((".py", *data))]
    assert {"vidl/kernels/shipped.json", "vidl/models/flops.json"} <= set(files)
    modules = {file for file in files if file.endswith(".py")}
    sources = (
        file.relative_to(ROOT).as_posix()
        for top in ("vidl", "kernels", "bench")
        for file in (ROOT / top).rglob("*.py")
    )
    assert modules == {s if s.startswith("vidl/") else f"vidl/{s}" for s in sources}


def files_under(folder):
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    tops = {path.name for path in source.iterdir()}
    assert {"vidl", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= tops
    assert not tops & {"kernels", "bench", "tests", "build", "docs"}
    sources = files_under(source / "csrc")
    assert sources == files_under(ROOT / "csrc")
    again = build("build_wheel", source, tmp_path / "wheel", VIDL_BUILD="none")
    assert files_of(again) == files_of(wheel)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
@pytest.mark.parametrize("how", ["installed", "editable", "bare"])
def test_it_works(how, where, tmp_path, request):
    if (how, where) == ("bare", "elsewhere"):
        pytest.skip("neither installed nor in the working directory")
    tree, python, site = request.getfixturevalue(how)
    out = succeed(python, USE, tree if where == "root" else tmp_path)
    package, library, record = json.loads(out)
    home = site if (how, where) == ("installed", "elsewhere") else tree
    assert Path(package).is_relative_to(home) and Path(library).is_relative_to(home)
    assert record["file"] is None
    if how == "bare":
        assert "never installed" in record["error"]
    else:
        assert record["reason"] == "VIDL_BUILD=none"  # of the installation, also in the root


@pytest.mark.parametrize("hub", [False, True], ids=["alone", "with Hugging Face kernels"])
def test_timm_and_transformers_work_in_the_root(hub, bare, tmp_path):
    transformers = find_spec("transformers")
    if transformers is None or find_spec("timm") is None:
        pytest.skip("needs timm and transformers")
    (tree, python, _), variables = bare, {}
    if hub:
        checks = Path(transformers.origin).with_name("utils") / "import_utils.py"
        wanted = re.search(r'^KERNELS_MIN_VERSION = "(.+)"', checks.read_text(), re.MULTILINE)
        version = wanted[1] if wanted else "0.18.2"
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text(HUB_KERNELS)
        notes = tmp_path / f"kernels-{version}.dist-info/METADATA"
        notes.parent.mkdir()
        notes.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        variables = {"PYTHONPATH": str(tmp_path)}  # after the root, as with `python -c`
    available, file = succeed(python, NEIGHBOURS, tree, **variables).split(" ", 1)
    if hub:
        assert available == "True" and file == str(tmp_path / "kernels/__init__.py")
    elif find_spec("kernels") is None or find_spec("kernels").origin is None:
        assert available == "False" and file == "None"


def test_versions_agree():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "vidl/__init__.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    first, *released = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in released)
    assert not released or released[0].split(" - ")[0] == version


def test_make_installs_every_extra_but_peers_and_ray():
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = extras.split("\n[project")[0]
    names = re.findall(r"^([a-z]+) = \[", extras, re.MULTILINE)
    everything = re.search(r'^all = \[\s*"vidl-kernels\[(.+)\]"', extras, re.MULTILINE)[1].split(
        ","
    )
    make = re.search(r"foreach extra,([a-z ]+),", (ROOT / "Makefile").read_text())[1].split()
    assert {*everything, "data", *make} == {*names} - {"peers", "ray"}  # data is part of train


def test_an_unknown_build_fails(tree, tmp_path):
    done = hook("build_wheel", tree, tmp_path, VIDL_BUILD="bogus")
    assert done.returncode != 0
    assert "one of auto, cuda, cpu, none, got 'bogus'" in done.stderr


def test_a_missing_link_is_an_error(tmp_path):
    tree = copy_tree(tmp_path / "vidl")  # as left by an archive tool without support of links
    (tree / "vidl/kernels").unlink()
    (tree / "vidl/kernels").write_text("../kernels")
    done = hook("build_wheel", tree, tmp_path / "out", VIDL_BUILD="none")
    assert done.returncode != 0
    assert "ln -sfn ../kernels vidl/kernels" in done.stderr


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_requested_build_that_fails_is_an_error(kind, tree, tmp_path):
    done = hook("build_wheel", tree, tmp_path, VIDL_BUILD=kind, **NO_COMPILER)
    assert done.returncode != 0
    assert f"VIDL_BUILD={kind} failed:" in done.stderr
    assert "no C++ compiler" in done.stderr or "cmake" in done.stderr


def test_auto_without_a_compiler_installs_and_says_why(tree, tmp_path):
    wheel = build("build_wheel", tree, tmp_path, VIDL_BUILD="auto", **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    record = json.loads(zipfile.ZipFile(wheel).read("vidl/_build.json"))
    assert record["cpu"] is False and record["cuda"] is False
    assert "no cpu kernels: " in record["reason"] and "no cuda kernels: " in record["reason"]
    python, _ = environment(tmp_path / "environment", wheel)
    twice = call(python, USE + USE, tmp_path).stderr
    assert twice.count("vidl: using torch on the CPU, no cuda kernels: ") == 1


def test_no_kernels_as_requested_say_nothing(installed, tmp_path):
    _, python, _ = installed
    assert "vidl: " not in call(python, USE, tmp_path).stderr


@needs_compiler
def test_a_compiler_that_fails(tmp_path):
    tree = copy_tree(tmp_path / "vidl")
    done = hook("build_wheel", tree, tmp_path / "out", VIDL_BUILD="cpu", CXX=shutil.which("false"))
    assert done.returncode != 0
    assert "VIDL_BUILD=cpu failed: CMake Error" in done.stderr


@needs_compiler
def test_the_library_is_built_rebuilt_and_removed(tmp_path):
    """With a small library in place of the real one, to save time."""
    tree = copy_tree(tmp_path / "vidl")
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    source, library = tree / "csrc/answer.cpp", tree / "vidl/_C.so"
    source.write_text('extern __attribute__((visibility("default"))) const char answer[] = "old";')
    no_cuda = {"CUDACXX": NO_COMPILER["CUDACXX"]}

    wheel = build("build_wheel", tree, tmp_path / "wheel", VIDL_BUILD="auto", **no_cuda)
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    assert {"vidl/_C.so", "vidl/_build.json"} <= files_of(wheel)
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*"]
    subprocess.run([*repair, "-w", tmp_path, wheel], check=True, env=os.environ | {"PATH": TOOLS})
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-manylinux[\w.]+\.whl$", repaired.name)
    assert {n for n in files_of(repaired) if not n.endswith("/")} == files_of(wheel)
    record = json.loads(zipfile.ZipFile(wheel).read("vidl/_build.json"))
    assert record["cpu"] is True and record["cuda"] is False
    assert record["stable_abi"] == "2.10" and record["torch"] and record["compiler"]
    assert record["reason"].startswith("no cuda kernels: nvcc was not found")
    python, _ = environment(tmp_path / "environment", wheel)
    load = "import ctypes, torch, vidl; library = ctypes.CDLL(vidl.__path__[0] + '/_C.so')"
    succeed(python, f"{load}; print(library.answer)", tmp_path)

    def edit(kind):
        return hook("build_editable", tree, tmp_path / "editable", VIDL_BUILD=kind)

    assert edit("cpu").returncode == 0 and b"old" in library.read_bytes()
    source.write_text(source.read_text().replace("old", "new answer"))
    assert edit("cpu").returncode == 0 and b"new answer" in library.read_bytes()

    source.write_text("void warned() { int unused; }")  # a warning is an error
    failed = edit("cpu")
    assert failed.returncode != 0 and "unused variable" in failed.stderr
    assert not library.exists(), "a library of older sources is left"

    assert edit("none").returncode == 0
    record = json.loads(library.with_name("_build.json").read_text())
    assert record == {"cpu": False, "cuda": False, "reason": "VIDL_BUILD=none"}
    again = build("build_wheel", tree, tmp_path / "wheel", VIDL_BUILD="none")
    assert "vidl/_C.so" not in files_of(again), "left over from an earlier build"


@pytest.mark.slow
@needs_compiler
def test_a_fresh_machine(tree, sdist, tmp_path):
    """The sdist builds the library; its wheel and README's first program need no compiler."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    wheel = build("build_wheel", source, tmp_path / "wheel", VIDL_BUILD="cpu")
    python, site = environment(tmp_path / "environment", wheel)
    alone = {"PATH": str(python.parent), **NO_COMPILER}
    info = "import sys; sys.argv = ['vidl', 'info', '--json']; from vidl.cli import main; main()"
    record = json.loads(succeed_all(python, info, tmp_path, **alone))["build"]
    assert record["cpu"] is True and record["file"] == str(site / "vidl/_C.so")
    program = re.search(r"^```python\n(.+?)^```", (tree / "README.md").read_text(), re.M | re.S)[1]
    shown = succeed_all(python, program + "print(model(clips, bool_masked_pos=ids_keep).loss)",
                        tmp_path, **alone)  # fmt: skip
    assert "VideoMAE" in shown and "tensor(" in shown
