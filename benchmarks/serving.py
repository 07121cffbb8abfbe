"""Springtide beside bare vLLM and Ray Serve LLM, each alone on the machine, in turn (A B C D A B C D …), under the same load.

Medians are over rounds; ratios are within one round, so that a slow minute of the machine does not count for one system and against
another. `benchmarks.peers` says what each system is given.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import load, peers
from benchmarks.cost import cost_table, spent, used
from benchmarks.memory import Process, budget, memory_table, processes
from benchmarks.peers import Served
from benchmarks.place import PORT, ask, console, finish, machine, neighbours, springtide, wait_until_idle, warn_if_busy, workplace
from benchmarks.report import LABELS, Measurement, costs_us, draw, markdown, results, summarise, verdicts
from cluster.config import Config

WARM_UP_REQUESTS = 64
START_AND_STOP_S = 75
"""For the estimate alone, as is the next."""
SECONDS_PER_ROUND_OF_STREAMS = 0.6
"""How long a system takes to answer as many requests as there are streams, 32 tokens each."""


@dataclass(frozen=True)
class Load:
    """What every system is asked."""

    rounds: int
    streams: tuple[int, ...]
    requests: int
    """At the most streams; fewer streams send fewer, but never less than a quarter."""
    tokens: int
    neighbours: int = 0
    """Processes beside the system that keep a processor busy."""

    @property
    def cases(self) -> list[tuple[int, bool]]:
        return [(streams, streaming) for streaming in (True, False) for streams in self.streams]

    def requests_at(self, streams: int) -> int:
        return max(self.requests // 4, self.requests * streams // max(self.streams))

    def estimate_s(self, systems: int) -> float:
        turns = sum(self.requests_at(streams) / streams for streams, _ in self.cases)
        return self.rounds * systems * (START_AND_STOP_S + turns * SECONDS_PER_ROUND_OF_STREAMS * self.tokens / 32)


def serving(options: argparse.Namespace) -> None:
    """Compare the systems, print tables, write the files that were asked for."""
    plan = Load(options.rounds, options.streams, options.requests, options.tokens, options.neighbours)
    minutes = plan.estimate_s(len(options.systems)) / 60
    console.print(f"{machine()}\nThis takes about {minutes:.0f} minutes: {describe(plan, options.systems)}")
    warn_if_busy()
    with workplace(options.model) as (config, model):
        measurements, memory = measure(plan, options.systems, config, model)
    console.print(results(measurements), *costs(measurements), sep="\n")
    console.print(*(memory_table(LABELS[system], memory[system]) for system in memory), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(summarise(measurements), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(measurements))
    if options.png:
        draw(measurements, options.png)
    finish([*verdicts(measurements), *(budget(memory["springtide"]) if "springtide" in memory else [])])


def describe(plan: Load, systems: Sequence[str]) -> str:
    levels = ", ".join(map(str, plan.streams))
    beside = f", beside {plan.neighbours} busy processes" if plan.neighbours else ""
    return f"{plan.rounds} rounds of {len(systems)} systems, at {levels} concurrent requests, streamed and not{beside}."


def running(system: str, config: Config, model: Path, watch: Callable[[str], None]) -> AbstractContextManager[Served]:
    return springtide(config, watch) if system == "springtide" else peers.serving(system, config, model, PORT)


def measure(
    plan: Load, systems: Sequence[str], config: Config, model: Path
) -> tuple[list[Measurement], dict[str, list[Process]]]:
    """Every case of every system in every round, and each system's processes after its last round."""
    measurements: list[Measurement] = []
    memory: dict[str, list[Process]] = {}
    with progress_bar() as progress:
        task = progress.add_task("", total=plan.rounds * len(systems) * (len(plan.cases) + 1))
        for turn in range(plan.rounds):
            for system in systems:
                say = _teller(progress, task, f"round {turn + 1}/{plan.rounds}  {LABELS[system]}")
                say("starting")
                with running(system, config, model, say) as served:
                    measurements += _cases(plan, turn, system, served, say)
                    memory[system] = processes(served.root)
                    say("stopping")
    return measurements, memory


def _cases(plan: Load, turn: int, system: str, served: Served, say: Callable[..., None]) -> list[Measurement]:
    say("warming up")
    for streaming in (True, False):
        ask(served, max(plan.streams), WARM_UP_REQUESTS, streaming, plan.tokens)
    say("letting it come to rest")
    wait_until_idle()
    with neighbours(plan.neighbours):
        return list(_measured(plan, turn, system, served, say))


def _measured(plan: Load, turn: int, system: str, served: Served, say: Callable[..., None]) -> Iterator[Measurement]:
    for streams, streaming in plan.cases:
        say(f"{streams} {'streams' if streaming else 'at once, not streamed'}", advance=1)
        before = used(served.root)
        samples = ask(served, streams, plan.requests_at(streams), streaming, plan.tokens)
        cpu_s = spent(before, used(served.root))
        for error in sorted({sample.error for sample in samples} - {""}):
            console.print(f"[red]{LABELS[system]}, {streams} streams: {error}")
        yield Measurement(turn, system, streams, streaming, load.summarise(samples, streaming), cpu_s, tokens_of(samples))
    say("reading its memory", advance=1)


def costs(measurements: Sequence[Measurement]) -> Iterator[Table]:
    """Each system's table of processor time, at the most streams."""
    most = max(one.streams for one in measurements)
    for system in dict.fromkeys(one.system for one in measurements):
        yield cost_table(f"{LABELS[system]}, {most} streams", costs_us(measurements, system, most, True))


def tokens_of(samples: Sequence[load.Sample]) -> int:
    return sum(sample.tokens for sample in samples if sample.ok)


def progress_bar() -> Progress:
    """Refreshed by hand: a thread that redraws ten times a second would be part of what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, auto_refresh=False)


def _teller(progress: Progress, task: TaskID, who: str) -> Callable[..., None]:
    def say(what: str, advance: int = 0) -> None:
        progress.update(task, description=f"{who}: {what}", advance=advance, refresh=True)

    return say
