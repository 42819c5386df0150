"""The ops as a kernel of the Hugging Face Hub, loaded from a folder by Hugging Face's `kernels`.

The kernel is loaded in another process, where `import vidl` fails. This file must not import that
package by its name, which in the root is also the name of our folder.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from vidl import ops

ROOT = Path(__file__).parents[1]
package = find_spec("kernels")
pytestmark = pytest.mark.skipif(
    package is None or package.origin is None, reason="needs Hugging Face's package kernels"
)

LOAD = """
import sys
from pathlib import Path
import torch
if sys.argv[3] == "alone":
    sys.modules["vidl"] = None  # `import vidl` is an error
else:
    import vidl.ops
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
CHECK = """
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
Build.open(sys.argv[1])
folder = Path(kernel.__file__).parent
metadata = Metadata.read_from_file(folder / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
assert kernel.__name__ == metadata.id and metadata.name.python_name == "vidl"
"""
RUN = """
inputs = torch.load(sys.argv[2])
def run(ops, backend):
    weight = inputs["weight"].clone().requires_grad_()
    tokens = ops.masked_patch_embed(
        inputs["video"], weight, ids_keep=inputs["ids"], backend=backend
    )
    x = tokens.reshape(4, 2, 32)  # [N, H, D]
    out = ops.space_time_attention(x, x, x, ops.Groups.equal(2, 2), backend=backend)
    out.square().sum().backward()
    return out.detach(), weight.grad
"""
RESULTS = """
ops = getattr(torch.ops, kernel.__name__)
assert hasattr(ops, "masked_patch_embed") and hasattr(ops, "masked_patch_embed_triton")
results = {backend: run(kernel, backend) for backend in sys.argv[4].split(",")}
torch.save(results, "results.pt")
if sys.argv[3] == "beside vidl":
    assert kernel.Groups is not vidl.ops.Groups
    for mine, theirs in zip(run(vidl.ops, "torch"), results["torch"], strict=True):
        torch.testing.assert_close(mine, theirs)
print(Path(kernel.__file__).parent.name)
"""


def pack(kind, repository):
    tools = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    done = subprocess.run(
        [sys.executable, ROOT / "hub/pack.py", kind, repository],
        env=os.environ | {"PATH": tools}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return pack("none", tmp_path_factory.mktemp("hub"))


def variants(repository):
    return {folder.name: folder for folder in (repository / "build").iterdir()}


def load_and_run(repository, company, backends, tmp_path):
    """The name of the variant that was loaded, after a comparison with vidl in this process."""
    torch.manual_seed(0)
    inputs = {
        "video": torch.randint(256, (2, 3, 2, 8, 8), dtype=torch.uint8),
        "weight": torch.randn(64, 3, 4, 4) / 48**0.5,
        "ids": torch.tensor([[0, 7], [3, 1]]),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if company == "beside vidl":
        env["PYTHONPATH"] = str(ROOT)
    arguments = [repository, tmp_path / "inputs.pt", company, ",".join(backends)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD + CHECK + RUN + RESULTS, *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = torch.load(tmp_path / "results.pt")
    scope = {"torch": torch, "inputs": inputs}
    exec(RUN.replace("inputs = torch.load(sys.argv[2])", ""), scope)
    expected = scope["run"](ops, "reference")
    assert set(results) == set(backends)
    for backend in backends:
        for mine, theirs in zip(expected, results[backend], strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-5)
    return done.stdout.split()[-1]


@pytest.mark.parametrize("company", ["alone", "beside vidl"])
def test_the_kernel_runs(company, repository, tmp_path):
    backends = ("auto", "torch", "reference")
    assert load_and_run(repository, company, backends, tmp_path) == "torch-cpu"


def test_the_kernel_needs_torch_and_triton_only(repository):
    for folder in variants(repository).values():
        for file in folder.rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
            tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert tops <= {"torch", "triton"}, file


def test_every_variant_has_a_namespace_of_its_own(repository):
    texts = {n: (folder / "metadata.json") for n, folder in variants(repository).items()}
    metadata = {name: json.loads(file.read_text()) for name, file in texts.items()}
    assert set(metadata) == {"torch-cpu", "torch-cuda"}
    assert len({m["id"] for m in metadata.values()}) == 2
    assert all(m["id"].isidentifier() for m in metadata.values())
    assert {m["backend"]["type"] for m in metadata.values()} == {"cpu", "cuda"}
    assert {"build.toml", "README.md", "LICENSE"} <= {x.name for x in repository.iterdir()}


def test_an_unknown_kind_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "hub/pack.py", "rocm", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1 and "need cpu or cuda or none and a folder" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_missing_build_tool_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "hub/pack.py", "cpu", tmp_path / "hub"],
        env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "need cmake; install cmake and ninja" in done.stderr
    assert variants(tmp_path / "hub").keys() == {"unfinished"}


def test_architectures_of_the_metadata():
    spec = spec_from_file_location("pack", ROOT / "hub/pack.py")
    packing = module_from_spec(spec)
    spec.loader.exec_module(packing)
    names = packing.architectures({"cuda_architectures": "80-real;90a-real;100"})
    assert names == ["8.0", "9.0a", "10.0+PTX"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_compiled_kernel_runs(tmp_path):
    """The CPU library, compiled for its own namespace; preferred to the variant without one."""
    repository = pack("cpu", pack("none", tmp_path / "hub"))
    for company in ("alone", "beside vidl"):
        name = load_and_run(repository, company, ("native", "auto", "torch"), tmp_path)
        assert name.startswith("torch-stable-abi211-cpu-") and name.endswith("-linux")
