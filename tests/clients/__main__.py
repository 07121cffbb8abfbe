"""``python -m tests.clients [CLIENT …]``: clients as people have them, each in an environment of its own, against one pool of real models.

Prints each failed check with its words, and one table. Ends with 1 where a check failed, or no client was tried. A client that cannot be
installed here is skipped, and the table says so.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.place import springtide
from benchmarks.real import CHAT, ENCODER, real_models
from cluster import client as admin
from cluster.config import Config
from tests.clients.environments import NotInstalled, node, own, python

Prepare = Callable[[], list[str]]
"""Installs a client and returns the command that checks it."""

CLIENTS: dict[str, Prepare] = {
    "openai": partial(python, "openai"),
    "openai-node": partial(node, "openai"),
    "anthropic": partial(python, "anthropic"),
    "langchain": partial(python, "langchain"),
    "litellm": partial(python, "litellm"),
    "lm_eval": partial(python, "lm_eval"),
    "vllm_bench": partial(own, "vllm_bench"),
}
"""What each client is called on the command line."""
TIMEOUT_S = 240
FREE_S = 10
"""How long engines may go on after a client has ended: it has left a stream or two, and control asks the replicas twice a second."""
console = Console(width=None if sys.stdout.isatty() else 120)


class Result(NamedTuple):
    client: str
    version: str = ""
    passed: int = 0
    failed: int = 0
    seconds: float = 0
    words: str = ""
    """Why it was skipped, or what was wrong beside its checks."""

    @property
    def skipped(self) -> bool:
        return not self.passed and not self.failed


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - set(CLIENTS):
        console.print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CLIENTS)}")
        return 2
    results = list(checked({name: CLIENTS[name] for name in names or CLIENTS}))
    console.print(table(results), closing(results), sep="\n", highlight=False)
    return status(results)


def checked(clients: dict[str, Prepare]) -> Iterator[Result]:
    """Install the clients while the pool starts, then ask it by one after the other: they share two cores."""
    with ThreadPoolExecutor(2) as installing:
        commands = {name: installing.submit(prepare) for name, prepare in clients.items()}
        with real_models() as (config, folders), springtide(config):
            for name, command in commands.items():
                yield _checked(name, command, config, folders[CHAT])


def _checked(name: str, command: "Future[list[str]]", config: Config, folder: Path) -> Result:
    try:
        line = command.result()
    except NotInstalled as error:
        return Result(name, words=str(error))
    began_s = time.monotonic()
    output = _output(line, config, folder)
    result = said(name, output)._replace(seconds=time.monotonic() - began_s)
    if left := _left_running(config):
        result = result._replace(failed=result.failed + 1, words=f"{left} requests run on after it has left")
    if result.failed:
        console.rule(name)
        console.print(output, markup=False, highlight=False)
    return result


def _output(line: list[str], config: Config, folder: Path) -> str:
    url = f"http://{config.gateway.host}:{config.gateway.port}"
    inputs = {"CLIENTS_URL": url, "CLIENTS_CHAT": CHAT, "CLIENTS_ENCODER": ENCODER, "CLIENTS_FOLDER": str(folder)}
    elsewhere = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere and not key.startswith("OPENAI_")}
    try:
        done = subprocess.run(
            line,
            env={**environment, **inputs, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return f"{error.stdout or ''}\nIt did not end within {TIMEOUT_S} s."
    return done.stdout


def said(name: str, output: str) -> Result:
    """What a script's last line says. One that ended without it has failed.

    >>> said("openai", 'ok a_stream 0.1 s\\n{"version": "3.54.0", "passed": 1, "failed": 0}')
    Result(client='openai', version='3.54.0', passed=1, failed=0, seconds=0, words='')
    >>> said("openai", "Traceback").failed
    1
    """
    lines = output.strip().splitlines()
    try:
        last: dict[str, Any] = json.loads(lines[-1])
        return Result(name, str(last["version"]), int(last["passed"]), int(last["failed"]))
    except (IndexError, ValueError, KeyError, TypeError):
        return Result(name, failed=1, words="it ended before its checks did")


def _left_running(config: Config) -> int:
    """How many requests the engines still answer when they should have nothing to do."""
    deadline_s = time.monotonic() + FREE_S
    while (running := sum(one["running"] for one in admin.of(config).status()["replicas"])) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return running


def table(results: Sequence[Result]) -> Table:
    drawn = Table("client", "version", "checks passed", "seconds", "")
    for one in results:
        passed = "skipped" if one.skipped else f"{one.passed} of {one.passed + one.failed}"
        drawn.add_row(one.client, one.version, passed, f"{one.seconds:.0f}", one.words)
    return drawn


def status(results: Sequence[Result]) -> int:
    """What the process ends with: a run that tried nothing must not look like one that passed.

    >>> status([Result("a", passed=3), Result("b")]), status([Result("a", passed=3, failed=1)]), status([Result("a"), Result("b")])
    (0, 1, 1)
    """
    return int(any(result.failed for result in results) or all(result.skipped for result in results))


def closing(results: Sequence[Result]) -> str:
    """
    >>> closing([Result("a", passed=3), Result("b", passed=1, failed=1), Result("c", words="no wheel")])
    '4 passed, 1 failed, 1 skipped'
    >>> closing([Result("a", words="no wheel")])
    '0 passed, 0 failed, 1 skipped: no client was tried'
    """
    passed, failed = sum(one.passed for one in results), sum(one.failed for one in results)
    tried = "" if passed or failed else ": no client was tried"
    return f"{passed} passed, {failed} failed, {sum(one.skipped for one in results)} skipped{tried}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
