"""Taking other weights over in place: drain the streams, read the weights in, verify them, serve again; or go back to the old ones."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cluster import logs
from cluster.config import Fleet
from cluster.errors import VersionRefused
from cluster.redact import reason
from cluster.store import artefact
from cluster.types import Manifest
from deployments.replica.adapters import Adapters
from deployments.replica.holdings import Holdings
from deployments.replica.in_flight import InFlight
from deployments.replica.lifecycle import Life, State
from deployments.replica.storage import Storage
from deployments.replica.vllm_engine import VllmEngine

CUT_AFTER_S = 2
"""How long streams may run on where the swap cuts them."""
CUT_S = 1
"""How long ending a stream takes at most."""

log = logs.logger(__name__)


class Swap:
    """The swaps of one engine. Callers take turns: nothing here may run twice at once.

    Weights of the same shape are read into the running vLLM engine (SWAPPING, tens of milliseconds for a small model). Weights of another
    shape, tokenizer or configuration need another vLLM engine in its place (RESTARTING, as long as a start).
    """

    def __init__(
        self,
        fleet: Fleet,
        life: Life,
        storage: Storage,
        vllm: VllmEngine,
        holdings: Holdings,
        adapters: Adapters,
        in_flight: InFlight,
    ) -> None:
        self.fleet = fleet
        self.life = life
        self.storage = storage
        self.vllm = vllm
        self.holdings = holdings
        self.adapters = adapters
        self.in_flight = in_flight
        self.restarted_s = 0.0
        """When the last restart of vLLM began."""

    async def to(self, id: str, expected: str, cut_streams: bool) -> None:
        """Host the weights ``id``. Never raises: after a failure the engine serves the weights that it had, and `Holdings.refused` says why.

        ``expected`` is the fingerprint that another replica computed over these weights; empty where no replica hosts them.
        """
        self.holdings.clear_refusals(id)
        began_s = time.monotonic()
        try:
            manifest = await self.storage.manifest(id)
            folder = await self.storage.fetch(manifest)
            fits = await self.fits(folder)
            began_s = time.monotonic()
            self.life.to(State.DRAINING)
            await self._drain(fits and self.fleet.swap == "keep", cut_streams)
            drained_s = time.monotonic()
            self.life.to(State.SWAPPING if fits else State.RESTARTING)
            async with self._standing_still(fits):
                await self._replace(manifest, folder, expected, fits)
            log.info("hosts %s: drained %.3f s, swapped %.3f s", id, drained_s - began_s, time.monotonic() - drained_s)
        except Exception as error:
            # vLLM may raise anything over weights that it cannot read. The old ones serve on, and the rollout ends with these words.
            self.holdings.refuse(id, reason(error))
            log.exception("stays on %s", self.holdings.base)
        finally:
            if self.life.state in (State.DRAINING, State.SWAPPING, State.RESTARTING):
                self.life.to(State.SERVING)
            self.holdings.pause_s = time.monotonic() - began_s
            self.holdings.revision += 1

    async def catch_up(self, manifest: Manifest, folder: Path) -> None:
        """Read weights of the same shape in after a sleep. No stream runs, and there is nothing to go back to."""
        async with self._standing_still(True):
            await self._take_over(manifest, folder, "", True)

    async def fits(self, folder: Path) -> bool:
        """Whether the running vLLM engine can read the weights in ``folder``."""
        return not await asyncio.to_thread(artefact.difference, folder, self.holdings.folder)

    async def _drain(self, keeping: bool, cut_streams: bool) -> None:
        """Wait until no stream runs. Streams of the base may run on where they are kept; other streams may be cut."""
        limit_s = min(CUT_AFTER_S, self.fleet.swap_drain_s) if cut_streams else self.fleet.swap_drain_s
        deadline_s, kept = time.monotonic() + limit_s, self.holdings.base if keeping else None
        while running := self.in_flight.streams(apart_from=kept):
            if cut_streams and time.monotonic() > deadline_s:
                log.warning("cuts %d streams of %s: it is rolled back", running, self.holdings.base)
                self.in_flight.cut()
                deadline_s += CUT_S
            elif time.monotonic() > deadline_s:
                raise VersionRefused(
                    f"{running} streams still ran after {limit_s} s.", "Raise fleet.swap_drain_s, or set fleet.swap=keep."
                )
            await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def _standing_still(self, fits: bool) -> AsyncIterator[None]:
        """No token is made until the engine holds verified weights: the new ones, or the old ones again."""
        if not fits:
            yield  # vLLM restarts, and makes no token anyway
            return
        keep = self.fleet.swap == "keep"
        await self.vllm.pause(keep)
        try:
            yield
        finally:
            if self.life.state is not State.BROKEN:
                await self.vllm.resume(keep)

    async def _replace(self, manifest: Manifest, folder: Path, expected: str, fits: bool) -> None:
        before = await self.storage.manifest(self.holdings.base)
        try:
            await self._take_over(manifest, folder, expected, fits)
        except Exception:
            if not self.holdings.held:  # the old weights are gone from memory, and the new ones are not verified
                await self._revert(before, fits)
            raise

    async def _revert(self, before: Manifest, fits: bool) -> None:
        """Back to the weights that the engine had. BROKEN where that fails too: what is in memory has no name to answer under."""
        try:
            folder = await self.storage.fetch(before)
            await self._take_over(before, folder, self.holdings.fingerprint, fits)
        except Exception:
            self.life.to(State.BROKEN)
            raise

    async def _take_over(self, manifest: Manifest, folder: Path, expected: str, fits: bool) -> None:
        """Replace the weights and everything that followed from the old ones: adapters, prefix cache, the model's name."""
        found = await (self._reload(folder) if fits else self._restart(folder, str(manifest.id)))
        if expected and found != expected:
            raise VersionRefused(f"the weights in memory have checksum {found[:12]}…, another replica's {expected[:12]}…")
        self.vllm.rename(str(manifest.id), folder)
        self.holdings.host(manifest, folder, found)
        await self.adapters.catch_up()

    async def _reload(self, folder: Path) -> str:
        await self.adapters.unload_all()
        self.holdings.held = {}
        return await self.vllm.reload(folder)

    async def _restart(self, folder: Path, name: str) -> str:
        self.restarted_s = time.monotonic()
        self.holdings.held = {}
        await self.vllm.restart(folder, name)
        return await self.vllm.fingerprint()
