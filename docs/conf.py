"""Sphinx settings: the manual is written in Markdown, the reference comes from the docstrings."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "_ext")]

import vidl  # noqa: E402

project = "vidl"
author = "The vidl authors"
release = vidl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["_build"]
html_show_copyright = False
html_theme = "furo"
html_title = f"vidl {release}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# "Attributes: a, b: text" names two attributes; napoleon's own style takes `a` for the type of `b`.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_param = False
default_role = "code"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
