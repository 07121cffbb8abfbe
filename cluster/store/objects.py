"""Bytes under one URL: ``file:///…`` on a laptop, ``s3://``, ``gs://`` or ``az://`` on a cluster.

Everything is written create-only, so the highest number wins and compare-and-swap works on every backend: obstore's
``mode="create"`` raises `AlreadyExistsError` on local, memory and cloud stores alike, while conditional *update* does not
exist on local ones.
"""

import contextlib
import hashlib
import shutil
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from cluster.errors import BodyTooLarge, Conflict, StoreUnavailable
from cluster.store.connection import DOCUMENTS, FILES, Limits, connect, is_remote

CHUNK_BYTES = 8 << 20


class Store:
    """An object store. Pickles as its URL, so that Ray can carry it; the connection is made on first use."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def local_root(self) -> Path | None:
        """The folder behind a ``file://`` URL, None for a remote store."""
        parts = urlparse(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    @cached_property
    def backend(self) -> Any:
        """For documents and listings, whatever their size."""
        return self._connect(DOCUMENTS)

    @cached_property
    def bulk(self) -> Any:
        """For what takes longer the more there is of it. Only a remote store has limits to differ in, and one in memory would be another."""
        return self._connect(FILES) if is_remote(self.url) else self.backend

    def _connect(self, limits: Limits) -> Any:
        try:
            if self.local_root is not None:
                self.local_root.mkdir(parents=True, exist_ok=True)
            return connect(self.url, limits)
        except (BaseError, OSError, ValueError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"The store {self.url} cannot be used: {error}.",
            "Check that the path or bucket exists and is writable, or set another with SPRINGTIDE_STORE.",
            param="store",
        )

    def upload(self, path: str, file: Path) -> None:
        """Copy a local file to ``path`` in parts, whatever its size. Only for a path that a claim has made this caller's own:
        parts cannot be created conditionally."""
        try:
            obstore.put(self.bulk, path, file)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def put_new(self, path: str, data: bytes) -> None:
        """Create ``path``. Raises `Conflict` where it exists, `StoreUnavailable` where the store fails (disk full, no access)."""
        try:
            obstore.put(self.backend, path, data, mode="create")
        except AlreadyExistsError as error:
            raise Conflict(f"{path} already exists in the store.", "Take the next number and try again.") from error
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def put_own(self, path: str, data: bytes) -> None:
        """`put_new` for content that nobody else writes: a token, a time or an author is in it.

        A write may succeed and its answer be lost; asked again, the store says that the path exists. So the object is read back, and
        what is there decides: the own content is success.
        """
        try:
            self.put_new(path, data)
        except (Conflict, StoreUnavailable):
            if self._holds(path, data):
                return
            raise

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self.get(path) == data
        except StoreUnavailable:
            return False

    def put_stream(self, path: str, parts: Iterable[bytes], limit_bytes: int) -> int:
        """Write ``parts`` to ``path`` while they come, and return their size. Memory holds a few of them, whatever their sum.

        Raises `BodyTooLarge` above ``limit_bytes``, and whatever ``parts`` raises; nothing is at ``path`` then. As with `upload`, the
        path must be the caller's own.
        """
        count = _Count(limit_bytes)
        try:
            obstore.put(self.bulk, path, count.each(parts))
        except (BaseError, OSError) as error:
            raise error if error is count.failure else self._unavailable(error) from error
        return count.size

    async def put_stream_async(self, path: str, parts: AsyncIterable[bytes], limit_bytes: int) -> int:
        """`put_stream` for a body that arrives in an event loop."""
        count = _Count(limit_bytes)
        try:
            await obstore.put_async(self.bulk, path, count.each_async(parts))
        except (BaseError, OSError) as error:
            raise error if error is count.failure else self._unavailable(error) from error
        return count.size

    def rename(self, path: str, target: str) -> None:
        """Give the object another name, for content whose name is known at its end only (its digest). Replaces what ``target`` holds."""
        try:
            obstore.rename(self.bulk, path, target)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def read_range(self, path: str, start: int, end: int) -> bytes | None:
        """Bytes ``start`` to ``end`` (exclusive), fewer where the object ends before; None where there is no object."""
        try:
            return bytes(obstore.get_range(self.backend, path, start=start, end=end)) if end > start else b""
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            size = self.size(path)
            if size is None or start >= size:
                return None if size is None else b""
            raise self._unavailable(error) from error

    def size(self, path: str) -> int | None:
        """The object's length in bytes, None where there is none."""
        try:
            return int(obstore.head(self.backend, path)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def get(self, path: str) -> bytes | None:
        """The bytes at ``path``, None where there is nothing."""
        try:
            return bytes(obstore.get(self.backend, path).bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("wb") as file:
                for chunk in obstore.get(self.bulk, path).stream(min_chunk_size=CHUNK_BYTES):
                    file.write(chunk)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def children(self, prefix: str) -> list[str]:
        """The names directly under ``prefix``, folders and objects alike, sorted."""
        try:
            listed: Any = obstore.list_with_delimiter(self.backend, prefix)  # pyright: ignore[reportUnknownMemberType]
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        objects = (entry["path"] for entry in listed["objects"])
        return sorted(path.rsplit("/", 1)[-1] for path in (*listed["common_prefixes"], *objects))

    def written(self, prefix: str) -> dict[str, float]:
        """The objects directly under ``prefix``: name → when it was written, in seconds since the epoch."""
        try:
            listed: Any = obstore.list_with_delimiter(self.backend, prefix)  # pyright: ignore[reportUnknownMemberType]
        except FileNotFoundError:
            return {}
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        return {entry["path"].rsplit("/", 1)[-1]: entry["last_modified"].timestamp() for entry in listed["objects"]}

    def delete(self, path: str) -> None:
        """Delete one object, as far as the store still answers."""
        with contextlib.suppress(BaseError, OSError):
            obstore.delete(self.backend, path)

    def remove(self, prefix: str) -> None:
        """Delete everything under ``prefix``, as far as the store still answers. Raises `ValueError` for one that could lead elsewhere."""
        if not all(part.strip(".") for part in prefix.split("/")):
            raise ValueError(f"{prefix!r} is no folder of the store")
        if self.local_root is not None:
            return shutil.rmtree(self.local_root / prefix, ignore_errors=True)
        with contextlib.suppress(BaseError, OSError):
            found: Any = obstore.list(self.bulk, prefix).collect()  # pyright: ignore[reportUnknownMemberType]
            obstore.delete(self.bulk, [entry["path"] for entry in found])

    def check_writable(self) -> None:
        """Raise `StoreUnavailable` now rather than after an hour of training."""
        probe = f".writable-{uuid4().hex}"  # of this call alone: two jobs may start at once
        try:
            obstore.put(self.backend, probe, b"")
            obstore.delete(self.backend, probe)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error


class _Count:
    """Adds up what passes, and stops it above a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size = 0
        self.failure: OSError | None = None
        """The sender's own, which is not the store's."""

    def each(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for part in parts:
                yield self._add(part)
        except OSError as error:
            self.failure = error
            raise

    async def each_async(self, parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield self._add(part)
        except OSError as error:
            self.failure = error
            raise

    def _add(self, part: bytes) -> bytes:
        self.size += len(part)
        if self.size > self.limit_bytes:
            raise BodyTooLarge(f"The content is larger than {self.limit_bytes} bytes.", "Send less, or split it.")
        return part


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            yield block


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in chunks(path):
        digest.update(block)
    return digest.hexdigest()
