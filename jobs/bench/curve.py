"""What a job learns while workers come and go, beside one that nobody disturbs: ``python -m jobs.bench curve``.

Both train on the same data from the same seed, on a pool of four slots of which one serves. In one of them another job of a higher priority
takes two slots, gives one back, and then the other: three workers, one, two, three.
"""

import argparse
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster import config as configuration
from cluster import control, pool, show
from cluster.arbiter import Job as Asking
from cluster.config import Config
from cluster.tide import Claim
from jobs.bench import job as jobs
from jobs.bench.job import Job, training
from jobs.bench.place import changes, console, finish, machine, passed, springtide, workplace

ASK_S = 0.2
APART = 100
"""Steps between one change and the next."""
NOISE = 0.01
"""The largest difference of a step's loss that is taken for rounding, in units of the first loss: sums in another order, 500 steps long."""


def curve(options: argparse.Namespace) -> None:
    """A job's loss while its workers come and go, beside an undisturbed one's."""
    console.print(machine())
    with workplace(options.model) as (base, _):
        split = {"pool": {"slots": 4}, "training": {"workers": 3, "report_s": 0, "budget": {"cool_down_s": 1}}}
        config = configuration.parse(configuration.merge(base.dump(), split))
        with springtide(config, changes()):
            whole = run(config, options.epochs, disturbed=False)
            elastic = run(config, options.epochs, disturbed=True)
    found = compare(whole, elastic)
    console.print_json(json.dumps({key: value for key, value in found.items() if key != "losses"}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    draw(found, options.png)
    finish(verdicts(found))


def run(config: Config, epochs: float, disturbed: bool) -> str:
    """The log of a job from its first step to its last."""
    line = ("jobs.finetune", "--data", str(jobs.DATA), "--base", config.fleet.model, "--name", "curve", "--epochs", str(epochs))
    with training(config, *line, "--set", "global_batch=24") as job:
        if disturbed:
            disturb(config, job)
        job.wait_until(lambda: "\nresult {" in job.text, timeout_s=900)
        return job.text


def disturb(config: Config, job: Job) -> None:
    """Take two of three slots from it, give one back, and then the other."""
    ray.init(address=pool.require(config).address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        beyond(job, 3, 1)
        with claimed(2):
            beyond(job, 1, 2)
        with claimed(1):
            beyond(job, 2, 3)
        beyond(job, 3, 4)
    finally:
        ray.shutdown()


def beyond(job: Job, workers: int, formations: int) -> None:
    """Wait until it has trained for a while in its n-th formation, of so many workers."""

    def far() -> bool:
        sizes = jobs.sizes(job.text)
        return len(sizes) >= formations and sizes[-1][1] == workers and job.step > sizes[-1][0] + APART

    job.wait_until(far)


@contextmanager
def claimed(slots: int) -> Iterator[None]:
    """Slots taken by a job of a higher priority."""
    done, asking = threading.Event(), Asking("bench-claims", 100, time.time(), slots, slots)

    def claim() -> None:
        held = 0
        while not done.wait(ASK_S):
            held = control.connect().claim(Claim(asking, held, held)).slots

    thread = threading.Thread(target=claim, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        control.connect().leave(asking.id)


def compare(whole: str, elastic: str) -> dict[str, Any]:
    """Losses step by step, and the figures of both runs' ends."""
    one, other = jobs.losses(whole), jobs.losses(elastic)
    ends = [show.result(log) for log in (whole, elastic)]
    differences = [abs(one[step] - other[step]) for step in sorted(one.keys() & other.keys())]
    return {
        "steps": [max(one), max(other)],
        "steps_seen": [len(one), len(other)],
        "sizes": jobs.sizes(elastic),
        "steps_lost": jobs.lost(elastic),
        "first_loss": one[1],
        "max_difference": max(differences),
        "eval_loss": [end["eval_loss"] for end in ends],
        "losses": {"uninterrupted": one, "elastic": other},
    }


def verdicts(found: dict[str, Any]) -> list[str]:
    near = found["max_difference"] <= NOISE * found["first_loss"]
    return [
        f"both did {found['steps'][0]} and {found['steps'][1]} steps, {found['steps_lost']} lost; "
        f"{passed(found['steps'][0] == found['steps'][1] and found['steps_lost'] == 0)}",
        f"no step's loss differs by more than {found['max_difference']:.4f} of {found['first_loss']:.2f}; {passed(near)}",
        f"held-out loss at the end: {found['eval_loss'][0]:.5f} and {found['eval_loss'][1]:.5f}",
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Both losses over steps with the sizes in the background, and beneath them their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, apart) = pyplot.subplots(2, 1, figsize=(10, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    one, other = ({int(k): v for k, v in found["losses"][name].items()} for name in ("uninterrupted", "elastic"))
    curves.plot(one.keys(), one.values(), color="#9aa5b1", linewidth=4, label="uninterrupted, 3 workers")
    curves.plot(other.keys(), other.values(), color="#0f7c8a", linewidth=1, label="elastic")
    for step, workers in found["sizes"]:
        for axes in (curves, apart):
            axes.axvline(step, color="#e0b265", linewidth=1)
        curves.annotate(
            f"{workers} workers", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points"
        )
    curves.set_yscale("log")
    curves.set_title("training loss by step", loc="left")
    curves.legend(frameon=False)
    steps = sorted(one.keys() & other.keys())
    apart.plot(steps, [other[step] - one[step] for step in steps], color="#0f7c8a", linewidth=1)
    apart.set_title("difference", loc="left")
    for axes in (curves, apart):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
