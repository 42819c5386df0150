"""What this machine can run: versions, build, devices, decoders, and the backends of each op.

`vidl info` prints it as text, `vidl info --json` as JSON for programs and bug reports.
"""

import os
import platform
import re
import shlex
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vidl
import vidl.ops  # noqa: F401  declares the ops
from vidl.data import video
from vidl.kernels import choices, device, library

PACKAGES = ("triton", "numpy", "timm", "transformers", "xformers", "flash_attn", "av", "pyarrow")
# The flags of a CPU that decide which matrix units PyTorch and our kernels use.
ISA = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16", "i8mm"),
)


def collect() -> dict[str, Any]:
    """Everything that `vidl info` prints, as lists, dicts, strings and numbers.

    Returns:
        "versions", "build" (see `library.build_record`), "triton_needs", "cpu", "gpus", "decoders",
        "choices" (see `chosen`) and "ops": one row for each op, device and backend; its "reason" is
        None if the backend can run.
    """
    return {
        "versions": versions(),
        "build": library.build_record() | {"loads": library.LOAD_ERROR is None},
        "triton_needs": triton_needs(),
        "cpu": cpu(),
        "gpus": gpus(),
        "decoders": decoders(),
        "choices": chosen(),
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


def triton_needs() -> dict[str, str | None]:
    """The C compiler and the header with which Triton builds its launcher; None if missing."""
    names = [*shlex.split(os.environ.get("CC", ""))[:1], "gcc", "clang", "cc"]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "C compiler": next(filter(None, map(shutil.which, names)), None),
        "Python.h": str(header) if header.is_file() else None,
    }


def cpu() -> dict[str, Any]:
    """Model, usable cores, threads and instruction sets of the CPU, and those that PyTorch uses."""
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", device.cpu_facts(), re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "model": device.cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA if flag in has],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, capability, driver and limits of every CUDA device."""
    rows: list[dict[str, Any]] = []
    if not torch.cuda.is_available():
        return rows
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "name": card.name,
                "memory": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
                "driver": device.driver(),
                **device.limits(card),
            }
        )
    return rows


def decoders() -> dict[str, str | None]:
    """The reason why each video decoder cannot decode a test clip here, or None if it can."""
    names = {"pyav": "PyAV"}
    return {names.get(decoder, decoder): video.why_not(decoder) for decoder in video.DECODERS}


def chosen() -> dict[str, Any]:
    """What backend "auto" takes on each device of this machine, and from where.

    Returns:
        "VIDL_BACKEND" (str or None), which overrides the rest; "folder" of the entries of each
        device; and "ops": for each op and device the backend by the "rule", and the numbers of
        "tuned" and "shipped" entries of each backend, which precede the rule for their sizes.
    """
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for kind in kinds:
        table = choices.table(kind)
        for name in op_names():
            row: dict[str, Any] = {"op": name, "device": kind}
            row["rule"] = library.by_rule(name, kind, _usual(kind))
            for source, part in (("tuned", table.tuned), ("shipped", table.shipped)):
                row[source] = dict(Counter(b for key, b in part.items() if key.op == name))
            rows.append(row)
    folders = {kind: str(choices.folder(kind)) for kind in kinds}
    return {"VIDL_BACKEND": choices.forced(), "folder": folders, "ops": rows}


def _usual(kind: str) -> torch.dtype:
    """The dtype of training on a device."""
    return torch.bfloat16 if kind == "cuda" else torch.float32


def backends() -> Iterator[dict[str, Any]]:
    """One row for each op, device and backend: its dtypes, or the reason why it cannot run."""
    for name in op_names():
        for kind in ("cpu", "cuda"):
            missing = None
            if kind == "cuda" and not torch.cuda.is_available():
                missing = "no CUDA device"
            auto = None if missing else library.by_rule(name, kind, _usual(kind))
            for backend in library.BACKENDS:
                reasons = {d: library.why_not(backend, name, kind, d) for d in library.DTYPES}
                dtypes = [str(d).removeprefix("torch.") for d, why in reasons.items() if not why]
                unfit = None if dtypes else next(iter(reasons.values()))
                yield {
                    "op": name,
                    "device": kind,
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

    lines += ["", "launcher of Triton"]
    lines += [f"  {name:16} {value or 'missing'}" for name, value in facts["triton_needs"].items()]

    cpu = facts["cpu"]
    lines += ["", "devices", f"  cpu              {cpu['model']}, {cpu['cores']} cores"]
    lines += [f"  {'':16} {cpu['threads']} threads, PyTorch uses {cpu['torch_capability']}"]
    lines += [f"  {'':16} has {' '.join(cpu['isa']) or 'none of the instruction sets we look for'}"]
    for index, gpu in enumerate(facts["gpus"]):
        lines += [
            f"  cuda:{index:<11} {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, "
            f"capability {gpu['capability']}, driver {gpu['driver'] or 'unknown'}",
            f"  {'':16} {gpu['multiprocessors']} multiprocessors, L2 "
            f"{gpu['l2_bytes'] / 2**20:.0f} MiB, shared memory of a block at most "
            f"{gpu['shared_memory_bytes'] / 2**10:.0f} KiB",
        ]
    if not facts["gpus"]:
        lines += ["  cuda             no CUDA device"]

    lines += ["", "video decoders"]
    lines += [f"  {name:16} {why or 'decodes'}" for name, why in facts["decoders"].items()]

    lines += ["", *_render_choices(facts["choices"])]

    lines += ["", "ops (* is what backend='auto' takes by the rule)"]
    last = None
    for row in facts["ops"]:
        if row["op"] != last:
            lines += [f"  {row['op']}"]
            last = row["op"]
        state = f"no: {row['reason']}" if row["reason"] else f"yes: {', '.join(row['dtypes'])}"
        mark = "*" if row["auto"] else " "
        lines += [f"    {row['device']:5} {row['backend']:10}{mark} {state}"]
    return "\n".join(lines)


def _render_choices(facts: dict[str, Any]) -> list[str]:
    lines = ["backend='auto' (`vidl tune` measures; entries precede the rule for their sizes)"]
    if facts["VIDL_BACKEND"]:
        lines.append(f"  VIDL_BACKEND={facts['VIDL_BACKEND']} overrides it")
    for row in facts["ops"]:
        counts = [
            f"{source} {backend} x {count}"
            for source in ("tuned", "shipped")
            for backend, count in sorted(row[source].items())
        ]
        entries = ", ".join(counts) or "no entries"
        lines.append(f"  {row['op']:22}{row['device']:5} rule {row['rule']:10} {entries}")
    return lines + [f"  entries for {kind}: {path}" for kind, path in facts["folder"].items()]
