"""How training speeds up with more slots: ``python -m benchmarks scaling``.

One job trains on a pool with an idle engine, with one worker, then with two, and so on. A slot is a fixed part of a core, as in
`benchmarks.tide`, so that slots are what runs out and not the machine's cores. Linear means that n workers make n times the examples per second
of one.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich import box
from rich.progress import Progress
from rich.table import Table

from benchmarks.job import Job, training
from benchmarks.place import changes, console, finish, machine, passed, springtide, warn_if_busy, workplace
from benchmarks.report import Spread, spread
from benchmarks.shares import Shares
from benchmarks.tide import CORES_PER_SLOT, FLEET, GLOBAL_BATCH, command, engine_pids
from cluster import config as configuration
from cluster.config import Config

LINEAR = 0.9
"""The bar: so much of linear."""
WARM_S = 8
START_S = 400
"""Ray Train looks for resources once a minute, and does not begin with fewer workers than it was told."""
SYSTEMS = ("springtide", "stock_ray")
LABELS = {"springtide": "Springtide", "stock_ray": "stock Ray"}


class Speed(NamedTuple):
    """One job for a while."""

    round: int
    system: str
    workers: int
    samples_per_s: float
    busy: float
    """Processor time of the workers, as a part of what their slots allow."""


def scaling(options: argparse.Namespace) -> None:
    """Examples per second of one training job with one worker, two, and so on."""
    console.print(machine())
    warn_if_busy()
    found: list[Speed] = []
    most = max(options.workers)
    with workplace(options.model) as (config, _):
        config = arranged(config, most)
        with springtide(config, changes()), Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=options.rounds * len(options.systems) * len(options.workers))
            for number in range(options.rounds):
                for system in options.systems:
                    for workers in options.workers:
                        bar.update(task, description=f"round {number + 1}: {LABELS[system]}, {workers} workers")
                        found.append(measured(config, number, system, workers, options.seconds))
                        console.print(
                            f"{LABELS[system]}, {workers} workers: {found[-1].samples_per_s:.1f} examples/s, slots {found[-1].busy:.0%} busy"
                        )
                        bar.advance(task)
    rows = summarise(found)
    console.print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    finish(verdicts(rows))


def arranged(config: Config, workers: int) -> Config:
    """A pool with room for one engine and so many workers."""
    fleet = {**FLEET, "min_replicas": 1, "max_replicas": 1, "warm_pool_size": 0}
    changed = {"pool": {"slots": workers + 1}, "fleet": fleet, "training": {"checkpoint_s": 3600, "report_s": 0}}
    return configuration.parse(configuration.merge(config.dump(), changed))


def measured(config: Config, number: int, system: str, workers: int, seconds: float) -> Speed:
    own = configuration.merge(config.dump(), {"training": {"workers": workers, "min_workers": workers}})
    shares = Shares(CORES_PER_SLOT)
    if not shares.works:
        console.print("[yellow]No right to make control groups: the machine's cores will be the limit, not the slots.")
    line = command(config, system)
    if system == "stock_ray":
        line[line.index("--workers") + 1] = f"{workers},{workers}"
    try:
        shares.hold(engine_pids(config))
        with training(configuration.parse(own), *line) as job:
            job.wait_until(lambda: "progress" in job.text and len(job.workers) >= workers, START_S)
            shares.hold(job.workers)
            time.sleep(WARM_S)
            return watched(job, number, system, workers, seconds)
    finally:
        shares.close()


def watched(job: Job, number: int, system: str, workers: int, seconds: float) -> Speed:
    first = next_step(job)
    cpu_s, began_s = job.cpu_s, time.monotonic()
    time.sleep(seconds)
    last = next_step(job)
    took_s, used_s = time.monotonic() - began_s, job.cpu_s - cpu_s
    per_step = job.examples / math.ceil(job.examples / GLOBAL_BATCH)
    return Speed(number, system, workers, (last - first) * per_step / took_s, used_s / took_s / (workers * CORES_PER_SLOT))


def next_step(job: Job) -> int:
    """Wait for the end of a step: one takes a second, and none is counted in part."""
    now = job.step
    job.wait_until(lambda: job.step > now)
    return job.step


# what was found


def summarise(found: Sequence[Speed]) -> list[dict[str, Any]]:
    """A row for each system and number of workers. ``of_linear`` compares within a round."""
    one = {(each.round, each.system): each.samples_per_s / each.workers for each in reversed(found)}
    rows: list[dict[str, Any]] = []
    for system, workers in dict.fromkeys((each.system, each.workers) for each in found):
        mine = [each for each in found if (each.system, each.workers) == (system, workers)]
        linear = [each.samples_per_s / workers / one[each.round, system] for each in mine]
        rows.append(
            {
                "system": system,
                "workers": workers,
                "samples_per_s": asdict(spread([each.samples_per_s for each in mine])),
                "of_linear": asdict(spread(linear)),
                "busy": asdict(spread([each.busy for each in mine])),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("System", "Workers", "Examples/s", "Of linear", "Slots busy", box=box.MARKDOWN)
    for row in rows:
        speed, linear, busy = (Spread(**row[key]) for key in ("samples_per_s", "of_linear", "busy"))
        shown.add_row(LABELS[row["system"]], str(row["workers"]), speed.text(), linear.text(2), f"{busy.median:.0%}")
    return shown


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    mine = [row for row in rows if row["system"] == "springtide" and row["workers"] > 1]
    return [
        f"{row['workers']} workers make {row['of_linear']['median']:.2f} of linear; {passed(row['of_linear']['median'] >= LINEAR)} (≥ {LINEAR})"
        for row in mine
    ]
