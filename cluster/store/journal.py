"""Append-only journals of small JSON documents in the store: ``<prefix>/<number>.json``, each written once.

The highest number wins, a number is taken by whoever creates it first, and nothing is ever changed. Moves of an alias, records of a
rollout and verdicts on a version are kept this way. Numbers start at 1 and have no gaps, so the newest is found by asking for single
objects and never by listing: a journal of 100,000 documents is read as fast as one of 10.

One damaged document (cut off, overwritten, missing) is reported and costs nothing but itself: see `Damages`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import pydantic_core
from pydantic import ValidationError

from cluster import logs
from cluster.errors import Conflict, RecordDamaged, StoreUnavailable
from cluster.store.objects import Store
from cluster.types import Record

T = TypeVar("T", bound=Record)
Key = TypeVar("Key")
Value = TypeVar("Value")

AHEAD = 3
"""How many missing documents in a row are noticed, where documents follow them."""
REMEMBERED = 4096
"""Documents that one journal keeps in memory, a few kilobytes each at most."""

log = logs.logger(__name__)


class Damaged(NamedTuple):
    """One document that cannot be read."""

    path: str
    why: str


class Damages:
    """What is damaged in the store, as far as this process has met it. Each is logged once, and once more when it can be read again."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()

    def report(self, path: str, why: str) -> None:
        with self._lock:
            new = self._found.get(path) != why
            self._found[path] = why
        if new:
            log.error("%s in the store is damaged: %s", path, why)

    def healed(self, path: str) -> None:
        if path in self._found:
            with self._lock:
                self._found.pop(path, None)
            log.info("%s in the store can be read again", path)

    def listed(self, under: str = "") -> list[Damaged]:
        with self._lock:
            return [Damaged(path, why) for path, why in sorted(self._found.items()) if path.startswith(under)]


class Recent(OrderedDict[Key, Value]):
    """A mapping that forgets what was set the longest ago, above `REMEMBERED`. Threads may share it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def __setitem__(self, key: Key, value: Value) -> None:
        with self._lock:
            super().__setitem__(key, value)
            self.move_to_end(key)
            if len(self) > REMEMBERED:
                self.popitem(last=False)


class Journal(Generic[T]):
    """The journals of one kind of document. Documents never change, so what was read is remembered."""

    def __init__(self, store: Store, kind: type[T], damages: Damages | None = None) -> None:
        self.store = store
        self.kind = kind
        self.damages = damages or Damages()
        self._read: Recent[str, T] = Recent()
        self._highest: Recent[str, int] = Recent()
        """Prefix → the highest number that was ever seen there."""

    def highest(self, prefix: str, known: int = 0) -> int:
        """The highest number that is taken, readable or not; 0 where there is none. ``known``: a number that is taken for certain.

        The first time for a prefix that is about 2·log₂(newest - known) questions to the store, afterwards as many as a few new documents.
        """
        remembered = self._highest.get(prefix)
        ahead = 1 if remembered is not None else AHEAD
        found = highest(lambda n: self._exists(prefix, n), max(known, remembered or 0), ahead)
        self._highest[prefix] = found
        return found

    def newest(self, prefix: str, known: int = 0) -> T | None:
        """The newest document, None where there is none. Raises `RecordDamaged` where it cannot be read: the one before is no substitute
        for whoever decides by the newest."""
        number = self.highest(prefix, known)
        return self.read(prefix, number) if number else None

    def recent(self, prefix: str, count: int, known: int = 0) -> list[T]:
        """Of the newest ``count`` documents those that can be read, oldest first. Damaged ones are reported."""
        last = self.highest(prefix, known)
        found = (self.readable(prefix, number) for number in range(max(1, last - count + 1), last + 1))
        return [document for document in found if document is not None]

    def readable(self, prefix: str, number: int) -> T | None:
        """The document, None where it is damaged or missing, which is reported."""
        try:
            return self.read(prefix, number)
        except RecordDamaged:
            return None

    def read(self, prefix: str, number: int) -> T:
        """A document that is known to exist. Raises `RecordDamaged`."""
        if (document := self.find(prefix, number)) is None:
            raise self._damaged(path_of(prefix, number), "it is missing")
        return document

    def find(self, prefix: str, number: int) -> T | None:
        """The document, None where the number is not taken. Raises `RecordDamaged` where there is something else."""
        path = path_of(prefix, number)
        if (known := self._read.get(path)) is not None:
            return known
        raw = self.store.get(path)
        if raw is None:
            return None
        try:
            document = self._read[path] = decode(self.kind, raw)
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        self.damages.healed(path)
        return document

    def append(self, prefix: str, number: int, document: T) -> T:
        """Write ``document`` as ``number``. Raises `Conflict` where somebody else has taken it."""
        self.store.put_own(path_of(prefix, number), encode(document))
        self._read[path_of(prefix, number)] = document
        if self._highest.get(prefix) == number - 1:
            self._highest[prefix] = number
        return document

    def _exists(self, prefix: str, number: int) -> bool:
        path = path_of(prefix, number)
        return path in self._read or self.store.size(path) is not None

    def _damaged(self, path: str, why: str) -> RecordDamaged:
        self.damages.report(path, why)
        return RecordDamaged(f"{path} in the store is damaged: {why}.", "Restore it from a backup; everything else goes on.")


def path_of(prefix: str, number: int) -> str:
    return f"{prefix}/{number:08d}.json"


def highest(exists: Callable[[int], bool], known: int = 0, ahead: int = 1) -> int:
    """The highest number for which ``exists`` holds, where numbers have no gaps of ``ahead`` or more; ``known`` where none is above it.

    It gallops (known + 1, + 2, + 4, …) until one is not there, and halves the distance from then on. For example, from 0 with 5 numbers
    taken it asks for 1, 2, 4, 8, 6, 5, and then, with ``ahead`` 3, for 7 and 8.
    """
    low, step = known, 1
    while exists(low + step):
        low, step = low + step, step * 2
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exists(middle) else (low, middle)
    beyond = next((n for n in range(low + 2, low + ahead + 1) if exists(n)), None)
    return low if beyond is None else highest(exists, beyond, ahead)


def encode(document: Record) -> bytes:
    """The bytes to write: in the form that this release knows, or in the newer one that the document came in."""
    form = max(document.SCHEMA, document.schema_version)
    return document.model_copy(update={"schema_version": form}).model_dump_json(indent=1).encode()


def decode(kind: type[T], raw: bytes) -> T:
    """The document in ``raw``. Unknown fields are kept where a newer release wrote it. Raises `ValueError` in a few words."""
    try:
        values: Any = pydantic_core.from_json(raw)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})" if raw else "it is empty") from None
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    form: Any = cast(dict[str, Any], values).get("schema", 1)
    newer = isinstance(form, int) and form > kind.SCHEMA
    try:
        return kind.model_validate_json(raw, extra="allow" if newer else "forbid")
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        words = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'document'}: {one['msg']}" for one in wrong[:3])
        by = f" (it was written in form {form}, this release knows {kind.SCHEMA})" if newer else ""
        raise ValueError(f"{words}{by}") from None


def keep(store: Store, path: str, data: bytes) -> bool:
    """Create ``path`` where nobody has, as an aid to later readers: whether it is there now. What fails is only logged."""
    try:
        store.put_new(path, data)
    except Conflict:
        return True
    except StoreUnavailable as error:
        log.warning("not written: %s", error)
        return False
    return True
