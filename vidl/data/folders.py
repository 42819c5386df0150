"""Names that stand for several files: globs, and folders of clips with their captions."""

import glob
import warnings
from collections.abc import Iterator
from pathlib import Path

from vidl.data.formats import IMAGES, VIDEOS, Row, kind_of
from vidl.data.parsing import BadAnnotation, encoding_of, without_surrogates

METADATA = ("metadata.csv", "metadata.jsonl")


def matching(name: str | Path) -> list[str]:
    """The files or folders that match a glob, sorted; a name that is no glob, or exists, is itself.

    Args:
        name: a file, a folder or a glob; `**` matches folders in folders.

    Raises:
        ValueError: nothing matches.
    """
    name = str(name)
    if not glob.has_magic(name) or Path(name).exists():
        return [name]
    names = sorted(glob.glob(name, recursive=True))
    if not names:
        raise ValueError(f"need files that match {name}, got none")
    return names


def annotations_of(folder: Path) -> Path:
    """The annotation file of a folder, as Hugging Face names it, or else the folder itself.

    Raises:
        ValueError: there are several.
    """
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder}: need one of {' and '.join(METADATA)}, got both")
    return files[0] if files else folder


def contents(folder: Path) -> list[Path]:
    """The clips, images and texts in a folder and its folders, sorted; hidden ones are left out."""
    suffixes = {f".{suffix}" for suffix in (*VIDEOS, *IMAGES, "txt")}
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def captioned(folder: Path) -> Iterator[Row]:
    """A folder of clips and images; the caption of a.mp4 is the text of a.txt beside it.

    Texts without a clip are skipped with a warning.

    Raises:
        BadAnnotation: a text is blank or not UTF-8.
        ValueError: there are no clips, or a clip has no text.
    """
    files = contents(folder)
    texts = {file for file in files if file.suffix.lower() == ".txt"}
    clips = [file for file in files if file not in texts]
    if not clips:
        raise ValueError(f"{folder}: need {' or '.join(METADATA)}, or clips with texts beside them")
    unused = texts - {clip.with_suffix(".txt") for clip in clips}
    if unused:
        warnings.warn(
            f"{folder}: {len(unused)} texts without a clip are skipped, as {min(unused)}",
            stacklevel=2,
        )
    for clip in clips:
        caption = _text_of(clip)
        name = str(clip.relative_to(folder))
        yield Row(name, kind=kind_of(name), id=clip.stem, captions=[caption])


def _text_of(clip: Path) -> str:
    file = clip.with_suffix(".txt")
    if not file.is_file():
        raise ValueError(
            f"{clip}: need its caption in {file.name} beside it, or {' or '.join(METADATA)} in the "
            "folder of the clips"
        )
    try:
        text = file.read_text(encoding=encoding_of(file)).strip()
    except UnicodeError as error:
        raise BadAnnotation(file, 1, f"need a text in UTF-8: {error}") from None
    if not text:
        raise BadAnnotation(file, 1, "need a caption, got a blank text")
    return without_surrogates(text)
