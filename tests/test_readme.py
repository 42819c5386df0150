"""Every code block of README.md and of the manual: Python runs, commands and configurations parse.

A block that cannot run here has the reason in the line above it: `<!-- not run: reason -->`.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from vidl import cli, models
from vidl.bench.commands import READERS
from vidl.training import Config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks of text, JSON, and directives of Sphinx have nothing to run.
RUN = ("python", "sh", "yaml")
NOT_RUN = ("text", "json", "{toctree}", "{image}", "{eval-rst}", "{vidl-config}", "{vidl-commands}")


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks_of(page: Path) -> list[Block]:
    pattern = r"(?:^<!-- not run: *(.*?) *-->\n)?^```(\S*).*?\n(.*?)^```$"
    matches = re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, language, text, reason or None) for reason, language, text in matches]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = {
    line
    for block in BLOCKS
    if block.language == "sh" and block.reason is None
    for line in block.text.splitlines()
    if line.strip()
}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
# What a program needs that is not installed everywhere.
NEEDS = {"timm": "timm", "transformers": "transformers", "vidl.data": "av"}


def programs() -> dict[str, str]:
    """Python programs by name: each block of README, and all blocks of a page of the manual."""
    by_name: dict[str, list[str]] = {}
    for number, block in enumerate(BLOCKS):
        if block.language == "python" and block.reason is None:
            name = str(block.page.relative_to(ROOT))
            by_name.setdefault(f"{name}-{number}" if block.page == README else name, []).append(
                block.text
            )
    return {name: "\n".join(texts) for name, texts in by_name.items()}


PROGRAMS = programs()


def test_blocks_are_of_known_languages_and_few_are_not_run():
    assert {block.language for block in BLOCKS} <= {*RUN, *NOT_RUN}
    marks = sum(page.read_text().count("<!-- not run") for page in PAGES if page.parent != ROOT)
    assert sum(block.reason is not None for block in BLOCKS) == marks <= 3


def test_code_comes_early_in_readme():
    before = README.read_text().split("```")[0]
    assert len(re.sub(r"<[^>]*>", "", before).split()) < 160  # words; read aloud, one minute


def test_the_numbers_of_readme_are_in_its_results():
    text = README.read_text()
    first, results = text.split("## Install")[0], text.split("<!-- results -->")[1]
    row = next(line for line in results.splitlines() if line.startswith("| mac tiny"))
    dense, *times = (float(ms.replace(",", "")) for ms in re.findall(r"\| ([\d,]+) ms", row))
    numbers = re.findall(r"([\d,.]+) (×|ms)", first)
    assert [unit for _, unit in numbers] == ["×", "ms", "ms", "×", "×"]
    speedup, start, end, eager, compiled = (float(n.replace(",", "")) for n, _ in numbers)
    assert (start, end) == (dense, times[2])
    # The times in the table are rounded.
    for number, time in zip((eager, compiled, speedup), times, strict=True):
        assert number == pytest.approx(start / time, abs=0.02)


@pytest.mark.parametrize("name", PROGRAMS)
def test_python_runs(name, tmp_path):
    for word, library in NEEDS.items():
        if word in PROGRAMS[name]:
            pytest.importorskip(library)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # also where vidl is not installed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{PROGRAMS[name]}\n{done.stderr}"


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_command_parses(line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # a variable of the environment
    program, *words = words
    if program == "torchrun":
        program, words = "vidl", words[words.index("vidl") + 1 :]
    if program == "make":
        variables = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
        assert {word.partition("=")[0] for word in words} <= TARGETS | variables
    elif program == "python":
        assert words[0] == "-m" or (ROOT / words[0]).is_file()
    elif program == "vidl":
        if words[0] == "bench" and words[1:2] and words[1] in READERS:
            words[:2] = [" ".join(words[:2])]  # as vidl.cli.main does
        args, rest = cli.build_parser().parse_known_args(words)
        check_fields(args, [*getattr(args, "overrides", []), *rest])
    else:
        assert program == "pip"


def check_fields(args: argparse.Namespace, fields: list[str]) -> None:
    """The FIELD=VALUE of a command name fields that exist."""
    assert all(re.match(r"[a-z_.]+=", field) for field in fields)
    if hasattr(args, "model"):  # vidl summary and vidl savings
        recipe = models.recipe(args.model)
        assert all(hasattr(recipe, field.partition("=")[0]) for field in fields)
    elif fields:
        Config.read(None, ["data.files=[clips.json]", *fields])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.page)
def test_configuration_parses(block, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    Config.read(file)


def test_links_and_make_targets_exist():
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
        links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"src(?:set)?=\"(.+?)\"", text)
        assert not [link for link in links if not (page.parent / link).exists()], page


@pytest.mark.slow
def test_the_manual_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "reference/ops.html").read_text()
    assert "<pre><span></span>scores[j] = mean over heads" in html, "formulas are code"
