"""Plain text to pretrain on: UTF-8 files, or JSON lines with ``{"text": "…"}``. A file of text is one document; a line of JSON is one too.

Documents are read in pieces, so that memory holds one piece and not the whole. A piece ends at the end of a line where it has one.

>>> [piece.text for piece in cut("a line\\nand another\\nthe end", limit=15)]
['a line\\n', 'and another\\n', 'the end']
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cluster.errors import DataError
from cluster.machine import expanded, files_in
from jobs import sources
from jobs.data.lines import Problem, decode, kind, lines

PIECE = 1 << 18
"""Characters of a piece at most."""
JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
DO = 'Save it as UTF-8, or write JSON lines with {"text": "..."} into a file that ends in .jsonl.'


class Piece(NamedTuple):
    text: str
    last: bool
    """Whether its document ends with it."""


def listed(named: Iterable[str]) -> list[str]:
    """The files behind what a command line names: a folder means all files in it but hidden ones, in the order of their names.

    Raises `BadRequest` where a folder has none.
    """
    found: list[str] = []
    for source in named:
        is_folder = not _is_elsewhere(source) and expanded(source).is_dir()
        found += map(str, files_in(expanded(source))) if is_folder else [source]
    return found


def _is_elsewhere(source: str) -> bool:
    """Whether it is a URL, an upload or a sample."""
    return "://" in source or source.startswith((sources.UPLOAD, sources.SAMPLE))


def pieces(source: str, fetch: sources.Fetch) -> Iterator[Piece]:
    """The documents of one source, in pieces. Raises `DataError` naming the file and the place."""
    raw, name = fetch(source), sources.title(source)
    for document in _json_lines(raw, name) if name.endswith(JSON_ENDINGS) else [_text(raw, name)]:
        yield from cut(document)


def cut(document: str, limit: int = PIECE) -> Iterator[Piece]:
    """A document in pieces of at most ``limit`` characters."""
    at = 0
    while at < len(document):
        end = min(len(document), at + limit)
        if end < len(document) and (line := document.rfind("\n", at, end)) >= 0:
            end = line + 1
        yield Piece(document[at:end], end == len(document))
        at = end


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start + 1} is not UTF-8 text.", DO) from None


def _json_lines(raw: bytes, name: str) -> Iterator[str]:
    for number, line in lines(raw):
        try:
            text = decode(line).get("text")
            if not isinstance(text, str):
                raise Problem(f"'text' is a JSON {kind(text)}", 'Write {"text": "..."} on each line.')
        except Problem as problem:
            raise problem.at(name, number) from None
        yield text
