"""Judges results: in words for a reader, and against thresholds for the end of a run."""

import collections
from collections.abc import Iterable, Sequence

from vidl.bench.measure.cases import OVERHEAD
from vidl.bench.report import digest
from vidl.bench.report.digest import MODES, Comparison, Device, times
from vidl.bench.report.records import Record, newest
from vidl.bench.training.summary import flop_ratio

# A speedup over the fastest baseline below this is reported as slower.
LEAST_SPEEDUP = 1.0
# The share of the hardware limit that vidl should reach; less for the ops with small shapes, where
# a launch alone takes 10 to 20 % of 15 to 25 microseconds.
LEAST_SHARE = {"space_time_attention": 0.8, "masked_patch_embed": 0.8, "masked_patch_loss": 0.8}
LEAST_SHARE_OF_OTHERS = 0.6
# The share of the saving of FLOPs that a sparse step should realise over dense eager PyTorch.
LEAST_REALISED = 0.9
NOISE = 0.05  # of a speedup in words


def least_share(op: str) -> float:
    """The share of the limit that vidl should reach."""
    return LEAST_SHARE.get(op, LEAST_SHARE_OF_OTHERS)


def in_words(device: Device) -> list[str]:
    """Sentences about a device: what is faster, what is slower, and by how much."""
    return [*_ops_in_words(device), *_steps_in_words(device), *_learning_in_words(device)]


def _ops_in_words(device: Device) -> list[str]:
    rows = [c for c in digest.main_comparisons(device) if c.speedup is not None]
    if not (overall := digest.spread(c.speedup for c in rows)):
        return []
    ordered = sorted(rows, key=lambda c: c.speedup or 0)
    lowest, highest = ordered[0], ordered[-1]
    faster = sum((c.speedup or 0) > 1 + NOISE for c in rows)
    slower = sum((c.speedup or 0) < 1 - NOISE for c in rows)
    shapes = f"{len(rows)} shape{'s' * (len(rows) > 1)}"
    return [f"Operations in {rows[0].dtype}, {shapes}: vidl is faster than the fastest "
            f"PyTorch baseline at {faster}, within {100 * NOISE:.0f} % of it at "
            f"{len(rows) - faster - slower} and slower at {slower}. The median speedup is "
            f"{times(overall.median)}; the lowest is {times(overall.lowest)} (`{lowest.op}`, "
            f"{lowest.shape}), the highest {times(overall.highest)} (`{highest.op}`, "
            f"{highest.shape})."]  # fmt: skip


def _steps_in_words(device: Device) -> list[str]:
    rows = [s for s in digest.steps(device) if s.speedup is not None]
    parts = []
    for row in ("dense", "sparse"):
        if overall := digest.spread(s.speedup for s in rows if s.row == row):
            parts += [f"{overall.range} on {row} steps"]
    if not parts:
        return []
    text = "Whole training steps: the speedup over the fastest PyTorch baseline is "
    text += f"{' and '.join(parts)}; it exceeds the noise in {sum(s.clear for s in rows)} of "
    text += f"{len(rows)} cases."
    total = digest.spread(s.best.get("speed_up") for s in rows if s.row == "sparse")
    if total:
        text += f" From dense eager PyTorch to sparse vidl, the speedup is {total.range}."
    return [text]


def _learning_in_words(device: Device) -> list[str]:
    parts, alike = [], True
    for shape in dict.fromkeys(r["shape"] for r in device.quality):
        rows = {r["row"]: recall(r) for r in device.quality if r["shape"] == shape}
        if {"dense", "sparse"} <= set(rows):
            dense, sparse = rows["dense"], rows["sparse"]
            apart = dense["highest"] < sparse["lowest"] or sparse["highest"] < dense["lowest"]
            texts = [f"{r['mean']:.1f} % ({r['lowest']:.0f} to {r['highest']:.0f}) {row}"
                     for row, r in rows.items()]  # fmt: skip
            parts += [f"{', '.join(texts)} ({shape}{'; the ranges are apart' if apart else ''})"]
            alike = alike and not apart
    if not parts:
        return []
    result = "dense and sparse models learn alike" if alike else "dense and sparse models differ"
    return [f"With as many steps as fit into the same training time, {result} at this size: "
            f"text-to-video R@1 is {'; '.join(parts)}."]  # fmt: skip


def recall(record: Record) -> Record:
    """Text-to-video R@1 of a training run: mean, lowest and highest of its seeds."""
    name = "t2v re-ranked R@1" if "t2v re-ranked R@1" in record["r1"] else "t2v R@1"
    value: Record = record["r1"][name]
    return value


def verdict(devices: Sequence[Device], records: Iterable[Record]) -> str:
    """A summary for a terminal.

    Args:
        devices: the result of `digest.devices`.
        records: all records; those that are wrong or failed are listed.
    """
    lines = [line for device in devices for line in _device(device)]
    bad = [r for r in newest(records).values() if r["status"] in ("wrong", "failed")]
    ours = [r for r in bad if r["kind"] == "ours"]
    lines += ["", f"{len(ours)} results of vidl wrong or failed"]
    for r in ours:
        name = f"{r['op']} · {r['shape']} · {r['dtype']} · {r['mode']} · {r['candidate']}"
        lines += [f"  {r['status']:7} {name}: {r['reason']}"]
    others = collections.Counter((r["op"], r["dtype"]) for r in bad if r["kind"] != "ours")
    counts = [f"; {op} {dtype} {count}" for (op, dtype), count in sorted(others.items())]
    lines += [f"{others.total()} results of baselines wrong or failed{''.join(counts)}"]
    return "\n".join(lines)


def _device(device: Device) -> list[str]:
    rows = digest.comparisons(device)
    slower = [c for c in rows if c.speedup is not None and c.speedup < LEAST_SPEEDUP]
    far = [
        c
        for c in rows
        if not c.shape.startswith(OVERHEAD) and c.best["share_of_limit"] < least_share(c.op)
    ]
    lines = ["", f"{device.title}: {len(rows)} measurements of vidl, all compared before timing"]
    lines += [f"  {len(slower)} slower than a baseline"]
    lines += [f"    {_name(c)}: {times(c.speedup or 0)} ({c.best.get('strongest_baseline')})"
              for c in slower]  # fmt: skip
    lines += [f"  {len(far)} below the required share of the hardware limit"]
    lines += [
        f"    {_name(c)}: {c.best['share_of_limit']:.0%} of {least_share(c.op):.0%}" for c in far
    ]
    for shape in dict.fromkeys(r["shape"] for r in device.savings if "median_ms" in r):
        lines += _steps([r for r in device.savings if r["shape"] == shape and "median_ms" in r])
    return lines


def _name(c: Comparison) -> str:
    return " · ".join((c.op, c.shape, c.dtype, MODES[c.mode]))


def _steps(timed: Sequence[Record]) -> list[str]:
    cells = [f"{r['candidate']} {r['median_ms']:,.1f} ms" for r in timed]
    lines = [f"  a step of {timed[0]['shape']}: {'; '.join(cells)}"]
    fitting = [r for r in timed if r["row"] == "sparse" and r["column"] in digest.OURS]
    ours = min(fitting, key=lambda r: r["median_ms"], default={})
    ratio, realised = flop_ratio(timed), ours.get("realised_saving")
    if ratio is not None and realised is not None:
        below = "" if realised >= LEAST_REALISED else f", below the required {LEAST_REALISED:.0%}"
        lines += [f"    realised {realised:.0%} of {times(ratio)} fewer FLOPs{below}"]
    return lines
