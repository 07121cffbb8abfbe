"""The replica: start the engine, converge to the wanted versions, drain, report load. The only file that imports vLLM.

A replica is one Serve replica with one vLLM engine. Requests do not pass through Serve's RPC: the replica serves vLLM's own FastAPI
application on a port of its own, and the gateway streams bytes from it. The port answers only to who knows the replica's secret, which
leaves the process over Ray's authenticated RPC and nowhere else.

The engine only ever sees immutable version ids as model names, so its prefix cache cannot mix two versions.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import uvicorn
from ray import serve

from cluster import logs
from cluster.config import Config, Fleet
from cluster.errors import ModelNotFound, SpringtideError, VersionRefused
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Manifest, ReplicaState, VersionId
from deployments.asgi import Receive, Scope, Send
from deployments.seal import seal

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SECRET_HEADER = b"x-springtide-secret"
QUIET_S = 1.5
"""A draining replica must have been idle this long before it ends."""

log = logs.logger(__name__)


class Guard:
    """ASGI middleware around the engine's application: lets only the gateway in, and counts the requests in flight."""

    def __init__(self, app: Any, secret: str) -> None:
        self.app = app
        self.secret = secret.encode()
        self.running = 0
        self.busy_until_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks anything else
            return await send({"type": "websocket.close"})
        offered = next((value for name, value in scope["headers"] if name == SECRET_HEADER), b"")
        if not hmac.compare_digest(offered, self.secret):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            return await send({"type": "http.response.body"})
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1
            self.busy_until_s = time.monotonic()


@serve.deployment
class Replica:
    """One engine that hosts one weights version, and any adapters on it."""

    async def __init__(self, config: Config) -> None:
        seal()
        self.config = config
        self.registry = Registry(Store(config.store))
        self.cache = config.home / "cache"
        self.held: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.loading = asyncio.Lock()
        self.id = serve.get_replica_context().replica_id.unique_id
        self.secret = secrets.token_urlsafe(32)

        base = await asyncio.to_thread(base_weights, self.registry, config.fleet.model)
        folder = await asyncio.to_thread(self.registry.fetch, base, self.cache)
        self.base = str(base.id)
        self.engine, app = await start_engine(config.fleet, folder, self.base)
        self.models = app.state.openai_serving_models
        self.held[self.base] = base.digest
        wanted = await asyncio.to_thread(self.registry.ever_live, base.id, config.fleet.max_cpu_loras)
        await self.hold([str(manifest.id) for manifest in wanted])  # before any traffic: a late replica is never behind
        self.guard = Guard(app, self.secret)
        self.host = ray.util.get_node_ip_address()
        self.port, self.server, self.serving = serve_http(self.guard, self.host)
        loop = type(asyncio.get_running_loop()).__module__
        log.info("replica %s serves %s on port %d (%s)", self.id, self.base, self.port, loop)

    async def describe(self) -> ReplicaState:
        return ReplicaState(
            id=self.id,
            url=f"http://{self.host}:{self.port}",
            secret=self.secret,
            base=self.base,
            held=dict(self.held),
            refused=dict(self.refused),
            running=self.guard.running,
        )

    async def hold(self, ids: list[str]) -> ReplicaState | None:
        """Load every version of ``ids`` that is not held yet. Never raises for a bad version: the answer says what was refused and why."""
        async with self.loading:
            for id in ids:
                await self._hold_one(id)
        return await self.describe() if hasattr(self, "guard") else None

    async def _hold_one(self, id: str) -> None:
        if id in self.held:
            return
        try:
            manifest = await asyncio.to_thread(self.registry.manifest, VersionId.parse(id))
            if str(manifest.weights) == self.base:
                await self._load(manifest)
            self.refused.pop(id, None)
        except SpringtideError as error:
            self.refused[id] = str(error)
            log.warning("refused %s: %s", id, error)

    async def _load(self, manifest: Manifest) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        folder = await asyncio.to_thread(self.registry.fetch, manifest, self.cache)
        request = LoadLoRAAdapterRequest(lora_name=str(manifest.id), lora_path=str(folder))
        answer = await self.models.load_lora_adapter(request)
        if isinstance(answer, ErrorResponse):
            raise VersionRefused(f"the engine says: {answer.error.message}", "Check the adapter's target modules and shapes.")
        self.held[str(manifest.id)] = manifest.digest

    async def check_health(self) -> None:
        await self.engine.check_health()
        if self.serving.done():
            raise RuntimeError("the replica's HTTP server ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's public hook: what `deployments.autoscaling` decides by."""
        return {"running": float(self.guard.running)}

    async def __del__(self) -> None:
        """Serve calls this when the replica must end: let the streams finish, then stop the engine."""
        if not hasattr(self, "guard"):
            return
        deadline_s = time.monotonic() + self.config.fleet.drain_timeout_s
        quiet_since_s = time.monotonic()
        while time.monotonic() < deadline_s and time.monotonic() - quiet_since_s < QUIET_S:
            await asyncio.sleep(0.1)
            if self.guard.running or self.guard.busy_until_s > quiet_since_s:
                quiet_since_s = time.monotonic()
        log.info("replica %s ends", self.id)
        self.server.should_exit = True
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.serving, 5)
        finally:
            self.engine.shutdown()


def base_weights(registry: Registry, model: str) -> Manifest:
    """The weights version that a fleet for ``model`` hosts: what the alias's live version is, or sits on."""
    live = registry.alias(model)
    if live is None:
        raise ModelNotFound(f"{model} has no version to serve.", "Register one: springtide up --model PATH, or jobs.pretrain.")
    return registry.manifest(registry.manifest(live.stable).weights)


async def start_engine(fleet: Fleet, folder: Path, name: str) -> "tuple[AsyncLLM, Any]":
    """An engine over ``folder`` and vLLM's own FastAPI application for it, which knows the model as ``name``.

    The same calls as vLLM's API server makes (``vllm/entrypoints/launchers/api_server/entry.py`` in 0.29), without its process and socket.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ.update(fleet.engine_environment())
    values = {**fleet.engine_arguments(), "model": folder, "served_model_name": name, "disable_fastapi_docs": True}
    args: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(values))
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    return engine, app


def command_line(arguments: dict[str, Any]) -> list[str]:
    """``{"max_loras": 4, "enable_lora": True}`` → ``["--max-loras=4", "--enable-lora"]``."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in arguments.items() if value is not False}
    return [flag if value is True else f"{flag}={value}" for flag, value in flags.items()]


def serve_http(app: Any, host: str) -> "tuple[int, uvicorn.Server, asyncio.Task[None]]":
    """Serve ``app`` on a free port of ``host`` in this event loop."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen(2048)
    settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=600)
    server = uvicorn.Server(settings)
    return listener.getsockname()[1], server, asyncio.create_task(server.serve(sockets=[listener]))
