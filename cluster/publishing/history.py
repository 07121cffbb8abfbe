"""What an alias's past says, in a few kilobytes however long it is. Pure.

A `History` is folded move by move. Every few moves it is written to the store as a snapshot (`cluster.store.aliases`), so that a reader
takes the newest snapshot and the few moves after it, and never the whole past.

Example: the moves m@1, m@2, m@3, and back to m@2 leave the stack (m@1, m@2), so a rollback goes to m@1; m@3 has lived, last.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar

from cluster.types import Durable, Generation, Record, Version, VersionId

MOVES_KEPT = 32
"""A rollout makes a handful of moves; whoever asks what the alias meant a moment ago finds it here."""
STACK_KEPT = 128
"""Rollbacks in a row that go back version by version."""
LIVED_KEPT = 256
"""Versions of the past. An engine starts with the last few dozen of them."""


class Lived(Durable):
    """A version that clients of the alias could get."""

    version: Version
    weights: Version
    """The weights that it is, or sits on."""
    last_s: float
    """When it was last moved to."""
    stable: bool
    """Whether it was ever live, and not a canary only."""


class History(Record):
    """``aliases/<alias>/snapshots/<number>.json``: an alias's moves up to ``number``, compacted."""

    SCHEMA: ClassVar[int] = Generation.SCHEMA  # its moves are part of it: a new form of theirs is a new form of this

    alias: str
    number: int = 0
    """The highest generation that is taken. Where its record is damaged, the newest of ``moves`` is before it."""
    moves: tuple[Generation, ...] = ()
    """The newest that can be read, oldest first."""
    stack: tuple[Version, ...] = ()
    """The versions that rollbacks go through: the last is live. A move back takes everything after it away."""
    lived: tuple[Lived, ...] = ()
    """The versions that were live or canary, those of the newest moves last."""
    rollout: int = 0
    """The highest number of a rollout that made a move."""

    @property
    def newest(self) -> Generation | None:
        return self.moves[-1] if self.moves else None

    def was_live(self, id: VersionId) -> bool:
        """Whether all clients once got it, as far as is remembered."""
        return any(one.version == id and one.stable for one in self.lived)

    def after(self, number: int, move: Generation | None, weights: Callable[[VersionId], VersionId | None]) -> "History":
        """The history with one more generation. ``move``: None where its record is damaged. ``weights``: version → what it sits on, None
        where that cannot be read any more."""
        if move is None:
            return self.model_copy(update={"number": number})
        return self.model_copy(
            update={
                "number": number,
                "moves": (*self.moves, move)[-MOVES_KEPT:],
                "stack": _pushed(self.stack, move.stable)[-STACK_KEPT:],
                "lived": _lived(self.lived, move, weights)[-LIVED_KEPT:],
                "rollout": max(self.rollout, move.rollout or 0),
            }
        )


def _pushed(stack: tuple[VersionId, ...], stable: VersionId) -> tuple[VersionId, ...]:
    return (*stack[: stack.index(stable)], stable) if stable in stack else (*stack, stable)


def _lived(lived: tuple[Lived, ...], move: Generation, weights: Callable[[VersionId], VersionId | None]) -> tuple[Lived, ...]:
    known = {one.version: one for one in lived}
    new: list[Lived] = []
    for id in reversed(move.versions):
        before = known.pop(id, None)
        under = before.weights if before else weights(id)
        if under is not None:
            stable = id == move.stable or bool(before and before.stable)
            new.append(Lived(version=id, weights=under, last_s=move.time_s, stable=stable))
    return (*known.values(), *new)


def resident(histories: Iterable[History], weights: VersionId, limit: int) -> list[VersionId]:
    """The adapters that a replica with these weights should hold: the last ``limit`` that were live or canary on them, those of now last.

    Older ones stay in the store; a version that never went live is nobody's to call.
    """
    known = list(histories)
    live = {id for history in known if history.newest for id in history.newest.versions}
    ordered = sorted((one for history in known for one in history.lived), key=lambda one: (one.version in live, one.last_s))
    adapters = [one.version for one in ordered if one.weights == weights != one.version]
    latest = list(dict.fromkeys(reversed(adapters)))[:limit]
    return latest[::-1]
