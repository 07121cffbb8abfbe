"""Checkpoints of a run in the store. A thread writes them while the training goes on; the newest whole one counts.

``runs/<name>/<step>/state.safetensors`` holds the tensors. ``manifest.json`` beside it is written last; it holds the counters, the digest of the
tensors and a digest of itself. So a checkpoint whose writing was cut short does not exist, and a damaged one is passed over.

Example: steps 40 and 55 are in the store, and the process died while it wrote 70. ``newest`` prints that 70 was cut short and returns 55.
"""

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file

from cluster.store.objects import Store, sha256

KEPT = 2
FILE, MANIFEST = "state.safetensors", "manifest.json"


class Snapshot(NamedTuple):
    """A run between two steps."""

    step: int
    meta: Mapping[str, Any]
    """Plain JSON values."""
    tensors: Mapping[str, torch.Tensor]
    """Copies on the host, which nothing changes."""


class Checkpoints:
    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.root = f"runs/{run}"

    def write(self, snapshot: Snapshot) -> None:
        """Raises `StoreUnavailable` where the store fails. The checkpoints before are still there then."""
        folder = f"{self.root}/{snapshot.step:012d}"
        if self._read(folder):
            return
        self.store.remove(folder)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / FILE
            save_file(dict(snapshot.tensors), file)
            self.store.upload(f"{folder}/{FILE}", file)
            known = {"step": snapshot.step, "sha256": sha256(file), "meta": dict(snapshot.meta)}
        self.store.put_new(f"{folder}/{MANIFEST}", json.dumps({**known, "seal": seal(known)}).encode())
        for old in self._outdated():
            self.store.remove(f"{self.root}/{old:012d}")

    def newest(self, after: int = -1) -> Snapshot | None:
        """The newest whole one of a step later than ``after``. The log names those that are not whole."""
        for step in sorted((step for step in self.steps() if step > after), reverse=True):
            snapshot = self._read(f"{self.root}/{step:012d}")
            if snapshot:
                return snapshot
            print(f"the checkpoint of step {step} is damaged or was cut short; taking the one before", flush=True)
        return None

    def steps(self) -> list[int]:
        return [int(name) for name in self.store.children(self.root) if name.isdigit()]

    def _outdated(self) -> list[int]:
        """The steps before the newest `KEPT` that were written to their end."""
        ended = [step for step in self.steps() if self.store.get(f"{self.root}/{step:012d}/{MANIFEST}")]
        return [step for step in self.steps() if ended and step < ended[-KEPT:][0]]

    def _read(self, folder: str) -> Snapshot | None:
        manifest, data = self.store.get(f"{folder}/{MANIFEST}"), self.store.get(f"{folder}/{FILE}")
        known = opened(manifest or b"")
        if known is None or data is None or hashlib.sha256(data).hexdigest() != known["sha256"]:
            return None
        return Snapshot(known["step"], known["meta"], load(data))


def seal(known: Mapping[str, Any]) -> str:
    """The digest of a manifest without its seal."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def opened(manifest: bytes) -> dict[str, Any] | None:
    """A manifest without its seal; None where it is not what was written."""
    try:
        known = json.loads(manifest)
    except ValueError:
        return None
    if not isinstance(known, dict):
        return None
    sealed = known.pop("seal", None)
    return known if sealed == seal(known) else None


class Writer:
    """Writes the newest snapshot that it was given, in a thread of its own. The log names one that could not be written, and the training goes
    on: the next one is due soon."""

    def __init__(self, checkpoints: Checkpoints, tell: Callable[[str], None] = lambda outcome: None) -> None:
        """``tell`` hears ``written`` or ``failed`` of each."""
        self.checkpoints, self.tell = checkpoints, tell
        self.changed = threading.Condition()
        self.waiting: list[Snapshot] = []
        """The newest, where there is one."""
        self.given, self.tried, self.written = -1, -1, -1
        threading.Thread(target=self._run, name="checkpoints", daemon=True).start()

    def give(self, snapshot: Snapshot) -> None:
        with self.changed:
            if snapshot.step >= self.given:  # two threads may have made one each, and the older one may come last
                self.waiting, self.given = [snapshot], snapshot.step
                self.tried = min(self.tried, snapshot.step - 1)  # again, where it was tried and could not be written
            self.changed.notify_all()

    def settle(self) -> int:
        """Wait until the given snapshot is written, or could not be. Returns the newest step that was written, -1 where none was."""
        with self.changed:
            self.changed.wait_for(lambda: self.tried >= self.given)
            return self.written

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.waiting))
                snapshot = self.waiting.pop()
            began_s = time.monotonic()
            try:
                self.checkpoints.write(snapshot)
                self.written = snapshot.step
                self.tell("written")
                print(f"checkpoint step={snapshot.step} seconds={time.monotonic() - began_s:.2f}", flush=True)
            except Exception as error:  # noqa: BLE001 (this thread must live: the next one may succeed)
                self.tell("failed")
                print(f"checkpoint step={snapshot.step} could not be written, the one before stays: {error}", flush=True)
            with self.changed:
                self.tried = snapshot.step
                self.changed.notify_all()
