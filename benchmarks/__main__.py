"""``python -m benchmarks VERB``: measure, print, and write what the README shows."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.adapters import adapters
from benchmarks.curve import curve
from benchmarks.memory import memory
from benchmarks.parity.run import parity
from benchmarks.publish import publish
from benchmarks.report import SYSTEMS
from benchmarks.scaling import SYSTEMS as SCALED
from benchmarks.scaling import scaling
from benchmarks.serving import serving
from benchmarks.shape import shape
from benchmarks.tasks import TASKS, WAYS, tasks
from benchmarks.tide import SYSTEMS as DIVISIONS
from benchmarks.tide import tide
from benchmarks.training import CASES, training
from benchmarks.training import SYSTEMS as TRAINERS
from cluster.jobspec import Parser
from jobs import main


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(word) for word in text.split(",")))


def known_systems(text: str) -> tuple[str, ...]:
    return known(text, SYSTEMS)


def known_divisions(text: str) -> tuple[str, ...]:
    return known(text, DIVISIONS)


def known_scaled(text: str) -> tuple[str, ...]:
    return known(text, SCALED)


def known_tasks(text: str) -> tuple[str, ...]:
    return known(text, tuple(TASKS))


def known_ways(text: str) -> tuple[str, ...]:
    return known(text, WAYS)


def known_trainers(text: str) -> tuple[str, ...]:
    return known(text, tuple(TRAINERS))


def known_cases(text: str) -> tuple[str, ...]:
    return known(text, tuple(CASES))


def known(text: str, names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = set(text.split(",")) - set(names)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    return tuple(text.split(","))


class Option(NamedTuple):
    """An option of a verb, as argparse takes it."""

    flag: str
    settings: dict[str, Any]


def option(flag: str, **settings: Any) -> Option:
    return Option(flag, settings)


def file(flag: str, help: str, default: Path | None = None, metavar: str = "FILE") -> Option:
    return option(flag, type=Path, default=default, metavar=metavar, help=help)


MODEL = option("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")

VERBS: dict[Callable[[argparse.Namespace], None], tuple[Option, ...]] = {
    serving: (
        option("--rounds", type=int, default=3),
        option("--streams", type=numbers, default=(1, 8, 32, 64), metavar="N,N,…", help="concurrent requests"),
        option("--requests", type=int, default=480, help="at the most streams; fewer streams send fewer"),
        option("--tokens", type=int, default=32, help="length of every answer"),
        option("--neighbours", type=int, default=0, help="busy processes beside every system"),
        MODEL,
        option("--systems", type=known_systems, default=SYSTEMS, metavar="NAME,…", help=", ".join(SYSTEMS)),
        file("--json", "write one row per system and case"),
        file("--markdown", "write the table for a README"),
        file("--png", "where the chart goes", Path("serving.png")),
    ),
    memory: (option("--requests", type=int, default=10_000), MODEL),
    publish: (
        option("--adapters", type=int, default=30),
        option("--weights", type=int, default=10),
        option("--swap", choices=("wait", "keep"), default="wait", help="what streams do while weights are swapped"),
        MODEL,
        file("--json", "write one object with the figures"),
        file("--png", "write the chart"),
    ),
    parity: (
        option("--every", type=int, default=1, metavar="N", help="only every Nth request"),
        file("--json", "write both answers to each request"),
        file("--markdown", "write the tables"),
    ),
    adapters: (MODEL, file("--json", "write one row per number of adapters")),
    tide: (
        option("--seconds", type=float, default=600, help="length of the day"),
        option("--seed", type=int, default=1, help="of the generated trace"),
        file("--trace", "replay these arrivals instead, stretched and thinned to the load", metavar="CSV"),
        option(
            "--requests-per-s",
            type=float,
            help="the load is made for replicas that can do so much; by default what one can do here",
        ),
        option("--systems", type=known_divisions, default=DIVISIONS, metavar="NAME,…", help=", ".join(DIVISIONS)),
        MODEL,
        file("--json", "write one row per system"),
        file("--png", "where the chart goes", Path("tide.png")),
    ),
    scaling: (
        option("--rounds", type=int, default=3),
        option("--workers", type=numbers, default=(1, 2, 3, 4), metavar="N,N,…"),
        option("--systems", type=known_scaled, default=SCALED, metavar="NAME,…", help=", ".join(SCALED)),
        option("--seconds", type=float, default=30, help="how long each is measured"),
        MODEL,
        file("--json", "write one row per system and number of workers"),
    ),
    tasks: (
        option("--data", type=Path, required=True, metavar="FOLDER", help="with gsm8k_train.jsonl and sst2_train.tsv"),
        option("--tasks", type=known_tasks, default=tuple(TASKS), metavar="NAME,…", help=", ".join(TASKS)),
        option("--ways", type=known_ways, default=WAYS, metavar="NAME,…", help=", ".join(WAYS)),
        option("--examples", type=int, default=1000, help="to train on"),
        option("--questions", type=int, default=100, help="to ask, which are not trained on"),
        option("--epochs", type=float, default=1),
        file("--json", "write one row per task and way"),
    ),
    training: (
        option("--rounds", type=int, default=3),
        option("--cases", type=known_cases, default=tuple(CASES), metavar="NAME,…", help=", ".join(CASES)),
        option("--systems", type=known_trainers, default=tuple(TRAINERS), metavar="NAME,…", help=", ".join(TRAINERS)),
        option("--threads", type=int, default=2, help="of every trainer"),
        file("--data", "chat JSON lines to tune on; by default the seedling's facts in conversations"),
        file("--text", "text to pretrain on; by default the documentation"),
        file("--json", "write one row per system and case"),
        file("--png", "where the chart goes", Path("training.png")),
    ),
    curve: (
        option("--epochs", type=float, default=600, help="how long both jobs train"),
        MODEL,
        file("--json", "write the figures and every step's loss"),
        file("--png", "where the chart goes", Path("curve.png")),
    ),
    shape: (
        option("folder", type=Path, nargs="?", default=Path(), help="a checkout; by default this folder"),
        file("--json", "write all figures, each touch and each room's imports"),
    ),
}
"""Each verb has its function's name, and its docstring as help."""


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("benchmarks", description="Measure Springtide beside its peers.")
    verbs = parser.add_subparsers(required=True)
    for verb, options in VERBS.items():
        own = verbs.add_parser(verb.__name__, help=verb.__doc__)
        own.set_defaults(run=verb)
        for one in options:
            own.add_argument(one.flag, **one.settings)
    return parser.parse_args(line)


def run() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended on the way out
    options.run(options)


if __name__ == "__main__":
    main(run)
