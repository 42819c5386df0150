"""What this machine can run: versions, build, devices, decoders, and the backends of each op.

`vidl info` prints it as text, `vidl info --json` as JSON for programs and bug reports.
"""

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vidl
import vidl.ops  # noqa: F401  declares the ops
from vidl.data import video
from vidl.kernels import library

PACKAGES = ("triton", "numpy", "timm", "transformers", "xformers", "flash_attn", "av", "pyarrow")
# The flags of a CPU that decide which matrix units PyTorch and our kernels use.
ISA = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16", "i8mm"),
)


def collect() -> dict[str, Any]:
    """Everything that `vidl info` prints, as lists, dicts, strings and numbers.

    Returns:
        "versions", "build" (see `library.build_record`), "cpu", "gpus", "decoders" and "ops": one
        row for each op, device and backend; its "reason" is None if the backend can run.
    """
    return {
        "versions": versions(),
        "build": library.build_record() | {"loads": library.LOAD_ERROR is None},
        "cpu": cpu(),
        "gpus": gpus(),
        "decoders": decoders(),
        "ops": list(backends()),
    }


def versions() -> dict[str, str | None]:
    """Versions of vidl, Python, PyTorch and optional packages; None if not installed."""
    packages: dict[str, str | None] = {
        "vidl": vidl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda (of torch)": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return packages


def cpu() -> dict[str, Any]:
    """Model, usable cores, threads and instruction sets of the CPU, and those that PyTorch uses."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA if flag in has],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, compute capability and driver of every CUDA device."""
    rows: list[dict[str, Any]] = []
    if not torch.cuda.is_available():
        return rows
    notes = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", notes.read_text() if notes.exists() else "")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "name": card.name,
                "memory": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
                "multiprocessors": card.multi_processor_count,
                "driver": driver[0] if driver else None,
            }
        )
    return rows


def decoders() -> dict[str, str | None]:
    """The reason why each video decoder cannot decode a test clip here, or None if it can."""
    names = {"pyav": "PyAV"}
    return {names.get(decoder, decoder): video.why_not(decoder) for decoder in video.DECODERS}


def backends() -> Iterator[dict[str, Any]]:
    """One row for each op, device and backend: its dtypes, or the reason why it cannot run."""
    for name in op_names():
        for device in ("cpu", "cuda"):
            missing = None
            if device == "cuda" and not torch.cuda.is_available():
                missing = "no CUDA device"
            auto = None if missing else library.choose("auto", name, device, torch.float32)
            for backend in library.BACKENDS:
                reasons = {d: library.why_not(backend, name, device, d) for d in library.DTYPES}
                dtypes = [str(d).removeprefix("torch.") for d, why in reasons.items() if not why]
                unfit = None if dtypes else next(iter(reasons.values()))
                yield {
                    "op": name,
                    "device": device,
                    "backend": backend,
                    "reason": missing or unfit,
                    "dtypes": [] if missing else dtypes,
                    "auto": backend == auto,
                }


def op_names() -> list[str]:
    """The ops without those that are the backward pass of another op."""
    return [name for name in library.OPS if not name.endswith("_bwd")]


def render(facts: dict[str, Any]) -> str:
    """The result of `collect` as text for a terminal."""
    lines = ["versions"]
    lines += [
        f"  {name:16} {value or 'not installed'}" for name, value in facts["versions"].items()
    ]

    lines += ["", "build"]
    lines += [
        f"  {name:16} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts["build"].items()
        if value not in (None, "", [], {})
    ]

    cpu = facts["cpu"]
    lines += ["", "devices", f"  cpu              {cpu['model']}, {cpu['cores']} cores"]
    lines += [f"  {'':16} {cpu['threads']} threads, PyTorch uses {cpu['torch_capability']}"]
    lines += [f"  {'':16} has {' '.join(cpu['isa']) or 'none of the instruction sets we look for'}"]
    for index, gpu in enumerate(facts["gpus"]):
        lines += [
            f"  cuda:{index:<11} {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, "
            f"capability {gpu['capability']}, driver {gpu['driver'] or 'unknown'}"
        ]
    if not facts["gpus"]:
        lines += ["  cuda             no CUDA device"]

    lines += ["", "video decoders"]
    lines += [f"  {name:16} {why or 'decodes'}" for name, why in facts["decoders"].items()]

    lines += ["", "ops (* is what backend='auto' picks)"]
    last = None
    for row in facts["ops"]:
        if row["op"] != last:
            lines += [f"  {row['op']}"]
            last = row["op"]
        state = f"no: {row['reason']}" if row["reason"] else f"yes: {', '.join(row['dtypes'])}"
        mark = "*" if row["auto"] else " "
        lines += [f"    {row['device']:5} {row['backend']:10}{mark} {state}"]
    return "\n".join(lines)
