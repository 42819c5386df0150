"""Files, folders and repositories of the Hub that Hugging Face datasets streams."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vidl.data.folders import matching
from vidl.data.video import BrokenClip

# What datasets calls the format of a suffix.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json",
            ".csv": "csv", ".tar": "webdataset"}  # fmt: skip
REPOSITORY = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")
FORM = "hf-hub:USER/NAME, hf-hub:USER/NAME@REVISION, or one of them with /FILES"
# How long the Hub may take to describe a repository, in seconds: datasets retries for much longer.
PATIENCE = 10.0


@dataclass(frozen=True)
class Opened:
    """A data set that datasets streams.

    Attributes:
        table: a `datasets.IterableDataset` that leaves videos and images encoded.
        files: the files that it reads.
        folder: where files that its rows name are: a folder, or hf://datasets/USER/NAME@COMMIT.
        commit: of a repository; empty for local files.
    """

    table: Any
    files: list[str]
    folder: str
    commit: str = ""

    def content(self, name: str) -> bytes:
        """A file of the repository.

        Args:
            name: its path in the repository, or the URL that datasets gives to it.

        Raises:
            BrokenClip: the repository does not give it.
        """
        from huggingface_hub import HfFileSystem

        path = name if name.startswith(f"{self.folder}/") else f"{self.folder}/{name}"
        try:
            return bytes(HfFileSystem().cat_file(path))
        except Exception as error:  # of the network, the Hub and the libraries between them
            raise BrokenClip(name, _reason(error)) from None


def open_streaming(
    names: Sequence[str], *, subset: str | None = None, split: str | None = None, commit: str = ""
) -> Opened:
    """Open tables, a folder or a repository for streaming.

    Args:
        names: files or globs of files of one format; or one folder; or one repository,
            `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`, or some of its files, such as
            `hf-hub:USER/NAME/data/train-*.parquet`.
        subset: what the Hub calls the subset or configuration of a folder or repository.
        split: of a folder or repository; default: train.
        commit: of a repository, in place of its revision.

    Raises:
        ValueError: there is no such file, folder or repository, it cannot be read, the files have
            several formats, or they cannot be read in the same order again.
    """
    if len(names) == 1 and names[0].startswith("hf-hub:"):
        return _repository(names[0], subset, split, commit)
    files = [file for name in names for file in matching(name)]
    if len(files) == 1 and Path(files[0]).is_dir():
        folder = os.path.realpath(files[0])
        builder = _builder(files[0], folder, name=subset)
        return Opened(_table(builder, split, files[0]), _files_of(builder), folder)
    missing = [name for name in files if not Path(name).is_file()]
    if missing or not files:
        given = ", ".join(missing) or "none"
        raise ValueError(
            f"need data.files as local tables, one local folder or one repository ({FORM}), got "
            f"{given}"
        )
    if subset is not None or split is not None:
        raise ValueError(
            "need data.split and data.subset with a folder or a repository only: tables are read "
            f"whole, got {subset if split is None else split}"
        )
    suffixes = {Path(name).suffix for name in files}
    if len(suffixes) > 1 or not suffixes <= BUILDERS.keys():
        raise ValueError(
            f"need tables (data.files) of one format among {', '.join(BUILDERS)}, got "
            f"{', '.join(sorted(suffixes)) or 'none'}"
        )
    files = sorted(files)
    builder = _builder(files[0], BUILDERS[suffixes.pop()], data_files=files)
    return Opened(_table(builder, None, files[0]), files, str(Path(files[0]).parent))


def _repository(given: str, subset: str | None, split: str | None, commit: str) -> Opened:
    match = REPOSITORY.fullmatch(given)
    if match is None:
        raise ValueError(f"need a repository as {FORM}, got {given}")
    from huggingface_hub import HfApi

    name, revision = match[1], commit or match[2]
    try:
        facts = HfApi().dataset_info(name, revision=revision, timeout=PATIENCE)
    except Exception as error:  # of the network, the Hub, or offline mode
        raise ValueError(
            f"need data.files as a repository of data sets that the Hub gives, got {given} "
            f"({_reason(error)}). Without a network, run `hf download {name} --repo-type dataset "
            "--local-dir data` where there is one, and set data.files=[data]"
        ) from None
    files = {"data_files": {split or "train": match[3]}} if match[3] else {}
    builder = _builder(given, name, name=subset, revision=facts.sha, **files)
    folder = f"hf://datasets/{name}@{facts.sha}"
    return Opened(_table(builder, split, given), _files_of(builder), folder, facts.sha or "")


def _builder(given: str, path: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(path, **options)
    except Exception as error:  # also of Arrow, the network and the Hub
        raise unreadable(given, error) from error


def _files_of(builder: Any) -> list[str]:
    splits = builder.config.data_files or {}
    return sorted(str(file) for files in splits.values() for file in files)


def _table(builder: Any, split: str | None, given: str) -> Any:
    """The rows of a split, with videos and images as they are stored."""
    split = split or "train"
    for part in split.split("+"):
        files = (builder.config.data_files or {}).get(part.strip(), [])
        metadata = [file for file in files if PurePosixPath(str(file)).stem == "metadata"]
        if len(metadata) > 1:
            # datasets keeps them in a set, whose order differs between processes
            raise ValueError(
                f"need one metadata file in the split {part} of {given}, got {len(metadata)}: join "
                "them, since their order is not the same on all ranks"
            )
    try:
        table = builder.as_streaming_dataset(split=split)
        # vidl decodes: only the frames that it needs, and with its checks
        return table.decode(False) if table.features else table
    except Exception as error:  # also of Arrow, tar files, the network and the Hub
        raise unreadable(given, error) from error


def unreadable(name: str, error: Exception) -> ValueError:
    """The error for files that datasets cannot read, as one line."""
    hint = "; data.source=shards reads tar files also if they are damaged or their JSON differs"
    return ValueError(f"cannot read {name}: {_reason(error)}{hint * name.endswith('.tar')}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
