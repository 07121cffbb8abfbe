"""``python -m benchmarks VERB``: measure, print, and write what the README shows."""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.adapters import adapters
from benchmarks.curve import curve
from benchmarks.memory import memory
from benchmarks.publish import publish
from benchmarks.report import SYSTEMS
from benchmarks.serving import serving
from benchmarks.tide import SYSTEMS as DIVISIONS
from benchmarks.tide import tide
from cluster.jobspec import Parser
from jobs import main


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(word) for word in text.split(",")))


def known_systems(text: str) -> tuple[str, ...]:
    return known(text, SYSTEMS)


def known_divisions(text: str) -> tuple[str, ...]:
    return known(text, DIVISIONS)


def known(text: str, names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = set(text.split(",")) - set(names)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    return tuple(text.split(","))


def arguments() -> argparse.Namespace:
    parser = Parser("benchmarks", description="Measure Springtide beside its peers.")
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
    verb.add_argument("--png", type=Path, default=Path("serving.png"), metavar="FILE", help="where the chart goes")
    verb = verbs.add_parser("memory", help=memory.__doc__)
    verb.set_defaults(run=memory)
    verb.add_argument("--requests", type=int, default=10_000)
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb = verbs.add_parser("publish", help=publish.__doc__)
    verb.set_defaults(run=publish)
    verb.add_argument("--adapters", type=int, default=30)
    verb.add_argument("--weights", type=int, default=10)
    verb.add_argument("--swap", choices=("wait", "keep"), default="wait", help="what streams do while weights are swapped")
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write one object with the figures")
    verb.add_argument("--png", type=Path, metavar="FILE", help="write the chart")
    verb = verbs.add_parser("adapters", help=adapters.__doc__)
    verb.set_defaults(run=adapters)
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write one row per number of adapters")
    verb = verbs.add_parser("tide", help=tide.__doc__)
    verb.set_defaults(run=tide)
    verb.add_argument("--seconds", type=float, default=600, help="length of the day")
    verb.add_argument("--seed", type=int, default=1, help="of the generated trace")
    verb.add_argument(
        "--trace", type=Path, metavar="CSV", help="replay these arrivals instead, stretched and thinned to the load"
    )
    verb.add_argument("--requests-per-s", type=float, help="what one replica can do; measured by default")
    verb.add_argument("--systems", type=known_divisions, default=DIVISIONS, metavar="NAME,…", help=", ".join(DIVISIONS))
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write one row per system")
    verb.add_argument("--png", type=Path, default=Path("tide.png"), metavar="FILE", help="where the chart goes")
    verb = verbs.add_parser("curve", help=curve.__doc__)
    verb.set_defaults(run=curve)
    verb.add_argument("--epochs", type=float, default=600, help="how long both jobs train")
    verb.add_argument("--model", type=Path, help="folder in Hugging Face layout; by default the seedling")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every step's loss")
    verb.add_argument("--png", type=Path, default=Path("curve.png"), metavar="FILE", help="where the chart goes")
    return parser.parse_args()


def run() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended on the way out
    options.run(options)


if __name__ == "__main__":
    main(run)
