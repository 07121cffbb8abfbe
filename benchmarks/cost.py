"""Processor time: which process of a system spends how much on a token. Where a system shares its cores with an engine, this is the rate."""

import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import psutil
from rich import box
from rich.table import Table

from benchmarks.memory import readable

LOAD_GENERATOR = "(the load generator)"
LEAST_US = 1.0
"""Processes below this many microseconds per token are counted together."""


class Used(NamedTuple):
    """What one process has used since it started."""

    name: str
    cpu_s: float


def used(root: psutil.Process) -> dict[int, Used]:
    """Process id → what it has used, of the tree under ``root`` and of this process, which makes the load."""
    found: dict[int, Used] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
            found[process.pid] = Used(readable(process.cmdline()), times.user + times.system)
        except psutil.NoSuchProcess:  # it ended while we looked
            continue
    own = os.times()
    return found | {os.getpid(): Used(LOAD_GENERATOR, own.user + own.system)}


def spent(before: Mapping[int, Used], after: Mapping[int, Used]) -> dict[str, float]:
    """Name of a process → processor seconds between the two looks. Processes with one name are summed; one that ended meanwhile is missing. Ray
    renames its workers while they run.

    >>> spent({1: Used("ray::IDLE", 2.0)}, {1: Used("engine", 5.0), 2: Used("engine", 0.5)})
    {'engine': 3.5}
    """
    found: dict[str, float] = {}
    for pid, (name, cpu_s) in after.items():
        known = before.get(pid)
        found[name] = found.get(name, 0.0) + cpu_s - (known.cpu_s if known else 0.0)
    return found


def per_token_us(cpu_s: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Microseconds of a processor per token, the most first. No tokens, no figures."""
    each = {name: spent_s / tokens * 1e6 for name, spent_s in cpu_s.items()} if tokens else {}
    return dict(sorted(each.items(), key=lambda pair: -pair[1]))


def cost_table(title: str, costs_us: Mapping[str, Sequence[float]]) -> Table:
    """``costs_us``: process → microseconds per token in each round. Medians with the lowest and the highest, the most first."""
    table = Table(title=f"Processor time per token, {title}", box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("Process", footer="all")
    table.add_column("µs per token (lowest–highest)", justify="right", footer=_spread(_sums(costs_us.values())))
    for row in cost_rows(costs_us):
        table.add_row(*row)
    return table


def cost_rows(costs_us: Mapping[str, Sequence[float]]) -> Iterable[tuple[str, str]]:
    """(process, its microseconds per token as text), the most first; what costs next to nothing in one row at the end.

    >>> list(cost_rows({"engine": [300, 310], "gateway": [50, 40], "raylet": [0.2, 0.1], "agent": [0.1, 0.1]}))
    [('engine', '305 (300–310)'), ('gateway', '45 (40–50)'), ('2 others', '0 (0–0)')]
    """
    large = sorted(
        (name for name, each in costs_us.items() if median(each) >= LEAST_US), key=lambda name: -median(costs_us[name])
    )
    yield from ((name, _spread(costs_us[name])) for name in large)
    if small := [each for name, each in costs_us.items() if name not in large]:
        yield f"{len(small)} others", _spread(_sums(small))


def _sums(rounds: Iterable[Sequence[float]]) -> list[float]:
    return [sum(each) for each in zip(*rounds, strict=True)]


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})" if values else "–"
