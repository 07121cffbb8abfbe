"""An engine in a process of its own, which one replica after another may own: it converges to the wanted versions and reports load.

A Serve replica holds a slot and no more (`deployments.replica.replica`); the engine that it owns is a Ray actor on its machine that holds none, so it
can outlive the replica, asleep, and be awake again under the next one within moments. Requests do not pass through Ray: the engine serves
vLLM's own FastAPI application on a port of its own, and the gateway streams bytes from it. The port answers only to who knows the
secret, which leaves the process over Ray's authenticated RPC and nowhere else.

vLLM only ever sees immutable version ids as model names, so its prefix cache cannot mix two versions.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import ray

from cluster import logs, niceness
from cluster.config import FleetSpec
from cluster.control import weight_distribution
from cluster.errors import SpringtideError, VersionRefused
from cluster.store import artefact
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Manifest, ReplicaState, VersionId
from deployments.replica import watchdog
from deployments.replica.auth import AuthMiddleware
from deployments.replica.launch import serve_http, start_engine
from deployments.replica.load import STEPS_S, EngineLoad
from deployments.replica.warm_pool import Owner

START_TIMEOUT_S = 600
"""How long there may be no engine between two before Serve replaces the replica."""
HURRY_S = 2
"""How long streams by weights that are taken back may run on."""
CUT_S = 1
"""How long ending a stream takes at most."""
QUIET_S = 1.5
"""An engine whose replica ends must have been idle this long before it rests."""

log = logs.logger(__name__)


class Engine:
    """One vLLM engine that hosts one weights version, and any adapters on it."""

    def __init__(self, spec: FleetSpec, environment: dict[str, str]) -> None:
        """``environment``: which accelerators to take; set before anything looks."""
        os.environ.update(environment)
        self.spec = spec
        self.registry = Registry(Store(spec.store))
        self.cache = spec.home / "cache"
        self.owner: Owner | None = None
        """None while it sleeps, or was never started."""
        self.base = ""
        """Empty before the first start."""
        self.held: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.staged: dict[str, str] = {}
        self.pause_s = 0.0
        self.revision = 0
        self.starting_s: float | None = None
        """Since when it is between two engines."""
        self.broken = False
        self.loading = asyncio.Lock()
        self.load = EngineLoad()
        self.secret = secrets.token_urlsafe(32)
        self.release = lambda: None
        self.ending = False
        self.expiry: asyncio.Task[None] | None = None
        """Ends it when it has slept for long enough."""

    # one replica after another

    async def sleeps(self) -> bool:
        """Whether any replica may own it: its first replica's, and working."""
        return bool(self.base) and self.owner is None and not self.ending and not self.engine.errored

    async def own(self, owner: Owner, weights: str, spec: FleetSpec) -> bool:
        """Host ``weights`` for this replica from now on, as its ``spec`` says, and end when its process does. False: another was faster, or
        it takes an engine of another shape; this one ends then."""
        if self.owner is not None or self.ending:
            return False
        self.owner, self.spec, began_s = owner, spec, time.monotonic()
        if self.expiry is not None:
            self.expiry.cancel()
        self.release = watchdog.when_gone(owner.pid, lambda: os._exit(1))  # nothing to save: whoever could ask for it is gone
        manifest = self.registry.manifest(VersionId.parse(weights))
        folder = await asyncio.to_thread(self.registry.fetch, manifest, self.cache)
        if not self.base:
            await self._start(manifest, folder)
        elif not await self._wake(manifest, folder):
            self._end()
            return False
        await self._catch_up()  # before any traffic: a late replica is never behind
        self.guard.closed = False
        loop = type(asyncio.get_running_loop()).__module__
        log.info("%s serves %s on port %d after %.2f s (%s)", owner.id, weights, self.port, time.monotonic() - began_s, loop)
        return True

    async def _start(self, manifest: Manifest, folder: Path) -> None:
        self.folder, self.base = folder, str(manifest.id)
        self.engine, app = await start_engine(self.spec, folder, self.base, self.load)
        self.models = app.state.openai_serving_models
        self.fingerprint = await self._fingerprint()
        self.held[self.base] = manifest.digest
        self.guard = AuthMiddleware(app, self.secret)
        self.host = ray.util.get_node_ip_address()
        self.port, self.server, self.serving = serve_http(self.guard, self.host)
        niceness.freeze_gc()

    async def _wake(self, manifest: Manifest, folder: Path) -> bool:
        """Answer again, by other weights where those went live meanwhile; False where that takes another engine."""
        fits = self.base == str(manifest.id) or await self._fits(folder)
        if fits and self.spec.sleeps:
            await self.engine.wake_up()
        if fits and self.base != str(manifest.id):
            async with self._standing_still(True):
                await self._take_over(manifest, folder, "", True)
        self.refused.clear()
        self.staged.clear()
        return fits

    async def rest(self, keep: bool) -> None:
        """The replica ends: let the streams finish, then sleep, where it is to be kept, for another to own; else end."""
        await self._quiet()
        self.guard.closed = True  # a gateway that has not heard of it comes back by a newer view
        keep = keep and not self.broken and not self.loading.locked()
        if keep:
            self.guard.cut()
            if self.spec.sleeps:
                await self.engine.sleep(level=1)
        self.release()
        log.info("%s ends; its engine %s", self.owner and self.owner.id, "sleeps" if keep else "ends too")
        self.owner = None
        if keep:
            self.expiry = asyncio.create_task(self._expire())
        else:
            await self.end()

    async def _expire(self) -> None:
        await asyncio.sleep(self.spec.fleet.standby_s)
        await self.end()

    async def end(self) -> None:
        """Nobody needs it. Nothing where it is owned."""
        if self.owner is None:
            self.ending = True
            await self._shut()

    async def _quiet(self) -> None:
        deadline_s = time.monotonic() + self.spec.fleet.drain_timeout_s
        quiet_since_s = time.monotonic()
        while time.monotonic() < deadline_s and time.monotonic() - quiet_since_s < QUIET_S:
            await asyncio.sleep(0.1)
            if self.guard.running or self.guard.busy_until_s > quiet_since_s:
                quiet_since_s = time.monotonic()

    async def _shut(self) -> None:
        self.server.should_exit = True
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.serving, 5)
        finally:
            self.engine.shutdown()
            self._end()

    def _end(self) -> None:
        """Once what was asked last is answered."""
        asyncio.get_running_loop().call_later(0.1, os._exit, 0)

    # what control asks for

    async def describe(self) -> ReplicaState:
        owner = self.owner or Owner("", "", 0)
        return ReplicaState(
            id=owner.id,
            url=f"http://{self.host}:{self.port}",
            secret=self.secret,
            base=self.base,
            held=dict(self.held),
            refused=dict(self.refused),
            running=self.guard.running,
            staged=dict(self.staged),
            revision=self.revision,
            pause_s=self.pause_s,
            fingerprint=self.fingerprint,
            app=owner.app,
            pid=os.getpid(),
        )

    async def _catch_up(self) -> None:
        """Load every version that was live on these weights."""
        limit = self.spec.fleet.max_cpu_loras
        wanted = await asyncio.to_thread(self.registry.ever_live, VersionId.parse(self.base), limit)
        for manifest in wanted:
            await self._hold_one(str(manifest.id))

    async def hold(self, ids: list[str], carried: weight_distribution.Carried) -> ReplicaState:
        """Load every version of ``ids`` that is not held yet; lay ready on this machine what sits on other weights.

        Never raises for a bad version: the answer says what was refused and why. ``carried``: files that came with the order.
        """
        async with self.loading:
            await asyncio.to_thread(weight_distribution.unpack, carried, self.cache)
            for id in ids:
                await self._hold_one(id)
        return await self.describe()

    async def _hold_one(self, id: str) -> None:
        if id in self.held or id in self.staged:
            self.revision += self._forgive(id) if self.refused else 0
            return
        try:
            manifest = await asyncio.to_thread(self.registry.manifest, VersionId.parse(id))
            await (self._load if str(manifest.weights) == self.base else self._stage)(manifest)
            self._forgive(id)
        except SpringtideError as error:
            self.refused[id] = str(error)
            log.warning("refused %s: %s", id, error)
        self.revision += 1

    def _forgive(self, id: str) -> bool:
        """Forget what was said earlier against a version, or against its weights; whether there was anything."""
        weights = self.registry.manifest(VersionId.parse(id)).weights
        return any([self.refused.pop(each, None) is not None for each in {id, str(weights)}])

    async def _stage(self, manifest: Manifest) -> None:
        """Every byte of the version and of its weights on this machine, its digest checked."""
        for one in {manifest.id, manifest.weights}:
            await asyncio.to_thread(self.registry.fetch, self.registry.manifest(one), self.cache)
        self.staged[str(manifest.id)] = manifest.digest

    async def _load(self, manifest: Manifest) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        folder = await asyncio.to_thread(self.registry.fetch, manifest, self.cache)
        await self._make_room(manifest.id)
        request = LoadLoRAAdapterRequest(lora_name=str(manifest.id), lora_path=str(folder))
        answer = await self.models.load_lora_adapter(request)
        if isinstance(answer, ErrorResponse):
            raise VersionRefused(f"the engine says: {answer.error.message}", "Check the adapter's target modules and shapes.")
        self.held[str(manifest.id)] = manifest.digest

    async def _make_room(self, coming: VersionId) -> None:
        """Give up the adapter that was not asked for the longest, where all places are taken. What is live, or answering, stays."""
        adapters = [id for id in self.held if id != self.base]
        if len(adapters) < self.spec.fleet.max_cpu_loras:
            return
        aliases = await asyncio.to_thread(self.registry.aliases)
        live = {str(id) for move in aliases.values() for id in move.versions}
        idle = [id for id in adapters if id not in live and not self.guard.answering[id]]
        if not idle or self.spec.fleet.when_full == "refuse":
            raise VersionRefused(
                f"All {len(adapters)} places for adapters are taken, so {coming} has none.",
                "Raise fleet.max_cpu_loras, or set fleet.when_full=evict to give up the one that was idle the longest.",
                param="fleet.max_cpu_loras",
            )
        await self._unload(min(idle, key=lambda id: self.guard.used_s.get(id, 0.0)))

    async def _unload(self, id: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        request = self.models.lora_requests.get(id)
        del self.held[id]
        await self.models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=id))
        if request is not None:
            await self.engine.remove_lora(request.lora_int_id)
        log.info("gave up %s", id)

    async def become(self, id: str, fingerprint: str, hurry: bool) -> ReplicaState:
        """Host the weights ``id`` from now on, in place: let the streams end, load, verify, answer again.

        ``fingerprint`` is what another replica computed over these weights, empty where none hosts them. ``hurry``: streams that take
        longer than `HURRY_S` are ended. Whatever fails, the engine goes back to the weights it had, and its state says why.
        """
        async with self.loading:
            if id != self.base:
                await self._swap(self.registry.manifest(VersionId.parse(id)), fingerprint, hurry)
        return await self.describe()

    async def _swap(self, manifest: Manifest, expected: str, hurry: bool) -> None:
        self.revision += self.refused.pop(str(manifest.id), None) is not None
        began_s = time.monotonic()
        try:
            folder = await asyncio.to_thread(self.registry.fetch, manifest, self.cache)
            fits = await self._fits(folder)
            began_s = time.monotonic()
            self.guard.closed = True
            await self._drained(fits and self.spec.fleet.swap == "keep", hurry)
            drained_s = time.monotonic()
            async with self._standing_still(fits):
                await self._replace(manifest, folder, expected, fits)
            log.info("became %s: drained %.3f s, swapped %.3f s", manifest.id, drained_s - began_s, time.monotonic() - drained_s)
        except Exception as error:
            # Whatever the engine raised over the new weights, the old ones answer again; the rollout ends with these words.
            self.refused[str(manifest.id)] = str(error)
            log.exception("%s stays %s", self.owner and self.owner.id, self.base)
        finally:
            self.guard.closed = self.broken  # what is in memory then has no name to answer under
            self.pause_s = time.monotonic() - began_s
            self.revision += 1

    @contextlib.asynccontextmanager
    async def _standing_still(self, fits: bool) -> AsyncIterator[None]:
        """No token is made until the engine holds weights that were verified: the new ones, or the old ones again."""
        if not fits:
            yield  # another engine takes this one's place
            return
        engine, keep = self.engine, self.spec.fleet.swap == "keep"
        await engine.pause_generation(mode="keep" if keep else "wait", clear_cache=not keep)
        try:
            yield
        finally:
            if engine is self.engine and not self.broken:
                await engine.reset_prefix_cache(reset_running_requests=keep)
                await engine.resume_generation()

    async def _replace(self, manifest: Manifest, folder: Path, expected: str, fits: bool) -> None:
        before = self.registry.manifest(VersionId.parse(self.base))
        try:
            await self._take_over(manifest, folder, expected, fits)
        except Exception:
            if not self.held:
                await self._revert(before)
            raise

    async def _revert(self, before: Manifest) -> None:
        try:
            folder = await asyncio.to_thread(self.registry.fetch, before, self.cache)
            await self._take_over(before, folder, self.fingerprint, await self._fits(folder))
        except Exception:
            self.broken = True  # a replica that can host nothing is replaced by Serve
            raise

    async def _take_over(self, manifest: Manifest, folder: Path, expected: str, fits: bool) -> None:
        """Replace the weights and everything that followed from the old ones: adapters, prefix cache, the model's name."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        found = await (self._reload(folder) if fits else self._restart(folder, str(manifest.id)))
        if expected and found != expected:
            raise VersionRefused(f"the weights in memory have checksum {found[:12]}…, another replica's {expected[:12]}…")
        self.base, self.folder, self.fingerprint = str(manifest.id), folder, found
        self.models.base_model_paths[:] = [BaseModelPath(name=self.base, model_path=str(folder))]
        self.held[self.base] = manifest.digest
        self.staged.clear()
        await self._catch_up()

    async def _fits(self, folder: Path) -> bool:
        """Whether the running engine can read these weights in; otherwise it takes another engine."""
        return self.starting_s is None and not await asyncio.to_thread(artefact.difference, folder, self.folder)

    async def _drained(self, keeping: bool, hurry: bool) -> None:
        """Wait until no stream runs, or none but those of the base where they are kept."""
        limit_s = min(HURRY_S, self.spec.fleet.swap_drain_s) if hurry else self.spec.fleet.swap_drain_s
        deadline_s, kept = time.monotonic() + limit_s, self.base if keeping else None
        while running := sum(count for id, count in self.guard.answering.items() if id != kept):
            if hurry and time.monotonic() > deadline_s:
                log.warning("%d streams of %s are ended: it is taken back", running, self.base)
                self.guard.cut()
                deadline_s += CUT_S
            elif time.monotonic() > deadline_s:
                raise VersionRefused(
                    f"{running} streams still ran after {limit_s} s.", "Raise fleet.swap_drain_s, or set fleet.swap=keep."
                )
            await asyncio.sleep(0.005)

    async def _reload(self, folder: Path) -> str:
        """Read other tensors into the running engine; the checksum of what it holds then."""
        for id in [id for id in self.held if id != self.base]:
            await self._unload(id)
        self.held.clear()
        return ":".join(await self.engine.collective_rpc("take_over", args=(str(folder),)))

    async def _restart(self, folder: Path, name: str) -> str:
        """Another engine in the place of this one, for weights of another shape; the checksum of what it holds."""
        self.starting_s = time.monotonic()
        self.held.clear()
        await asyncio.to_thread(self.engine.shutdown)
        self.engine, app = await start_engine(self.spec, folder, name, self.load)
        self.guard.app, self.models, self.folder = app, app.state.openai_serving_models, folder
        self.starting_s = None
        return await self._fingerprint()

    async def _fingerprint(self) -> str:
        return ":".join(await self.engine.collective_rpc("fingerprint"))

    async def check(self) -> None:
        """Raises where the replica should be replaced."""
        if self.starting_s is None:
            await self.engine.check_health()
        elif time.monotonic() - self.starting_s > START_TIMEOUT_S:
            raise RuntimeError(f"its other engine did not start within {START_TIMEOUT_S} s")
        if self.broken:
            raise RuntimeError("the replica could not go back to the weights it had")
        if self.serving.done():
            raise RuntimeError("the replica's HTTP server ended")

    async def stats(self) -> dict[str, float]:
        now_s = time.monotonic()
        return self.load.stats(now_s, idle=not self.guard.running and now_s - self.guard.busy_until_s > STEPS_S)
