"""Which versions an engine loads beside its base: loading, staging, making room, and saying why not."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from cluster import logs
from cluster.config import Fleet
from cluster.errors import SpringtideError, VersionRefused
from cluster.types import Manifest, is_interim
from deployments.replica.holdings import Holdings
from deployments.replica.in_flight import InFlight
from deployments.replica.storage import Storage
from deployments.replica.vllm_engine import VllmEngine

CLOSE_S = 1.0
"""How long an order waits for the requests of an adapter that makes room. Other orders wait for this one, and control orders it again."""

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
        if id in self.holdings.closing:
            self.holdings.reopen(id)
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

    async def let_go(self) -> None:
        """Unload the interim versions of runs that control wants here no more, as soon as no request uses them."""
        for id in self.holdings.adapters:
            if is_interim(id) and id not in self.holdings.assigned and not self.in_flight.answering[id]:
                await self._unload(id)
                self.holdings.revision += 1

    async def catch_up(self) -> None:
        """Load every version that was live on these weights, so that a replica is not behind when it begins to serve."""
        for manifest in await self.storage.retained(self.holdings.base, self.fleet.max_cpu_loras):
            await self.hold(str(manifest.id))

    async def unload_all(self) -> None:
        for id in self.holdings.adapters:
            await self._unload(id)

    async def _load(self, manifest: Manifest) -> None:
        """Nothing where room could not be made yet: control orders it again."""
        id, folder = str(manifest.id), await self.storage.fetch(manifest)
        waits = await self._make_room(id)
        self.holdings.wait(id, waits)
        if not waits:
            await self.vllm.load_adapter(id, folder)
            self.holdings.held[id] = manifest.digest

    async def _stage(self, manifest: Manifest) -> None:
        """Bring every byte of the version and of its weights to this machine, so that a swap waits for no store."""
        for id in {manifest.id, manifest.weights}:
            await self.storage.fetch(await self.storage.manifest(id))
        self.holdings.staged[str(manifest.id)] = manifest.digest

    async def _make_room(self, coming: str) -> str:
        """Unload one adapter where all places are taken. It takes no new request from now on, and its requests in flight end first; words for
        what is still waited for, or nothing."""
        if len(self.holdings.adapters) < self.fleet.max_cpu_loras:
            return ""
        leaving = next((id for id in self.holdings.closing if id not in self.holdings.assigned), None) or await self._choose()
        if leaving is None:
            raise VersionRefused(
                f"All {len(self.holdings.adapters)} places for adapters are taken, so {coming} has none.",
                "Raise fleet.max_cpu_loras, or set fleet.when_full=evict to unload the adapter that was idle the longest.",
                param="fleet.max_cpu_loras",
            )
        if leaving not in self.holdings.closing:
            self.holdings.close(leaving)
        if not await self.in_flight.until_answered(leaving, CLOSE_S):
            return f"the place of {leaving}, which {self.in_flight.answering[leaving]} requests still use"
        await self._unload(leaving)
        return ""

    async def _choose(self) -> str | None:
        """The adapter that makes room; see `to_unload`."""
        uses = [Use(id, self.in_flight.answering[id], self.in_flight.used_s.get(id, 0.0)) for id in self.holdings.adapters]
        return to_unload(uses, self.holdings.assigned, await self.storage.live(), self.fleet.when_full == "evict")

    async def _unload(self, id: str) -> None:
        self.holdings.forget(id)  # first: control must not route to what is being unloaded
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
