"""Every op is tested with all backends, devices and dtypes, and with uninitialized memory = NaN."""

import atexit
import os
import shutil
import tempfile
import time
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
# What the user tuned must not choose the backends of the tests; workers inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["VIDL_CACHE"] = tempfile.mkdtemp(prefix="vidl-tests-")
    atexit.register(shutil.rmtree, os.environ["VIDL_CACHE"], ignore_errors=True)
os.environ.pop("VIDL_BACKEND", None)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic

# Workers of pytest-xdist share the cores: with more threads than cores they would spin and wait.
# Only in the workers: they would inherit the number of their parent.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the variable is for subprocesses

from where import Where  # noqa: E402

from vidl import ops  # noqa: E402, F401  (declares every op)

# A machine with a GPU may have no package but torch.
collect_ignore_glob = [] if find_spec("numpy") else ["test_data_*.py"]

# The GPU tests that `make gpu` runs first: one test of every op, with each backend and dtype there,
# forward and backward. Attention has one for each class of sizes.
SMOKE = {
    "test_frame_difference": {"test_as_accurate_as_torch": ["float-BCTHW-tubelets"]},
    "test_masked_patch_embed": {"test_as_accurate_as_torch": ["tubelets"]},
    "test_masked_patch_loss": {"test_as_accurate_as_torch": ["VideoMAE"]},
    "test_select_tokens": {"test_as_accurate_as_torch": ["packed EViT"]},
    "test_space_time_attention": {
        "test_as_accurate_as_torch": ["eight rows-cls", "frames and a global token-mean"],
        "test_head_sizes_of_long_groups": ["64"],
    },
    "test_token_scores": {"test_as_accurate_as_torch": ["frames-mean"]},
}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        smoke = SMOKE.get(item.path.stem, {}).get(getattr(item, "originalname", ""), [])
        ends = tuple(f"-cuda-{case}]" for case in smoke)
        if item.get_closest_marker("gpu") and item.name.endswith(ends):
            item.add_marker(pytest.mark.gpu_smoke)
        if interpreted(item) and (
            item.get_closest_marker("slow_interpreted")
            or item.callspec.params.get("dtype") == torch.float16
        ):
            item.add_marker(pytest.mark.slow)


def interpreted(item) -> bool:
    """Whether the test runs Triton's interpreter, which takes seconds for a large input.

    Its float16 tests are slow ones: they compute as the float32 tests do, with other roundings.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    place = parameters.get("where", parameters.get("place", parameters.get("backend")))
    return place in ("triton", Where("triton", "cpu"))


def pytest_runtest_setup(item) -> None:
    """Skip what `make gpu` has no time for: pytest then ends by itself, and lists what failed."""
    if time.time() > float(os.environ.get("VIDL_TEST_UNTIL", "inf")):
        pytest.skip("no time left")


PLACES = [
    *(pytest.param(Where(b, "cpu"), id=f"{b}-cpu") for b in ("native", "triton", "emulated")),
    *(
        pytest.param(Where(b, "cuda"), id=f"{b}-cuda", marks=pytest.mark.gpu)
        for b in ("native", "triton")
    ),
]


@pytest.fixture(params=PLACES)
def where(request) -> Where:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill `torch.empty`, in Python and C++, with NaN, to detect outputs that are not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
