"""The store as an engine asks it. Every read runs in a thread, because the event loop here serves tokens."""

import asyncio
from collections.abc import Collection
from pathlib import Path

from cluster.config import FleetSpec
from cluster.control import weight_distribution
from cluster.store.registry import Registry, registry_of
from cluster.types import Manifest, VersionId


class Storage:
    """One engine's reader of the store. No request waits for it."""

    def __init__(self, spec: FleetSpec) -> None:
        self.registry = registry_of(spec)
        self.cache = spec.home / "cache"
        self.fetched: list[Manifest] = []
        """Every version that `fetch` holds in the cache."""

    async def manifest(self, id: str | VersionId) -> Manifest:
        return await asyncio.to_thread(self.registry.manifest, VersionId.parse(id))

    async def fetch(self, manifest: Manifest) -> Path:
        """A folder on this machine with the version's files, every digest checked. The cache keeps it until `keep` says otherwise."""
        folder = await asyncio.to_thread(self.registry.fetch, manifest, self.cache)
        self.fetched.append(manifest)
        return folder

    def keep(self, ids: Collection[str]) -> None:
        """Let the cache give up every version but these and their weights. Example: the old weights after a swap."""
        used = {weights for one in self.fetched if str(one.id) in ids for weights in (one.id, one.weights)}
        kept: dict[VersionId, Manifest] = {}
        for one in self.fetched:
            if one.id in used and one.id not in kept:
                kept[one.id] = one
            else:  # not used, or fetched once more
                self.registry.files.release(one)
        self.fetched = list(kept.values())

    async def unpack(self, carried: weight_distribution.Carried) -> None:
        """Write files that came with control's order to where `fetch` looks first."""
        await asyncio.to_thread(weight_distribution.unpack, carried, self.cache, self.registry.files.limit_bytes)

    async def live(self) -> set[str]:
        """The versions that some alias's clients may get now."""
        aliases = await asyncio.to_thread(self.registry.aliases)
        return {str(id) for move in aliases.values() for id in move.versions}

    async def retained(self, weights: str, limit: int) -> list[Manifest]:
        """The adapters that an engine with these weights holds before it serves: at most ``limit``, the live ones last."""
        return await asyncio.to_thread(retained, self.registry, VersionId.parse(weights), limit)


def retained(registry: Registry, weights: VersionId, limit: int) -> list[Manifest]:
    return registry.resident_adapters(weights, limit)
