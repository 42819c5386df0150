"""A lock of a run's folder: two processes would overwrite each other's checkpoints."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vidl.training.parallel import Ranks

NAME = ".lock"


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder of a run; the system gives it back when the process ends, however it ends.

    Args:
        folder: folder of the run; created if missing.
        ranks: this rank; the first one holds the lock, and all of them must call this.

    Raises:
        ValueError: another process holds the folder.
    """
    file, problem, new = None, None, not folder.exists()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / NAME, "a+")  # noqa: SIM115  held until the run ends
        problem = _lock(file)
    try:
        problem = ranks.gathered(problem)[0]
        if problem is not None:
            raise ValueError(f"{folder} is in use by {problem}: need another run.folder, or wait")
        if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)) < ranks.world_size:
            check_shared(folder, ranks)
        yield
    finally:
        if file is not None:
            # a run that failed before its first file leaves no folder
            if new and [path.name for path in folder.iterdir()] == [NAME]:
                (folder / NAME).unlink()
                folder.rmdir()
            file.close()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Check that all ranks write to the same folder; all of them must call this.

    Raises:
        ValueError: the first rank does not see what another one writes.
    """
    marks = [folder / f".rank-{rank}" for rank in range(ranks.world_size)]
    folder.mkdir(parents=True, exist_ok=True)
    marks[ranks.rank].touch()
    ranks.wait()
    unseen = [rank for rank, mark in enumerate(marks) if not mark.exists()]
    unseen = ranks.gathered(unseen)[0]
    marks[ranks.rank].unlink()
    if unseen:
        raise ValueError(
            "need run.folder on a file system that all nodes share: rank 0 does not see what rank "
            f"{', '.join(map(str, unseen))} writes to {folder.absolute()}"
        )


def _lock(file: TextIO) -> str | None:
    """Lock an open file; returns the process that holds it, if there is one."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:  # a file system without locks
        warnings.warn(f"cannot lock {file.name}: {error}", stacklevel=2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None
