"""Append-only journals of small JSON documents in the store: ``<prefix>/<number>.json``, each written once.

The highest number wins, a number is taken by whoever creates it first, and nothing is ever changed. Moves of an alias, records of a
rollout and verdicts on a version are kept this way.
"""

from typing import Generic, TypeVar

from cluster.errors import StoreUnavailable
from cluster.store.objects import Store
from cluster.types import Durable

T = TypeVar("T", bound=Durable)


class Journal(Generic[T]):
    """The journals of one kind of document. Documents never change, so each is read once."""

    def __init__(self, store: Store, kind: type[T]) -> None:
        self.store = store
        self.kind = kind
        self._read: dict[tuple[str, int], T] = {}

    def numbers(self, prefix: str) -> list[int]:
        names = self.store.children(prefix)
        return sorted(int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit())

    def last(self, prefix: str) -> T | None:
        numbers = self.numbers(prefix)
        return self.read(prefix, numbers[-1]) if numbers else None

    def all(self, prefix: str) -> list[T]:
        """Oldest first."""
        return [self.read(prefix, number) for number in self.numbers(prefix)]

    def read(self, prefix: str, number: int) -> T:
        if (prefix, number) not in self._read:
            raw = self.store.get(f"{prefix}/{number:08d}.json")
            if raw is None:
                raise StoreUnavailable(f"Record {number} of {prefix} vanished from the store.", "Restore it from a backup.")
            self._read[prefix, number] = self.kind.model_validate_json(raw)
        return self._read[prefix, number]

    def append(self, prefix: str, number: int, document: T) -> T:
        """Write ``document`` as ``number``. Raises `Conflict` where somebody else has taken it."""
        self.store.put_new(f"{prefix}/{number:08d}.json", document.model_dump_json(indent=1).encode())
        self._read[prefix, number] = document
        return document
