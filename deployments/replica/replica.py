"""The replica as Serve has it: it holds a slot, owns an engine on its machine, and passes on what control asks.

Its process is light on purpose: what takes long to start is the engine, and that may have been left asleep by a replica before it
(`deployments.replica.warm_pool`).
"""

import asyncio
import contextlib
import os
import time

from ray import serve
from ray.exceptions import RayError

from cluster.config import FleetSpec
from cluster.control import weight_distribution
from cluster.control.client import Line, tell
from cluster.errors import ModelNotFound
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import ReplicaState, VersionId
from deployments.ray_patches import seal
from deployments.replica import watchdog
from deployments.replica.warm_pool import Owner, WarmPool

LOOK_S = 0.4
"""How often a replica looks whether it holds something else."""
REPORT_S = 1.0
"""How often it says that it lives. Control takes it for dead after `cluster.control.replicas.SILENT_S`."""


@serve.deployment
class Replica:
    """One slot, or as many as its engine needs, that serves."""

    async def __init__(self, spec: FleetSpec, weights: VersionId | None = None) -> None:
        """``weights``: what a replica of a second fleet hosts (`cluster.control.surge`); by default what is live, or sits under it."""
        seal()
        context = serve.get_replica_context()
        self.id = context.replica_id.unique_id
        self.ceiling: int | None = None
        tell("starting", self.id, "fetches its weights", context.app_name)
        id = weights or await asyncio.to_thread(live_weights, Registry(Store(spec.store)), spec.fleet.model)
        self.standby = WarmPool(spec)
        self.engine = await self.standby.engine(
            Owner(self.id, context.app_name, os.getpid()),
            str(id),
            lambda stage: tell("starting", self.id, stage, context.app_name),
        )
        state = await self.describe()
        self.release = watchdog.when_gone(state.pid, lambda: os._exit(1))  # Serve starts another replica at once
        self.reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        """Tell control how this replica is: at once when it holds something else, and every `REPORT_S`. Control asks nobody, so that nobody
        waits for a slow replica."""
        line, told, told_s = Line(), None, float("-inf")
        while True:
            with contextlib.suppress(RayError):  # the engine has ended: Serve's health check says so
                state = await self.describe()
                if state._replace(running=0) != told or time.monotonic() - told_s >= REPORT_S:
                    told_s = time.monotonic()
                    told = state._replace(running=0) if await line.tell("report", state) else None
            await asyncio.sleep(LOOK_S)

    async def wake(self) -> None:
        """Nothing: whoever calls it has a replica by then."""

    async def describe(self) -> ReplicaState:
        return await self.engine.describe.remote()

    async def hold(self, ids: list[str], carried: weight_distribution.Carried) -> ReplicaState | None:
        """See `deployments.replica.engine.Engine.hold`; None while there is none yet."""
        return await self.engine.hold.remote(ids, carried) if hasattr(self, "engine") else None

    async def become(self, replica: str, id: str, fingerprint: str, hurry: bool = False) -> ReplicaState | None:
        """See `deployments.replica.engine.Engine.become`. Asked of all replicas, obeyed by the one that is meant."""
        return await self.engine.become.remote(id, fingerprint, hurry) if replica == self.id else None

    async def cap(self, ceiling: int | None) -> None:
        """The fleet may have no more replicas than this; None lifts it. Serve's autoscaler hears it with the next load."""
        self.ceiling = ceiling

    async def check_health(self) -> None:
        await self.engine.check.remote()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's public hook: what `deployments.autoscaling` decides by."""
        load = await self.engine.stats.remote()
        return load if self.ceiling is None else {**load, "ceiling": float(self.ceiling)}

    async def __del__(self) -> None:
        """Serve calls this when the replica must end: let the streams finish, then leave the engine asleep, or end it."""
        if not hasattr(self, "release"):
            return
        self.reporting.cancel()
        tell("leaving", self.id)
        self.release()
        await self.standby.leave(self.engine)


def live_weights(registry: Registry, model: str) -> VersionId:
    """The weights version that a fleet for ``model`` hosts: what the alias's live version is, or sits on."""
    live = registry.alias(model)
    if live is None:
        raise ModelNotFound(f"{model} has no version to serve.", "Register one: springtide up --model PATH, or jobs.pretrain.")
    return registry.manifest(live.stable).weights
