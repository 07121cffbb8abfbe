"""How the allocator and the gateway's routing table bear a large pool, without Ray: ``python -m tests.scale``.

A day's load passes in some thousand turns at the pace at which control divides the slots, which is the densest past that the arbiter can
have to remember; two days, so that what is held after the second can be compared with the first. Real are `cluster.capacity.allocator` with the
arbiter, control's way of telling the gateways, and a gateway's table. Timed, in processor time, are a turn with the heartbeat of every job in it,
the way of a change of the view on control's side and on the gateway's, and the choice of a replica per request. Python's collector of
garbage waits meanwhile; what it costs a gateway is timed by itself.
"""

import argparse
import gc
import json
import pickle
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from rich import box
from rich.table import Table as Shown

from benchmarks.load import percentile
from benchmarks.place import console, finish, machine, passed
from cluster.capacity.allocator import SNAPSHOTS, Allocator
from cluster.capacity.arbiter import SERVING, Budget, FleetDemand
from cluster.control.allocation import TURN_S
from cluster.control.gateways import Gateways
from cluster.control.metrics import Board
from cluster.types import View
from cluster.view import delta
from deployments.api.models import model_list
from deployments.routing.table import Table
from tests.world import ADAPTERS_PER_NODE, NODES_PER_JOB, SLOTS_PER_NODE, World

NODES = (10, 30, 100, 300, 1000)
TURNS = SNAPSHOTS
"""In a day: by its end the allocator remembers as much as it ever will."""
VIEW_TURNS = 40
"""Turns from one change of the view to the next."""
JOIN_TURNS = 400
"""Turns from one gateway that starts to the next."""
REQUESTS = 40
"""Choices after each view."""
LIMIT_MS = 50
GROWTH_LIMIT = 0.02
"""How much may be held more after the second day than after the first."""
BUDGET = Budget(training_floor_slots=8, headroom_slots=64)
COLUMNS = {
    "Nodes": "{nodes}",
    "Allocator ms": "{allocator_p50_ms}/{allocator_p99_ms}/{allocator_max_ms}",
    "Board ms": "{board_p50_ms}/{board_p99_ms}",
    "Place ms": "{place_p50_ms}/{place_p99_ms}/{place_max_ms}",
    "Control ms": "{announce_p50_ms}/{announce_p99_ms}/{announce_max_ms}",
    "Table ms": "{table_p50_ms}/{table_p99_ms}/{table_max_ms}",
    "Choice µs": "{choice_p50_us}/{choice_p99_us}",
    "All ms": "{whole_p50_ms}",
    "GC ms": "{collect_p50_ms}",
    "Allocator MB": "{allocator_mb}",
    "Table MB": "{table_mb}",
    "Tick MB": "{tick_allocator_mb}/{tick_table_mb}",
}
TICKS = {
    "allocator": "the allocator",
    "board": "its metrics",
    "place": "the placement of adapters",
    "announce": "control's word to the gateways",
    "table": "a gateway's table",
}
CAPTION = (
    "A tick of the allocator is the heartbeats of all jobs and a turn; of the board, what metrics have to say of it; of the placement, "
    "dividing the replicas' places among all live adapters; of control, finding and packing what changed in the view; of the table, "
    "unpacking and "
    f"adopting it: processor time, p50 / p99 / max over two days of {TURNS:,} turns. A choice is one request's, p50 / p99. All: a whole "
    "view unpacked and adopted by a gateway that starts. GC: a full run of that gateway's garbage collector. MB: held after both days; "
    f"needed for a moment during a tick of the allocator / of the table. {SLOTS_PER_NODE} slots and {ADAPTERS_PER_NODE} adapters a node, half "
    f"of the slots served, a job for every {NODES_PER_JOB} nodes."
)
COLOURS = {
    "board": "#7b5ea7",
    "allocator": "#0f7c8a",
    "table": "#cf7f3f",
    "announce": "#e0b265",
    "place": "#5b8c5a",
    "choice": "#9aa5b1",
}

Row = dict[str, float]
Result = TypeVar("Result")


class OneGateway(Gateways):
    """Control's side of the gateways, with one gateway's table in the place of Ray."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.times_s: list[float] = []

    def _tell(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        if method == "adopt":
            packed = pickle.dumps(arguments[0], protocol=5)
            self.times_s.append(cost(lambda: self.table.adopt(pickle.loads(packed)))[1])
        return [self.table.view.revision]


class Days:
    """Two days of a pool of one size."""

    def __init__(self, nodes: int, turns: int, seed: int) -> None:
        self.nodes = nodes
        self.world = World(nodes, turns, seed)
        self.allocator, self.gateways = Allocator(BUDGET, 0.0), OneGateway()
        self.table = self.gateways.table
        self.board = Board()
        self.flying: deque[str] = deque()
        self.times_s: dict[str, list[float]] = {
            what: [] for what in ("allocator", "board", "place", "announce", "whole", "collect", "choice", "listing")
        }
        self.broken: list[str] = []
        """Invariants that did not hold, in words."""

    def live(self, turns: int) -> Row:
        """``turns``, and as many again."""
        with collector_waits():
            for turn in range(turns):
                self._tick(turn)
            before = {"allocator": weight(self.allocator), "table": weight(self.table)}
            for turn in range(turns, 2 * turns):
                self._tick(turn)
            return {**self._size(), **self._times(), **self._weights(before), "broken": len(self.broken)}

    def _tick(self, turn: int) -> None:
        self._turn(turn)
        if turn % VIEW_TURNS == 0:
            self._route()
        if turn % JOIN_TURNS == 0:
            self._join()

    def _turn(self, turn: int) -> None:
        now_s, world = turn * TURN_S, self.world
        beats = world.step(turn, self.allocator)

        def decide() -> int:
            for beat in beats:
                self.allocator.heartbeat(beat, now_s)
            return self.allocator.turn(world.slots, world.serving, (FleetDemand("base", 0, world.wanted),), now_s)

        lease = self._timed("allocator", decide)
        self.broken += owned_twice(world, self.allocator, lease)
        world.hear(turn, self.allocator.grants)

    def _route(self) -> None:
        self.world.change()
        self.world.hold(self._timed("place", self.world.place))
        routed = self.world.route()
        told = len(self.gateways.times_s)
        _, seconds = cost(lambda: self.gateways.announce(*routed))
        self._timed("board", lambda: self.board.news(self.allocator.snapshots, self.allocator.changes))
        if told:  # the first says all; see `_join`
            self.times_s["announce"].append(seconds - sum(self.gateways.times_s[told:]))
        self._timed("listing", lambda: model_list(self.table))
        for name in self.world.asks(REQUESTS):
            version, replica = self._timed("choice", lambda name=name: self._ask(name))
            if version != self.world.aliases[name].stable or str(version) not in self.world.replicas[replica].held:
                self.broken.append(f"{name} went to {replica} for {version}")

    def _join(self) -> None:
        """A gateway starts, and hears all; then its collector looks through that."""
        late, packed = Table(), pickle.dumps(self.gateways.current, protocol=5)
        gc.freeze()
        self._timed("whole", lambda: late.adopt(pickle.loads(packed)))
        self._timed("collect", gc.collect)
        if late.holders != self.table.holders:
            self.broken.append("a gateway that was told every change knows something else than one that was told all")

    def _ask(self, name: str) -> tuple[Any, str]:
        """A request comes, and an older one may end."""
        version, _, fleet = self.table.resolve(name, "somebody")
        replica = self.table.choose(version, 0.0, fleet=fleet)
        self.table.in_flight[replica.id] += 1
        self.flying.append(replica.id)
        if len(self.flying) > len(self.table.view.replicas):
            self.table.in_flight[self.flying.popleft()] -= 1
        return version, replica.id

    def _timed(self, what: str, do: Callable[[], Result]) -> Result:
        result, seconds = cost(do)
        self.times_s[what].append(seconds)
        return result

    def _size(self) -> Row:
        world = self.world
        return {"nodes": self.nodes, "slots": world.slots, "adapters": len(world.adapters), "jobs": world.jobs}

    def _times(self) -> Row:
        found: Row = {}
        for what, times_s in {**self.times_s, "table": self.gateways.times_s[1:]}.items():
            unit, scale = ("us", 1e6) if what == "choice" else ("ms", 1e3)
            for words, percent in (("p50", 50), ("p99", 99), ("max", 100)):
                found[f"{what}_{words}_{unit}"] = (percentile(times_s, percent) or 0) * scale
        return found

    def _weights(self, before: dict[str, int]) -> Row:
        after = {"allocator": weight(self.allocator), "table": weight(self.table)}
        held = {f"{what}_mb": size / 1e6 for what, size in after.items()}
        growth = {f"{what}_growth": size / before[what] - 1 for what, size in after.items()}
        turn = momentary(lambda: self._turn(len(self.times_s["allocator"])))
        self.world.change()
        self.world.hold(self.world.place())
        change = delta(self.gateways.current, View(time.time_ns(), *self.world.route()))
        return {
            **held,
            **growth,
            "tick_allocator_mb": turn / 1e6,
            "tick_table_mb": momentary(lambda: self.table.adopt(change)) / 1e6,
        }


def owned_twice(world: World, allocator: Allocator, lease: int) -> list[str]:
    """What is wrong after a turn; empty where every slot has one owner and no job may grow into a slot that is not free."""
    grants, beats = dict(allocator.decision.past.grants), allocator.beats
    held = sum(beat.held for beat in beats)
    promised = {beat.job.id: allocator.grant(beat.job.id, beat.held).slots for beat in beats}
    growing = sum(max(0, promised[beat.job.id] - beat.held) for beat in beats)
    wrong = {
        "more was divided than there is": sum(grants.values()) > world.slots,
        "serving and jobs together were given more than there is": bool(grants) and lease + sum(promised.values()) > world.slots,
        "what serving was given is not its lease": bool(grants) and grants[SERVING] != lease,
        "jobs may grow by more than is free": growing > max(0, world.slots - world.serving - held),
        "more is held than there is": world.free < 0,
    }
    return [f"{words} at {world.slots} slots" for words, found in wrong.items() if found]


@contextmanager
def collector_waits() -> Iterator[None]:
    """Python's collector of garbage would look through the whole simulated pool, at moments of its own."""
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        gc.collect()


def cost(do: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and the seconds of processor time that it took: what else runs on this machine is not its fault."""
    began_s = time.thread_time()
    result = do()
    return result, time.thread_time() - began_s


def weight(root: object) -> int:
    """Bytes of everything that is reached from ``root``, each object once; classes, functions and modules are not data."""
    seen, ahead, total = set[int](), [root], 0
    while ahead:
        one = ahead.pop()
        if id(one) not in seen and not isinstance(one, type | FunctionType | ModuleType):
            seen.add(id(one))
            total += sys.getsizeof(one)
            ahead.extend(gc.get_referents(one))
    return total


def momentary(do: Callable[[], object]) -> int:
    """Bytes that were allocated at most while it ran."""
    tracemalloc.start()
    do()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


# results


def shown(rows: Sequence[Row]) -> Shown:
    table = Shown(caption=CAPTION, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    texts = {
        key: f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}" for key, value in row.items()
    }
    return [form.format(**texts) for form in COLUMNS.values()]


def markdown(rows: Sequence[Row]) -> str:
    """The same table and verdicts for a README."""
    lines = [COLUMNS, ["---:"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{CAPTION}\n\nMeasured on {machine()}.\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    largest = rows[-1]
    size = f"at {largest['nodes']:.0f} nodes"
    lines = [
        f"a tick of {words} {size} takes {largest[f'{what}_p99_ms']:.1f} ms, p99; "
        f"{passed(largest[f'{what}_p99_ms'] <= LIMIT_MS)} (≤ {LIMIT_MS} ms)"
        for what, words in TICKS.items()
    ]
    grown = max(largest["allocator_growth"], largest["table_growth"])
    lines.append(f"the second day adds {grown:.1%} to what is held; {passed(grown <= GROWTH_LIMIT)} (≤ {GROWTH_LIMIT:.0%})")
    broken = sum(row["broken"] for row in rows)
    return [*lines, f"{broken:.0f} broken invariants; {passed(broken == 0)}"]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels over the number of nodes, both axes logarithmic: time per tick with its limit, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    nodes = [row["nodes"] for row in rows]
    _draw_times(times, nodes, rows)
    for what, label in (("allocator", "allocator, after two days"), ("table", "table, after two days")):
        memory.plot(nodes, [row[f"{what}_mb"] for row in rows], "o-", color=COLOURS[what], label=label)
        before = [row[f"{what}_mb"] / (1 + row[f"{what}_growth"]) for row in rows]
        memory.plot(nodes, before, "x:", color=COLOURS[what], label=f"{what}, a day earlier")
        needed = [row[f"tick_{what}_mb"] for row in rows]
        memory.plot(nodes, needed, "--", color=COLOURS[what], linewidth=0.8, label=f"{what}, during a tick")
    memory.set_title("Memory, MB, over nodes", loc="left")
    for axes in (times, memory):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(nodes, [f"{n:g}" for n in nodes], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    times.set_ylim(top=40 * LIMIT_MS)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_times(axes: Any, nodes: Sequence[float], rows: Sequence[Row]) -> None:
    for key, label in (
        ("allocator", "allocator: all heartbeats and a turn"),
        ("table", "gateway: a change unpacked and adopted"),
        ("board", "metrics: what is to be said"),
        ("announce", "control: a change found and packed"),
        ("choice", "gateway: a request's choice"),
    ):
        unit, scale = ("us", 1e-3) if key == "choice" else ("ms", 1.0)
        p50, p99 = ([row[f"{key}_{words}_{unit}"] * scale for row in rows] for words in ("p50", "p99"))
        axes.plot(nodes, p50, "o-", color=COLOURS[key], label=label)
        axes.fill_between(nodes, p50, p99, color=COLOURS[key], alpha=0.2, linewidth=0)
    axes.axhline(LIMIT_MS, color="#444", linewidth=0.8, linestyle="--")
    axes.text(nodes[-1], LIMIT_MS * 1.1, f"{LIMIT_MS} ms", fontsize=8, ha="right")
    axes.set_title("Time per tick, ms, over nodes: p50, shaded to p99", loc="left")


def run() -> None:
    parser = argparse.ArgumentParser("tests.scale", description="Grow a simulated pool and time what decides in it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=TURNS, help="in a day")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one row per size")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a README")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the chart")
    options = parser.parse_args()
    days = [Days(nodes, options.turns, options.seed) for nodes in NODES]
    rows = [day.live(options.turns) for day in days]
    console.print(machine(), shown(rows), sep="\n")
    if options.json:
        options.json.write_text(
            json.dumps([{key: round(value, 4) for key, value in row.items()} for row in rows], indent=1) + "\n"
        )
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    if options.png:
        draw(rows, options.png)
    console.print(*sorted({words for day in days for words in day.broken}), sep="\n")
    finish(verdicts(rows))


if __name__ == "__main__":
    run()
