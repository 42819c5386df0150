"""The choices of a run: "auto" takes the same backends until its end, also when it resumes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidl.files import replaced
from vidl.kernels import choices
from vidl.training import checkpoints
from vidl.training.parallel import Ranks

NAME = "choices.json"


def resumes(folder: Path) -> bool:
    """Whether the folder has a run that continues with its choices."""
    return checkpoints.newest(folder) is not None and (folder / NAME).is_file()


@contextmanager
def frozen(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Use the choices of the run in a folder, or those of this device for a new run, on all ranks.

    Backends differ in the last bits: a run that resumed with others would not repeat its losses,
    and ranks that choose differently would not compute the same.

    Raises:
        ValueError: the file of the choices is damaged.
    """
    kind = ranks.device.type
    table = _read(folder / NAME) if resumes(folder) else choices.table(kind)
    with choices.using(kind, table):
        shared = choices.share(kind)
    with choices.using(kind, shared):
        yield


def save(folder: Path, ranks: Ranks) -> None:
    """Write the choices of the run into its folder; on the first rank."""
    with replaced(folder / NAME) as unfinished:
        table = choices.table(ranks.device.type)
        unfinished.write_text(json.dumps(table.as_json(), indent=1) + "\n")


def _read(file: Path) -> choices.Table:
    try:
        return choices.Table.from_json(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); without it the run resumes with the "
                         "choices of this device") from error  # fmt: skip
