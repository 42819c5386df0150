"""The house rules that a machine can check: folders, names, letters; imports point down."""

import ast
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An op is a folder of kernels/ with an op.py; the other folders hold what several ops share.
OPS = sorted(file.parent.name for file in ROOT.glob("kernels/*/op.py"))
SHARED = {"groups", "patches"}
SOURCES = sorted(
    file.relative_to(ROOT)
    for folder in ("kernels", "bench", "vidl", "tests", "examples", "csrc")
    for file in (ROOT / folder).rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
)
KERNELS = [file for file in SOURCES if file.parts[0] == "kernels" and file.suffix == ".py"]
REFERENCES = [file for file in KERNELS if file.name == "reference.py"]
TRITON = [file for file in KERNELS if file.name.startswith("triton_")]


def imports(file: Path) -> Iterator[str]:
    """The full names of the modules, and of the names in them, that a file imports anywhere."""
    package = ["vidl", *file.with_suffix("").parts[:-1]]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            parts = [*parts, node.module] if node.module else parts
            yield ".".join(parts)
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_imports_finds_every_form():
    file = Path("kernels/masked_patch_embed/op.py")
    names = set(imports(file))
    assert {"torch", "torch.Tensor", "vidl.kernels.library"} <= names
    assert "vidl.kernels.masked_patch_embed.reference" in names  # from . import reference


def test_there_are_ops():
    assert "masked_patch_embed" in OPS
    folders = {file.parts[1] for file in KERNELS if len(file.parts) > 2}
    assert folders == {*OPS, *SHARED}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files(op):
    parts = ("__init__.py", "op.py", "reference.py", "triton_kernels.py")
    wanted = [f"kernels/{op}/{part}" for part in parts]
    # csrc/<op>/cuda.cu beside them, for an op whose CUDA kernels are written.
    wanted += [f"csrc/{op}/op.cpp", f"tests/test_{op}.py", f"bench/ops/{op}.py"]
    missing = [file for file in wanted if not (ROOT / file).is_file()]
    assert not missing


def test_a_source_of_csrc_is_an_op():
    # The parts of an op, and what several ops share, are headers.
    sources = [file for file in SOURCES if file.parts[0] == "csrc" and file.suffix != ".h"]
    assert {file.parts[1] for file in sources} == set(OPS)
    assert {file.name for file in sources} == {"op.cpp", "cuda.cu"}


def test_the_folders_are_those_of_the_house():
    def folders(top: str) -> set[str]:
        depth = top.count("/") + 1
        return {
            file.parts[depth]
            for file in SOURCES
            if file.as_posix().startswith(f"{top}/") and len(file.parts) > depth + 1
        }

    assert folders("csrc") == {*OPS, *SHARED, "cpu", "cuda", "torch"}
    assert folders("bench") == {"ops", "measure", "training", "tuning", "report", "results"}
    assert folders("vidl/swapping") == {"timm", "torchvision", "huggingface"}


def test_no_name_repeats_its_folder():
    wrong = []
    for file in (file for file in SOURCES if file.parts[0] in ("kernels", "csrc", "bench", "vidl")):
        for folder, name in zip(file.parts[1:], [*file.parts[2:-1], file.stem], strict=False):
            if name == folder or name.startswith(f"{folder}_"):
                wrong.append(str(file))
    assert not wrong


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_the_folder_is_not_a_package_of_its_own(folder):
    # With an __init__.py, `kernels` would hide Hugging Face's package of that name from
    # transformers wherever Python is started in the root. Without one any real package wins.
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "vidl" / folder
    assert link.is_symlink(), f"run: ln -sfn ../{folder} vidl/{folder}"
    assert os.readlink(link) == f"../{folder}"


@pytest.mark.parametrize("file", KERNELS, ids=str)
def test_ops_import_nothing_from_above(file):
    above = [name for name in imports(file) if within(name, "vidl")]
    below = ("vidl.kernels", "vidl.files")
    above = [name for name in above if name != "vidl" and not within(name, *below)]
    assert not above, "ops know nothing of models, modules, benchmarks or the command line"


LAYERS = [
    "files",
    "overrides",
    "progress",
    "kernels",
    "ops",
    "nn",
    "masking",
    "objectives",
    "models",
    "swapping",
    "data",
    "evaluation",
    "training",
    "bench",
    "cli",
]


@pytest.mark.parametrize("layer", [x for x in LAYERS[:-1] if x != "kernels"])
def test_imports_point_down(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    folder = Path("vidl" if layer != "bench" else "", layer)
    files = [
        file
        for file in SOURCES
        if file.suffix == ".py" and folder in (file.with_suffix(""), *file.parents)
    ]
    assert files
    for file in files:
        wrong = [name for name in imports(file) if within(name, *(f"vidl.{x}" for x in above))]
        assert not wrong, f"{file}: command line, models, objectives, masks, modules, operations"


@pytest.mark.parametrize("file", KERNELS, ids=str)
def test_triton_is_imported_in_files_of_that_name_only(file):
    if file not in TRITON:
        assert not [name for name in imports(file) if within(name, "triton")]


@pytest.mark.parametrize("file", REFERENCES + TRITON, ids=str)
def test_backends_do_not_import_each_other(file):
    own = TRITON if file in TRITON else REFERENCES
    others = {"op", *(other.stem for other in REFERENCES + TRITON if other not in own)}
    assert not [name for name in imports(file) if name.split(".")[-1] in others]


@pytest.mark.parametrize("file", KERNELS, ids=str)
def test_the_parts_of_triton_kernels_are_its_own(file):
    # From outside only triton_kernels.py is loaded, by library.py when the backend is chosen.
    parts = {other.stem for other in TRITON}
    if file not in TRITON:
        assert not [name for name in imports(file) if name.split(".")[-1] in parts]


@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_import_other_ops(op):
    others = [f"vidl.kernels.{other}" for other in OPS if other != op]
    for file in (file for file in KERNELS if file.parts[1] == op):
        assert not [name for name in imports(file) if within(name, *others)]


def test_nothing_imports_the_folders_by_their_own_names():
    # `vidl` is the only import package: a module loaded under two names would declare its op twice.
    for file in (file for file in SOURCES if file.suffix == ".py"):
        wrong = [name for name in imports(file) if within(name, "kernels", "bench")]
        assert not wrong, f"{file} imports {wrong}"


def test_a_name_says_what_a_file_holds():
    vague = {"utils", "util", "common", "misc", "helpers", "core"}
    assert not [str(file) for file in SOURCES if vague & set(file.with_suffix("").parts)]


def names_bound(tree: ast.AST) -> Iterator[str]:
    """Names of variables, arguments and functions that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


@pytest.mark.parametrize("file", [f for f in SOURCES if f.suffix == ".py"], ids=str)
def test_a_variable_names_the_thing(file):
    empty = {"each", "found", "lead", "made", "turned", "way"}
    assert not empty & set(names_bound(ast.parse((ROOT / file).read_text())))


def test_there_are_no_banners():
    banner = re.compile(r"^\s*(#|//)\s*[-=*]{3,}", re.MULTILINE)
    sources = [file for file in SOURCES if file.suffix in (".py", ".cpp", ".cu", ".h")]
    assert not [str(file) for file in sources if banner.search((ROOT / file).read_text())]


@pytest.mark.parametrize("op", OPS)
def test_no_op_treats_the_reference_as_a_special_case(op):
    tree = ast.parse((ROOT / f"kernels/{op}/op.py").read_text())
    compared = [part for node in ast.walk(tree) if isinstance(node, ast.Compare)
                for part in (node.left, *node.comparators)]  # fmt: skip
    assert not [c for c in compared if isinstance(c, ast.Constant) and c.value == "reference"]


# CONTRIBUTING.md, Letters. In a clip or picture C, H and W are channels, height and width.
LETTERS = {"B", "T", "P", "N", "K", "M", "C", "C_in", "H", "W", "D", "G", "L", "S", "E"}
PUBLIC = ("ops", "nn", "masking", "objectives", "models", "data", "training", "evaluation")


def shapes(text: str) -> Iterator[tuple[str, ...]]:
    """The capital letters of every shape in brackets, as in `[B, K, C]`."""
    for inside in re.findall(r"\[([^\[\]\n]*)\]", text):
        symbols = re.findall(r"(?<![\w.])[A-Z](?:_[a-z]+)?(?![\w.])", inside)
        if symbols and not re.search(r"[\"'=:]", inside):
            yield tuple(symbols)


def test_shapes_finds_every_form():
    text = "x: [B, 2 * K, C], [total, H, D] or [T / t]; a list[Tensor], `[N + 1]`, x[B]"
    assert list(shapes(text)) == [("B", "K", "C"), ("H", "D"), ("T",), ("N",), ("B",)]


@pytest.mark.parametrize("part", PUBLIC)
def test_letters_of_public_docstrings(part):
    module = importlib.import_module(f"vidl.{part}")
    documented = [value for name, value in vars(module).items() if not name.startswith("_")]
    documented += [
        member
        for value in documented
        if inspect.isclass(value) and value.__module__.startswith("vidl.")
        for name, member in vars(value).items()
        if not name.startswith("_") or name == "__init__"
    ]
    wrong = []
    for value in documented:
        for shape in shapes(inspect.getdoc(value) or ""):
            # D is the size of a head and nothing else: no shape has it without the heads.
            if set(shape) - LETTERS or ("D" in shape and "H" not in shape):
                wrong.append((getattr(value, "__name__", value), shape))
    assert not wrong


def test_arguments_of_schemas_are_words():
    from vidl.kernels import library

    importlib.import_module("vidl.ops")
    for op in library.OPS.values():
        arguments = re.findall(r"[\w\[\]?]+ (\w+)(?=[,)=])", op.schema)
        assert arguments and not [name for name in arguments if len(name) == 1 and name.isupper()]


def test_position_is_time_then_space():
    from vidl.kernels import library

    importlib.import_module("vidl.ops")
    schemas = [op.schema for op in library.OPS.values() if re.search(r"\bspace\b", op.schema)]
    assert schemas and all(re.search(r"\btime, .*\bspace\b", schema) for schema in schemas)


def test_the_page_on_reliability_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 50 and len(named) == page.count("::")
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
    rows = [line for line in page.splitlines() if line.startswith("| ") and "promise" not in line]
    assert all("::" in line for line in rows)
