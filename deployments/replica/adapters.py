"""Which versions an engine loads beside its base: loading, staging, making room, and saying why not."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from cluster import logs
from cluster.config import Fleet
from cluster.errors import SpringtideError, VersionRefused
from cluster.types import Manifest
from deployments.replica.holdings import Holdings
from deployments.replica.in_flight import InFlight
from deployments.replica.storage import Storage
from deployments.replica.vllm_engine import VllmEngine

CLOSE_S = 5.0
"""How long an order waits for the requests of an adapter that makes room."""

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
        """Nothing where room could not be made yet: control orders it again."""
        folder = await self.storage.fetch(manifest)
        if await self._make_room(str(manifest.id)):
            await self.vllm.load_adapter(str(manifest.id), folder)
            self.holdings.held[str(manifest.id)] = manifest.digest

    async def _stage(self, manifest: Manifest) -> None:
        """Bring every byte of the version and of its weights to this machine, so that a swap waits for no store."""
        for id in {manifest.id, manifest.weights}:
            await self.storage.fetch(await self.storage.manifest(id))
        self.holdings.staged[str(manifest.id)] = manifest.digest

    async def _make_room(self, coming: str) -> bool:
        """Unload one adapter where all places are taken. Its requests in flight end first; new ones go to another replica. False where they
        have not ended yet."""
        adapters = self.holdings.adapters
        if len(adapters) < self.fleet.max_cpu_loras:
            return True
        uses = [Use(id, self.in_flight.answering[id], self.in_flight.used_s.get(id, 0.0)) for id in adapters]
        leaving = to_unload(uses, self.holdings.assigned, await self.storage.live(), self.fleet.when_full == "evict")
        if leaving is None:
            raise VersionRefused(
                f"All {len(adapters)} places for adapters are taken, so {coming} has none.",
                "Raise fleet.max_cpu_loras, or set fleet.when_full=evict to unload the adapter that was idle the longest.",
                param="fleet.max_cpu_loras",
            )
        if not await self._close(leaving):
            log.info("%s waits for the place of %s, which still answers", coming, leaving)
            return False
        await self._unload(leaving)
        return True

    async def _close(self, id: str) -> bool:
        """Admit no request for the version, and wait for those in flight. False, and it is open again, where they last longer than `CLOSE_S`:
        other orders wait for this one."""
        digest, answered = self.holdings.held.pop(id), False
        self.holdings.revision += 1
        try:
            answered = await self.in_flight.until_answered(id, CLOSE_S)
        finally:
            if not answered:
                self.holdings.held[id] = digest
        return answered

    async def _unload(self, id: str) -> None:
        self.holdings.held.pop(id, None)  # first: control must not route to what is being unloaded
        self.in_flight.used_s.pop(id, None)
        await self.vllm.unload_adapter(id)
        log.info("unloaded %s", id)


class Use(NamedTuple):
    """How one adapter is used."""

    id: str
    answering: int
    """Its requests in flight."""
    used_s: float
    """When it was last asked for."""


def to_unload(uses: Sequence[Use], assigned: Collection[str], live: Collection[str], evict: bool) -> str | None:
    """The adapter that makes room for another; None where all must stay. Pure.

    What control has ``assigned`` to this engine stays; before control has said so, what is ``live`` does. A live adapter that is not
    assigned here may go: another replica is to hold it, or there is no place for it. An adapter that is not live goes only where the fleet's
    ``when_full`` says ``evict``. Of those that may go, the ones without a request in flight come first, then the ones that are not live,
    then the one that was idle the longest.

    Example: a and b are live and fit on both replicas, so both hold them. c comes, and this replica is assigned b and c: a must go, though
    it answers.

    >>> busy = [Use("a@1", answering=3, used_s=9.0), Use("b@1", answering=1, used_s=8.0)]
    >>> to_unload(busy, {"b@1", "c@1"}, {"a@1", "b@1", "c@1"}, evict=True)
    'a@1'
    """
    must_stay = assigned or live
    may_go = [one for one in uses if one.id not in must_stay and (evict or one.id in live)]
    return min(may_go, key=lambda one: (one.answering, one.id in live, one.used_s)).id if may_go else None
