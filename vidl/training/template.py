"""A commented configuration file for a user's own clips; the comments are those of the fields."""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vidl.training.config import GIVEN, SECTIONS, Config, meanings


def write(name: str, overrides: Sequence[str] = ()) -> Path:
    """Write a configuration with all fields and their meanings.

    Args:
        name: of the run; the file is NAME.yaml, its annotations default to NAME.json.
        overrides: `section.field=value`, see `Config.read`.

    Returns:
        The file.

    Raises:
        ValueError: the name is not a file name, the file exists, or see `Config.read`.
        OSError: the file cannot be written.
    """
    if not name or name.startswith((".", "-")) or Path(name).name != name:
        raise ValueError(f"need NAME as a plain file name, got {name!r}")
    name = name.removesuffix(".yaml")
    file = Path(f"{name}.yaml")
    base = {"data.files": [f"{name}.json"], "run.folder": f"runs/{name}"}
    text = "\n".join(_lines(name, Config.read(None, overrides, base)))
    try:
        with open(file, "x") as out:
            out.write(text)
    except FileExistsError:
        raise ValueError(f"{file} exists; remove it, or choose another NAME") from None
    return file


def _lines(name: str, config: Config) -> Iterator[str]:
    yield f"# {config.model.name} on your own clips:  vidl pretrain --config {name}.yaml"
    yield "# Fields have their defaults, except data.files and run.folder; remove those you keep."
    for section, kind in SECTIONS.items():
        yield ""
        yield from _comment(inspect.getdoc(kind) or "", "")
        yield f"{section}:"
        given = getattr(config, section)
        for field in dataclasses.fields(kind):
            if "about" in field.metadata:
                yield from _comment(field.metadata["about"], "  ")
                yield f"  {field.name}: {_shown(getattr(given, field.name))}"
        if section == "model":
            yield from _recipe(config)
    yield ""


def _recipe(config: Config) -> Iterator[str]:
    """The fields of the recipe; those of the preset are comments, so that another preset counts."""
    recipe: Any = config.recipe()
    about = meanings(type(recipe))
    yield ""
    yield f"  # The recipe: values of the preset {config.model.preset}, unless you set another."
    for field in dataclasses.fields(recipe):
        if field.name not in GIVEN:
            yield from _comment(about[field.name], "  ")
            mark = "" if field.name in config.model.recipe else "# "
            yield f"  {mark}{field.name}: {_shown(getattr(recipe, field.name))}"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, 90, initial_indent=mark, subsequent_indent=mark)


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    )
