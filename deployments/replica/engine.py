"""The engine's actor: one vLLM engine in a process of its own, which one replica after another may own.

A Serve replica holds a slot and no more (`deployments.replica.replica`). Its engine is a Ray actor on the same machine that holds no slot,
so the engine can outlive the replica, asleep, and serve again under the next one within moments. Requests do not pass through Ray: vLLM's
own FastAPI application listens on a port of its own, and the gateway streams bytes from it. The port answers only to whoever knows the
secret, which leaves the process over Ray's authenticated RPC and nowhere else.

vLLM only ever sees immutable version ids as model names, so its prefix cache cannot mix two versions.
"""

import asyncio
import os
import secrets
import time
from pathlib import Path

from cluster import logs
from cluster.config import FleetSpec
from cluster.control import weight_distribution
from cluster.types import HoldOrder, Manifest, ReplicaState
from deployments.replica import watchdog
from deployments.replica.ending import Ending
from deployments.replica.hosting import Hosting
from deployments.replica.lifecycle import Life, Owner, State
from deployments.replica.load import STEPS_S, EngineLoad
from deployments.replica.storage import Storage

START_TIMEOUT_S = 600
"""How long vLLM may take to restart for weights of another shape before Serve replaces the replica."""
UNOWNED_S = 60
"""How long a new engine waits for its first owner. The replica that started it may have died in between."""
QUIET_S = 1.5
"""An engine whose replica ends must have been idle this long before it sleeps or ends."""

LOOK_S = 0.1
"""How often an engine looks for what its replica has to report."""

log = logs.logger(__name__)


class Engine:
    """One vLLM engine that hosts one weights version, and any adapters on it. `Life` says what it may do now."""

    def __init__(self, spec: FleetSpec, environment: dict[str, str]) -> None:
        """``environment``: which accelerators to take; set before anything looks."""
        os.environ.update(environment)
        self.spec = spec
        self.life = Life()
        self.ending = Ending(self.life, UNOWNED_S)
        self.storage = Storage(spec)
        self.load = EngineLoad()
        self.secret = secrets.token_urlsafe(32)
        self.loading = asyncio.Lock()
        """Held while versions are loaded or swapped."""
        self.started: Hosting | None = None
        self.unwatch = lambda: None
        """Stops watching the owner's process."""

    @property
    def hosting(self) -> Hosting:
        assert self.started is not None, "vLLM has not started"  # noqa: S101 (replicas pass orders on only after `acquire`)
        return self.started

    # one replica after another

    async def asleep(self) -> bool:
        """Whether a replica may own it: an engine that another replica has left, and that works."""
        return self.life.state is State.ASLEEP and not self.hosting.vllm.dead

    async def acquire(self, owner: Owner, weights: str, spec: FleetSpec) -> bool:
        """Host ``weights`` for this replica, with its fleet's settings, and end when its process does.

        False where another replica was faster, or the engine cannot host them; in that case the engine ends. Where the files cannot be read
        it raises, and the engine is as it was before.
        """
        if not self.life.acquire(owner):
            return False
        began_s = time.monotonic()
        self.unwatch = watchdog.when_gone(owner.pid, lambda: os._exit(1))  # nothing to save: nobody else can ask for it
        async with self.loading:
            try:
                manifest = await self.storage.manifest(weights)
                folder = await self.storage.fetch(manifest)
            except Exception:
                self._give_up()
                raise
            if not await self._host(manifest, folder, spec):
                return False
        log.info("%s serves %s at %s after %.2f s", owner.id, weights, self.hosting.server.url, time.monotonic() - began_s)
        return True

    def _give_up(self) -> None:
        """Nothing has changed yet: wait for the next owner."""
        self.unwatch()
        self.life.to(State.NEW if self.life.state is State.STARTING else State.ASLEEP)
        self.ending.after(UNOWNED_S if self.life.state is State.NEW else self.spec.fleet.warm_pool_s)

    async def _host(self, manifest: Manifest, folder: Path, spec: FleetSpec) -> bool:
        if self.started is None:
            await self._start(manifest, folder, spec)
        else:
            self.started.use(spec)
            if not await self.started.wake(manifest, folder):
                await self.ending.end()
                return False
        self.spec = spec
        await self.hosting.adapters.catch_up()  # before any request: a late replica is never behind
        self.storage.keep(self.hosting.holdings.used)
        self.life.to(State.SERVING)
        return True

    async def _start(self, manifest: Manifest, folder: Path, spec: FleetSpec) -> None:
        try:
            self.started = await Hosting.start(spec, self.life, self.storage, self.load, self.secret, manifest, folder)
        except Exception:
            self.life.to(State.ENDED)
            self.ending.exit_soon(1)  # the replica gets vLLM's words first, then Serve, then whoever waits for the pool
            raise
        self.ending.started(self.started)

    async def release(self, keep: bool) -> None:
        """The replica ends. Wait for the streams; then sleep, where the engine is to be kept for another replica, else end."""
        self._leave()
        await self.hosting.in_flight.until_quiet(QUIET_S, self.spec.fleet.drain_timeout_s)
        self._leave()  # where a swap was under way before, and has ended
        keep = keep and self.life.state is State.LEAVING and not self.loading.locked()
        log.info("%s ends; its engine %s", self.life.owner and self.life.owner.id, "sleeps" if keep else "ends too")
        if not keep:
            return await self.ending.end()
        self.life.to(State.FALLING_ASLEEP)
        await self.hosting.fall_asleep()
        self.unwatch()
        self.life.to(State.ASLEEP)
        self.ending.after(self.spec.fleet.warm_pool_s)

    def _leave(self) -> None:
        if self.life.may(State.LEAVING):
            self.life.to(State.LEAVING)

    async def end(self) -> None:
        """End, unless a replica owns the engine."""
        if self.life.owner is None:
            await self.ending.end()

    # what control asks for

    async def describe(self) -> ReplicaState:
        holdings, owner = self.hosting.holdings, self.life.owner or Owner("", "", 0)
        return ReplicaState(
            id=owner.id,
            url=self.hosting.server.url,
            secret=self.secret,
            base=holdings.base,
            held=dict(holdings.held),
            refused=dict(holdings.refused),
            waiting=dict(holdings.waiting),
            running=self.hosting.in_flight.running,
            staged=dict(holdings.staged),
            revision=holdings.revision,
            pause_s=holdings.pause_s,
            fingerprint=holdings.fingerprint,
            app=owner.app,
            pid=os.getpid(),
            context_tokens=self.hosting.vllm.context_tokens,
            kv_cache_tokens=self.hosting.vllm.kv_cache_tokens,
        )

    async def news(self, known: ReplicaState | None, patience_s: float) -> ReplicaState:
        """What `describe` says, once it is something else than ``known`` but for the requests that run; at the latest after ``patience_s``.

        The engine looks at itself: a look from outside is a call through Ray.
        """
        state, ends_s = await self.describe(), time.monotonic() + patience_s
        while known is not None and state._replace(running=known.running) == known and time.monotonic() < ends_s:
            await asyncio.sleep(LOOK_S)
            state = await self.describe()
        return state

    async def hold(self, order: HoldOrder, carried: weight_distribution.Carried) -> ReplicaState:
        """Load every version of the order that is not held yet, and stage what sits on other weights. Let go of interim versions that are not
        to be kept.

        Never raises for a bad version: the answer says what was refused and why. ``carried``: files that came with the order.
        """
        async with self.loading:
            await self.storage.unpack(carried)
            self.hosting.holdings.assigned = frozenset(order.keep)
            await self.hosting.adapters.let_go()
            for id in order.load:
                await self.hosting.adapters.hold(id)
            self.storage.keep(self.hosting.holdings.used)
        return await self.describe()

    async def swap_weights(self, id: str, fingerprint: str, cut_streams: bool) -> ReplicaState:
        """Host the weights ``id`` in place; see `Swap.to`. Nothing where the replica ends already."""
        async with self.loading:
            if id != self.hosting.holdings.base and self.life.state is State.SERVING:
                await self.hosting.swap.to(id, fingerprint, cut_streams)
                self.storage.keep(self.hosting.holdings.used)
        return await self.describe()

    # what Serve asks for

    async def check(self) -> None:
        """Raises where Serve should replace the replica."""
        if self.life.state is State.BROKEN:
            raise RuntimeError("the engine died, or could not go back to the weights it had")
        if self.hosting.server.ended:
            raise RuntimeError("the engine's HTTP server ended")
        if self.life.state is not State.RESTARTING:
            await self.hosting.vllm.check()
        elif time.monotonic() - self.hosting.swap.restarted_s > START_TIMEOUT_S:
            raise RuntimeError(f"vLLM did not restart within {START_TIMEOUT_S} s")

    async def stats(self) -> dict[str, float]:
        """The engine's load; see `deployments.replica.load`."""
        return self.load.stats(time.monotonic(), idle=self.hosting.in_flight.idle(STEPS_S))
