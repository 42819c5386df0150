"""Sphinx settings: the manual is written in Markdown, the reference comes from the docstrings."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import vidl  # noqa: E402

project = "vidl"
author = "The vidl authors"
release = vidl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"vidl {release}"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
myst_heading_anchors = 3
