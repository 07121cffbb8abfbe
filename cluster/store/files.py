"""The files of versions on this machine: every digest checked, fetched once, bounded.

A ``file://`` store is read in place. Anything else is copied to a cache that the processes of a machine share::

    <cache>/<digest of the version>/<path>   its files; a part file is named *.part while it arrives
    <cache>/<digest of the version>/.lock    held (shared) by each process that uses the version; its time says when that was last

Above its limit the cache gives up what was not used for the longest. What a process holds the lock of stays; a lock ends with its process.
"""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from cluster import logs
from cluster.config import CACHE_BYTES
from cluster.errors import DigestMismatch, SpringtideError, StoreUnavailable
from cluster.store.headers import Tensor, header, parse
from cluster.store.objects import Store, sha256
from cluster.store.versions import files_of
from cluster.types import File, Manifest

RETRY_S = 15
"""After a first failure; twice as long after each further one."""
LONGEST_RETRY_S = 600
STALE_S = 3600
"""A part file that nobody has written to for so long is a dead process's."""
TENSORS = ".safetensors"

log = logs.logger(__name__)


class Failure(NamedTuple):
    """The last attempt to fetch a version."""

    times: int
    retry_s: float
    """When the next is allowed, on the monotonic clock."""
    why: str


class Files:
    """The versions' files on this machine, for one process."""

    def __init__(self, store: Store, limit_bytes: int = CACHE_BYTES) -> None:
        self.store = store
        self.limit_bytes = limit_bytes
        self._digests: dict[Path, tuple[int, int, str]] = {}
        """Path → (time of change, size, sha256) of what this process has read: a base is not read again for each adapter on it."""
        self._headers: dict[str, dict[str, Tensor]] = {}
        """sha256 of a tensor file → its header."""
        self._locks: dict[str, int] = {}
        """Digest of a version → the open file whose lock this process holds."""
        self._users: Counter[str] = Counter()
        self._holding = threading.Lock()
        """Over `_locks` and `_users`: control's threads fetch at once."""
        self._failures: dict[str, Failure] = {}

    # what callers ask for

    def fetch(self, manifest: Manifest, cache: Path) -> Path:
        """A local folder with the version's files, every digest checked. It stays until `release`, or this process's end.

        Raises `DigestMismatch`, or `StoreUnavailable` where the store fails, or failed so recently that it is not asked again yet.
        """
        return self._fetch(manifest, cache, manifest.files)

    def fetch_settings(self, manifest: Manifest, cache: Path) -> Path:
        """The same without the tensors: configuration, tokenizer, chat template."""
        return self._fetch(manifest, cache, tuple(file for file in manifest.files if not file.path.endswith(TENSORS)))

    def release(self, manifest: Manifest) -> None:
        """Undo one `fetch`: the cache may give the version up again."""
        digest = manifest.digest
        with self._holding:
            if digest in self._locks:
                self._users[digest] -= 1
                if self._users[digest] <= 0:
                    os.close(self._locks.pop(digest))

    def tensors(self, manifest: Manifest, cache: Path) -> dict[str, Tensor]:
        """Tensor name → dtype and shape, from the headers alone: of a gigabyte in a bucket some kilobytes are read."""
        files = [file for file in manifest.files if file.path.endswith(TENSORS)]
        return {name: tensor for file in files for name, tensor in self._header(manifest, file, cache).items()}

    # how

    def _header(self, manifest: Manifest, file: File, cache: Path) -> dict[str, Tensor]:
        if file.sha256 not in self._headers:
            there = self._folder(manifest, cache) / file.path
            self._headers[file.sha256] = (
                header(there) if there.exists() else parse(file.path, file.size_bytes, self._read(manifest, file))
            )
        return self._headers[file.sha256]

    def _read(self, manifest: Manifest, file: File) -> Callable[[int, int], bytes]:
        return lambda start, end: self.store.read_range(f"{files_of(manifest.id)}/{file.path}", start, end) or b""

    def _folder(self, manifest: Manifest, cache: Path) -> Path:
        local = self.store.local_root
        return local / files_of(manifest.id) if local else cache / manifest.digest

    def _fetch(self, manifest: Manifest, cache: Path, files: tuple[File, ...]) -> Path:
        folder = self._folder(manifest, cache)
        if self.store.local_root is None:
            self._hold(manifest.digest, folder)
            try:
                self._download(manifest, folder, files)
            except SpringtideError:
                self.release(manifest)
                raise
        for file in files:
            self._check(manifest, file, folder)
        return folder

    def _hold(self, digest: str, folder: Path) -> None:
        with self._holding:
            if digest not in self._locks:
                self._locks[digest] = lock(folder)
            self._users[digest] += 1
            os.utime(folder / ".lock")

    def _download(self, manifest: Manifest, folder: Path, files: tuple[File, ...]) -> None:
        """Every file that is not there yet; one process of the machine at a time, so that the others find them."""
        if all((folder / file.path).exists() for file in files):
            return
        self._check_may_retry(manifest)
        with exclusive(folder / ".fetching"):
            missing = [file for file in files if not (folder / file.path).exists()]
            make_room(folder.parent, sum(file.size_bytes for file in missing), self.limit_bytes)
            try:
                for file in missing:
                    self._download_one(manifest, file, folder)
            except StoreUnavailable as error:
                self._failed(manifest, error)
                raise
        self._failures.pop(manifest.digest, None)

    def _download_one(self, manifest: Manifest, file: File, folder: Path) -> None:
        path = folder / file.path
        with arriving(path) as partial:
            self.store.download(f"{files_of(manifest.id)}/{file.path}", partial)

    def _check(self, manifest: Manifest, file: File, folder: Path) -> None:
        path = folder / file.path
        found = self._sha256(path) if path.is_file() else "nothing"
        if found == file.sha256:
            return
        error = DigestMismatch(
            f"{file.path} of {manifest.id} does not match its manifest: expected sha256 {file.sha256[:12]}…, found {found[:12]}….",
            "The stored file was changed or damaged. Register the version again; the live one is untouched.",
        )
        if self.store.local_root is None:
            path.unlink(missing_ok=True)
            self._failed(manifest, error)
            self.release(manifest)
        raise error

    def _sha256(self, path: Path) -> str:
        now = path.stat()
        known = self._digests.get(path)
        if known is None or known[:2] != (now.st_mtime_ns, now.st_size):
            known = self._digests[path] = (now.st_mtime_ns, now.st_size, sha256(path))
        return known[2]

    # failures

    def _failed(self, manifest: Manifest, error: SpringtideError) -> None:
        count = self._failures[manifest.digest].times + 1 if manifest.digest in self._failures else 1
        wait_s = min(LONGEST_RETRY_S, RETRY_S * 2 ** (count - 1))
        self._failures[manifest.digest] = Failure(count, time.monotonic() + wait_s, error.message)

    def _check_may_retry(self, manifest: Manifest) -> None:
        failure = self._failures.get(manifest.digest)
        if failure is None or failure.retry_s <= time.monotonic():
            return
        times = "once" if failure.times == 1 else f"{failure.times} times"
        raise StoreUnavailable(
            f"Fetching {manifest.id} failed {times}: {failure.why}",
            f"It is tried again in {failure.retry_s - time.monotonic():.0f} s at the earliest.",
        )


@contextlib.contextmanager
def arriving(path: Path) -> Generator[Path]:
    """A name to write to; the file appears at ``path`` when it is whole, and nothing is left where it is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# the cache that processes share


def lock(folder: Path) -> int:
    """The open file that keeps a version's folder in the cache while it stays open."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # given up between the two lines
            file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(file, fcntl.LOCK_SH)
            if _still(file, folder):
                return file
            os.close(file)


@contextlib.contextmanager
def in_use(folder: Path) -> Generator[None]:
    """Keeps a version's folder in the cache meanwhile."""
    file = lock(folder)
    try:
        os.utime(folder / ".lock")
        yield
    finally:
        os.close(file)


def _still(file: int, folder: Path) -> bool:
    """Whether the open file is the folder's lock, and not that of a folder of this name that was given up meanwhile."""
    try:
        return os.fstat(file).st_ino == (folder / ".lock").stat().st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def exclusive(path: Path) -> Generator[None]:
    """One holder on this machine at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Entry(NamedTuple):
    """One version in the cache."""

    used_s: float
    size_bytes: int
    folder: Path


def make_room(cache: Path, coming_bytes: int, limit_bytes: int) -> None:
    """Give up what was not used for the longest, until what is coming fits. Where everything is in use the cache grows beyond its limit:
    a version that cannot be fetched cannot be served."""
    with exclusive(cache / ".evicting"):
        entries = sorted(_entry(folder) for folder in cache.iterdir() if folder.is_dir())
        total = sum(entry.size_bytes for entry in entries) + coming_bytes
        for entry in entries:
            if total <= limit_bytes:
                return
            total -= entry.size_bytes if _give_up(entry.folder) else 0
        if total > limit_bytes:
            log.warning(
                "%s takes %d bytes with what is coming, above cache_bytes %d; all of it is in use", cache, total, limit_bytes
            )


def _entry(folder: Path) -> Entry:
    """Its size counts what is there; part files of dead processes go."""
    mark = folder / ".lock"
    used_s = (mark if mark.exists() else folder).stat().st_mtime
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process renames its part file
            stat = path.stat()
            if path.suffix == ".part" and stat.st_mtime < time.time() - STALE_S:
                path.unlink()
            else:
                size += stat.st_size
    return Entry(used_s, size, folder)


def _give_up(folder: Path) -> bool:
    """Remove a version from the cache, unless a process uses it."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        gone = folder.with_name(f".{folder.name}.{uuid4().hex}")
        folder.rename(gone)  # at once: nobody must find half of it
        shutil.rmtree(gone, ignore_errors=True)
        log.info("gave up %s in the cache", folder.name)
        return True
    finally:
        os.close(file)
