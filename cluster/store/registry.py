"""Everything about models in one store: `Versions`, `Aliases`, `Rollouts`, `Verdicts` and the files on this machine, which share what they
have read."""

from pathlib import Path
from typing import Unpack

from cluster.config import CACHE_BYTES, Config, FleetSpec
from cluster.errors import ModelNotFound
from cluster.publishing.gate import Verdict
from cluster.publishing.history import History
from cluster.publishing.rollout import Rollout
from cluster.store.aliases import Aliases, MoveOptions
from cluster.store.candidate import Candidate
from cluster.store.files import Files
from cluster.store.journal import Damaged, Damages
from cluster.store.objects import Store
from cluster.store.rollouts import Rollouts, Verdicts
from cluster.store.versions import Versions
from cluster.types import Generation, Kind, Lineage, Manifest, VersionId

ROLLOUTS_SHOWN = 50
"""Rollouts of an alias that a reader of its history gets, the newest."""
MOVES_SHOWN = 200


def registry_of(config: Config | FleetSpec) -> "Registry":
    """The registry in the configured store, with the configured cache."""
    return Registry(Store(config.store), config.cache_bytes)


class Registry:
    """The parts, and short names for what is asked of them most."""

    def __init__(self, store: Store, cache_bytes: int = CACHE_BYTES) -> None:
        self.store = store
        self.damages = Damages()
        self.catalog = Versions(store, self.damages)
        self.moves = Aliases(store, self.catalog, self.damages)
        self.trials = Rollouts(store, self.damages)
        self.judged = Verdicts(store, self.damages)
        self.files = Files(store, cache_bytes)

    def damaged(self) -> list[Damaged]:
        """What could not be read, as far as it was asked for."""
        return self.damages.listed()

    # versions

    def register(self, name: str, kind: Kind, base: VersionId | None, folder: Path, lineage: Lineage) -> Manifest:
        return self.catalog.register(name, kind, base, folder, lineage)

    def names(self) -> list[str]:
        return self.catalog.names()

    def versions(self, name: str) -> list[Manifest]:
        return self.catalog.all(name)

    def manifest(self, id: VersionId) -> Manifest:
        return self.catalog.manifest(id)

    def resolve(self, text: str) -> Manifest:
        """The version that ``text`` names: NAME@NUMBER, or an alias for its live version. Raises `ModelNotFound` with what there is."""
        if "@" in text:
            return self.manifest(VersionId.parse(text))
        if move := self.alias(text):
            return self.manifest(move.stable)
        known = ", ".join(self.aliases()) or "none"
        raise ModelNotFound(f"There is no model {text!r}.", f"Models: {known}. A version is written NAME@NUMBER.", param="base")

    def fetch(self, manifest: Manifest, cache: Path) -> Path:
        return self.files.fetch(manifest, cache)

    def candidate(self, id: VersionId, cache: Path) -> Candidate:
        return Candidate(self.manifest(id), self.files, cache)

    # aliases

    def aliases(self) -> dict[str, Generation]:
        """Every alias at its newest generation."""
        return {name: history.moves[-1] for name, history in self.moves.all().items()}

    def alias(self, name: str) -> Generation | None:
        return self.moves.newest(name)

    def past(self, name: str) -> History:
        return self.moves.history(name)

    def history(self, name: str, count: int = MOVES_SHOWN) -> list[Generation]:
        """The newest generations of an alias, oldest first."""
        return self.moves.recent(name, count)

    def move(
        self, alias: str, stable: VersionId, reason: str, author: str, after: int, **options: Unpack[MoveOptions]
    ) -> Generation:
        return self.moves.move(alias, stable, reason, author, after, **options)

    def resident_adapters(self, weights: VersionId, limit: int) -> list[Manifest]:
        return self.moves.resident_adapters(weights, limit)

    def previous(self, alias: str) -> VersionId:
        return self.moves.previous(alias)

    # rollouts and verdicts

    def rollout(self, alias: str) -> Rollout | None:
        """The newest record of the alias's newest rollout."""
        return self.trials.newest(alias, self.moves.rollout_seen(alias))

    def rollouts(self, alias: str, count: int = ROLLOUTS_SHOWN) -> list[list[Rollout]]:
        """The newest rollouts of the alias, oldest first, each with all its records."""
        return self.trials.recent(alias, count, self.moves.rollout_seen(alias))

    def records(self, alias: str, number: int) -> list[Rollout]:
        return self.trials.records(alias, number)

    def record(self, rollout: Rollout) -> Rollout:
        self.manifest(rollout.version)
        return self.trials.append(rollout)

    def verdicts(self, id: VersionId) -> list[Verdict]:
        return self.judged.of(id)

    def judge(self, verdict: Verdict) -> Verdict:
        self.manifest(verdict.version)
        return self.judged.append(verdict)
