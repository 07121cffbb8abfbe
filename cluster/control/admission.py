"""May this version go live here? Asked before any replica is touched; what cannot is refused with words."""

from collections.abc import Mapping
from pathlib import Path

from cluster.capacity.lora import takes_adapters
from cluster.config import FleetSpec
from cluster.errors import VersionRefused
from cluster.store import artefact, fitting
from cluster.store.candidate import Candidate
from cluster.store.layout import check_layout
from cluster.store.registry import Registry
from cluster.types import Manifest, VersionId


def check(
    spec: FleetSpec,
    registry: Registry,
    manifest: Manifest,
    hosted: VersionId,
    examined: bool = False,
    memory_bytes: int | None = None,
) -> None:
    """Raise `VersionRefused` for what an engine would choke on, or what the fleet, which hosts the weights ``hosted``, cannot serve; `DoesNotFit`
    for weights that need more than ``memory_bytes``, the memory of one device.

    ``examined``: what was live before is not read through once more; going back is urgent. Of the base and of the hosted weights only the
    tensors' headers are read.
    """
    cache = spec.home / "cache"
    if not examined and manifest.kind == "adapter":
        check_takes_adapters(registry, manifest, cache)
    elif not examined:
        fitting.fit(spec, fitting.of_version(registry, manifest.id, cache), str(manifest.id), memory_bytes)
    with registry.candidate(manifest.id, cache) as candidate:
        if not examined:
            examine(registry, candidate, hosted, cache)
        if manifest.kind == "adapter":
            check_rank(candidate, spec)


def examine(registry: Registry, candidate: Candidate, hosted: VersionId, cache: Path) -> None:
    """Every byte of the version: its digest, its layout, its numbers, and whether it fits what it sits on or replaces."""
    manifest = candidate.manifest
    check_layout(candidate.folder, manifest.kind)
    base = registry.candidate(manifest.base, cache) if manifest.base else None
    artefact.inspect(candidate.folder, base.shapes if base else None)
    if manifest.weights == manifest.id != hosted:
        artefact.check_kinds(candidate.tensors, registry.candidate(hosted, cache).tensors)


def check_takes_adapters(registry: Registry, manifest: Manifest, cache: Path) -> None:
    with registry.candidate(manifest.weights, cache) as base:
        config = fitting.configuration(base.settings)
    if not takes_adapters(config):
        raise VersionRefused(
            f"{manifest.id} is an adapter on {manifest.weights}, and vLLM loads no adapters onto a {config['architectures'][0]}.",
            "Train all of its weights, and publish those.",
            param="base",
        )


def check_rank(candidate: Candidate, spec: FleetSpec) -> None:
    rank, limit = max(artefact.stated_ranks(candidate.settings)), spec.fleet.max_lora_rank
    if rank > limit:
        raise VersionRefused(
            f"{candidate.manifest.id} has rank {rank}, but the engine takes at most {limit}.",
            f"Train with a smaller r, or start the fleet {spec.name} with max_lora_rank={rank} or more.",
            param="fleet.max_lora_rank",
        )


def check_replaces(
    model: str,
    manifest: Manifest,
    alias: str,
    hosted: VersionId,
    needed: Mapping[str, VersionId | None],
    leaving: VersionId | None,
) -> None:
    """Other weights than the fleet's take their place, so nobody else may need the old ones. Pure.

    ``model``: the alias whose weights the fleet hosts, now ``hosted``. ``needed``: alias → the weights that it needs now, or when its
    rollout has ended. ``leaving``: the weights that a rollout of ``model`` is about to bring.

    Example: the fleet hosts m@1 for the alias m, and the alias a means an adapter on m@1. Publishing m@2 to m is refused while a needs
    m@1. Publishing an adapter on m@2 to a is refused too: the fleet does not host m@2.
    """
    if alias != model and leaving and leaving != manifest.weights:
        raise VersionRefused(
            f"{manifest.id} needs {manifest.weights}, and the fleet is about to host {leaving}.",
            "Train it on those, or wait until that rollout has ended.",
            param="base",
        )
    if manifest.weights == hosted:
        return
    others = [name for name, weights in needed.items() if name != alias and weights == hosted]
    if alias != model or others or manifest.weights.name != hosted.name:
        raise VersionRefused(
            f"{manifest.id} needs {manifest.weights}, but the fleet hosts {hosted} for {', '.join(others) or model}.",
            f"Train it on {hosted}, or host its base too: springtide fleets add NAME --model {manifest.weights.name}.",
            param="base",
        )


class Shapes:
    """Which weights can take each other's place inside a running engine. Versions never change, so each pair is compared once, by the
    tensors' headers and the settings: nothing large is read or hashed, so this may be asked within a round."""

    def __init__(self) -> None:
        self.known: dict[tuple[VersionId, VersionId], str] = {}

    def swap_obstacle(self, registry: Registry, cache: Path, new: VersionId, old: VersionId) -> str:
        """What keeps ``new`` from taking the place of ``old`` in a running engine: ``shape``, or the name of a file that differs. Empty where
        nothing does. See `artefact.difference`."""
        if new == old:
            return ""
        if (new, old) not in self.known:
            with registry.candidate(new, cache) as one, registry.candidate(old, cache) as other:
                self.known[new, old] = artefact.difference(one, other)
        return self.known[new, old]
