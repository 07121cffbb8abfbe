"""Checkpoints of a run in the store. A thread writes them while the training goes on. The newest complete one counts.

``runs/<name>/<step>/state.safetensors`` holds the tensors. ``manifest.json`` beside it is written last, and commits the checkpoint. It holds
the counters, the digest of the tensors and a digest of itself. So a checkpoint without a manifest is incomplete, and a wrong digest shows
damage.

Example: steps 40 and 55 are in the store, and the process died while it wrote 70. ``newest`` prints that 70 is incomplete and returns 55.
"""

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load, save_file

from cluster.store.objects import Store, sha256
from jobs.training.progress import Committed

KEPT = 2
FILE, MANIFEST = "state.safetensors", "manifest.json"
OWN_DIGEST = "seal"
"""The manifest's key for its own digest. Stored checkpoints have it, so the name stays."""


class Snapshot(NamedTuple):
    """A run between two steps."""

    step: int
    meta: Mapping[str, Any]
    """Plain JSON values."""
    tensors: Mapping[str, torch.Tensor]
    """Copies on the host, which nothing changes."""
    group: str = ""
    """What no other process group is called, of any job; empty where one process has all of the state."""


class Copied(Protocol):
    """What a `Writer` writes: a `Snapshot`, or a worker's shard of one."""

    @property
    def step(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...


class Commits(Protocol):
    """Where a `Writer` writes to."""

    def commit(self, snapshot: Any, /) -> None: ...


class Checkpoints:
    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.root = f"runs/{run}"

    def commit(self, snapshot: Snapshot) -> None:
        """Write a checkpoint: the tensors first, the manifest last. Raises `StoreUnavailable`; the checkpoints before stay then."""
        folder = f"{self.root}/{snapshot.step:012d}"
        if self._read_complete(folder):
            return
        self.store.remove(folder)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / FILE
            save_file(dict(snapshot.tensors), file)
            self.store.upload(f"{folder}/{FILE}", file)
            manifest = {"step": snapshot.step, "sha256": sha256(file), "meta": dict(snapshot.meta)}
        self.store.put_new(f"{folder}/{MANIFEST}", json.dumps({**manifest, OWN_DIGEST: digest(manifest)}).encode())
        for old in self._outdated():
            self.store.remove(f"{self.root}/{old:012d}")

    def newest(self, after: int = -1) -> Snapshot | None:
        """The newest complete checkpoint of a step later than ``after``. The log names the ones that are damaged or incomplete."""
        for step in sorted((step for step in self.steps() if step > after), reverse=True):
            snapshot = self._read_complete(f"{self.root}/{step:012d}")
            if snapshot:
                return snapshot
            print(f"the checkpoint of step {step} is damaged or incomplete; taking the one before", flush=True)
        return None

    def steps(self) -> list[int]:
        return [int(name) for name in self.store.children(self.root) if name.isdigit()]

    def _outdated(self) -> list[int]:
        """The steps before the newest `KEPT` that were committed."""
        committed = [step for step in self.steps() if self.store.get(f"{self.root}/{step:012d}/{MANIFEST}")]
        return [step for step in self.steps() if committed and step < committed[-KEPT:][0]]

    def _read_complete(self, folder: str) -> Snapshot | None:
        """The checkpoint in a folder; None where it is damaged or incomplete."""
        raw, data = self.store.get(f"{folder}/{MANIFEST}"), self.store.get(f"{folder}/{FILE}")
        manifest = read_manifest(raw or b"")
        if manifest is None or data is None or hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            return None
        return Snapshot(manifest["step"], manifest["meta"], load(data))


def digest(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 digest of a manifest that has no digest of itself yet."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(raw: bytes) -> dict[str, Any] | None:
    """A manifest without its own digest; None where the bytes are not what `Checkpoints.commit` wrote."""
    try:
        manifest = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(manifest, dict):
        return None
    written = manifest.pop(OWN_DIGEST, None)
    return manifest if written == digest(manifest) else None


class Writer:
    """Commits the newest snapshot that it was given, in a thread of its own. The training goes on where that fails: the log says why, and the
    next snapshot is due soon."""

    def __init__(self, checkpoints: Commits, tell: Callable[[Committed | None], None] = lambda committed: None) -> None:
        """``tell`` hears of each snapshot that was committed, and None for each that failed."""
        self.checkpoints, self.tell = checkpoints, tell
        self.changed = threading.Condition()
        self.waiting: list[Copied] = []
        """The newest, where there is one."""
        self.given, self.tried = -1, -1
        self.newest = Committed()
        threading.Thread(target=self._run, name="checkpoints", daemon=True).start()

    def give(self, snapshot: Copied) -> None:
        with self.changed:
            if snapshot.step >= self.given:  # two threads may make one each, and the older one may arrive last
                self.waiting, self.given = [snapshot], snapshot.step
                self.tried = min(self.tried, snapshot.step - 1)  # a step that failed is tried again
            self.changed.notify_all()

    def flush(self) -> Committed:
        """Wait until the newest given snapshot is committed or has failed. Returns the newest that is committed."""
        with self.changed:
            self.changed.wait_for(lambda: self.tried >= self.given)
            return self.newest

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.waiting))
                snapshot = self.waiting.pop()
            began_s = time.monotonic()
            try:
                self.checkpoints.commit(snapshot)
                size_bytes = sum(tensor.nbytes for tensor in snapshot.tensors.values())
                self.newest = Committed(snapshot.step, time.monotonic() - began_s, size_bytes)
                self.tell(self.newest)
                print(f"checkpoint step={snapshot.step} seconds={self.newest.seconds:.2f}", flush=True)
            except Exception as error:  # noqa: BLE001 (this thread must live: the next snapshot may succeed)
                self.tell(None)
                print(f"checkpoint step={snapshot.step} could not be written, the one before stays: {error}", flush=True)
            with self.changed:
                self.tried = snapshot.step
                self.changed.notify_all()
