"""The gateway: the ASGI application at ``/``, one error mapping, and the routing table that control keeps current.

Stateless: everything it routes by comes from control, and if control is away it goes on with what it knows. Several gateways agree on
an alias because control moves it in two phases (`prepare`, then `adopt`), so no client sees a version go back.
"""

import asyncio
import contextlib
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster import logs, niceness
from cluster.config import Config
from cluster.control.client import ensure
from cluster.errors import MethodNotAllowed, RouteNotFound, SpringtideError
from cluster.pool import graph
from cluster.publishing.canary import Tally
from cluster.types import ColdStage, ColdStart, Generation, VersionId, View
from cluster.view import ViewDelta
from deployments.api import models
from deployments.api.admin import Admin
from deployments.api.inference import Inference
from deployments.http import Receive, Scope, Send, send_error, send_json
from deployments.ray_patches import close_internal_port
from deployments.routing.measure import Recorder
from deployments.routing.shadow import Shadow
from deployments.routing.table import Table
from deployments.routing.upstream import Upstream

REFRESH_S = 1.0
HOLD_TIMEOUT_S = 10.0
"""How long a request may wait for a move that control announced; afterwards it goes by what this gateway knows."""
STAGE_TIMEOUT_S = 2
GENERATING = ("/v1/chat/completions", "/v1/completions")

log = logs.logger(__name__)


@serve.deployment
@serve.ingress()
class Gateway:
    async def __init__(self, config: Config) -> None:
        close_internal_port()
        niceness.renice(niceness.CARRYING)
        self.config = config
        self.table = Table()
        self.upstream = Upstream(self.table, config.gateway.first_byte_timeout_s)
        self.recorder = Recorder()
        self.shadow = Shadow(self.upstream, self.recorder)
        self.moving: dict[str, int] = {}
        self.changed = asyncio.Condition()
        self.held = 0
        self.waking: asyncio.Task[None] | None = None
        self.control: Any = ensure(config)
        await self.control.configure.remote(config.dump())
        await self._catch_up()
        self.refreshing = asyncio.create_task(self._refresh())

    def __serve_build_asgi_app__(self) -> "Application":
        return Application(self)

    # told by control

    async def prepare(self, aliases: list[str], revision: int) -> None:
        """Hold new requests for ``aliases`` until a view at least as new as ``revision`` (nanoseconds) arrives."""
        self.moving.update(dict.fromkeys(aliases, revision))

    async def measured(self, alias: str, rollout: int) -> dict[str, Tally]:
        """Version id → what this gateway saw of it during ``rollout`` of ``alias``."""
        return self.recorder.measured(alias, rollout)

    async def adopt(self, news: View | ViewDelta) -> int:
        """Route by a newer view from now on; returns the revision in force."""
        self.table.adopt(news)
        async with self.changed:
            self.moving = {alias: revision for alias, revision in self.moving.items() if revision > self.table.view.revision}
            self.changed.notify_all()
        return self.table.view.revision

    async def _catch_up(self) -> None:
        known = self.table.view
        await self.adopt(await self.control.view.remote(known.revision) or known)

    async def _refresh(self) -> None:
        """Catch up on pushes that were missed."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._catch_up()
            except RayError as error:  # control is being restarted, or was ended for good: the known view still routes
                log.warning("control does not answer: %s", error)
                self.control = ensure(self.config)

    # asked by requests

    async def resolve(self, model: str, session: str) -> tuple[VersionId, Generation | None]:
        if awaited := self.moving.get(model):
            try:
                await asyncio.wait_for(self._settled(model), HOLD_TIMEOUT_S)
            except TimeoutError:
                if self.moving.get(model) == awaited:  # and not a newer move, which has its own time
                    self.moving.pop(model)
        return self.table.resolve(model, session)

    async def change(self, timeout_s: float) -> None:
        """Wait for a newer view than the one in force, but not longer than this."""
        revision = self.table.view.revision
        async with self.changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait_for(lambda: self.table.view.revision > revision), timeout_s)

    def wake(self) -> bool:
        """See to it that a replica is started where none runs; whether none does."""
        if self.table.view.replicas:
            return False
        if self.waking is None or self.waking.done():
            self.waking = asyncio.create_task(self._wake())
        return True

    async def _wake(self) -> None:
        """One call through Serve, which it counts as a request that waits, and starts a replica for at once."""
        try:
            handle: Any = serve.get_app_handle(graph.fleet_app(self.config.default_fleet))
            await asyncio.wait_for(handle.wake.remote(), self.config.gateway.cold_start_timeout_s)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("no replica was started: %s", error)

    async def stage(self) -> ColdStart:
        """How far the replica is that is being started, in words for whoever waits for it."""
        try:
            return await asyncio.wait_for(self.control.stage.remote(), STAGE_TIMEOUT_S)
        except (TimeoutError, RayError):
            return ColdStart(ColdStage.QUEUED, "")

    async def _settled(self, alias: str) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: alias not in self.moving)


class Application:
    """Routes and errors, as a bare ASGI application: middleware layers would cost every token, and these few lines are all it needs."""

    def __init__(self, gateway: Any) -> None:
        self.gateway = gateway
        limits = gateway.config.gateway
        self.admin = Admin(lambda: gateway.control, gateway.config)
        self.generating = {path: Inference(path, limits, gateway) for path in GENERATING}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        try:
            await self._route(scope, receive, send)
        except SpringtideError as error:
            await send_error(send, error)
        except Exception:
            # A bug. The client gets OpenAI's form of it where nothing has been sent yet; the server then logs it and closes.
            with contextlib.suppress(Exception):
                await send_error(
                    send, SpringtideError("Something went wrong here.", "Send the request again; the log has the reason.")
                )
            raise

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method, view = scope["path"], scope["method"], self.gateway.table.view
        if method == "POST" and path in self.generating:
            return await self.generating[path](scope, receive, send)
        if path.startswith("/admin/"):
            return await send_json(send, 200, await self.admin.answer(method, path, scope, receive))
        if method == "GET" and path == "/v1/models":
            return await send_json(send, 200, models.model_list(view))
        if method == "GET" and path.startswith("/v1/models/"):
            return await send_json(send, 200, models.model(view, path.removeprefix("/v1/models/")))
        if method in ("GET", "HEAD") and path == "/health":
            return await self._health(send, len(view.replicas))
        if path in self.generating or path == "/health" or path.startswith("/v1/models"):
            raise MethodNotAllowed(f"{method} is not what {path[:200]} takes.", "Generation is POST, everything else GET.")
        raise RouteNotFound(
            f"There is no {method} {path[:200]} here.", "The API is OpenAI's: /v1/chat/completions, /v1/models, …"
        )

    async def _health(self, send: Send, replicas: int) -> None:
        if replicas:
            return await send_json(send, 200, {"status": "ok", "replicas": replicas})
        stage, words = await self.gateway.stage()
        asleep = stage is ColdStage.ASLEEP  # a balancer must not keep the request away that would wake the fleet
        document = {"status": "asleep" if asleep else "starting", "replicas": 0, "stage": words}
        await send_json(send, 200 if asleep else 503, document)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                self.gateway.refreshing.cancel()
                return await self.gateway.upstream.close()
