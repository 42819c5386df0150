"""The backend that "auto" takes: measured on this device, shipped for it, or by a rule.

`vidl tune` measures and stores one file for each entry below the cache folder, in a folder of the
device and its software. A process reads them once for each device. A lookup then reads one
dictionary: it is legal while a CUDA graph is captured, and a constant for torch.compile.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidl.files import cache_folder, replaced
from vidl.kernels import device
from vidl.kernels.constant import assume_constant

# A JSON object from the name of a device to its entries, made from committed measurements.
SHIPPED = Path(__file__).with_name("shipped.json")
POLICIES = ("eager", "graph")
log = logging.getLogger("vidl")


class Key(NamedTuple):
    """The calls of an op that share a measurement.

    Attributes:
        op: name of the op.
        sizes: names of sizes, and their rounded binary logarithms.
        dtype: of the computation, as in "bfloat16".
        facts: names and values of other properties.
        gradient: whether a backward pass follows.
        policy: "graph" if no Python runs between the kernels, as in a CUDA graph; else "eager".
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    facts: tuple[tuple[str, Any], ...]
    gradient: bool
    policy: str = "eager"

    def __str__(self) -> str:
        sizes = (f"{name} ~{2**number}" for name, number in self.sizes)
        facts = (f"{name} {value}" for name, value in self.facts if value not in (False, ""))
        mode = "forward and backward" if self.gradient else "forward"
        return ", ".join([*sizes, *facts, self.dtype, mode])


def asked(kind: str) -> bool:
    """Whether anything asks for the keys of calls with "auto": entries, or a recorder.

    Args:
        kind: the type of device, as in "cuda".
    """
    return recorder is not None or torch.compiler.is_compiling() or bool(table(kind))


def key(
    op: str,
    kind: str,
    dtype: torch.dtype,
    tensors: Sequence[Tensor | None],
    sizes: Mapping[str, int],
    /,
    **facts: Any,
) -> Key | None:
    """The key of a call; None if a number is a symbol of torch.compile.

    A lookup would then compile again for another number.

    Args:
        kind: the type of device, as in "cuda".
        tensors: those that may require gradients.
        sizes: numbers of which only the magnitude matters.
        facts: booleans, words, and numbers that matter exactly.
    """
    numbers = (*sizes.values(), *facts.values())
    if torch.compiler.is_compiling():
        # Not above: it takes a second, and needs sympy.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        symbolic = not all(not isinstance(x, int) or has_static_value(x) for x in numbers)
    else:
        symbolic = any(isinstance(x, torch.SymInt) for x in numbers)
    if symbolic:
        return None
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    classes = tuple((name, round(math.log2(max(n, 1)))) for name, n in sizes.items())
    return Key(op, classes, str(dtype)[6:], tuple(facts.items()), gradient, _policy(kind))


def _policy(kind: str) -> str:
    if kind != "cuda":
        return "eager"
    graph = torch.compiler.is_compiling() or (
        device.exists(kind) and torch.cuda.is_current_stream_capturing()
    )
    return "graph" if graph else "eager"


@dataclass(frozen=True)
class Table:
    """The entries of a device: those of the user, and those of the package."""

    tuned: dict[Key, str] = field(default_factory=dict)
    shipped: dict[Key, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tuned or self.shipped)

    def get(self, wanted: tuple[Any, ...]) -> dict[str, str]:
        """The backends for a key by their sources, best first; a pure lookup."""
        parts = {"tuned": self.tuned, "shipped": self.shipped}
        entry: Any = wanted  # equal to the key of the same values
        return {source: part[entry] for source, part in parts.items() if entry in part}

    def as_json(self) -> dict[str, Any]:
        return {
            name: [{"key": key_as_json(k), "backend": b} for k, b in part.items()]
            for name, part in (("tuned", self.tuned), ("shipped", self.shipped))
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Table":
        """The inverse of `as_json`.

        Raises:
            ValueError: the value is something else.
        """
        try:
            return Table(*(_entries(value[name]) for name in ("tuned", "shipped")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"need a table of choices: {error!r}") from error


_tables: dict[tuple[str, int], Table] = {}
_frozen: dict[str, Table] = {}  # for each type of device, while `using` is active
_said: set[tuple[str, int]] = set()


def table(kind: str) -> Table:
    """The entries of the current device of a type; read once."""
    if kind in _frozen:
        return _frozen[kind]
    if not device.exists(kind):
        return Table()
    place = device.current(kind)
    if place not in _tables:
        _tables[place] = Table(_read_tuned(kind), _read_shipped(kind))
    return _tables[place]


def folder(kind: str) -> Path:
    """The folder of the user's entries for the current device of a type."""
    return cache_folder() / "choices" / device.digest(device.identity(kind))


def file_of(kind: str, entry: Key) -> Path:
    """The file of an entry of the user."""
    return folder(kind) / f"{entry.op}-{device.digest(key_as_json(entry))}.json"


def write(kind: str, entry: Key, backend: str, **measured: Any) -> None:
    """Choose a backend for a key from now on, in this process and in later ones.

    Args:
        measured: what the choice is based on; stored with it.

    Raises:
        OSError: the file cannot be written, as on a full disk; names it. The choice then holds for
            this process.
    """
    table(kind).tuned[entry] = backend
    file = file_of(kind, entry)
    content = {"key": key_as_json(entry), "backend": backend, **measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    about = file.with_name("device.txt")
    if not about.exists():
        with replaced(about) as unfinished:
            unfinished.write_text(json.dumps(device.identity(kind), indent=2) + "\n")
    with replaced(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def using(kind: str, frozen: Table) -> Iterator[None]:
    """Replace the entries of a type of device within the block, as a resumed run does."""
    before = dict(_frozen)
    _frozen[kind] = frozen
    try:
        yield
    finally:
        _frozen.clear()
        _frozen.update(before)


def share(kind: str) -> Table:
    """The entries of the first rank, on all ranks of torch.distributed; a collective call.

    Without it each rank would read its own cache, and ranks that choose differently compute
    differently or wait for each other.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return table(kind)
    values = [table(kind).as_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    assert values[0] is not None
    return Table.from_json(values[0])


def forced() -> str | None:
    """The backend that the environment names for all calls with "auto"."""
    backend = os.environ.get("VIDL_BACKEND")
    return None if backend in ("", "auto") else backend


@assume_constant
def lookup(kind: str, wanted: tuple[Any, ...] | None) -> str:
    """The backends that the environment, or else the entries, name for a call.

    Args:
        wanted: a key as a tuple, since torch.compile makes no constant of a named one; or None.

    Returns:
        Words such as "VIDL_BACKEND=native", or "tuned=native shipped=triton"; the best first. (A
        string, since torch.compile takes a list for an input of the graph.)
    """
    if backend := forced():
        return f"VIDL_BACKEND={backend}"
    if wanted is None:
        return ""
    return " ".join(f"{source}={backend}" for source, backend in table(kind).get(wanted).items())


@assume_constant
def say_untuned(kind: str, backend: str) -> None:
    """Say once for each device without entries that nothing was measured on it."""
    if not device.exists(kind):
        return
    place = device.current(kind)
    if place in _said or table(kind):
        return
    _said.add(place)
    if os.environ.get("RANK", "0") == "0":
        name = device.name_of(kind)
        log.warning(f"vidl: using {backend} on {name}; `vidl tune` measures the kernels on it")


# Called with the key of a call, the facts of `library.why_not`, and the op's arguments.
Note = Callable[[Key, dict[str, Any], Sequence[Any], dict[str, Any]], None]


class Recorder:
    """Notes the calls that "auto" chooses a backend for: see `recording`."""

    def __init__(self, note: Note) -> None:
        self.note = note
        self.last: tuple[Key | None, dict[str, Any]] = (None, {})

    def chosen(self, wanted: Key | None, facts: dict[str, Any]) -> None:
        """A backend was chosen for a call, which follows."""
        self.last = (wanted, facts)

    def ran(self, name: str, arguments: Sequence[Any], hints: dict[str, Any]) -> None:
        """An op runs: note it if its backend was chosen just before."""
        (wanted, facts), self.last = self.last, (None, {})
        if wanted is not None and wanted.op == name:
            self.note(wanted, facts, arguments, hints)


recorder: Recorder | None = None


@contextmanager
def recording(note: Note) -> Iterator[None]:
    """Note every call with backend "auto", except those in graphs of torch.compile."""
    global recorder
    before, recorder = recorder, Recorder(note)
    try:
        yield
    finally:
        recorder = before


def key_as_json(entry: Key) -> dict[str, Any]:
    """A key for JSON."""
    return entry._asdict() | {"sizes": dict(entry.sizes), "facts": dict(entry.facts)}


def key_from_json(values: dict[str, Any]) -> Key:
    """The inverse of `key_as_json`."""
    pairs = {name: tuple(dict(values[name]).items()) for name in ("sizes", "facts")}
    return Key(**{**values, **pairs})


def _entries(rows: list[dict[str, Any]]) -> dict[Key, str]:
    return dict(_entry(row) for row in rows)


def _entry(values: dict[str, Any]) -> tuple[Key, str]:
    """A key and its backend, from JSON.

    Raises:
        ValueError, TypeError, KeyError: the value is something else.
    """
    entry, backend = key_from_json(values["key"]), values["backend"]
    if entry.policy not in POLICIES or not isinstance(backend, str):
        raise ValueError(f"need a policy and a backend, got {entry.policy!r} and {backend!r}")
    hash(entry)
    return entry, backend


def _read_tuned(kind: str) -> dict[Key, str]:
    """The user's entries; a damaged file is no entry."""
    try:
        if not (cache_folder() / "choices").is_dir():  # nothing was ever tuned
            return {}
    except (OSError, RuntimeError):  # a user without a home, or who may not read it
        return {}
    entries = {}
    for file in sorted(folder(kind).glob("*.json")):
        try:
            entry, backend = _entry(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"vidl: {file} is damaged and ignored ({reason})", stacklevel=2)
        else:
            entries[entry] = backend
    return entries


def _read_shipped(kind: str) -> dict[Key, str]:
    return _entries(json.loads(SHIPPED.read_text()).get(device.name_of(kind), []))
