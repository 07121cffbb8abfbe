"""JSON lines: one object on each line of a file, with the line's number for whoever has to correct it."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from cluster.errors import DataError

One = TypeVar("One")
LINES = "Write one object per line. A JSON array or an indented file is not JSON lines."


class Line(NamedTuple):
    number: int
    """Counted from 1; blank lines count."""
    raw: bytes


class Problem(Exception):
    """What is wrong with one line, and what the user can do."""

    def __init__(self, what: str, do: str) -> None:
        super().__init__(what)
        self.what, self.do = what, do

    def at(self, source: str, number: int) -> DataError:
        return DataError(f"{source}, line {number}: {self.what}.", self.do)


def lines(raw: bytes) -> Iterator[Line]:
    """The lines that are not blank. Only a newline ends a line, because JSON strings may hold U+2028."""
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield Line(number, line)


def objects(raw: bytes, source: str, made: Callable[[dict[str, Any], int], Iterable[One]]) -> Iterator[One]:
    """What ``made(value, number)`` makes of each line's object. Its `Problem` becomes a `DataError` with the file ``source`` and the line."""
    for number, line in lines(raw):
        try:
            yield from made(decode(line), number)
        except Problem as problem:
            raise problem.at(source, number) from None


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises `Problem`.

    A key that comes twice is a problem: JSON's readers keep one of the two values, and not all of them the same one.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"byte {error.start + 1} is not UTF-8 text", "Is this a binary file? Save it as UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Problem(f"not JSON: {error}", LINES) from None
    if not isinstance(value, dict):
        raise Problem(f"a JSON {kind(value)} where an object should be", LINES)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Problem(f"the key {twice!r} comes twice in one object", "Keep the value that you mean.")
    return value


def _no_number(name: str) -> NoReturn:
    raise Problem(f"not JSON: {name} is no number there", "Write null, or leave the key out.")


def kind(value: Any) -> str:
    """JSON's name for the type of a decoded value.

    >>> [kind(value) for value in ({}, [], "", True, None, 1.5)]
    ['object', 'array', 'string', 'boolean', 'null', 'number']
    """
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
