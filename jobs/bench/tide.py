"""One day of bursty traffic on four slots with a training job beside it, three ways: ``python -m jobs.bench tide``.

- ``static``: two slots serve, two train, whatever happens.
- ``stock_ray``: Serve's autoscaling and Ray Train's elastic workers, each by itself; nobody takes a slot from the other.
- ``springtide``: one budget.

The requests, the engines, the gateway and the steps are the same in all three, so that what differs is who has which slot. A slot is held
down to a fixed part of a core (`jobs.bench.shares`) as soon as its process works, since two cores cannot feed four busy engines: slots are
what runs out then, as accelerators do. The load is scaled to what one such engine can do, which is measured first.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from rich.progress import Progress

from cluster import admin, graph, pool
from cluster import config as configuration
from cluster.config import Config
from cluster.errors import SpringtideError
from cluster.handover import parse
from jobs.bench import load, tide_report, trace
from jobs.bench.load import Sample
from jobs.bench.peers import Served
from jobs.bench.place import changes, console, finish, machine, springtide, warn_if_busy, workplace
from jobs.bench.shares import Shares
from jobs.bench.tide_report import GLOBAL_BATCH, TTFT_TARGET_S, Day, Look

SYSTEMS = ("static", "stock_ray", "springtide")
SLOTS = 4
CORES_PER_SLOT = 0.2
LOW, HIGH = 0.08, 0.38
"""Requests per second at night and at noon, as shares of what one replica can do: bursts of three times that need a second one."""
TOKENS = 32
WARM_S = 10
DATA = Path(__file__).parents[1] / "seedling/facts.jsonl"
STEP = re.compile(r"step=(\d+)/|from step (\d+)|stopped after step (\d+)")
WORKER = re.compile(r"\((?:Member|RayTrainWorker) pid=(\d+)\)")

FLEET = {
    "target_running": 4,
    "scale_up_after_s": 0,
    "scale_down_after_s": 10,
    "target_ttft_s": TTFT_TARGET_S,
    "kv_cache_bytes": 64 << 20,
}
SPLITS: dict[str, dict[str, Any]] = {
    "static": {"fleet": {"min_replicas": 2, "max_replicas": 2}, "training": {"workers": 2, "min_workers": 2}},
    "stock_ray": {"fleet": {"min_replicas": 1, "max_replicas": 3}},
    "springtide": {"fleet": {"min_replicas": 1, "max_replicas": 3}, "training": {"workers": 3, "min_workers": 1}},
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
        per_s = options.requests_per_s or capacity(config, shares)
        console.print(f"one replica answers {per_s:.1f} requests a second; a slot is {CORES_PER_SLOT:g} of a core")
        shape = trace.Shape(options.seconds, LOW * per_s, HIGH * per_s)
        times_s = arrivals(options, shape)
        for system in options.systems:
            days.append(day(config, system, times_s, options.seconds, Shares(CORES_PER_SLOT)))
            console.print(tide_report.line(days[-1], options.seconds))
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


def capacity(config: Config, shares: Shares) -> float:
    """Requests per second that one replica answers where as many are open as it likes."""
    with springtide(arranged(config, {"fleet": {"min_replicas": 1, "max_replicas": 1}}), changes()) as served:
        shares.hold(replica_pids(config))
        samples = asyncio.run(load.run(served.url, served.model, streams=16, duration_s=15, tokens=TOKENS))
        shares.close()
    return load.summarise(samples, streaming=True).requests_per_s


def arranged(config: Config, split: dict[str, Any]) -> Config:
    """The pool's configuration for one way of dividing the slots."""
    budget = {"cool_down_s": 2}
    common = {"pool": {"slots": SLOTS}, "fleet": FLEET, "training": {"checkpoint_s": 15, "budget": budget}}
    return configuration.parse(configuration.merge(configuration.merge(config.dump(), common), split))


def day(base: Config, system: str, times_s: list[float], seconds: float, shares: Shares) -> Day:
    """Run the trace on a pool of its own."""
    config = arranged(base, SPLITS[system])
    with springtide(config, changes()) as served, training(config, system) as job:
        watcher = Watcher(config, job, shares)
        job.wait_for("progress")
        time.sleep(WARM_S)
        from_step, from_byte = job.step, len(job.text)
        watcher.begin()
        began_s = time.time()
        samples = asyncio.run(replayed(served, times_s, seconds, system))
        time.sleep(max(0.0, began_s + seconds - time.time()))
        steps, log = job.step - from_step, job.text[from_byte:]
        looks = watcher.end()
        moments = parse(admin.tide(config, began_s)["moments"])
    return Day(system, began_s, samples, looks, moments, log, steps, lost(log))


async def replayed(served: Served, times_s: list[float], seconds: float, system: str) -> list[Sample]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"{system}: a day of {len(times_s)} requests", total=len(times_s))
        return await load.replay(served.url, served.model, times_s, TOKENS, lambda _: bar.advance(task))


# the job


class Job:
    """A training job of this benchmark and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def step(self) -> int:
        return max(steps(self.text), default=0)

    @property
    def workers(self) -> set[int]:
        """The processes that have trained."""
        return {int(pid) for line in self.text.splitlines() if "step" in line for pid in WORKER.findall(line)}

    def wait_for(self, word: str, timeout_s: float = 180) -> None:
        deadline_s = time.monotonic() + timeout_s
        while word not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise SpringtideError(f"The training did not begin: {self.text[-600:]}")
            time.sleep(0.5)


@contextlib.contextmanager
def training(config: Config, system: str) -> Iterator[Job]:
    """A job that would go on for ever, until the block ends."""
    verb = ["jobs.bench.stock", "--workers", "1,3"] if system == "stock_ray" else ["jobs.finetune", "--name", "tide"]
    common = ["--data", str(DATA), "--base", config.fleet.model, "--epochs", "1000000", "--set", f"global_batch={GLOBAL_BATCH}"]
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.json"
        resolved.write_text(json.dumps(config.dump()))
        log = Path(folder) / "job.log"
        process = subprocess.Popen(
            [sys.executable, "-m", *verb, *common],
            env={**os.environ, "SPRINGTIDE_CONFIG": str(resolved), "PYTHONUNBUFFERED": "1"},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        try:
            yield Job(process, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def steps(log: str) -> list[int]:
    """Every step that the log names, in order."""
    return [int(next(filter(None, found))) for found in STEP.findall(log)]


def lost(log: str) -> int:
    """Steps that were done and had to be done again.

    >>> lost("step=5/9 stopped after step 6 training with 2 workers from step 6 step=8/9 training with 1 workers from step 7")
    1
    """
    named = steps(log)
    return sum(max(0, before - after) for before, after in itertools.pairwise(named))


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
        self.done.set()
        self.thread.join()
        self.shares.close()
        return self.looks

    def _run(self) -> None:
        while not self.done.wait(1.0):
            with contextlib.suppress(SpringtideError, OSError):
                self.shares.hold({*replica_pids(self.config), *self.job.workers})
                slots = admin.tide(self.config, time.time())["slots"]
                states = replica_states(self.config)
                serving, starting = states.count("RUNNING"), states.count("STARTING")
                used = round(slots["total"] - slots["free"])
                self.looks.append(Look(time.monotonic() - self.began_s, serving, starting, used))


def replicas(config: Config) -> list[dict[str, Any]]:
    client = ServeSubmissionClient(pool.dashboard(config), headers=pool.bearer())
    fleet = client.get_serve_details()["applications"].get(graph.fleet_app(config.fleet.model), {})
    return [replica for deployment in fleet.get("deployments", {}).values() for replica in deployment["replicas"]]


def replica_states(config: Config) -> list[str]:
    return [replica["state"] for replica in replicas(config)]


def replica_pids(config: Config) -> set[int]:
    """Of the replicas that answer."""
    return {replica["pid"] for replica in replicas(config) if replica["state"] == "RUNNING" and replica["pid"]}
