"""May this version go live here? Asked before any replica is touched; what cannot is refused with words."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cluster.config import Config
from cluster.errors import VersionRefused
from cluster.store import artefact
from cluster.store.registry import Registry, check_layout
from cluster.types import Manifest, VersionId

EMPTY: Mapping[str, VersionId] = MappingProxyType({})


def check(config: Config, registry: Registry, manifest: Manifest, alias: str, hosted: VersionId, examined: bool = False) -> None:
    """Raise `VersionRefused` for what an engine would choke on, or what the fleet, which hosts the weights ``hosted``, cannot serve.

    ``examined``: what was live before is not read through once more; going back is urgent.
    """
    cache = config.home / "cache"
    folder = registry.fetch(manifest, cache)
    check_layout(folder, manifest.kind)
    check_replaces(config, registry, manifest, alias, hosted)
    base = registry.fetch(registry.manifest(manifest.base), cache) if manifest.base else None
    if not examined:
        artefact.inspect(folder, base)
    if not examined and manifest.weights == manifest.id != hosted:
        artefact.check_kinds(folder, registry.fetch(registry.manifest(hosted), cache))
    rank, limit = max(artefact.stated_ranks(folder)) if manifest.kind == "adapter" else 0, config.fleet.max_lora_rank
    if rank > limit:
        raise VersionRefused(
            f"{manifest.id} has rank {rank}, but the engine takes at most {limit}.",
            f"Train with a smaller r, or start the pool with fleet.max_lora_rank={rank} or more.",
            param="fleet.max_lora_rank",
        )


def check_replaces(
    config: Config, registry: Registry, manifest: Manifest, alias: str, hosted: VersionId, coming: Mapping[str, VersionId] = EMPTY
) -> None:
    """Other weights than the fleet's take their place, so nobody else may need the old ones.

    ``coming``: alias → version of the rollouts under way; they will need theirs.
    """
    leaving = coming.get(config.default_model)
    if alias != config.default_model and leaving and registry.manifest(leaving).weights != manifest.weights:
        raise VersionRefused(
            f"{manifest.id} needs {manifest.weights}, and the fleet is about to host {registry.manifest(leaving).weights}.",
            "Train it on those, or wait until that rollout has ended.",
            param="base",
        )
    if manifest.weights == hosted:
        return
    needed = {**{name: move.stable for name, move in registry.aliases().items()}, **coming}
    others = [name for name, version in needed.items() if name != alias and registry.manifest(version).weights == hosted]
    if alias != config.default_model or others or manifest.weights.name != hosted.name:
        raise VersionRefused(
            f"{manifest.id} needs {manifest.weights}, but the fleet hosts {hosted} for {', '.join(others) or config.default_model}.",
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
