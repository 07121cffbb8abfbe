"""Aliases: what each means now, and what it meant before.

::

    aliases/<alias>/<generation>.json         append-only; the highest generation wins
    aliases/<alias>/snapshots/<number>.json   the history up to there in one object, written every few moves; only the newest are kept

A process asks once a round whether the next generation exists: one question for each alias, whatever the length of its history. A process
that knows nothing takes the newest snapshot and the few moves after it. A snapshot is derived: where it is damaged or missing, the newest
moves are read instead, and the next mover writes another.
"""

import threading
import time
from typing import TypedDict, Unpack

from cluster.errors import Conflict, ModelNotFound, RecordDamaged, VersionRefused
from cluster.publishing.history import History, resident
from cluster.store.journal import AHEAD, Damages, Journal, encode, highest, keep, path_of
from cluster.store.objects import Store
from cluster.store.readers import read_all
from cluster.store.versions import Versions
from cluster.types import NAME, Generation, Manifest, VersionId, check_name

EVERY = 8
"""Moves from one snapshot to the next."""
SNAPSHOTS_KEPT = 2
REREAD = 256
"""Moves that are read where there is no snapshot: a store of an older release, or one whose snapshots are damaged."""


class MoveOptions(TypedDict, total=False):
    """The fields of a `Generation` that a move may leave out."""

    canary: VersionId | None
    percent: int
    shadow_percent: int
    rollout: int | None
    record: int


class Aliases:
    """The aliases in one store. Any thread may call any method."""

    def __init__(self, store: Store, versions: Versions, damages: Damages) -> None:
        self.store = store
        self.versions = versions
        self.damages = damages
        self.moves = Journal(store, Generation, damages)
        self.snapshots = Journal(store, History, damages)
        self._known: dict[str, History] = {}
        self._lock = threading.Lock()

    # read

    def names(self) -> list[str]:
        """What no alias can be called is left out, such as a file that a copy left behind."""
        return [name for name in self.store.children("aliases") if NAME.fullmatch(name)]

    def all(self) -> dict[str, History]:
        """Every alias that has a readable move, with its history. An engine's start waits for this, and each of its evictions does."""
        names = self.names()
        return {name: history for name, history in zip(names, read_all(self.history, names), strict=True) if history.moves}

    def newest(self, alias: str) -> Generation | None:
        return self.history(alias).newest

    def history(self, alias: str) -> History:
        """The alias's history as of now; without moves where there is no such alias, or none of its records can be read."""
        known = self._known.get(check_name(alias))
        warm = known is not None and not self._may_be_healed(known)
        current = self._followed(known, 1) if warm and known else self._followed(self._cold(alias), AHEAD)
        with self._lock:
            if self._known.get(alias, current).number <= current.number:
                self._known[alias] = current
        return current

    def rollout_seen(self, alias: str) -> int:
        """A rollout of the alias that exists for certain, 0 where none is known: where a search for the newest may start."""
        known = self._known.get(check_name(alias)) or self.history(alias)
        return known.rollout

    def recent(self, alias: str, count: int) -> list[Generation]:
        """The newest ``count`` moves that can be read, oldest first."""
        history = self.history(alias)
        if count <= len(history.moves) or history.number <= len(history.moves):
            return list(history.moves[-count:])
        return self.moves.recent(_prefix(alias), count, history.number)

    def previous(self, alias: str) -> VersionId:
        """The version to roll back to: what was live before the live one was first published.

        A move back takes everything after it away, so rolling back twice goes back two versions, and never forward to a bad one.
        """
        history = self.history(alias)
        if not history.moves:
            raise ModelNotFound(f"There is no alias {alias}.", "See `springtide models` for the ones that exist.", param="model")
        if len(history.stack) < 2:
            raise Conflict(
                f"{alias} served nothing before {history.moves[-1].stable}; there is nothing to roll back to.",
                "Name a version with --to NAME@N.",
            )
        return history.stack[-2]

    def resident_adapters(self, weights: VersionId, limit: int) -> list[Manifest]:
        """See `resident`. A version that was damaged since must not keep a replica from starting."""
        found = read_all(self._manifest, resident(self.all().values(), weights, limit))
        return [manifest for manifest in found if manifest is not None]

    # write

    def move(
        self, alias: str, stable: VersionId, reason: str, author: str, after: int, **options: Unpack[MoveOptions]
    ) -> Generation:
        """Append the next generation. Raises `Conflict` where somebody moved the alias since generation ``after`` was read.

        Where the newest record is damaged, ``after`` is the newest that can be read, and the new generation takes the place of both.
        """
        self.versions.manifest(stable)
        before = self.history(alias)
        if after != (before.newest.generation if before.newest else 0):
            raise Conflict(f"{alias} is not at generation {after} any more.", "See `springtide history`, then decide again.")
        number = before.number + 1
        move = Generation(
            alias=alias, generation=number, stable=stable, reason=reason, author=author, time_s=time.time(), **options
        )
        made = self.moves.append(_prefix(alias), number, move)
        if number % EVERY == 0:
            self._snapshot(self.history(alias))
        return made

    # how a history is found

    def _cold(self, alias: str) -> History:
        """The newest snapshot, and where there is none a history of the newest moves."""
        for number in reversed(self._snapshot_numbers(alias)):
            if (found := self.snapshots.readable(_snapshots(alias), number)) is not None:
                return found
        number = self.moves.highest(_prefix(alias))
        return History(alias=alias, number=max(0, number - REREAD))

    def _followed(self, known: History, ahead: int) -> History:
        """The history with every move since. ``ahead``: see `highest`."""
        alias, before = known.alias, known.number
        number = highest(lambda n: self._taken(alias, n), before, ahead)
        for n in range(before + 1, number + 1):
            known = known.after(n, self.moves.readable(_prefix(alias), n), self._weights)
        if number - before > 2 * EVERY:
            self._snapshot(known)  # a mover could not: it was killed, or is of an older release
        return known

    def _taken(self, alias: str, number: int) -> bool:
        """Whether the generation exists: read at once, because it is wanted next."""
        try:
            return self.moves.find(_prefix(alias), number) is not None
        except RecordDamaged:
            return True

    def _may_be_healed(self, known: History) -> bool:
        """Whether the newest record was damaged, and can be read by now."""
        return _damaged(known) and self.moves.readable(_prefix(known.alias), known.number) is not None

    def _snapshot_numbers(self, alias: str) -> list[int]:
        stems = (name.removesuffix(".json") for name in self.store.children(_snapshots(alias)))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _snapshot(self, history: History) -> None:
        """An aid to later readers; without it they read more. It must not hide that the newest record is damaged."""
        if not _damaged(history) and keep(self.store, path_of(_snapshots(history.alias), history.number), encode(history)):
            for number in self._snapshot_numbers(history.alias)[:-SNAPSHOTS_KEPT]:
                self.store.delete(path_of(_snapshots(history.alias), number))

    def _weights(self, id: VersionId) -> VersionId | None:
        manifest = self._manifest(id)
        return manifest.weights if manifest else None

    def _manifest(self, id: VersionId) -> Manifest | None:
        try:
            return self.versions.find(id)
        except VersionRefused:
            return None


def _damaged(history: History) -> bool:
    """Whether the newest generation is taken and cannot be read."""
    return history.number > (history.newest.generation if history.newest else 0)


def _prefix(alias: str) -> str:
    return f"aliases/{check_name(alias)}"


def _snapshots(alias: str) -> str:
    return f"{_prefix(alias)}/snapshots"
