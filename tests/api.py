"""The public API as text: names and signatures, read from the sources.

python tests/api.py > tests/api.txt        # or: make api
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULE = re.compile(r"automodule:: (\S+)")


def modules() -> list[str]:
    """The modules of the reference in the manual."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return sorted({name for page in pages for name in MODULE.findall(page.read_text())} | {"vidl"})


def names(module: Any) -> list[str]:
    """The public names of a module that vidl defines."""
    known = getattr(module, "__all__", None) or [*getattr(module, "LAZY", ()), *vars(module)]
    return sorted(
        name
        for name in dict.fromkeys(known)
        if not name.startswith("_") and _is_own(module, getattr(module, name, None))
    )


def _is_own(module: Any, value: Any) -> bool:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    own = getattr(value, "__module__", "")
    listed = hasattr(module, "__all__") or module.__name__ in ("vidl", "vidl.ops")
    return own.startswith("vidl.") if listed else own == module.__name__


def lines() -> Iterator[str]:
    """One line for each function, class, method and field."""
    for module_name in modules():
        module = importlib.import_module(module_name)
        for name in names(module):
            value = inspect.unwrap(getattr(module, name))
            node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
            yield from _described(f"{module_name}.{name}", node)


def _described(name: str, node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{name}({ast.unparse(node.args)}){result}"
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"class {name}({bases})"
        for member in node.body:
            if isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith("_"):
                yield f"{name}.{ast.unparse(member)}"
            elif isinstance(member, ast.FunctionDef) and (
                not member.name.startswith("_") or member.name in ("__init__", "__call__")
            ):
                yield from _described(f"{name}.{member.name}", member)


if __name__ == "__main__":
    print("\n".join(lines()))
