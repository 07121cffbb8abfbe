"""What the processes of a system weigh, and whether the pool keeps to its budget."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from benchmarks.place import ask, changes, console, finish, machine, passed, springtide, workplace

POOL_LIMIT_BYTES = 5.5e9
GATEWAY_LIMIT_BYTES = 200e6
GATEWAY_GROWTH_LIMIT_BYTES = 10e6
"""What counts as flat between the first thousand requests and the last."""
MEMORY_STREAMS = 8
MEMORY_TOKENS = 8


@dataclass(frozen=True)
class Process:
    """A process's memory in bytes. PSS shares each page among those who map it, so that PSS adds up and RSS does not."""

    name: str
    pss: int
    rss: int


def memory(options: argparse.Namespace) -> None:
    """Ask a pool for many short answers and hold its memory to the budget."""
    console.print(f"{machine()}\n{options.requests} requests of {MEMORY_TOKENS} tokens, {MEMORY_STREAMS} at a time")
    steps = min(10, options.requests)
    trees: list[list[Process]] = []
    failures = 0
    with workplace(options.model) as (config, _), springtide(config, changes()) as served:
        for step in range(1, steps + 1):
            samples = ask(served, MEMORY_STREAMS, options.requests // steps, True, MEMORY_TOKENS)
            trees.append(processes(served.root))
            failed, gateway = sum(not sample.ok for sample in samples), gateway_in(trees[-1])
            failures += failed
            console.print(
                f"{step * options.requests // steps:6d} requests, {failed} failed: gateway PSS {_mb(gateway.pss)}, "
                f"RSS {_mb(gateway.rss)}; whole pool PSS {_mb(total(trees[-1]))}"
            )
    console.print(memory_table("Springtide", trees[-1]))
    growth = gateway_in(trees[-1]).rss - gateway_in(trees[0]).rss
    grown = within("the gateway's growth after the first tenth", growth, GATEWAY_GROWTH_LIMIT_BYTES)
    finish([*budget(max(trees, key=total)), grown, f"{failures} failed requests; {passed(failures == 0)}"])


def budget(tree: Sequence[Process]) -> list[str]:
    """Springtide's processes against what they may weigh."""
    return [
        within("the whole pool (PSS)", total(tree), POOL_LIMIT_BYTES),
        within("the gateway (RSS)", gateway_in(tree).rss, GATEWAY_LIMIT_BYTES),
    ]


def within(what: str, size: float, limit: float) -> str:
    return f"{what}: {_mb(size)}; {passed(size < limit)} (< {_mb(limit)})"


def gateway_in(tree: Sequence[Process]) -> Process:
    return next(process for process in tree if process.name.endswith("Gateway"))


def total(tree: Sequence[Process]) -> int:
    return sum(process.pss for process in tree)


def processes(root: psutil.Process) -> list[Process]:
    """The tree under ``root``, largest first. Kernels before 4.14 have no smaps_rollup; everything newer has."""
    found = []
    for process in (root, *root.children(recursive=True)):
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            found.append(Process(readable(process.cmdline()), _kib(rollup, "Pss") << 10, _kib(rollup, "Rss") << 10))
        except (OSError, psutil.NoSuchProcess):  # it ended while we looked
            continue
    return sorted(found, key=lambda process: -process.pss)


def _kib(rollup: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) if found else 0


def readable(command: Sequence[str]) -> str:
    """A command line as a name that says what the process is.

    >>> readable(["/usr/bin/python3", "-u", "/lib/ray/autoscaler/_private/monitor.py", "--logs-dir=/tmp"])
    'monitor'
    >>> readable(["ray::ServeReplica:gateway:Gateway", "", ""])
    'ServeReplica:gateway:Gateway'
    """
    words = [word for word in command if word not in ("", "-u", "-B")] or ["(ended)"]
    if not Path(words[0]).name.startswith("python"):
        return words[0].rpartition("/")[2].removeprefix("ray::")
    if words[1] == "-c":
        helper = re.search(r"multiprocessing\.(\w+)", words[2])
        return f"multiprocessing {helper[1]}" if helper else words[2]
    return words[2] if words[1] == "-m" else Path(words[1]).stem


def memory_table(title: str, found: Sequence[Process]) -> Table:
    table = Table(title=f"Memory of {title}", show_footer=True)
    table.add_column("Process", footer="all")
    table.add_column("PSS", justify="right", footer=_mb(total(found)))
    table.add_column("RSS", justify="right")
    for process in found:
        table.add_row(process.name, _mb(process.pss), _mb(process.rss))
    return table


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
