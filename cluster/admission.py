"""May this version go live here? Asked before any replica is touched; what cannot is refused with words."""

from pathlib import Path

from cluster import artefact
from cluster.config import Config
from cluster.errors import VersionRefused
from cluster.registry import Registry, adapter_rank, check_layout
from cluster.types import Manifest, VersionId


def check(config: Config, registry: Registry, manifest: Manifest, alias: str, hosted: VersionId) -> None:
    """Raise `VersionRefused` for what an engine would choke on, or what the fleet, which hosts the weights ``hosted``, cannot serve."""
    cache = config.home / "cache"
    folder = registry.fetch(manifest, cache)
    check_layout(folder, manifest.kind)
    if manifest.weights != hosted:
        _check_replaces(config, registry, manifest, alias, hosted)
    base = registry.fetch(registry.manifest(manifest.base), cache) if manifest.base else None
    artefact.inspect(folder, base)
    rank, limit = adapter_rank(folder) if manifest.kind == "adapter" else 0, config.fleet.max_lora_rank
    if rank > limit:
        raise VersionRefused(
            f"{manifest.id} has rank {rank}, but the engine takes at most {limit}.",
            f"Train with a smaller r, or start the pool with fleet.max_lora_rank={rank} or more.",
            param="fleet.max_lora_rank",
        )


def _check_replaces(config: Config, registry: Registry, manifest: Manifest, alias: str, hosted: VersionId) -> None:
    """Other weights than the fleet's take their place, so nobody else may need the old ones."""
    moves = registry.aliases().items()
    others = [name for name, move in moves if name != alias and registry.manifest(move.stable).weights == hosted]
    if alias != config.fleet.model or others or manifest.weights.name != hosted.name:
        raise VersionRefused(
            f"{manifest.id} needs {manifest.weights}, but the fleet hosts {hosted} for {', '.join(others) or config.fleet.model}.",
            f"Train it on {hosted}, or serve its base: springtide up --model {manifest.weights}.",
            param="base",
        )


class Shapes:
    """Which weights can take each other's place inside a running engine. Versions never change, so each pair is compared once."""

    def __init__(self) -> None:
        self.known: dict[tuple[VersionId, VersionId], str] = {}

    def difference(self, registry: Registry, cache: Path, new: VersionId, old: VersionId) -> str:
        """What keeps them apart, empty where nothing does; see `artefact.difference`."""
        if new == old:
            return ""
        if (new, old) not in self.known:
            one, other = (registry.fetch(registry.manifest(id), cache) for id in (new, old))
            self.known[new, old] = artefact.difference(one, other)
        return self.known[new, old]
