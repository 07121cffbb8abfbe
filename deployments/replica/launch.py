"""Starts vLLM: an engine and its own FastAPI application, on a port of this process. The only file that does."""

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from cluster.config import FleetSpec
from deployments.replica.load import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def start_engine(spec: FleetSpec, folder: Path, name: str, load: EngineLoad) -> "tuple[AsyncLLM, Any]":
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

    os.environ.update(spec.engine_environment())
    values = {**spec.engine_arguments(), "model": folder, "served_model_name": name, "disable_fastapi_docs": True}
    values["worker_extension_cls"] = "deployments.replica.fingerprint.Fingerprint"
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
