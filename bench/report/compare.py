"""What became faster or slower from one set of results to another, beyond their noise."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vidl.bench.report.records import Key, Record, newest

# What must be alike, or two times say nothing about the code.
ALIKE = ("sizes", "quick")


@dataclasses.dataclass(frozen=True)
class Change:
    """One measurement in both sets, or why it cannot be compared.

    Attributes:
        ratio: the old median over the new one; above 1 it is faster now. None: see `reason`.
        verdict: "faster", "slower", "same" (the 20 to 80 % quantiles overlap), "wrong" (it was
            timed before, and now its answer is wrong or it fails) or "other" (not comparable).
    """

    key: Key
    old: Record
    new: Record
    ratio: float | None
    verdict: str
    reason: str | None = None


def compare(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """Every measurement that both sets have; the slowest in comparison first."""
    before, after = newest(old), newest(new)
    changes = [_change(key, before[key], after[key]) for key in before if key in after]
    return sorted(changes, key=lambda change: change.ratio or 0.0)


def _change(key: Key, old: Record, new: Record) -> Change:
    if "median_ms" not in old:
        return Change(key, old, new, None, "other", "was not timed before")
    if "median_ms" not in new:
        reason = f"{new.get('status')}: {new.get('reason')}"
        verdict = "wrong" if new.get("status") in ("wrong", "failed") else "other"
        return Change(key, old, new, None, verdict, reason)
    differs = [name for name in ALIKE if old.get(name) != new.get(name)]
    if differs:
        values: Any = [f"{name} {old.get(name)} and {new.get(name)}" for name in differs]
        return Change(key, old, new, None, "other", "; ".join(values))
    ratio = old["median_ms"] / new["median_ms"]
    if new["p20_ms"] > old["p80_ms"]:
        verdict = "slower"
    elif new["p80_ms"] < old["p20_ms"]:
        verdict = "faster"
    else:
        verdict = "same"
    return Change(key, old, new, ratio, verdict)


def bad(changes: Iterable[Change]) -> list[Change]:
    """Those of ours that became slower or wrong; peers are not ours to answer for."""
    return [c for c in changes if c.verdict in ("slower", "wrong") and c.new["kind"] == "ours"]


def table(changes: list[Change]) -> str:
    """A line for each measurement that is not the same, and how many there are of each kind."""
    lines = []
    for c in changes:
        if c.verdict == "same":
            continue
        device, op, shape, dtype, mode, threads, candidate = c.key
        what = f"{op} · {shape} · {dtype} · {mode} · {candidate}"
        what += f" · {threads} threads" if threads else ""
        if c.ratio is None:
            lines.append(f"{c.verdict:7} {what} ({device}): {c.reason}")
        else:
            spans = [f"{r['median_ms']:.3f} ({r['p20_ms']:.3f}-{r['p80_ms']:.3f})" for r in
                     (c.old, c.new)]  # fmt: skip
            lines.append(
                f"{c.verdict:7} {c.ratio:5.2f} x  {what} ({device}): {' -> '.join(spans)} ms"
            )
    counts = {v: sum(c.verdict == v for c in changes) for v in
              ("slower", "wrong", "faster", "same", "other")}  # fmt: skip
    lines.append(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    lines.append("slower, faster: the 20 to 80 % quantiles do not overlap; peers are shown too")
    return "\n".join(lines)


def as_json(change: Change) -> dict[str, Any]:
    """A change as plain values."""
    names = ("device", "op", "shape", "dtype", "mode", "threads", "candidate")
    found: dict[str, Any] = dict(zip(names, change.key, strict=True))
    found |= {"kind": change.new["kind"], "verdict": change.verdict, "ratio": change.ratio}
    found |= {"reason": change.reason}
    for when, record in (("old", change.old), ("new", change.new)):
        found |= {f"{when}_{n}": record.get(n) for n in ("median_ms", "p20_ms", "p80_ms", "commit")}
    return found
