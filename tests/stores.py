"""Stores to run a test on: a folder, a bucket, one that counts, one whose answers get lost, one for many readers; aliases with a long past."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import StoreUnavailable
from cluster.publishing.history import History
from cluster.publishing.rollout import DIRECT, begin
from cluster.store.aliases import EVERY
from cluster.store.journal import encode, path_of
from cluster.store.objects import Store
from cluster.types import Generation, Lineage, Manifest, VersionId
from tests.s3 import Bucket, serving

KINDS = ("file", "s3")


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Store]:
    """An empty store: ``file`` under ``folder``, or ``s3`` over HTTP."""
    if kind == "file":
        yield Store((folder / "store").as_uri())
        return
    with serving() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield Filled("s3://pool/store", bucket)


class Filled(Store):
    """A store in a bucket of this process, which can be filled without asking it."""

    def __init__(self, url: str, bucket: Bucket) -> None:
        super().__init__(url)
        self.bucket = bucket


class Counting(Store):
    """A store that counts what it is asked; each of these is one request to a bucket, or a few for a long listing."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: Counter[str] = Counter()

    def get(self, path: str) -> bytes | None:
        self.asked["get"] += 1
        return super().get(path)

    def size(self, path: str) -> int | None:
        self.asked["size"] += 1
        return super().size(path)

    def children(self, prefix: str) -> list[str]:
        found = super().children(prefix)
        self.asked["children"] += 1
        self.asked["names"] += len(found)
        return found

    def read_range(self, path: str, start: int, end: int) -> bytes | None:
        self.asked["read_range"] += 1
        return super().read_range(path, start, end)

    def put_new(self, path: str, data: bytes) -> None:
        self.asked["put_new"] += 1
        super().put_new(path, data)

    def download(self, path: str, target: Path) -> None:
        self.asked["download"] += 1
        super().download(path, target)

    @property
    def total(self) -> int:
        return sum(count for what, count in self.asked.items() if what != "names")


class Losing(Store):
    """A store whose answers are lost: what is written is written, and the writer is told that the store failed."""

    lost = 0

    def put_new(self, path: str, data: bytes) -> None:
        super().put_new(path, data)
        if self.lost:
            self.lost -= 1
            raise StoreUnavailable("The answer was lost.")


class Together(Store):
    """A store that gives objects to ``readers`` threads that ask for one at the same time, and to no fewer."""

    def __init__(self, url: str, readers: int) -> None:
        super().__init__(url)
        self.barrier = threading.Barrier(readers, timeout=10)
        self.lock = threading.Lock()
        self.gets = 0

    def get(self, path: str) -> bytes | None:
        self.barrier.wait()
        with self.lock:
            self.gets += 1
        return super().get(path)


def lived(store: Store, alias: str, count: int, adapters: int = 24) -> None:
    """Write an alias with ``count`` generations as its movers would have left it: a weights version, and moves among adapters on it.

    Straight into the folder or through the store, without asking it anything.
    """
    base = VersionId(alias, 1)
    ids = [base, *(VersionId(alias, n) for n in range(2, adapters + 2))]
    for id in ids:
        kind = "weights" if id == base else "adapter"
        manifest = Manifest(id=id, kind=kind, base=None if id == base else base, files=(), lineage=Lineage(), created_s=0)
        write(store, f"versions/{id.name}/{id.n}/manifest.json", encode(manifest))
    history = History(alias=alias)
    for n in range(1, count + 1):
        stable = ids[n % len(ids)]
        move = Generation(alias=alias, generation=n, stable=stable, reason="r", author="a", time_s=n, rollout=n)
        write(store, path_of(f"aliases/{alias}", n), encode(move))
        rollout = begin(alias, n, stable, None, DIRECT, "r", "a", n)
        write(store, path_of(f"rollouts/{alias}/{n}", 1), encode(rollout))
        history = history.after(n, move, lambda id: base)
        if n % EVERY == 0 and n > count - 2 * EVERY:
            write(store, path_of(f"aliases/{alias}/snapshots", n), encode(history))


def write(store: Store, path: str, data: bytes) -> None:
    if isinstance(store, Filled):
        return store.bucket.store(f"store/{path}", data)
    assert store.local_root
    target = store.local_root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
