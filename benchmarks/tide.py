"""One day of bursty traffic on four slots with a training job beside it, three ways: ``python -m benchmarks tide``.

- ``static``: two slots serve, two train, whatever happens.
- ``stock_ray``: Serve's autoscaling and Ray Train's elastic workers, each by itself; nobody takes a slot from the other.
- ``springtide``: one budget.

The requests, the engines, the gateway and the steps are the same in all three, so that what differs is who has which slot. A slot is held
down to a fixed part of a core (`benchmarks.shares`) as soon as its process works, since two cores cannot feed four busy engines: slots are
what runs out then, as accelerators do. The load is scaled to what one such engine can do, which is measured first.
"""

import argparse
import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.progress import Progress

from benchmarks import load, tide_report, trace
from benchmarks.job import DATA, Job, lost, training
from benchmarks.load import Sample
from benchmarks.peers import Served
from benchmarks.place import changes, console, finish, machine, springtide, warn_if_busy, workplace
from benchmarks.shares import Shares
from benchmarks.tide_report import GLOBAL_BATCH, TTFT_TARGET_S, Day, Look
from cluster import client
from cluster import config as configuration
from cluster.capacity.handover import parse
from cluster.config import Config
from cluster.errors import PoolUnavailable, SpringtideError
from cluster.pool import graph, local
from cluster.pool.folders import RAY_LOGS
from cluster.pool.serve_api import ServeApi
from deployments.autoscaling import CALM

SYSTEMS = ("static", "stock_ray", "springtide")
SLOTS = 4
CORES_PER_SLOT = 0.2
LOW, HIGH = 0.08, 1 / 3
"""Requests per second at night and at noon, as shares of what one replica can do: a burst of three times noon's is all that it can."""
TOKENS = 32
TRIED_STREAMS, TRIED_S = (4, 8, 12, 16), 10
WARM_S = 10
UNPLACED = "s to be scheduled"
"""In what Serve's controller logs of a replica that gets no slot."""

FLEET = {
    "scale_up_after_s": 0,
    "scale_down_after_s": 10,
    "target_ttft_s": TTFT_TARGET_S,
    "kv_cache_bytes": 64 << 20,
}
SPLITS: dict[str, dict[str, Any]] = {
    "static": {"fleet": {"min_replicas": 2, "max_replicas": 2}, "training": {"workers": 2, "min_workers": 2}},
    "stock_ray": {
        "fleet": {"min_replicas": 1, "max_replicas": 2, "warm_pool_size": 0},
        "training": {"budget": {"serving_ceiling_slots": 0}},  # no lease
    },
    "springtide": {"fleet": {"min_replicas": 1, "max_replicas": 2}, "training": {"workers": 3, "min_workers": 1}},
}


def tide(options: argparse.Namespace) -> None:
    """Serving and training on one budget of slots, beside a static split and beside stock Ray."""
    console.print(machine())
    warn_if_busy()
    days: list[Day] = []
    with workplace(options.model) as (config, _):
        shares = Shares(CORES_PER_SLOT)
        if not shares.works:
            console.print("[yellow]No right to make control groups: the machine's cores will be the limit, not the slots.")
        one = capacity(config, shares)
        per_s = options.requests_per_s or one.per_s
        console.print(
            f"one replica answers {one.per_s:.1f} requests a second, and up to {one.at_once} at once in time; a slot is {CORES_PER_SLOT:g} of a core"
        )
        config = configuration.parse(configuration.merge(config.dump(), {"fleet": {"target_running": one.at_once}}))
        shape = trace.Shape(options.seconds, LOW * per_s, HIGH * per_s)
        times_s = arrivals(options, shape)
        for system in options.systems:
            days.append(day(config, system, times_s, options.seconds, Shares(CORES_PER_SLOT)))
            console.print(tide_report.line(days[-1], options.seconds))
    days.sort(key=lambda one: SYSTEMS.index(one.system))
    rows = [tide_report.row(one, options.seconds) for one in days]
    console.print(tide_report.table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    tide_report.draw(days, options.seconds, options.png)
    console.print(f"chart: {options.png}")
    finish(tide_report.verdicts(rows))


def arrivals(options: argparse.Namespace, shape: trace.Shape) -> list[float]:
    if options.trace:
        return trace.recorded(options.trace, options.seconds, (shape.low + shape.high) / 2, options.seed)
    return trace.arrivals(shape, options.seed)


class Capacity(NamedTuple):
    """What one replica can do in a slot."""

    per_s: float
    """Requests that it answers in a second where as many are open as it likes."""
    at_once: int
    """The most requests under way with which the first token comes well in time: what an operator would set as `fleet.target_running`."""


def capacity(config: Config, shares: Shares) -> Capacity:
    found: dict[int, load.Summary] = {}
    with springtide(arranged(config, {"fleet": {"min_replicas": 1, "max_replicas": 1}}), changes()) as served:
        shares.hold(engine_pids(config))
        for streams in TRIED_STREAMS:
            samples = asyncio.run(load.run(served.url, served.model, streams=streams, duration_s=TRIED_S, tokens=TOKENS))
            found[streams] = load.summarise(samples, streaming=True)
        shares.close()
    return Capacity(
        found[TRIED_STREAMS[-1]].requests_per_s, in_time({streams: one.ttft_p99_ms for streams, one in found.items()})
    )


def in_time(ttft_p99_ms: Mapping[int, float | None]) -> int:
    """The most streams whose first tokens come within the part of the target at which the autoscaler calls a fleet calm; the fewest if none do.

    >>> in_time({4: 200, 8: 400, 12: 700}), in_time({4: 900})
    (8, 4)
    """
    calm = [streams for streams, ms in ttft_p99_ms.items() if ms is not None and ms <= 1000 * CALM * TTFT_TARGET_S]
    return max(calm, default=min(ttft_p99_ms))


def arranged(config: Config, split: dict[str, Any]) -> Config:
    """The pool's configuration for one way of dividing the slots."""
    budget = {"cool_down_s": 2, "memory_s": 60}  # a day takes minutes, so yesterday is a minute ago
    common = {"pool": {"slots": SLOTS}, "fleet": FLEET, "training": {"checkpoint_s": 15, "budget": budget}}
    return configuration.parse(configuration.merge(configuration.merge(config.dump(), common), split))


def day(base: Config, system: str, times_s: list[float], seconds: float, shares: Shares) -> Day:
    """Run the trace on a pool of its own."""
    config = arranged(base, SPLITS[system])
    with yesterday(config) as served, training(config, *command(config, system)) as job:
        watcher = Watcher(config, job, shares)
        job.wait_until(lambda: "progress" in job.text)
        time.sleep(WARM_S)
        from_step, from_byte = job.step, len(job.text)
        watcher.begin()
        began_s = time.time()
        samples = asyncio.run(replayed(served, times_s, seconds, system))
        time.sleep(max(0.0, began_s + seconds - time.time()))
        steps, log = job.step - from_step, job.text[from_byte:]
        per_step = job.examples / math.ceil(job.examples / GLOBAL_BATCH)
        looks = watcher.end()
        said = serve_said(config)
        snapshots = parse(client.of(config).slots(began_s)["snapshots"])
    return Day(system, began_s, samples, looks, snapshots, said, round(steps * per_step), lost(log))


def serve_said(config: Config) -> str:
    """The last line of the pool's Serve controller about a replica that has not got its place."""
    logs = (config.home / RAY_LOGS).glob("serve/controller_*.log")
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if UNPLACED in line]
    return said[-1] if said else ""


@contextlib.contextmanager
def yesterday(config: Config) -> Iterator[Served]:
    """The pool, on which two replicas have run before: the day is one of many, and not the first."""
    busy = arranged(config, {"fleet": {"min_replicas": 2, "max_replicas": 2}})
    with springtide(busy, changes()) as served:
        wait_until(lambda: replica_states(config).count("RUNNING") == 2)
        graph.deploy(config)
        wait_until(lambda: replica_states(config) == ["RUNNING"] * config.fleet.min_replicas)
        yield served


def wait_until(done: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline_s:
            raise PoolUnavailable("The fleet does not come to rest.", "`springtide doctor` checks the usual causes.")
        time.sleep(0.3)


async def replayed(served: Served, times_s: list[float], seconds: float, system: str) -> list[Sample]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"{system}: a day of {len(times_s)} requests", total=len(times_s))
        return await load.replay(served.url, served.model, times_s, TOKENS, lambda _: bar.advance(task))


def command(config: Config, system: str) -> list[str]:
    """A job that would go on for ever."""
    verb = ["benchmarks.stock", "--workers", "1,3"] if system == "stock_ray" else ["jobs.finetune", "--name", "tide"]
    return [
        *verb,
        "--data",
        str(DATA),
        "--base",
        config.default_model,
        "--epochs",
        "1000000",
        "--set",
        f"global_batch={GLOBAL_BATCH}",
    ]


# what is watched meanwhile


class Watcher:
    """Looks at the pool once a second, in a thread of its own, and holds down every process that has come to work in a slot."""

    def __init__(self, config: Config, job: Job, shares: Shares) -> None:
        self.config, self.job, self.shares = config, job, shares
        self.looks: list[Look] = []
        self.began_s = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def begin(self) -> None:
        self.began_s, self.looks = time.monotonic(), []

    def end(self) -> list[Look]:
        if not self.thread.is_alive():
            raise PoolUnavailable("Nobody watched the pool to the end.", "The traceback above says why; run the benchmark again.")
        self.done.set()
        self.thread.join()
        self.shares.close()
        return self.looks

    def _run(self) -> None:
        while not self.done.wait(1.0):
            with contextlib.suppress(SpringtideError, OSError, RuntimeError):  # Ray's client, where the dashboard is busy
                self.shares.hold({*engine_pids(self.config), *self.job.workers})
                slots = client.of(self.config).slots(time.time())["slots"]
                states = replica_states(self.config)
                serving, starting = states.count("RUNNING"), states.count("STARTING")
                used = round(slots["total"] - slots["free"])
                self.looks.append(Look(time.monotonic() - self.began_s, serving, starting, used))


def replicas(config: Config) -> list[dict[str, Any]]:
    applications = ServeApi(local.dashboard(config), local.bearer()).applications()
    fleet = applications.get(graph.fleet_app(config.default_fleet), {})
    return [replica for deployment in fleet.get("deployments", {}).values() for replica in deployment["replicas"]]


def replica_states(config: Config) -> list[str]:
    return [replica["state"] for replica in replicas(config)]


def engine_pids(config: Config) -> set[int]:
    """Of the replicas that answer."""
    return {replica["pid"] for replica in client.of(config).status()["replicas"]}
