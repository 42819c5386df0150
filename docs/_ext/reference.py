"""Sphinx directives for commands and configuration, and what docstrings need to be rendered."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from vidl import cli, models
from vidl.training import config


class Commands(SphinxDirective):
    """One section for each command of `vidl`, from its parser."""

    def run(self) -> list[nodes.Node]:
        text = "\n".join(_command(parser) for parser in _leaves(cli.build_parser()))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class ConfigFields(SphinxDirective):
    """One table for each section of the configuration, from its dataclass."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(_tables()), allow_section_headings=True)


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _leaves(child)
            return
    yield parser


def _command(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().rstrip().replace("usage: ", "").replace("\n       ", "\n")
    lines = [f"## `{parser.prog}`", "", _escaped(parser.description or ""), ""]
    lines += ["```text", usage, "```", ""]
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and action.dest != argparse.SUPPRESS:
            names = formatter._format_action_invocation(action)
            about = (action.help or "") % {**vars(action), "prog": parser.prog}
            lines += [f"`{names}`", f": {_escaped(about)}", ""]
    return "\n".join(lines)


def _tables() -> Iterator[str]:
    for section, kind in config.SECTIONS.items():
        defaults = kind()
        rows = {
            f"{section}.{field.name}": (getattr(defaults, field.name), field.metadata["about"])
            for field in dataclasses.fields(kind)
            if "about" in field.metadata
        }
        yield from _table(f"## `{section}`", inspect.getdoc(kind) or "", rows)
        if section == "model":
            yield from _recipes()


def _recipes() -> Iterator[str]:
    for name, entry in models.MODELS.items():
        base = entry.presets["base"]
        about = config.meanings(type(base))
        rows = {
            f"model.{field.name}": (getattr(base, field.name), about[field.name])
            for field in dataclasses.fields(base)
            if field.name not in config.GIVEN
        }
        yield from _table(f"### Recipe of {name}", "Defaults of the preset base.", rows)


def _table(title: str, about: str, rows: dict[str, tuple[Any, str]]) -> Iterator[str]:
    yield from (title, "", _escaped(about), "", "| field | default | meaning |", "|---|---|---|")
    for name, (default, text) in rows.items():
        shown = "" if default in (None, [], ()) else f"`{_shown(default)}`"
        yield f"| `{name}` | {shown} | {_escaped(text)} |"
    yield ""


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _escaped(text: str) -> str:
    """Text as Markdown; what is between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_\[\]<>{}|#$])", r"\\\1", part)
        for part in parts
    )


def _skip(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool:
    """Skip the fields of a NamedTuple, which the docstring of the class describes."""
    return skip or type(value).__name__ == "_tuplegetter"


def _formulas(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Render an indented formula as code; in reST alone it would be a quotation."""
    for i in range(len(lines) - 1, 1, -1):
        begins = lines[i].startswith("    ") and not lines[i - 1]
        if begins and not lines[i - 2].startswith(" ") and not lines[i - 2].endswith("::"):
            lines[i:i] = [".. code-block:: text", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _formulas, priority=400)  # before napoleon, 500
    app.add_directive("vidl-commands", Commands)
    app.add_directive("vidl-config", ConfigFields)
    return {"parallel_read_safe": True}
