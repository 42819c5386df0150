"""Records of measurements: one per candidate, printed as a table and written as JSON lines."""

import functools
import json
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vidl import info
from vidl.bench.measure import hardware
from vidl.bench.measure.cases import BENCH, Case, Work, short
from vidl.bench.measure.check import Trial
from vidl.bench.measure.timing import Times
from vidl.kernels import library

Record = dict[str, Any]


def limit_seconds(limits: hardware.Limits, work: Sequence[Work]) -> float:
    """The lower limit of the time of the phases, one after the other."""
    return sum(limits.seconds(phase.size, phase.flops) for phase in work)


def records(
    case: Case,
    mode: str,
    threads: int,
    limits: hardware.Limits,
    trials: Sequence[Trial],
    times: dict[str, Times],
    quick: bool,
) -> list[Record]:
    """One record per candidate: its times, device and versions, or why it was not timed."""
    work = case.work(mode)
    least = limit_seconds(limits, work)
    medians = {name: hardware.quantiles(t.cold)[0] for name, t in times.items()}
    baselines = {t.candidate.name for t in trials if t.candidate.kind == "baseline"} & set(medians)
    strongest = min(baselines, key=lambda name: medians[name], default=None)
    common: Record = {
        "op": case.op,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": short(case.dtype),
        "mode": mode,
        **circumstances(case.device, threads),
        "quick": quick,
        "copy_gb_per_s": limits.copy / 1e9,
        "matmul_tflop_per_s": limits.matmul / 1e12,
        "matmul_dtype": short(limits.matmul_dtype),
        "limit_ms": least * 1e3,
        "strongest_baseline": strongest,
    }
    rows = []
    for trial in trials:
        name = trial.candidate.name
        record = common | {"candidate": name, "kind": trial.candidate.kind}
        record |= {"status": trial.status, "reason": trial.reason}
        record |= {"errors": trial.errors, "torch_errors": trial.torch_errors}
        if name in times:
            median, low, high = hardware.quantiles(times[name].cold)
            record |= {
                "median_ms": median * 1e3,
                "p20_ms": low * 1e3,
                "p80_ms": high * 1e3,
                "min_ms": min(times[name].cold) * 1e3,
                "repetitions": len(times[name].cold),
                "tflop_per_s": sum(phase.flops for phase in work) / median / 1e12,
                "gb_per_s": sum(phase.size for phase in work) / median / 1e9,
                "share_of_limit": least / median,
                "ratio_to": {other: medians[other] / median for other in medians if other != name},
                "ratio_to_strongest": medians[strongest] / median if strongest else None,
                "peak_bytes": times[name].memory,
                "note": times[name].note,
            }
            for kind in ("warm", "eager"):
                if getattr(times[name], kind):
                    record[f"{kind}_ms"] = hardware.quantiles(getattr(times[name], kind))[0] * 1e3
        rows.append(record)
    return rows


def circumstances(device: str, threads: int) -> Record:
    """Device, versions, commit and time of a measurement: part of every record."""
    return {
        "threads": threads if device == "cpu" else None,
        "device": hardware.device_name(device),
        "device_type": device,
        "gpu": info.gpus()[torch.cuda.current_device()] if device == "cuda" else None,
        "commit": commit(),
        "versions": info.versions(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def table(records: Sequence[Record]) -> str:
    """The records of one case as text for a terminal."""
    first = records[0]
    sizes = " ".join(f"{name}={value}" for name, value in first["sizes"].items() if value)
    place = f"{first['device_type'].upper()}: {first['device']}"
    if first["threads"]:
        place += f", {first['threads']} thread" + "s" * (first["threads"] > 1)
    timed = [r for r in records if "median_ms" in r]
    fastest = min((r["median_ms"] for r in timed if r["kind"] == "ours"), default=None)
    lines = [
        f"\n{first['op']} · {first['shape']} · {first['dtype']} · {first['mode']}",
        f"{sizes} · {place}",
        f"limit {first['limit_ms']:.3g} ms: copy {first['copy_gb_per_s']:.1f} GB/s, matmul "
        f"{first['matmul_tflop_per_s']:.3g} TFLOP/s ({first['matmul_dtype']})",
        f"{'candidate':40}{'ms':>9}{'20-80 %':>18}{'TFLOP/s':>10}{'GB/s':>8}{'of limit':>10}"
        f"{'speedup':>10}{'/ vidl':>9}",
    ]
    for r in sorted(timed, key=lambda r: r["median_ms"]):
        spread = f"{r['p20_ms']:.4g} - {r['p80_ms']:.4g}"
        speedup = "-" if (x := r["ratio_to_strongest"]) is None else f"{x:.2f} x"
        relative = "-" if fastest is None else f"{r['median_ms'] / fastest:.2f} x"
        label = r["candidate"] + ("" if r["kind"] in ("ours", "baseline") else f" ({r['kind']})")
        lines.append(
            f"{label:40}{r['median_ms']:9.3f}{spread:>18}{r['tflop_per_s']:10.3g}"
            f"{r['gb_per_s']:8.3g}{r['share_of_limit']:10.0%}{speedup:>10}{relative:>9}"
        )
        details = [
            f"{kind} {r[f'{kind}_ms']:.3f} ms" for kind in ("warm", "eager") if f"{kind}_ms" in r
        ]
        if r["peak_bytes"] is not None:
            details.append(f"peak {r['peak_bytes'] / 2**20:.0f} MiB above the inputs")
        details += [r["note"]] if r["note"] else []
        lines += [f"    {', '.join(details)}"] if details else []
    lines.append("speedup: over the fastest baseline; / vidl: time relative to vidl")
    for r in records:
        if "median_ms" not in r:
            lines.append(f"{r['candidate']:40} {r['status']}: {r['reason']}")
    return "\n".join(lines)


def write(records: Sequence[Record], directory: str | Path | None = None) -> Path:
    """Append records of one op as JSON lines to `<directory>/<device>/<op>.jsonl`.

    Candidates that cannot run on the device are not written.
    """
    folder = Path(directory or BENCH / "results") / hardware.slug(records[0]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{records[0]['op']}.jsonl"
    with file.open("a") as lines:
        lines.writelines(json.dumps(r) + "\n" for r in records if r["status"] != "cannot run")
    return file


@functools.cache
def commit() -> str | None:
    """The commit of the source tree, with "-dirty" if a file other than the results differs."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(BENCH.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):  # an installed package, or no git
        return library.build_record().get("commit")
