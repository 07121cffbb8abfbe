"""The replica as Serve has it: it holds a slot, owns an engine on its machine, and passes control's orders on.

Its process is light on purpose. What takes long to start is the engine, and an earlier replica may have left one asleep
(`deployments.replica.warm_pool`).
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError

from cluster.config import FleetSpec
from cluster.control import weight_distribution
from cluster.control.client import Line, tell
from cluster.errors import FINAL, EngineFailed, ModelNotFound
from cluster.redact import reason
from cluster.store.registry import Registry, registry_of
from cluster.types import UNBOUNDED, HoldOrder, ReplicaBounds, ReplicaState, VersionId
from deployments.ray_patches import close_internal_port
from deployments.replica import watchdog
from deployments.replica.lifecycle import Owner
from deployments.replica.warm_pool import WarmPool

REPORT_S = 1.0
"""How often it says that it lives. Control takes it for dead after `cluster.control.replicas.SILENT_S`."""
AGAIN_S = 0.4
"""How long a replica waits before it tells control again what did not reach it."""
TELL_S = 0.2
"""How long a message to control may take to leave a process that ends."""


@serve.deployment
class Replica:
    """One slot, or as many as its engine needs, that serves."""

    engine: Any = None
    """The engine's actor; None until it serves."""
    unwatch: Callable[[], None] | None = None
    """Stops watching the engine's process."""
    reporting: asyncio.Task[None] | None = None
    bounds = UNBOUNDED
    """See `bound`."""

    async def __init__(self, spec: FleetSpec, weights: VersionId | None = None) -> None:
        """``weights``: what a replica of a surge fleet hosts (`cluster.control.applications`). By default it hosts the weights that are live."""
        close_internal_port()
        context = serve.get_replica_context()
        self.id, self.app = context.replica_id.unique_id, context.app_name
        self._tell("fetches its weights")
        self.warm_pool = WarmPool(spec)
        self.engine = await self._engine(spec, weights)
        state: ReplicaState = await self.engine.describe.remote()
        self.unwatch = watchdog.when_gone(state.pid, self._end)
        self.reporting = asyncio.create_task(self._report())

    async def _engine(self, spec: FleetSpec, weights: VersionId | None) -> Any:
        """The engine's actor, once it serves. Control hears why where it does not start.

        Serve makes several attempts, and vLLM takes a minute for each. Example: the KV cache is too small for the context. The first attempt
        fails in vLLM's words; the two that follow fail at once by the same words, and vLLM is not started for them.
        """
        id = weights or await asyncio.to_thread(live_weights, registry_of(spec), spec.fleet.model)
        if words := await Line().ask("failure", self.app, str(id)):
            tell("leaving", self.id)
            raise EngineFailed(words)
        try:
            return await self.warm_pool.engine(Owner(self.id, self.app, os.getpid()), str(id), self._tell)
        except Exception as error:
            tell("failed", self.id, self.app, str(id), reason(error), isinstance(error, FINAL))
            raise

    async def _report(self) -> None:
        """Tell control how this replica is: at once when it holds something else, and every `REPORT_S`. Control asks no replica, so it waits
        for no slow one."""
        line, told = Line(), None
        while True:
            try:
                state: ReplicaState = await self.engine.news.remote(told, REPORT_S)
            except RayError:  # the engine has ended: `_end` is called
                await asyncio.sleep(REPORT_S)
                continue
            if await line.tell("report", self._of(state)):
                told = state
            else:
                told = None
                await asyncio.sleep(AGAIN_S)

    def _tell(self, stage: str) -> None:
        tell("starting", self.id, stage, self.app)

    def _end(self) -> None:
        """The engine is gone. Gateways must know before Serve notices; then Serve starts another replica at once."""
        tell("leaving", self.id)
        asyncio.get_running_loop().call_later(TELL_S, os._exit, 1)

    async def wake(self) -> None:
        """Do nothing. Serve starts a replica for this call where there is none."""

    async def hold(self, orders: dict[str, HoldOrder], carried: weight_distribution.Carried) -> ReplicaState | None:
        """See `deployments.replica.engine.Engine.hold`; None until it serves. Control asks all replicas, and those that ``orders`` names
        obey."""
        return self._of(await self.engine.hold.remote(orders[self.id], carried)) if self.engine and self.id in orders else None

    async def swap_weights(self, replica: str, id: str, fingerprint: str, cut_streams: bool = False) -> ReplicaState | None:
        """See `deployments.replica.engine.Engine.swap_weights`. Control asks all replicas, and the one that ``replica`` names obeys."""
        return self._of(await self.engine.swap_weights.remote(id, fingerprint, cut_streams)) if replica == self.id else None

    async def bound(self, bounds: ReplicaBounds) -> ReplicaState | None:
        """How few and how many replicas the fleet may have. Serve's autoscaler hears it with the next load."""
        self.bounds = bounds
        return self._of(await self.engine.describe.remote()) if self.engine else None

    def _of(self, state: ReplicaState) -> ReplicaState:
        """The engine's state with what this replica adds."""
        return state._replace(bounds=self.bounds)

    async def check_health(self) -> None:
        if self.reporting is not None and self.reporting.done():
            raise RuntimeError("it no longer tells control how it is; the log says why")
        await self.engine.check.remote()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's public hook: what `deployments.autoscaling` decides by."""
        bounds = {name: float(value) for name, value in self.bounds._asdict().items() if value is not None}
        return {**await self.engine.stats.remote(), **bounds}

    async def __del__(self) -> None:
        """Serve calls this when the replica must end: let the streams finish, then leave the engine asleep, or end it."""
        if self.unwatch is None or self.reporting is None:
            return
        self.reporting.cancel()
        tell("leaving", self.id)
        self.unwatch()
        await self.warm_pool.leave(self.engine)


def live_weights(registry: Registry, model: str) -> VersionId:
    """The weights version that a fleet for ``model`` hosts: the alias's live version, or the base of a live adapter."""
    live = registry.alias(model)
    if live is None:
        raise ModelNotFound(f"{model} has no version to serve.", "Register one: springtide up --model PATH, or jobs.pretrain.")
    return registry.manifest(live.stable).weights
