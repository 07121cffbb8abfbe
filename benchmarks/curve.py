"""What a job learns while workers come and go, beside one that nobody disturbs: ``python -m benchmarks curve``.

Both train on the same data from the same seed, on a pool of four slots of which one serves. From one of them two jobs of a higher priority
take a slot each, and give them back one after the other: three workers, one, two, three.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import job as jobs
from benchmarks.job import Job, training
from benchmarks.place import changes, console, finish, machine, passed, springtide, workplace
from cluster import config as configuration
from cluster.config import Config

APART = 50
"""Steps between one change and the next."""
DATA = Path(__file__).parents[1] / "jobs/seedling/tide.jsonl"
RATE = 5e-5
"""A small learning rate: what rounding makes of two runs grows with every step, and the faster the larger the steps are."""
NOISE, PRINTED = 0.01, 1e-4
"""The largest difference of a step's loss that is taken for rounding, in units of that loss: sums in another order, step after step. And what
the log rounds away."""


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
    with training(config, *line(config, "curve", epochs), "--set", "global_batch=24", "--set", f"learning_rate={RATE}") as job:
        if disturbed:
            disturb(config, job)
        job.wait_until(lambda: "\nresult {" in job.text, timeout_s=900)
        return job.text


def disturb(config: Config, job: Job) -> None:
    """Take two of three slots from it, and give them back one after the other."""
    beyond(job, 3, 1)
    with contending(config):
        with contending(config):
            beyond(job, 1, 2)
        beyond(job, 2, 3)
    beyond(job, 3, 4)


def beyond(job: Job, workers: int, formations: int) -> None:
    """Wait until it has trained for a while in its n-th formation or a later one, of so many workers."""

    def far() -> bool:
        sizes = jobs.sizes(job.text)
        return len(sizes) >= formations and sizes[-1][1] == workers and job.step > sizes[-1][0] + APART

    job.wait_until(far, timeout_s=300)


@contextmanager
def contending(config: Config) -> Iterator[None]:
    """Another job, of a higher priority, that takes a slot."""
    fixed = {"training": {"workers": 1, "report_s": 1}}
    greedy = configuration.parse(configuration.merge(config.dump(), fixed))
    with training(greedy, *line(config, "rival", 1_000_000), "--priority", "10"):
        yield


def line(config: Config, name: str, epochs: float) -> tuple[str, ...]:
    return ("jobs.finetune", "--data", str(DATA), "--base", config.default_model, "--name", name, "--epochs", str(epochs))


def compare(whole: str, elastic: str) -> dict[str, Any]:
    """Losses step by step, and the figures of both runs' ends."""
    one, other = jobs.losses(whole), jobs.losses(elastic)
    ends = [jobs.made(log) for log in (whole, elastic)]
    differences = [abs(one[step] - other[step]) for step in sorted(one.keys() & other.keys())]
    return {
        "steps": [max(one), max(other)],
        "steps_seen": [len(one), len(other)],
        "sizes": jobs.sizes(elastic),
        "steps_lost": jobs.lost(elastic),
        "first_loss": one[1],
        "max_difference": max(differences),
        "beyond_noise": sum(abs(one[step] - other[step]) > NOISE * one[step] + PRINTED for step in one.keys() & other.keys()),
        "eval_loss": [end["eval_loss"] for end in ends],
        "losses": {"uninterrupted": one, "elastic": other},
    }


def verdicts(found: dict[str, Any]) -> list[str]:
    whole = len({*found["steps"], *found["steps_seen"]}) == 1 and found["steps_lost"] == 0
    return [
        f"both did {found['steps'][0]} and {found['steps'][1]} steps, {found['steps_lost']} lost; {passed(whole)}",
        f"no step's loss differs by more than {found['max_difference']:.4f}; {found['beyond_noise']} by more than {NOISE:.0%} of itself; "
        f"{passed(found['beyond_noise'] == 0)}",
        f"held-out loss at the end: {found['eval_loss'][0]:.5f} and {found['eval_loss'][1]:.5f}",
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Both losses over steps, and beneath them their difference and the workers at the time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(10, 6), sharex=True, height_ratios=(3, 1, 1), layout="constrained")
    curves, apart, sizes = axes
    one, other = ({int(k): v for k, v in found["losses"][name].items()} for name in ("uninterrupted", "elastic"))
    curves.plot(one.keys(), one.values(), color="#9aa5b1", linewidth=4, label="uninterrupted, 3 workers")
    curves.plot(other.keys(), other.values(), color="#0f7c8a", linewidth=1, label="elastic")
    curves.set_yscale("log")
    curves.set_title("training loss by step", loc="left")
    curves.legend(frameon=False)
    steps = sorted(one.keys() & other.keys())
    apart.plot(steps, [other[step] - one[step] for step in steps], color="#0f7c8a", linewidth=1)
    apart.set_title("difference", loc="left")
    begun, workers = zip(*found["sizes"], strict=True)
    sizes.step([*begun, steps[-1]], [*workers, workers[-1]], where="post", color="#e0b265", linewidth=2)
    sizes.set_yticks(range(4))
    sizes.set_title("workers of the elastic run", loc="left")
    for one_of in axes:
        one_of.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
