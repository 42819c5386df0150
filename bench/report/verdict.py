"""The end of a run: what was right, what is slower than a peer, what is far from its limit."""

import collections
from collections.abc import Iterable, Sequence

from vidl.bench.report.digest import Device, against, times
from vidl.bench.report.records import Record, newest
from vidl.bench.training.summary import flop_ratio

# The thresholds. Slower than a peer: its time over ours below this.
LEAST_RATIO = 1.0
# Of the time below which the device cannot go; at 15 to 25 microseconds a launch alone takes 10 to
# 20 % of it, so that less is asked of the ops with small shapes.
LEAST_SHARE = {"space_time_attention": 0.8, "masked_patch_embed": 0.8, "masked_patch_loss": 0.8}
LEAST_SHARE_OF_OTHERS = 0.6
# Of the saving of FLOPs that a sparse step should realise over dense stock.
LEAST_REALISED = 0.9


def least_share(op: str) -> float:
    """The share of the limit that ours should reach."""
    return LEAST_SHARE.get(op, LEAST_SHARE_OF_OTHERS)


def verdict(devices: Sequence[Device], records: Iterable[Record]) -> str:
    """A summary for a terminal.

    Args:
        devices: of `digest.devices`.
        records: all, of which those that are wrong or failed are named.
    """
    lines = [line for device in devices for line in _device(device)]
    bad = [r for r in newest(records).values() if r["status"] in ("wrong", "failed")]
    ours = [r for r in bad if r["kind"] == "ours"]
    lines += ["", f"{len(ours)} of ours wrong or failed"]
    for r in ours:
        what = f"{r['op']} · {r['shape']} · {r['dtype']} · {r['mode']} · {r['candidate']}"
        lines += [f"  {r['status']:7} {what}: {r['reason']}"]
    others = collections.Counter((r["op"], r["dtype"]) for r in bad if r["kind"] != "ours")
    found = (f"{op} {dtype} {count}" for (op, dtype), count in sorted(others.items()))
    lines += [f"{others.total()} of peers wrong or failed" + "".join(f"; {each}" for each in found)]
    return "\n".join(lines)


def _device(device: Device) -> list[str]:
    rows = against(device)
    lines = ["", f"{device.title}: {len(rows)} measurements of ours, answers compared before each"]
    slower = [a for a in rows if a.ratio is not None and a.ratio < LEAST_RATIO]
    far = [a for a in rows if a.best["share_of_limit"] < least_share(a.op)]
    lines += [f"  {len(slower)} slower than a peer"]
    lines += [
        f"    {_name(a)}: {times(a.ratio or 0)} ({a.best.get('strongest_peer')})" for a in slower
    ]
    lines += [f"  {len(far)} below the share of the limit that is asked of them"]
    lines += [
        f"    {_name(a)}: {a.best['share_of_limit']:.0%} of {least_share(a.op):.0%}" for a in far
    ]
    for shape in dict.fromkeys(r["shape"] for r in device.savings if "median_ms" in r):
        lines += _steps([r for r in device.savings if r["shape"] == shape and "median_ms" in r])
    return lines


def _name(a: object) -> str:
    return " · ".join(str(getattr(a, name)) for name in ("op", "shape", "dtype", "mode"))


def _steps(timed: Sequence[Record]) -> list[str]:
    cells = [f"{r['candidate']} {r['median_ms']:,.1f} ms" for r in timed]
    lines = [f"  a step of {timed[0]['shape']}: {'; '.join(cells)}"]
    ours = next((r for r in timed if r["candidate"] == "sparse, vidl"), {})
    ratio, realised = flop_ratio(timed), ours.get("realised_saving")
    if ratio is not None and realised is not None:
        word = "" if realised >= LEAST_REALISED else f", below the {LEAST_REALISED:.0%} asked"
        lines += [f"    realised {realised:.0%} of {times(ratio)} fewer FLOPs{word}"]
    return lines
