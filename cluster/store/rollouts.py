"""Rollouts and verdicts: how versions came to be live, and what the gate said of them.

::

    rollouts/<alias>/<number>/<n>.json    append-only; the highest n of the highest number is where the alias is now
    versions/<name>/<n>/verdicts/<k>.json append-only; the highest k counts
"""

from cluster.errors import RecordDamaged
from cluster.publishing.gate import Verdict
from cluster.publishing.rollout import Rollout
from cluster.store.journal import AHEAD, Damages, Journal, Recent, highest, path_of
from cluster.store.objects import Store
from cluster.types import VersionId, check_name

VERDICTS_KEPT = 32
"""Verdicts on one version that are looked at, the newest."""


class Rollouts:
    """The rollouts in one store."""

    def __init__(self, store: Store, damages: Damages) -> None:
        self.store = store
        self.journal = Journal(store, Rollout, damages)
        self._numbers: Recent[str, int] = Recent()
        """Alias → the highest rollout that was ever seen."""

    def number(self, alias: str, known: int = 0) -> int:
        """The alias's newest rollout, 0 where there is none. ``known``: one that exists for certain."""
        remembered = self._numbers.get(check_name(alias))
        found = highest(
            lambda n: self.store.size(path_of(_prefix(alias, n), 1)) is not None,
            max(known, remembered or 0),
            AHEAD if remembered is None else 1,
        )
        self._numbers[alias] = found
        return found

    def newest(self, alias: str, known: int = 0) -> Rollout | None:
        """The newest record of the alias's newest rollout. Raises `RecordDamaged`: to go on from an older record could repeat a step."""
        number = self.number(alias, known)
        return self.journal.newest(_prefix(alias, number)) if number else None

    def records(self, alias: str, number: int) -> list[Rollout]:
        """One rollout's records that can be read, oldest first."""
        return self.journal.recent(_prefix(alias, number), 1000)

    def last(self, alias: str, number: int) -> Rollout | None:
        """One rollout's newest record, None where it cannot be read."""
        try:
            return self.journal.newest(_prefix(alias, number))
        except RecordDamaged:
            return None

    def recent(self, alias: str, count: int, known: int = 0) -> list[list[Rollout]]:
        """The newest ``count`` rollouts, oldest first, each with its records; without those of which none can be read."""
        last = self.number(alias, known)
        found = (self.records(alias, number) for number in range(max(1, last - count + 1), last + 1))
        return [records for records in found if records]

    def append(self, record: Rollout) -> Rollout:
        """Raises `Conflict` where another control, or another publish, was faster."""
        return self.journal.append(_prefix(record.alias, record.number), record.n, record)


class Verdicts:
    """The verdicts in one store."""

    def __init__(self, store: Store, damages: Damages) -> None:
        self.journal = Journal(store, Verdict, damages)

    def of(self, id: VersionId) -> list[Verdict]:
        """The newest verdicts on a version that can be read, oldest first."""
        return self.journal.recent(_verdicts(id), VERDICTS_KEPT)

    def append(self, verdict: Verdict) -> Verdict:
        prefix = _verdicts(verdict.version)
        return self.journal.append(prefix, self.journal.highest(prefix) + 1, verdict)


def _prefix(alias: str, number: int) -> str:
    return f"rollouts/{check_name(alias)}/{number}"


def _verdicts(id: VersionId) -> str:
    return f"versions/{id.name}/{id.n}/verdicts"
