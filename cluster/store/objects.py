"""Bytes under one URL: ``file:///…`` on a laptop, ``s3://``, ``gs://`` or ``az://`` on a cluster.

Everything is written create-only, so the highest number wins and compare-and-swap works on every backend: obstore's
``mode="create"`` raises `AlreadyExistsError` on local, memory and cloud stores alike, while conditional *update* does not
exist on local ones.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from cluster.errors import Conflict, StoreUnavailable

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
        try:
            if self.local_root is not None:
                self.local_root.mkdir(parents=True, exist_ok=True)
            return from_url(self.url)
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
            obstore.put(self.backend, path, file)
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
                for chunk in obstore.get(self.backend, path).stream(min_chunk_size=CHUNK_BYTES):
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

    def remove(self, prefix: str) -> None:
        """Delete everything under ``prefix``, as far as the store still answers."""
        if self.local_root is not None:
            return shutil.rmtree(self.local_root / prefix, ignore_errors=True)
        with contextlib.suppress(BaseError, OSError):
            found: Any = obstore.list(self.backend, prefix).collect()  # pyright: ignore[reportUnknownMemberType]
            obstore.delete(self.backend, [entry["path"] for entry in found])

    def check_writable(self) -> None:
        """Raise `StoreUnavailable` now rather than after an hour of training."""
        probe = f".writable-{uuid4().hex}"  # of this call alone: two jobs may start at once
        try:
            obstore.put(self.backend, probe, b"")
            obstore.delete(self.backend, probe)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            yield block


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in chunks(path):
        digest.update(block)
    return digest.hexdigest()
