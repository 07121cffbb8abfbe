"""The replica: start the engine, converge to the wanted versions, drain, report load. The only file that starts an engine.

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
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import uvicorn
from ray import serve

from cluster import artefact, carry, control, logs
from cluster.config import Config, Fleet
from cluster.errors import ModelNotFound, SpringtideError, VersionRefused
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Manifest, ReplicaState, VersionId
from deployments.asgi import Receive, Scope, Send
from deployments.load import EngineLoad
from deployments.seal import seal
from deployments.upstream import CLOSED

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SECRET_HEADER = b"x-springtide-secret"
VERSION_HEADER = b"x-springtide-version"
START_TIMEOUT_S = 600
"""How long a replica may be between two engines before Serve replaces it."""
HURRY_S = 2
"""How long streams by weights that are taken back may run on."""
CUT_S = 1
"""How long ending a stream takes at most."""
QUIET_S = 1.5
"""A draining replica must have been idle this long before it ends."""

log = logs.logger(__name__)


class Guard:
    """ASGI middleware around the engine's application: lets only the gateway in, and counts the requests in flight."""

    def __init__(self, app: Any, secret: str) -> None:
        self.app = app
        self.secret = secret.encode()
        self.running = 0
        self.closed = False
        """While the replica takes other weights over: whoever comes is sent away, and comes back by the gateway's newer view."""
        self.busy_until_s = 0.0
        self.answering: Counter[str] = Counter()
        """Version id → requests in flight."""
        self.used_s: dict[str, float] = {}
        """Version id → when it was last asked for."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """Of the requests in flight."""

    def cut(self) -> None:
        """End every request in flight. The gateways see a broken connection, and say so to the client."""
        for task in self.tasks:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks anything else
            return await send({"type": "websocket.close"})
        offered = next((value for name, value in scope["headers"] if name == SECRET_HEADER), b"")
        if not hmac.compare_digest(offered, self.secret):
            return await _refuse(send, 403)
        if self.closed:
            return await _refuse(send, CLOSED)
        version = next((value for name, value in scope["headers"] if name == VERSION_HEADER), b"").decode("latin-1")
        self.running += 1
        self.answering[version] += 1
        self.used_s[version] = time.monotonic()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (uvicorn runs each request in a task)
        self.tasks.add(task)
        try:
            await self.app(scope, receive, send)
        finally:
            self.tasks.discard(task)
            self.running -= 1
            self.answering[version] -= 1
            self.busy_until_s = time.monotonic()


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


@serve.deployment
class Replica:
    """One engine that hosts one weights version, and any adapters on it."""

    async def __init__(self, config: Config, weights: VersionId | None = None) -> None:
        """``weights``: what a replica of a second fleet hosts (`cluster.surge`); by default what is live, or sits under it."""
        seal()
        self.config = config
        self.registry = Registry(Store(config.store))
        self.cache = config.home / "cache"
        self.held: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.staged: dict[str, str] = {}
        self.pause_s = 0.0
        self.revision = 0
        self.starting_s: float | None = None
        """Since when this replica is between two engines."""
        self.broken = False
        self.loading = asyncio.Lock()
        self.load = EngineLoad()
        context = serve.get_replica_context()
        self.id, self.application = context.replica_id.unique_id, context.app_name
        self.secret = secrets.token_urlsafe(32)

        tell("starting", self.id, "fetches its weights")
        id = weights or await asyncio.to_thread(live_weights, self.registry, config.fleet.model)
        base = self.registry.manifest(id)
        self.folder = await asyncio.to_thread(self.registry.fetch, base, self.cache)
        self.base = str(base.id)
        tell("starting", self.id, "starts its engine")
        self.engine, app = await start_engine(config.fleet, self.folder, self.base, self.load)
        self.models = app.state.openai_serving_models
        self.fingerprint = await self._fingerprint()
        self.held[self.base] = base.digest
        self.guard = Guard(app, self.secret)
        tell("starting", self.id, "loads its adapters")
        await self._catch_up()  # before any traffic: a late replica is never behind
        self.host = ray.util.get_node_ip_address()
        self.port, self.server, self.serving = serve_http(self.guard, self.host)
        loop = type(asyncio.get_running_loop()).__module__
        log.info("replica %s serves %s on port %d (%s)", self.id, self.base, self.port, loop)

    async def wake(self) -> None:
        """Nothing: whoever calls it has a replica by then."""

    async def describe(self) -> ReplicaState:
        return ReplicaState(
            id=self.id,
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
            app=self.application,
        )

    async def _catch_up(self) -> None:
        """Load every version that was live on these weights."""
        limit = self.config.fleet.max_cpu_loras
        wanted = await asyncio.to_thread(self.registry.ever_live, VersionId.parse(self.base), limit)
        for manifest in wanted:
            await self._hold_one(str(manifest.id))

    async def hold(self, ids: list[str], carried: carry.Carried) -> ReplicaState | None:
        """Load every version of ``ids`` that is not held yet; lay ready on this machine what sits on other weights.

        Never raises for a bad version: the answer says what was refused and why. ``carried``: files that came with the order.
        """
        async with self.loading:
            await asyncio.to_thread(carry.unpack, carried, self.cache)
            for id in ids:
                await self._hold_one(id)
        return await self.describe() if hasattr(self, "port") else None

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
        if len(adapters) < self.config.fleet.max_cpu_loras:
            return
        aliases = await asyncio.to_thread(self.registry.aliases)
        live = {str(id) for move in aliases.values() for id in move.versions}
        idle = [id for id in adapters if id not in live and not self.guard.answering[id]]
        if not idle or self.config.fleet.when_full == "refuse":
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

    async def become(self, replica: str, id: str, fingerprint: str, hurry: bool = False) -> ReplicaState | None:
        """Host the weights ``id`` from now on, in place: let the streams end, load, verify, answer again.

        Asked of all replicas, obeyed by the one that is meant. ``fingerprint`` is what another replica computed over these weights,
        empty where none hosts them. ``hurry``: streams that take longer than `HURRY_S` are ended. Whatever fails, the replica goes
        back to the weights it had, and its state says why.
        """
        if replica != self.id:
            return None
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
            await self._drained(fits and self.config.fleet.swap == "keep", hurry)
            drained_s = time.monotonic()
            async with self._standing_still(fits):
                await self._replace(manifest, folder, expected, fits)
            log.info("became %s: drained %.3f s, swapped %.3f s", manifest.id, drained_s - began_s, time.monotonic() - drained_s)
        except Exception as error:
            # Whatever the engine raised over the new weights, the old ones answer again; the rollout ends with these words.
            self.refused[str(manifest.id)] = str(error)
            log.exception("%s stays %s", self.id, self.base)
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
        engine, keep = self.engine, self.config.fleet.swap == "keep"
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
        limit_s = min(HURRY_S, self.config.fleet.swap_drain_s) if hurry else self.config.fleet.swap_drain_s
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
        self.engine, app = await start_engine(self.config.fleet, folder, name, self.load)
        self.guard.app, self.models, self.folder = app, app.state.openai_serving_models, folder
        self.starting_s = None
        return await self._fingerprint()

    async def _fingerprint(self) -> str:
        return ":".join(await self.engine.collective_rpc("fingerprint"))

    async def check_health(self) -> None:
        if self.starting_s is None:
            await self.engine.check_health()
        elif time.monotonic() - self.starting_s > START_TIMEOUT_S:
            raise RuntimeError(f"its other engine did not start within {START_TIMEOUT_S} s")
        if self.broken:
            raise RuntimeError("the replica could not go back to the weights it had")
        if self.serving.done():
            raise RuntimeError("the replica's HTTP server ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's public hook: what `deployments.autoscaling` decides by."""
        return self.load.stats(time.monotonic(), idle=self.guard.running == 0)

    async def __del__(self) -> None:
        """Serve calls this when the replica must end: let the streams finish, then stop the engine."""
        if not hasattr(self, "port"):
            return
        tell("leaving", self.id)
        deadline_s = time.monotonic() + self.config.fleet.drain_timeout_s
        quiet_since_s = time.monotonic()
        while time.monotonic() < deadline_s and time.monotonic() - quiet_since_s < QUIET_S:
            await asyncio.sleep(0.1)
            if self.guard.running or self.guard.busy_until_s > quiet_since_s:
                quiet_since_s = time.monotonic()
        log.info("replica %s ends", self.id)
        self.guard.closed = True  # a gateway that has not heard of it comes back by a newer view
        self.server.should_exit = True
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.serving, 5)
        finally:
            self.engine.shutdown()


def tell(what: str, *arguments: str) -> None:
    """Tell control something about this replica; nobody waits for it, and it would learn of it later in any case."""
    with contextlib.suppress(ValueError):  # no control yet
        getattr(ray.get_actor(control.ACTOR, namespace=control.NAMESPACE), what).remote(*arguments)


def live_weights(registry: Registry, model: str) -> VersionId:
    """The weights version that a fleet for ``model`` hosts: what the alias's live version is, or sits on."""
    live = registry.alias(model)
    if live is None:
        raise ModelNotFound(f"{model} has no version to serve.", "Register one: springtide up --model PATH, or jobs.pretrain.")
    return registry.manifest(live.stable).weights


async def start_engine(fleet: Fleet, folder: Path, name: str, load: EngineLoad) -> "tuple[AsyncLLM, Any]":
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
    values["worker_extension_cls"] = "deployments.fingerprint.Fingerprint"
    args: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(values))
    # In a thread: it returns when the engine is ready, and meanwhile this replica must say how it is.
    settings = AsyncEngineArgs.from_cli_args(args)
    engine = await asyncio.to_thread(
        AsyncLLM.from_engine_args,
        settings,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[load.factory],  # pyright: ignore[reportArgumentType] (it has a stat logger's methods, and need not import vLLM)
    )
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
