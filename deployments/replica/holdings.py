"""Which versions one engine can answer with, and what it said about the others. Control reads this record by `revision`."""

from dataclasses import dataclass, field
from pathlib import Path

from cluster.redact import redact
from cluster.types import Manifest


@dataclass
class Holdings:
    base: str
    """Id of the weights version in the accelerator's memory."""
    folder: Path
    """Where the files of the base are."""
    fingerprint: str = ""
    """Checksum of the weights in the accelerator's memory."""
    held: dict[str, str] = field(default_factory=dict[str, str])
    """Version id → digest, the base included."""
    assigned: frozenset[str] = frozenset()
    """Adapters that control wants here whatever else comes. Empty until control has said so."""
    closing: dict[str, str] = field(default_factory=dict[str, str])
    """Version id → digest of adapters that are loaded and make room: they take no new requests, and are unloaded when their last has ended."""
    waiting: dict[str, str] = field(default_factory=dict[str, str])
    """Version id → what it waits for before it can be loaded."""
    staged: dict[str, str] = field(default_factory=dict[str, str])
    """Version id → digest of what lies ready on this machine and needs other weights."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Version id → why it was not loaded."""
    revision: int = 0
    """Grows with every change, so that control can tell an answer that was overtaken on its way."""
    pause_s: float = 0.0
    """How long the last swap kept the engine from answering."""

    @property
    def adapters(self) -> list[str]:
        """Those that take a place, whether they take requests or not."""
        return [id for id in (*self.held, *self.closing) if id != self.base]

    @property
    def used(self) -> set[str]:
        """The versions whose files must stay on this machine."""
        return {*self.held, *self.closing, *self.staged}

    def close(self, id: str) -> None:
        """Let the adapter take no new request. Control must not route to it any more."""
        self.closing[id] = self.held.pop(id)
        self.revision += 1

    def reopen(self, id: str) -> None:
        self.held[id] = self.closing.pop(id)
        self.revision += 1

    def forget(self, id: str) -> None:
        """The adapter is unloaded."""
        self.held.pop(id, None)
        self.closing.pop(id, None)

    def wait(self, id: str, words: str) -> None:
        """Say what the version waits for; nothing where ``words`` is empty."""
        if words != self.waiting.get(id, ""):
            self.revision += 1
        self.waiting = {**self.waiting, id: words} if words else {one: why for one, why in self.waiting.items() if one != id}

    def host(self, manifest: Manifest, folder: Path, fingerprint: str) -> None:
        """Other weights are in memory, and nothing that followed from the old ones."""
        self.base, self.folder, self.fingerprint = str(manifest.id), folder, fingerprint
        self.held = {self.base: manifest.digest}
        self.assigned = frozenset()
        self.closing, self.waiting, self.staged = {}, {}, {}

    def refuse(self, id: str, why: str) -> None:
        """``why`` becomes a rollout's reason for good, and may quote a store's error with a presigned URL in it."""
        self.refused[id] = redact(why)
        self.revision += 1

    def clear_refusals(self, *ids: str) -> None:
        """Forget what was said against these versions."""
        found = [id for id in ids if self.refused.pop(id, None) is not None]
        self.revision += bool(found)
