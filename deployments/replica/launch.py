"""Starts vLLM: its engine, its FastAPI application, and an HTTP server for that on a port of this process."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from cluster.address import authority, family
from cluster.config import FleetSpec
from deployments.replica.arguments import OURS, check_draft, check_template, namespace, refused_by_vllm
from deployments.replica.load import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SHUTDOWN_S = 5
"""How long answers in flight may take when the server ends."""


async def start_engine(spec: FleetSpec, folder: Path, name: str, load: EngineLoad) -> "tuple[AsyncLLM, Any]":
    """An engine over ``folder`` and vLLM's own FastAPI application for it, which knows the model as ``name``.

    The same calls as vLLM's API server makes (``vllm/entrypoints/launchers/api_server/entry.py`` in 0.29), without its process and socket.
    Raises `ConfigError` where vLLM does not take the fleet's arguments; that is known before it reads the weights.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    os.environ.update(spec.engine_environment())
    with refused_by_vllm(spec.name):
        args = namespace({**spec.engine_arguments(), **OURS, "model": str(folder), "served_model_name": [name]})
    # In a thread: it returns when the engine is ready, and the replica must answer health checks meanwhile.
    engine = await asyncio.to_thread(_engine, args, spec.name, load)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    app.state.server = Unstoppable()
    return engine, app


def _engine(args: Any, fleet: str, load: EngineLoad) -> "AsyncLLM":
    """vLLM checks its arguments in three places, and writes the reasoning parser into them on the way."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    with refused_by_vllm(fleet):
        check_draft(args)
        check_template(args.chat_template)
        validate_parsed_serve_args(args)
        settings = AsyncEngineArgs.from_cli_args(args)
        config = settings.create_engine_config(UsageContext.OPENAI_API_SERVER)
        validate_api_server_args(args)
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[load.factory],  # pyright: ignore[reportArgumentType] (it has a stat logger's methods, and need not import vLLM)
        enable_log_requests=settings.enable_log_requests,
        aggregate_engine_logging=settings.aggregate_engine_logging,
    )


class Unstoppable:
    """What vLLM takes for its HTTP server: its error handler sets ``should_exit`` once the engine is dead.

    `deployments.replica.engine` notices a dead engine by itself and ends the process. Without this attribute the handler raises, and the
    client reads ``'State' object has no attribute 'server'``.
    """

    should_exit = False


class Server:
    """An ASGI application on a free port of ``host``, served by this event loop."""

    def __init__(self, app: Any, host: str) -> None:
        listener = socket.socket(family(host))
        listener.bind((host, 0))
        listener.listen(2048)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://{authority(host, self.port)}"
        settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=600)
        self.uvicorn = uvicorn.Server(settings)
        self.serving = asyncio.create_task(self.uvicorn.serve(sockets=[listener]))

    @property
    def ended(self) -> bool:
        return self.serving.done()

    async def close(self) -> None:
        self.uvicorn.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.serving, SHUTDOWN_S)
