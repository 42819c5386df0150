"""What a swap changed in each module of a model, and which modules it left."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module before and after the swap.

    Attributes:
        name: as in `named_modules`; "" is the model itself.
        was: full name of its class before.
        became: what it is now, or None if it was left.
        note: the reason why it was left; or a remark on what it became.
    """

    name: str
    was: str
    became: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Every module that was swapped, and every attention or embedding that was left.

    `str(report)` has one line for the modules of different layers with the same outcome.
    """

    changes: tuple[Change, ...]

    @property
    def swapped(self) -> tuple[Change, ...]:
        """The modules that changed."""
        return tuple(change for change in self.changes if change.became is not None)

    @property
    def left(self) -> tuple[Change, ...]:
        """The attentions and embeddings that did not change, each with the reason."""
        return tuple(change for change in self.changes if change.became is None)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left"]
        return "\n".join([*lines, *summary(self.changes)])


def summary(changes: tuple[Change, ...]) -> list[str]:
    """One line for each kind of change; modules whose names differ only in numbers are counted."""
    kinds: dict[tuple[str, str, str | None, str], int] = {}
    for change in changes:
        name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", change.name) or "the model itself"
        kind = (name, change.was, change.became, change.note)
        kinds[kind] = kinds.get(kind, 0) + 1
    return [_line(count, *kind) for kind, count in kinds.items()]


def _line(count: int, name: str, was: str, became: str | None, note: str) -> str:
    times = f" ({count} x)" if count > 1 else ""
    outcome = "left" if became is None else f"-> {became}"
    return f"  {name}{times}: {was} {outcome}" + (f": {note}" if note else "")
