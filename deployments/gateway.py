"""The gateway as Ray Serve has it: it joins the parts, and passes on what control asks. `deployments.api.application` answers clients.

Stateless: everything that it routes by comes from control, and if control is away it goes on with what it knows.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster import logs, niceness
from cluster.config import Config, merge
from cluster.control.client import ensure
from cluster.publishing.canary import Tally
from cluster.types import FleetState, View
from cluster.view import ViewDelta
from deployments.api.application import Application
from deployments.api.inference import Routing
from deployments.ray_patches import close_internal_port
from deployments.routing.budget import Budget
from deployments.routing.measure import Recorder
from deployments.routing.refresh import Refresh
from deployments.routing.router import Router
from deployments.routing.shadow import Shadow
from deployments.routing.table import Table
from deployments.routing.upstream import Timeouts, Upstream
from deployments.uvicorn_patches import expose_connections

log = logs.logger(__name__)


@serve.deployment(logging_config={"enable_access_log": False})  # a line for each request, with neither its path nor its model
@serve.ingress()
class Gateway:
    async def __init__(self, config: Config) -> None:
        close_internal_port()
        expose_connections()
        niceness.renice(niceness.CARRYING)
        self.config = config
        limits = config.gateway
        table, recorder = Table(), Recorder()
        upstream = Upstream(table, Timeouts(limits.first_byte_timeout_s, limits.idle_timeout_s, limits.answer_timeout_s))
        router = Router(table, lambda fleet: wake(serve.get_app_handle, fleet, limits.cold_start_timeout_s))
        self.routing = Routing(
            router,
            Refresh(router, lambda: ensure(config)),
            upstream,
            recorder,
            Shadow(upstream, recorder),
            Budget(limits.max_requests, limits.max_buffered_bytes, limits.max_held),
        )
        await self.routing.refresh.start(config.dump())

    def __serve_build_asgi_app__(self) -> Application:
        return Application(self.config, self.routing)

    async def reconfigure(self, scaling: dict[str, Any]) -> None:
        """Serve's public hook, called at the start and when only numbers of replicas have changed (`cluster.pool.graph.scaling`). Control
        divides slots by them. It must not raise: Serve would end this gateway."""
        await self.routing.refresh.configure(merge(self.config.dump(), scaling))

    def check_health(self) -> None:
        """Serve's public hook."""
        self.routing.refresh.check()

    # told by control

    async def prepare(self, aliases: list[str], revision: int) -> None:
        self.routing.router.prepare(aliases, revision)

    async def adopt(self, news: View | ViewDelta) -> int:
        return await self.routing.router.adopt(news)

    async def measured(self, alias: str, rollout: int) -> dict[str, Tally]:
        """Version id → what this gateway saw of it during ``rollout`` of ``alias``."""
        return self.routing.recorder.measured(alias, rollout)


async def wake(find: Callable[[str], Any], fleet: FleetState, timeout_s: float) -> None:
    """Make one call through Serve. Serve counts it as a request that waits, and starts a replica for it at once.

    ``find``: Serve application → its handle. It asks Serve's controller and blocks until that has answered, so it is called in a thread: in the
    event loop, every stream of every fleet would wait with it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            handle = await asyncio.to_thread(find, fleet.app)
            await handle.wake.remote()
    except (TimeoutError, RayError, RayServeException) as error:
        log.warning("no replica of %s was started: %s", fleet.name, error)
