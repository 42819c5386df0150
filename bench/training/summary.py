"""The results of `vidl savings` as text: times, speedups, parts, GPU-hours, and regressions."""

from collections.abc import Iterable, Sequence
from typing import Any

from vidl.bench.report.digest import OURS
from vidl.bench.report.records import Record

Lines = list[str]


def table(records: Sequence[Record]) -> str:
    """All results of one recipe, for a terminal."""
    first = records[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    place = f"{first['device_type'].upper()}: {first['device']}{threads}, {first['dtype']}"
    timed = [r for r in records if "median_ms" in r]
    lines = [f"\n{first['shape']} · a pre-training step · {place}"]
    lines += [f"{r['candidate']:28} {r['status']}: {r['reason']}" for r in records
              if r["status"] != "ok"]  # fmt: skip
    lines += _agreement(records)
    if timed:
        lines += _times(timed) + _squares(timed) + _parts(timed) + _hours(timed)
        lines += _loading(timed) + does_not_pay(timed)
    return "\n".join(lines)


def _agreement(records: Sequence[Record]) -> Lines:
    lines = ["", "relative errors of losses and gradients against float64, compared before timing"]
    for r in records:
        if "errors" in r:
            worst = max(r["errors"].values())
            loss = "" if r["loss"] is None else f", loss {r['loss']:.6f} in {r['dtype']}"
            lines += [
                f"  {r['candidate']:28} {worst:.1e} of {r['allowed_error']:.1e} allowed{loss}"
            ]
    return lines


def _times(timed: Sequence[Record]) -> Lines:
    lines = ["", f"{'cell':28}{'ms':>10}{'20-80 %':>22}{'clips/s':>10}{'tokens/s':>11}"
             f"{'GFLOP':>10}{'MFU':>7}{'MiB':>8}{'J':>8}"]  # fmt: skip
    for r in timed:
        spread = f"{r['p20_ms']:.1f} - {r['p80_ms']:.1f}"
        flops = "" if r["flops"] is None else f"{r['flops'] / 1e9:,.1f}"
        mfu = f"{r['mfu']:.0%}" if "mfu" in r else ""
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}"
        joules = "" if r["joules_per_step"] is None else f"{r['joules_per_step']:.1f}"
        lines += [f"{r['candidate']:28}{r['median_ms']:10.1f}{spread:>22}"
                  f"{r['clips_per_s']:10.4g}{r['tokens_per_s']:11.4g}{flops:>10}{mfu:>7}"
                  f"{memory:>8}{joules:>8}".rstrip()]  # fmt: skip
    lines += ["tokens: visible patches; MFU: FLOPs that vidl needs, relative to the matmul rate, "
              f"{timed[0]['matmul_tflop_per_s']:.3g} TFLOP/s;",
              "MiB: peak memory above weights and optimizer; J: GPU energy per step"]  # fmt: skip
    return lines


def _squares(timed: Sequence[Record]) -> Lines:
    """Speedup over dense eager PyTorch, and its share of the saving of FLOPs."""
    cells = {(r["row"], r["column"]): r for r in timed}
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = ["", f"{'speedup over dense, pytorch':30}" + "".join(f"{c:>22}" for c in columns)]
    for row in ("dense", "sparse"):
        speedups = [cells.get((row, column), {}).get("speed_up") for column in columns]
        lines += [f"  {row:28}" + "".join(f"{_ratio(x):>22}" for x in speedups)]
    saved = [cells.get(("sparse", column), {}).get("realised_saving") for column in columns]
    ratio = flop_ratio(timed)
    if ratio is not None:
        lines += [f"  {f'realised of {ratio:.2f} x fewer FLOPs':28}"
                  + "".join(f"{'' if x is None else f'{x:.0%}':>22}" for x in saved)]  # fmt: skip
    return lines


def flop_ratio(timed: Iterable[Record]) -> float | None:
    """FLOPs of the dense step divided by those of the sparse one."""
    useful = {r["row"]: r["useful_flops"] for r in timed if r["useful_flops"]}
    return useful["dense"] / useful["sparse"] if {"dense", "sparse"} <= set(useful) else None


def _ratio(x: Any) -> str:
    return "" if x is None else f"{x:.2f} x"


def _parts(timed: Sequence[Record]) -> Lines:
    known = [r for r in timed if r["breakdown_ms"]]
    if not known:
        return []
    lines = ["", f"{'ms by part':14}" + "".join(f"{r['candidate']:>18}" for r in known)]
    for part in known[0]["breakdown_ms"]:
        values = [r["breakdown_ms"][part] for r in known]
        if any(values):
            lines += [f"  {part:12}" + "".join(f"{x:18.1f}" for x in values)]
    return lines + [f"forward and backward, measured by {known[0]['breakdown_by']}"]


def _hours(timed: Sequence[Record]) -> Lines:
    if timed[0]["device_type"] != "cuda":
        return ["", "GPU-hours of a full schedule: not measured (CPU results do not predict them)"]
    lines = [
        "",
        "GPU-hours of a full schedule, projected from these steps, without waiting for data:",
    ]
    return lines + [f"  {r['candidate']:28}{r['hours']:8.1f} = {r['hours_formula']}" for r in timed]


def _loading(timed: Sequence[Record]) -> Lines:
    loading = timed[0].get("loading")
    if not loading:
        return []
    if loading["clips_per_s"] is None:
        return ["", f"waiting for data: not measured: {loading['reason']}"]
    speed, workers = loading["clips_per_s"], loading["workers"]
    lines = ["", "data: the batches were in memory. On the idle machine the loader reads "
             f"{speed:.4g} clips/s of examples/ with {workers} workers;"]  # fmt: skip
    waits = (f"{max(0.0, 1 - speed / r['clips_per_s']):.0%} ({r['candidate']})" for r in timed)
    return lines + [
        f"  a run would wait {', '.join(waits)} of its time if nothing else used the cores"
    ]


def does_not_pay(timed: Sequence[Record]) -> Lines:
    """Where vidl is not faster than a baseline, needs more memory, or has a slower part."""
    regressions: Lines = []
    for baseline in timed:
        own = [r for r in timed if r["row"] == baseline["row"] and r["column"] in OURS]
        if baseline["column"] not in OURS and own:
            ours = min(own, key=lambda r: r["median_ms"])
            regressions += [f"{ours['row']}: {text}" for text in _not_better(ours, baseline)]
    return ["", "does not pay: " + ("; ".join(regressions) or "nothing found")]


def _not_better(ours: Record, baseline: Record) -> Lines:
    column, regressions = baseline["column"], []
    ratio = baseline["median_ms"] / ours["median_ms"]
    if ours["p20_ms"] > baseline["p80_ms"]:
        regressions += [f"a step has {ratio:.2f} x the speed of {column}"]
    elif ours["p80_ms"] >= baseline["p20_ms"]:
        regressions += [f"a step is no faster than in {column} beyond noise ({ratio:.2f} x)"]
    if (
        ours["peak_bytes"]
        and baseline["peak_bytes"]
        and ours["peak_bytes"] > baseline["peak_bytes"]
    ):
        more = ours["peak_bytes"] / baseline["peak_bytes"]
        regressions += [f"{more:.2f} x the memory of {column}"]
    for part, ms in ours["breakdown_ms"].items():
        other = baseline["breakdown_ms"].get(part)
        # Less than 5 % of the part or 1 % of the step is noise.
        if other is not None and ms > 1.05 * other and ms - other > 0.01 * ours["median_ms"]:
            regressions += [f"{part} takes {ms:.1f} ms, {other:.1f} in {column}"]
    return regressions
