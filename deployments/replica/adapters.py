"""Which versions an engine loads beside its base: loading, staging, making room, and saying why not."""

from cluster import logs
from cluster.config import Fleet
from cluster.errors import SpringtideError, VersionRefused
from cluster.types import Manifest
from deployments.replica.holdings import Holdings
from deployments.replica.in_flight import InFlight
from deployments.replica.storage import Storage
from deployments.replica.vllm_engine import VllmEngine

log = logs.logger(__name__)


class Adapters:
    """The adapters of one engine. Callers take turns: nothing here may run twice at once."""

    def __init__(self, fleet: Fleet, storage: Storage, vllm: VllmEngine, holdings: Holdings, in_flight: InFlight) -> None:
        self.fleet = fleet
        self.storage = storage
        self.vllm = vllm
        self.holdings = holdings
        self.in_flight = in_flight

    async def hold(self, id: str) -> None:
        """Load a version, or stage it where it sits on other weights. Never raises for a bad one: `Holdings.refused` says why.

        Example: on seedling@1, ``tuned@3`` (an adapter on seedling@1) is loaded, and ``seedling@2`` is fetched and checked.
        """
        known = id in self.holdings.held or id in self.holdings.staged
        if known and not self.holdings.refused:
            return
        try:
            manifest = await self.storage.manifest(id)
            if not known:
                await (self._load if str(manifest.weights) == self.holdings.base else self._stage)(manifest)
                self.holdings.revision += 1
            self.holdings.clear_refusals(id, str(manifest.weights))
        except SpringtideError as error:
            self.holdings.refuse(id, str(error))
            log.warning("refused %s: %s", id, error)

    async def catch_up(self) -> None:
        """Load every version that was live on these weights, so that a replica is not behind when it begins to serve."""
        for manifest in await self.storage.retained(self.holdings.base, self.fleet.max_cpu_loras):
            await self.hold(str(manifest.id))

    async def unload_all(self) -> None:
        for id in self.holdings.adapters:
            await self._unload(id)

    async def _load(self, manifest: Manifest) -> None:
        folder = await self.storage.fetch(manifest)
        await self._make_room(str(manifest.id))
        await self.vllm.load_adapter(str(manifest.id), folder)
        self.holdings.held[str(manifest.id)] = manifest.digest

    async def _stage(self, manifest: Manifest) -> None:
        """Bring every byte of the version and of its weights to this machine, so that a swap waits for no store."""
        for id in {manifest.id, manifest.weights}:
            await self.storage.fetch(await self.storage.manifest(id))
        self.holdings.staged[str(manifest.id)] = manifest.digest

    async def _make_room(self, coming: str) -> None:
        """Unload the adapter that was idle the longest, where all places are taken. One that must be here or is answering stays, and so does
        a live one while there is another: where the fleet's adapters do not all fit on each replica, another replica holds it."""
        adapters = self.holdings.adapters
        if len(adapters) < self.fleet.max_cpu_loras:
            return
        live = await self.storage.live()
        must_stay = self.holdings.assigned or live
        idle = [id for id in adapters if id not in must_stay and not self.in_flight.answering[id]]
        if not idle or self.fleet.when_full == "refuse":
            raise VersionRefused(
                f"All {len(adapters)} places for adapters are taken, so {coming} has none.",
                "Raise fleet.max_cpu_loras, or set fleet.when_full=evict to unload the adapter that was idle the longest.",
                param="fleet.max_cpu_loras",
            )
        await self._unload(min(idle, key=lambda id: (id in live, self.in_flight.used_s.get(id, 0.0))))

    async def _unload(self, id: str) -> None:
        del self.holdings.held[id]  # first: control must not route to what is being unloaded
        self.in_flight.used_s.pop(id, None)
        await self.vllm.unload_adapter(id)
        log.info("unloaded %s", id)
