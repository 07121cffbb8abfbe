"""What the store says should be: every alias's newest moves and its newest rollout, as far as this process has read or written them.

A cache of append-only journals, so an entry is never wrong, only old. `refresh` costs the same however long the history is: it reads the
newest record, and the ones between it and what is known.
"""

import contextlib

from cluster.errors import SpringtideError
from cluster.publishing import rollout
from cluster.publishing.gate import Verdict, latest
from cluster.publishing.rollout import Facts, Rollout
from cluster.store.aliases import MoveOptions
from cluster.store.readers import read_all
from cluster.store.registry import Registry
from cluster.types import Generation, Manifest, VersionId

KEPT = 32
"""Moves of an alias that are kept: gateways may be behind by some, and a rollout finds its own moves among them."""
FORERUNNERS = 32
"""How far back rollouts are looked at for one that a later one has replaced."""


class Desired:
    """Used by the loop's thread only."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.moves: dict[str, list[Generation]] = {}
        """Alias → its newest moves, oldest first."""
        self.rollouts: dict[str, Rollout] = {}
        """Alias → its newest rollout at its newest record."""
        self.loaded = False
        """Whether every alias that the store has was looked at once."""
        self.changes = 0
        """Grows whenever a move or a rollout is learnt of."""
        self._without: set[str] = set()
        """Aliases that had no rollout when they were last looked at."""
        self._closed: dict[str, int] = {}
        """Alias → the live rollout whose forerunners are closed."""

    def reset(self, registry: Registry) -> None:
        """Another store: nothing that is known holds."""
        self.registry, self.loaded = registry, False
        for known in (self.moves, self.rollouts, self._without, self._closed):
            known.clear()
        self.changes += 1

    def names(self) -> list[str]:
        """Every alias that the store has moves or rollouts of."""
        store = self.registry.store
        return sorted({*store.children("aliases"), *store.children("rollouts")})

    def load(self) -> list[str]:
        """Look at every alias for the first time, many at once; the names. One that cannot be read costs itself: it is skipped here, and its
        reconciler says why."""
        names = self.names()
        read_all(self._try_refresh, names)
        self.loaded = True
        return names

    def _try_refresh(self, alias: str) -> None:
        with contextlib.suppress(SpringtideError, ValueError):
            self.refresh(alias)
            for id in self.moves[alias][-1].versions if self.moves[alias] else ():
                self.registry.manifest(id)  # the registry keeps it: the loop asks for all of them next

    def refresh(self, alias: str) -> None:
        """Learn of what other hands have written. Raises where the newest record cannot be read; what is known stays."""
        self._refresh_rollout(alias)
        self._refresh_moves(alias)

    def _refresh_rollout(self, alias: str) -> None:
        newest = self.registry.rollout(alias)
        if newest is None:
            self._without.add(alias)
        elif newest != self.rollouts.get(alias):
            self.rollouts[alias] = newest
            self.changes += 1

    def _refresh_moves(self, alias: str) -> None:
        newest, known = self.registry.alias(alias), self.moves.get(alias, [])
        if newest is None or (known and known[-1].generation >= newest.generation):
            self.moves.setdefault(alias, [])
            return
        self.moves[alias] = self.registry.history(alias, KEPT)
        self.changes += 1

    def move(self, alias: str) -> Generation | None:
        """The alias's newest move; read from the store where it was never read."""
        if alias not in self.moves:
            self._refresh_moves(alias)
        return next(reversed(self.moves[alias]), None)

    def rollout(self, alias: str) -> Rollout | None:
        """The alias's newest rollout; read from the store where none is known."""
        if alias not in self.rollouts and alias not in self._without:
            self._refresh_rollout(alias)
        return self.rollouts.get(alias)

    def under_way(self) -> dict[str, Rollout]:
        return {alias: one for alias, one in self.rollouts.items() if one.stage in rollout.UNDER_WAY}

    def live(self) -> dict[str, VersionId]:
        """Alias → the version that most of its clients get, of every alias that is known."""
        return {alias: moves[-1].stable for alias, moves in self.moves.items() if moves}

    def manifest(self, id: VersionId) -> Manifest:
        return self.registry.manifest(id)

    def weights(self, id: VersionId) -> VersionId:
        return self.registry.manifest(id).weights

    def verdict(self, one: Rollout) -> Verdict | None:
        return latest(self.registry.verdicts(one.version), one.incumbent)

    # writing

    def record(self, one: Rollout) -> Rollout:
        """Write a rollout's next record. Whatever goes wrong, what was known of the alias is forgotten: the record may have arrived though
        its answer was lost, or somebody else's may have."""
        try:
            self.registry.record(one)
        except SpringtideError:
            self.rollouts.pop(one.alias, None)
            self._without.discard(one.alias)
            raise
        self.rollouts[one.alias] = one
        self.changes += 1
        return one

    def append_move(self, one: Rollout, stable: VersionId, after: int, options: MoveOptions) -> Generation:
        """Write the alias's next move, which ``one`` asks for."""
        try:
            move = self.registry.move(one.alias, stable, one.reason, one.author, after, **options)
        except SpringtideError:
            self.moves.pop(one.alias, None)
            raise
        self.moves[one.alias] = [*self.moves.get(one.alias, []), move][-KEPT:]
        self.changes += 1
        return move

    def close_forerunners(self, live: Rollout, now_s: float) -> None:
        """Let the rollout that ``live`` has replaced end. Looked at once by every control: one may have been killed before it got there.

        Example: rollout 3 is live, 4 was rolled back, 5 has just gone live. Going back from 5: 4 has ended by itself, 3 is closed as
        ``retired`` (or as ``rolled_back`` where 5 went back to what was live before 3). What was before 3 was closed when 3 went live.
        """
        if self._closed.get(live.alias) == live.number:
            return
        for number in range(live.number - 1, max(0, live.number - 1 - FORERUNNERS), -1):
            last = self.registry.trials.last(live.alias, number)
            ended = last and rollout.decide(last, Facts(replaced_by=live.version), now_s)
            if last and ended and last.stage == "live":
                self.registry.record(ended)
            if last and last.stage in ("live", "retired"):
                break
        self._closed[live.alias] = live.number  # last: where the store was away meanwhile, the next turn tries again
