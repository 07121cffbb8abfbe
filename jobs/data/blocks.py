"""Text as tokens in the store, cut into blocks of one length: what a pretraining run learns and measures.

The tokens of all documents stand one after the other, each document's end marked by a token. A block begins with the last token of the one before,
so every token but the very first is predicted exactly once.

>>> [block(number, length=4) for number in range(2)], blocks_of(8, length=4)
([(0, 4), (3, 7)], 2)
"""

import bisect
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from cluster.store.objects import Store
from jobs.data.rows import Row

SHARD_TOKENS = 1 << 22


class Shard(NamedTuple):
    path: str
    """In the store."""
    tokens: int


def block(number: int, length: int) -> tuple[int, int]:
    """Where the block begins and ends among all tokens."""
    first = number * (length - 1)
    return first, first + length


def blocks_of(tokens: int, length: int) -> int:
    """How many whole blocks there are."""
    return max(0, (tokens - 1) // (length - 1))


def write(store: Store, prefix: str, tokens: Iterable[np.ndarray[Any, Any]]) -> list[Shard]:
    """Write token ids as they come to objects under ``prefix``, in shards of `SHARD_TOKENS`. Memory holds one of them."""
    made: list[Shard] = []
    for held in _grouped(tokens):
        path = f"{prefix}/{len(made):06d}.npy"
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "tokens.npy"
            np.save(file, held)
            store.upload(path, file)
        made.append(Shard(path, len(held)))
    return made


def _grouped(tokens: Iterable[np.ndarray[Any, Any]]) -> Iterator[np.ndarray[Any, Any]]:
    held: list[np.ndarray[Any, Any]] = []
    count = 0
    for part in tokens:
        held.append(part)
        count += len(part)
        while count >= SHARD_TOKENS:
            joined = np.concatenate(held)
            yield joined[:SHARD_TOKENS]
            held = [joined[SHARD_TOKENS:]]
            count = len(held[0])
    if count:
        yield np.concatenate(held)


class Blocks(Sequence[Row]):
    """Some blocks of a text whose tokens are in the store. A shard is downloaded when one of its blocks is read first."""

    def __init__(self, store: Store, shards: Sequence[Shard], numbers: Sequence[int], length: int, cache: Path) -> None:
        """``numbers``: which blocks. ``cache``: a folder on this machine."""
        self.store, self.shards, self.numbers, self.length, self.cache = store, shards, numbers, length, cache
        self.firsts = [0, *itertools.accumulate(shard.tokens for shard in shards)]
        self.loaded: dict[int, np.ndarray[Any, Any]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        first, end = block(self.numbers[index], self.length)
        ids: list[int] = []
        while first < end:
            at = bisect.bisect_right(self.firsts, first) - 1
            part = self._shard(at)[first - self.firsts[at] : end - self.firsts[at]]
            ids += part.tolist()
            first += len(part)
        return Row(ids, 0)

    def _shard(self, at: int) -> np.ndarray[Any, Any]:
        if at not in self.loaded:
            self.loaded[at] = np.load(cached(self.store, self.shards[at].path, self.cache), mmap_mode="r")
        return self.loaded[at]


def cached(store: Store, path: str, folder: Path) -> Path:
    """The object at ``path`` as a file in ``folder``, under its own name."""
    file = folder / path.rpartition("/")[2]
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".{file.name}.{os.getpid()}"  # several workers of one machine may download it at once
        store.download(path, own)
        own.replace(file)
    return file
