"""`FIELD=VALUE` on the command line: one grammar for every command, that of YAML."""

import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def parse(texts: Sequence[str], form: str = "FIELD=VALUE") -> dict[str, Any]:
    """Read overrides; each value is a YAML scalar or list, as in Hydra.

    Args:
        texts: such as `mask_ratio=0.5` or `prune_layers=[3, 6]`. A text that is not YAML is a
            string.
        form: what the error message asks for.

    Returns:
        The values by the names of their fields; the last one counts.

    Raises:
        ValueError: a text has no "=".
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"need {form}, got {text!r}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[name] = value
    return values


def convert(values: Mapping[str, Any], hints: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    """Convert values to the types of their fields: YAML has no tuples and reads 1e-4 as text.

    Args:
        values: by the names of the fields.
        hints: the type of each known field.
        of: what has these fields, for the error message.

    Raises:
        ValueError: a field is unknown (the message suggests the closest match), or a value has
            another type.
    """
    converted = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{of} has no field {name!r}{_suggestion(name, hints)}")
        hint = hints[name]
        converted[name] = _cast(value, hint)
        if converted[name] is _WRONG:
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"need {name} as {wanted}, got {value!r}{_nearest(value, hint)}")
    return converted


def _suggestion(name: str, known: Iterable[str]) -> str:
    """The field of this name in another section, or the field with the most similar name."""
    field = name.rpartition(".")[2]
    similar = [other for other in known if other.rpartition(".")[2] == field]
    similar += difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def _nearest(value: Any, hint: Any) -> str:
    """The closest value of a type, for an error message."""
    if get_origin(hint) is Literal:
        close = difflib.get_close_matches(str(value), [str(x) for x in get_args(hint)], 1, 0.3)
        return f"; did you mean {close[0]!r}?" if close else ""
    if hint in (int, float):
        if isinstance(value, bool):
            return f"; did you mean {hint(value)}?"
        number = _number(value)
        if number is not _WRONG:
            whole = f"{number:.0f}" if math.isfinite(number) else "a finite number, e.g. 1000000"
            return f"; did you mean {whole}?"
    return ""


_WRONG = object()


def _cast(value: Any, hint: Any) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None if type(None) in parts else _WRONG
        options = (_cast(value, part) for part in parts if part is not type(None))
        return next((option for option in options if option is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in parts else _WRONG
    if origin in (list, tuple):
        values = list(value) if isinstance(value, list | tuple) else [value]
        if origin is list or parts[-1] is ...:
            parts = (parts[0],) * len(values)
        items = [_cast(item, part) for item, part in zip(values, parts, strict=False)]
        return _WRONG if len(values) != len(parts) or _WRONG in items else origin(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _WRONG
        pairs = {_cast(key, parts[0]): _cast(item, parts[1]) for key, item in value.items()}
        return _WRONG if _WRONG in (*pairs, *pairs.values()) else pairs
    if isinstance(value, bool):  # Python counts it as an int
        return value if hint is bool else _WRONG
    if hint is int and isinstance(value, int):  # exact, however large
        return value
    if hint in (int, float):
        number = _number(value)
        if number is _WRONG or not math.isfinite(number):
            return _WRONG
        return number if hint is float else int(number) if number == int(number) else _WRONG
    if hint is str and isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, hint) else _WRONG


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return _WRONG
