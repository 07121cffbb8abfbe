"""Many reads of the store at once. A bucket answers one question in some milliseconds, and hundreds of them in hardly more."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Name = TypeVar("Name")

READERS = 16
"""Threads that read at once."""


def read_all(read: Callable[[Name], T], names: Iterable[Name]) -> list[T]:
    """What ``read`` returns for each of ``names``, in their order. The first that raises ends it; what is under way is waited for.

    >>> read_all(str.upper, ["a", "b"])
    ['A', 'B']
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="store-reader") as threads:
        return list(threads.map(read, names))
