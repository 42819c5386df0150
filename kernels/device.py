"""What a device and its software are: the facts on which the fastest backend depends."""

import functools
import hashlib
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).parent
PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
)


def current(kind: str) -> tuple[str, int]:
    """The device that a call on this type uses now: the index of CUDA, or the CPU threads."""
    return kind, torch.cuda.current_device() if kind == "cuda" else torch.get_num_threads()


@functools.cache
def exists(kind: str) -> bool:
    """Whether kernels can run on this type of device here; asked in every call on it."""
    return kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())


def name_of(kind: str) -> str:
    """The name of the current GPU, or of the CPU."""
    return torch.cuda.get_device_name() if kind == "cuda" else cpu_model()


def identity(kind: str) -> dict[str, Any]:
    """Device, driver, versions and kernels; a measurement holds only where all are the same."""
    facts: dict[str, Any] = {"device": name_of(kind)}
    if kind == "cuda":
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= limits(card) | {"capability": f"{card.major}.{card.minor}", "driver": driver()}
        facts["cudnn"] = torch.backends.cudnn.version()
    else:
        facts |= {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return facts | {name: _version(name) for name in PACKAGES} | {"kernels": _kernels()}


def limits(card: Any) -> dict[str, int]:
    """The limits of a GPU that its kernels depend on, from its properties."""
    return {
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "shared_memory_bytes": getattr(card, "shared_memory_per_block_optin", 0),
    }


def digest(facts: dict[str, Any]) -> str:
    """A short hash of facts, for names of files and folders."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cpu_model() -> str:
    """The name of the CPU."""
    model = re.search(r"^model name\s*: (.+)$", cpu_facts(), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def cpu_facts() -> str:
    """What Linux says of the CPU; "" elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def driver() -> str | None:
    """The version of NVIDIA's driver, if it is known."""
    file = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", file.read_text() if file.exists() else "")
    return version[0] if version else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _kernels() -> str:
    """A hash of the native library and of the sources in this folder."""
    from vidl.kernels import library  # it imports this file

    content = hashlib.sha256()
    built = library.build_record()["file"]
    for file in [*sorted(KERNELS.rglob("*.py")), *([Path(built)] if built else [])]:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()[:16]
