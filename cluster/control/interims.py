"""The interim versions of runs: adapters that the replicas of a fleet hold although no alias means them.

A run that learns from the answers of its own newest weights (`jobs.rl`) registers an adapter after each step, and asks control to let the
replicas hold it. Only who knows a version's id can ask for it.

Control keeps the newest versions of each run in memory, and forgets a run that has not said for `EXPIRES_S` that it still needs them. A control
that starts again knows of none, and learns of them when their runs say so next. Until it can have heard of all, it takes none from a replica.
"""

from collections.abc import Iterable
from typing import NamedTuple

from cluster.types import VersionId

EXPIRES_S = 60.0
RENEW_S = 5.0
"""How often a run says which versions it needs."""


class Needed(NamedTuple):
    """What one run needs."""

    versions: tuple[VersionId, ...]
    """Oldest first."""
    until_s: float


class Interims:
    """Which interim versions there should be. Used by the loop's thread only."""

    def __init__(self, now_s: float) -> None:
        self.began_s = now_s
        self.runs: dict[str, Needed] = {}
        self.changes = 0
        """Grows whenever another version is needed, or one no more."""

    def need(self, run: str, versions: Iterable[VersionId], places: int, now_s: float) -> None:
        """A run needs these versions, and those that it named before; of all of them the newest ``places``.

        Calls may overtake each other: whatever their order, the newest versions stay.
        """
        before = self.of(run)
        newest = newest_of((*before, *versions), places)
        self.runs[run] = Needed(newest, now_s + EXPIRES_S)
        self.changes += newest != before

    def end(self, run: str) -> None:
        self.changes += self.runs.pop(run, None) is not None

    def expire(self, now_s: float) -> None:
        for run in [run for run, needed in self.runs.items() if needed.until_s < now_s]:
            self.end(run)

    def of(self, run: str) -> tuple[VersionId, ...]:
        return self.runs[run].versions if run in self.runs else ()

    @property
    def all(self) -> tuple[VersionId, ...]:
        return tuple(id for needed in self.runs.values() for id in needed.versions)

    def complete(self, now_s: float) -> bool:
        """Whether every run that needs versions has said so: control has run for long enough."""
        return now_s - self.began_s > EXPIRES_S


def newest_of(versions: Iterable[VersionId], places: int) -> tuple[VersionId, ...]:
    """The newest ``places`` versions, oldest first.

    >>> [id.n for id in newest_of([VersionId("m", n) for n in (3, 1, 2, 3)], 2)]
    [2, 3]
    """
    return tuple(sorted(set(versions), key=lambda id: id.n)[-places:])
