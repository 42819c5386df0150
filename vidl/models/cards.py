"""What the paper of a system states, and the table of all systems."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidl.files import replaced

# GFLOP of a training step, forward and backward, per clip with a caption of 32 words; written by
# tests/flops.py. "dense" is the preset base without masks and pruning, "sparse" the preset sparse,
# or base where the published model is sparse.
COUNTED = Path(__file__).with_name("flops.json")
KINDS = ("dense", "sparse")


@dataclass(frozen=True)
class Card:
    """A system in a few words. The objectives and the tasks are those of the model's class.

    Attributes:
        title: name of the system.
        arxiv: number of the paper.
        features: what the clip encoder sees, e.g. "patches of each frame".
        architecture: encoders and where they meet.
        data: what the paper pre-trains on.
        stated: hyperparameters that the paper or its code states.
        ours: what is our choice.
    """

    title: str
    arxiv: str
    features: str
    architecture: str
    data: str
    stated: str
    ours: str


@functools.cache
def counted() -> dict[str, dict[str, float]]:
    """The numbers of `COUNTED`, by system and kind."""
    numbers: dict[str, dict[str, float]] = json.loads(COUNTED.read_text())
    return numbers


def markdown(models: Mapping[str, Any]) -> str:
    """The table of all systems."""
    titles = ("system", "features", "architecture", "objectives", "data", "GFLOP, dense / sparse",
              "tasks")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, entry in models.items():
        card = entry.model.card
        objectives = ", ".join(x.upper() for x in entry.model.objectives)
        link = f"[{card.title}](https://arxiv.org/abs/{card.arxiv}) `{name}`"
        flops = " / ".join(f"{counted()[name][kind]:,.0f}" for kind in KINDS)
        cells = (link, card.features, card.architecture, objectives, card.data, flops)
        lines.append(f"| {' | '.join(cells)} | {', '.join(entry.tasks())} |")
    return "\n".join(lines)


def text(models: Mapping[str, Any]) -> str:
    """The systems, one paragraph each, for a terminal."""
    return "\n\n".join(describe(name, entry) for name, entry in models.items())


def describe(name: str, entry: Any) -> str:
    """One system, for a terminal."""
    card = entry.model.card
    flops = ", ".join(f"{counted()[name][kind]:,.1f} {kind}" for kind in KINDS)
    rows = {
        "features": card.features,
        "architecture": card.architecture,
        "objectives": ", ".join(x.upper() for x in entry.model.objectives),
        "data": card.data,
        "tasks": ", ".join(entry.tasks()),
        "stated": card.stated,
        "our choice": card.ours,
        "GFLOP": f"{flops} (a training step of base, per clip with 32 words)",
        "presets": ", ".join(entry.presets),
    }
    lines = [f"{name}: {card.title}, https://arxiv.org/abs/{card.arxiv}"]
    return "\n".join([*lines, *(f"  {key + ':':14}{value}" for key, value in rows.items())])


def update(file: Path, table: str) -> None:
    """Replace what a Markdown file has between <!-- systems --> and <!-- /systems -->.

    Raises:
        OSError, ValueError: the file cannot be read, or lacks the two marks.
    """
    begin, end = "<!-- systems -->", "<!-- /systems -->"
    before, begins, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not begins or not closed:
        raise ValueError(f"need the lines {begin} and {end}")
    with replaced(file) as unfinished:
        unfinished.write_text(f"{before}{begin}\n{table}\n{end}{after}")
