"""Parse JSON, JSON lines and CSV row by row, such that no row is lost without an error."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class BadAnnotation(ValueError):
    """An invalid annotation: file, line and what is needed."""

    def __init__(self, file: str | Path, line: int, problem: str):
        super().__init__(f"{file}:{line}: {problem}")


def encoding_of(file: Path) -> str:
    """UTF-16 if the file begins with its byte order mark, else UTF-8 with or without a mark."""
    with open(file, "rb") as data:
        return "utf-16" if data.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def checked(
    file: Path, entries: Iterable[tuple[int, Any]], build: Callable[[Any], T]
) -> Iterator[T]:
    """build(entry) of each pair of line and entry; errors get the file and the line.

    Args:
        file: the file of the entries.
        entries: line and entry.
        build: a function of an entry.

    Raises:
        BadAnnotation: `build` raised an error.
    """
    for line, entry in entries:
        try:
            yield build(entry)
        except KeyError as error:
            raise BadAnnotation(file, line, f"missing key {error}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise BadAnnotation(file, line, str(error)) from None


def text_field(entry: dict[str, Any], field: str) -> str:
    """A non-blank text; halves of characters, as in "\\ud83d", are replaced, UTF-8 has none.

    Raises:
        KeyError, ValueError: the field is missing, blank or no text.
    """
    return _text(entry[field], field)


def texts_field(entry: dict[str, Any], field: str) -> list[str]:
    """The texts of a field: a text, a list of texts, or none if it is missing or null.

    Raises:
        ValueError: the field is something else, or a text is blank.
    """
    value = entry.get(field)
    if value is None:
        return []
    if isinstance(value, list):
        return [_text(text, f"{field}[{number}]") for number, text in enumerate(value)]
    return [_text(value, field, "a non-blank text or a list of them")]


def name_field(entry: dict[str, Any], field: str, default: str | None = None) -> str:
    """A text or a number as text, such as an id.

    Raises:
        KeyError, ValueError: the field is missing and has no default, or is something else.
    """
    value = entry[field] if default is None else entry.get(field)
    if value is None and default is not None:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(value, field, "a non-blank text or a number")


def number_field(entry: dict[str, Any], field: str) -> float | None:
    """A finite number, or None if the field is missing or null.

    Raises:
        ValueError: the field is something else.
    """
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"need {field} as a number, got {value!r:.80}")
    return float(value)


def without_surrogates(text: str) -> str:
    """A text in which halves of characters, as in "\\ud83d", are replaced: UTF-8 has none."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _text(value: Any, field: str, need: str = "a non-blank text") -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"need {field} as {need}, got {value!r:.80}")
    return without_surrogates(value)


def table(
    file: Path, columns: Sequence[str], delimiter: str = ","
) -> Iterator[tuple[int, dict[str, str]]]:
    """First line and values of each row of a CSV file with a header.

    Args:
        file: a CSV file.
        columns: needed columns.
        delimiter: separates the values.

    Raises:
        BadAnnotation: a column is missing or has a name twice, a row has more or fewer values than
            the header, or a quote is not closed.
    """
    rows = lines(file, delimiter)
    _, header = next(rows, (1, []))
    missing = [name for name in columns if name not in header]
    if missing or len(set(header)) < len(header):
        given = ", ".join(header) or "nothing"
        need = f"need columns {', '.join(columns)}" if missing else "need distinct columns"
        raise BadAnnotation(file, 1, f"{need}, got {given}")
    for line, row in rows:
        if len(row) != len(header):
            raise BadAnnotation(file, line, f"need {len(header)} columns, got {len(row)}: {row}")
        yield line, dict(zip(header, row, strict=True))


def lines(
    file: Path, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """First line and values of each row of a CSV file; blank lines are skipped.

    Raises:
        BadAnnotation: a quote is not closed, or the file is not UTF-8.
    """
    with open(file, encoding=encoding_of(file), newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                row = next(reader, None)
            except (csv.Error, UnicodeError) as error:
                raise BadAnnotation(file, begin, f"in the row that begins here: {error}") from None
            if row is None:
                return
            if row:
                yield begin, row


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Line and object of each line of a file with one JSON object per line.

    Raises:
        BadAnnotation: a line is no object.
    """
    decoder = _decoder()
    with open(file, encoding=encoding_of(file)) as text:
        number = 0
        try:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield number, _object(file, number, decoder.decode(line))
        except json.JSONDecodeError as error:
            raise BadAnnotation(file, number, error.msg) from None
        except (UnicodeError, _Repeated) as error:
            line_of = number + isinstance(error, UnicodeError)
            raise BadAnnotation(file, line_of, str(error)) from None
        except RecursionError:
            raise BadAnnotation(file, number, "nested too deeply") from None


def members(file: Path, *names: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line, key and value of each object in a JSON list or object, parsed one by one.

    Args:
        file: a JSON file.
        names: keys of lists in the top-level object, of which the first present one is read; none:
            the top level is the list or object.

    Raises:
        BadAnnotation: invalid JSON, a key that occurs twice, text after the end, no such list, or a
            member that is no object.
    """
    text = _read(file)
    try:
        if not names:
            for line, key, _, value in _walk(file, text, 0):
                yield line, key, _object(file, line, value)
            return
        places: dict[str, int] = {}
        for line, key, at, _ in _walk(file, text, 0):
            if key in places:
                raise BadAnnotation(file, line, f"key {key!r} occurs twice")
            places[key] = at
        name = next((name for name in names if name in places), None)
        if name is None or text[places[name]] != "[":
            raise BadAnnotation(file, 1, f"need a list named {' or '.join(map(repr, names))}")
        for line, _, _, value in _walk(file, text, places[name], nested=True):
            yield line, "", _object(file, line, value)
    except json.JSONDecodeError as error:
        raise BadAnnotation(file, error.lineno, error.msg) from None


class _Repeated(ValueError):
    """A JSON object has a key twice; Python would keep the last value only."""


def _decoder() -> json.JSONDecoder:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            keys = [key for key, _ in pairs]
            raise _Repeated(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
        return entry

    return json.JSONDecoder(object_pairs_hook=once)


def _object(file: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadAnnotation(file, line, f"need an object, got {value!r:.40}")
    return value


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding=encoding_of(file))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadAnnotation(file, line, str(error)) from None


_BLANK = re.compile(r"\s*")


def _walk(
    file: Path, text: str, at: int, *, nested: bool = False
) -> Iterator[tuple[int, str, int, Any]]:
    """Line, key, position and value of each member of the list or object at a position."""

    def skip(at: int) -> int:
        return _BLANK.match(text, at).end()  # type: ignore[union-attr]  # it always matches

    decoder, at = _decoder(), skip(at)
    opening = text[at : at + 1]
    if opening not in ("[", "{"):
        raise BadAnnotation(file, 1, f"need a JSON list or object, got {text[at : at + 20]!r}")
    closing = "]" if opening == "[" else "}"
    line, counted, at = text.count("\n", 0, at) + 1, at, skip(at + 1)
    while text[at : at + 1] != closing:
        key = ""
        if opening == "{":
            key, at = decoder.raw_decode(text, at)
            at = skip(at)
            if not isinstance(key, str) or text[at : at + 1] != ":":
                raise json.JSONDecodeError("need a text as key, and :", text, at)
            at = skip(at + 1)
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except _Repeated as error:
            raise BadAnnotation(file, line, str(error)) from None
        except RecursionError:
            raise BadAnnotation(file, line, "nested too deeply") from None
        yield line, key, at, value
        at = skip(end)
        if text[at : at + 1] not in (",", closing):
            raise json.JSONDecodeError(f"need , or {closing}", text, at)
        at = skip(at + 1) if text[at] == "," else at
    at = skip(at + 1)
    if at < len(text) and not nested:
        problem = f"need the end of the file after {closing}, got {text[at : at + 20]!r}"
        raise json.JSONDecodeError(problem, text, at)
