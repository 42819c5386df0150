"""Files that are written whole or not at all, with errors that name them; the cache folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """$VIDL_CACHE, or vidl/ in $XDG_CACHE_HOME (default ~/.cache): what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VIDL_CACHE") or Path(base) / "vidl")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path to write to, which replaces `file` when the block ends.

    If the block fails, `file` is as before and nothing else is left.

    Raises:
        OSError: the file cannot be written, as on a full disk; names it.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with named(file, unfinished):
            yield unfinished
            unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def named(file: Path, unfinished: Path | None = None) -> Iterator[None]:
    """A block that writes to `file`: an OSError names it, since Python's errors of write do not.

    An error that names another file than `unfinished`, as one that is read, is unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(unfinished or file):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
