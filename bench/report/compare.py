"""Compares two sets of results: what became faster or slower beyond noise."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vidl.bench.report.records import Key, Record, newest

# Fields that must be equal for two times to be comparable.
EQUAL = ("sizes", "quick")


@dataclasses.dataclass(frozen=True)
class Change:
    """A measurement that both sets have.

    Attributes:
        key: identifies the measurement.
        old, new: its records.
        ratio: the old median divided by the new one; above 1 the new one is faster. None if they
            are not comparable; `reason` says why.
        verdict: "faster", "slower", "same" (the ranges from the 20 to the 80 % quantile overlap),
            "wrong" (timed before, now wrong or failed) or "other" (not comparable).
    """

    key: Key
    old: Record
    new: Record
    ratio: float | None
    verdict: str
    reason: str | None = None


def compare(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """The measurements that both sets have, the largest slowdown first."""
    before, after = newest(old), newest(new)
    changes = [_change(key, before[key], after[key]) for key in before if key in after]
    return sorted(changes, key=lambda change: change.ratio or 0.0)


def _change(key: Key, old: Record, new: Record) -> Change:
    if "median_ms" not in old:
        return Change(key, old, new, None, "other", "not timed in the old results")
    if "median_ms" not in new:
        reason = f"{new.get('status')}: {new.get('reason')}"
        verdict = "wrong" if new.get("status") in ("wrong", "failed") else "other"
        return Change(key, old, new, None, verdict, reason)
    differs = [name for name in EQUAL if old.get(name) != new.get(name)]
    if differs:
        differences: Any = [f"{name} {old.get(name)} and {new.get(name)}" for name in differs]
        return Change(key, old, new, None, "other", "; ".join(differences))
    ratio = old["median_ms"] / new["median_ms"]
    if new["p20_ms"] > old["p80_ms"]:
        verdict = "slower"
    elif new["p80_ms"] < old["p20_ms"]:
        verdict = "faster"
    else:
        verdict = "same"
    return Change(key, old, new, ratio, verdict)


def bad(changes: Iterable[Change]) -> list[Change]:
    """The changes of vidl that are slower or wrong; changes of baselines do not count."""
    return [c for c in changes if c.verdict in ("slower", "wrong") and c.new["kind"] == "ours"]


def table(changes: list[Change]) -> str:
    """A line for every measurement that changed, and the number of each verdict."""
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
    lines.append("slower, faster: the ranges from the 20 to the 80 % quantile do not overlap")
    return "\n".join(lines)


def as_json(change: Change) -> dict[str, Any]:
    """A change as a JSON object."""
    names = ("device", "op", "shape", "dtype", "mode", "threads", "candidate")
    values: dict[str, Any] = dict(zip(names, change.key, strict=True))
    values |= {"kind": change.new["kind"], "verdict": change.verdict, "ratio": change.ratio}
    values |= {"reason": change.reason}
    for when, record in (("old", change.old), ("new", change.new)):
        values |= {
            f"{when}_{n}": record.get(n) for n in ("median_ms", "p20_ms", "p80_ms", "commit")
        }
    return values
