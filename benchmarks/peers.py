"""The systems that Springtide is compared with, each one process tree on the loopback address that ends as a whole.

Every system gets the same model folder, the same engine arguments (`FleetSpec.engine_arguments`, fitted to the model), the same
variables for the engine's processes (`FleetSpec.engine_environment`) and one engine; usage statistics are off everywhere. Beyond that:

``bare_vllm``
    vLLM's own API server, ``python -m vllm.entrypoints.openai.api_server``, without its access log.
``bare_plain``
    The same without ``--enable-lora`` and what goes with it: what somebody runs who publishes no adapters.
``ray_default``
    ``ray.serve.llm.build_openai_app`` under Ray Serve's and Ray Serve LLM's defaults: two ingress replicas, Serve's Python proxy,
    tokens batched for 50 ms.
``ray_direct``
    The same application in Ray's fastest form: direct streaming behind HAProxy (``RAY_SERVE_ENABLE_HA_PROXY=1``,
    ``RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1``) with ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1``.

Both Ray systems also get ``RAY_worker_niceness=0`` (15 by default), token authentication and a 200 MiB object store, as
Springtide's pool has, so that what differs is the architecture. They run in a process of their own (``python -m benchmarks.peers``),
because Ray reads these variables when it is imported.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config import Config, FleetSpec
from cluster.errors import PoolUnavailable
from cluster.jobspec import Parser
from cluster.pool import haproxy
from cluster.store import fitting

HOST = "127.0.0.1"
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 40
LOGICAL_CPUS = 16
"""More than a small machine has, so that every actor of the defaults is scheduled; Ray's CPUs only count, they do not limit."""
OBJECT_STORE_BYTES = 200 << 20
BASE_PORT = 54380
"""First of the ports for HAProxy's pages and the replicas' direct ingress."""
BARE = ("bare_vllm", "bare_plain")
SYSTEMS = (*BARE, "ray_default", "ray_direct")


@dataclass(frozen=True)
class Served:
    """A system that answers."""

    url: str
    """``http://host:port/v1``."""
    model: str
    root: psutil.Process
    """The whole system is this process and its descendants."""


@contextmanager
def serving(system: str, config: Config, model: Path, port: int, fleet: str = "") -> Iterator[Served]:
    """Run one of `SYSTEMS` with ``model`` (Hugging Face layout) until the block ends, then end every process of it.

    ``fleet``: whose arguments its engine gets, by default the first one's. Raises `PoolUnavailable` with the end of its log where it does not start.
    """
    check_free(port)
    spec = config.spec(fleet or config.default_fleet)
    log = config.home / f"{system}-{spec.name}.log"
    with tempfile.TemporaryDirectory(prefix="peer-") as run:  # not in the home: a socket's path must stay under 97 characters
        process = _start(command(system, spec, model, port), environment(system, spec, Path(run)), log)
        try:
            served = Served(f"http://{HOST}:{port}/v1", spec.fleet.model, psutil.Process(process.pid))
            wait(served, lambda: _check(process, log), spec.fleet.task)
            yield served
        finally:
            end(process)


def _start(command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends this tree itself
        )


def command(system: str, spec: FleetSpec, model: Path, port: int) -> list[str]:
    name = spec.fleet.model
    engine = fitting.fitted(spec, model, name).engine_arguments()
    if system not in BARE:
        return [
            sys.executable,
            "-m",
            "benchmarks.peers",
            system,
            f"--model={model}",
            f"--name={name}",
            f"--port={port}",
            json.dumps(engine),
        ]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log", f"--host={HOST}"]
    if system == "bare_plain":
        engine = {key: value for key, value in engine.items() if "lora" not in key}
    if "tool_call_parser" in engine:
        engine["enable_auto_tool_choice"] = True  # as `deployments.replica.arguments.namespace` does
    return [*server, f"--port={port}", f"--model={model}", f"--served-model-name={name}", *flags(engine)]


def flags(engine: dict[str, Any]) -> list[str]:
    """
    >>> flags({"enable_lora": True, "enable_prefix_caching": False, "speculative_config": {"method": "ngram"}})
    ['--enable-lora', '--no-enable-prefix-caching', '--speculative-config={"method": "ngram"}']
    """
    written: list[str] = []
    for key, value in engine.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            written.append(f"--{flag}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return written


def environment(system: str, spec: FleetSpec, run: Path) -> dict[str, str]:
    """The variables a system runs under; its private files go to ``run``."""
    common = {
        **os.environ,
        **spec.engine_environment(),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",  # this environment's vLLM would load ours (`deployments.vllm_patches`)
        "TOKENIZERS_PARALLELISM": "false",
    }
    if system in BARE:
        return common
    return common | _ray(run) | (_direct(run) if system == "ray_direct" else {})


def _ray(run: Path) -> dict[str, str]:
    token = run / "ray_token"
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address is 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


def _direct(run: Path) -> dict[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.WRAPPER),  # keeps its pages on loopback
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # the wrapper runs whichever python is first
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(BASE_PORT),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(BASE_PORT + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(BASE_PORT + 10),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(BASE_PORT + 60),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(BASE_PORT + 61),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(BASE_PORT + 99),
    }


def check_free(port: int) -> None:
    """Raise `PoolUnavailable` where something listens already: its answers would be measured as this system's."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise PoolUnavailable(f"Something listens on port {port} already.", "End it, then measure again.")


def _check(process: "subprocess.Popen[bytes]", log: Path) -> None:
    if process.poll() is not None:
        words = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise PoolUnavailable(f"It ended with status {process.returncode}:\n{words}\n", "Is another process using its ports?")


def wait(served: Served, check: Callable[[], None] = lambda: None, task: str = "generate") -> None:
    """Block until the system chats, or makes a vector. ``check`` raises where waiting is useless."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Ready?"}], "max_tokens": 1}
    path, question = ("chat/completions", chat) if task == "generate" else ("embeddings", {"input": "Ready?"})
    deadline_s = time.monotonic() + START_TIMEOUT_S
    answer = "nothing"
    while time.monotonic() < deadline_s:
        check()
        try:
            response = httpx.post(f"{served.url}/{path}", json={"model": served.model, **question}, timeout=30)
        except httpx.HTTPError as error:
            answer = repr(error)
        else:
            if response.status_code == 200:
                return
            answer = response.text
        time.sleep(0.3)
    raise PoolUnavailable(f"{served.url} did not answer within {START_TIMEOUT_S} s; the last answer was: {answer[:300]}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM the root, wait, and SIGKILL what is left of its tree. psutil checks creation times, so no recycled id is hit."""
    if process.poll() is not None:
        return
    tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _, left = psutil.wait_procs(tree, timeout=5)
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=5)


# inside the process of a Ray system


def serve_ray(model: str, name: str, port: int, engine: dict[str, Any]) -> None:
    """A Ray of its own with Ray Serve LLM's application, until SIGTERM."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        dashboard_host=HOST,
        log_to_driver=False,
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    llm = LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": name, "model_source": model},
            "accelerator_config": {"kind": "cpu"},
            "engine_kwargs": engine,
            "deployment_config": {"num_replicas": 1},
        }
    )
    serve.start(http_options={"host": HOST, "port": port})
    serve.run(build_openai_app({"llm_configs": [llm]}))
    stop.wait()
    ray.shutdown()  # not serve.shutdown(): that waits half a minute for HAProxy to drain


def main() -> None:
    parser = Parser(description=serve_ray.__doc__)
    parser.add_argument("system", choices=[system for system in SYSTEMS if system not in BARE])
    parser.add_argument("--model", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--name", required=True, help="what clients call the model")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("engine", type=json.loads, help="the engine's keyword arguments, a JSON object")
    options = parser.parse_args()
    serve_ray(options.model, options.name, options.port, options.engine)


if __name__ == "__main__":
    main()
