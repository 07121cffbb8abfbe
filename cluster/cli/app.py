"""What all files of commands share: the `springtide` command itself, its options, and the client of the pool."""

import os
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from cluster import config as configuration
from cluster import endpoint
from cluster.client import Client
from cluster.config import Config
from cluster.errors import BadRequest
from cluster.pool import local

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One pool of accelerators that serves models and trains them.",
)
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)

Preset = Annotated[str | None, typer.Option(help="Start from cluster/presets/NAME.yaml: laptop or gpu.")]
File = Annotated[Path | None, typer.Option("--config", help="A YAML file; springtide.yaml here by default.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one key: --set fleet.max_replicas=2. Repeatable.")]
Wait = Annotated[bool, typer.Option(help="Wait until it ends, and show its progress. Ctrl-C stops only the waiting.")]


class Chosen(NamedTuple):
    """The options before the command's name."""

    pool: str | None = None


chosen = Chosen()


@app.callback()
def options(
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="URL of the pool's gateway; SPRINGTIDE_API_KEY holds its key. By default SPRINGTIDE_POOL, or else the pool "
            "that runs from this home.",
        ),
    ] = None,
) -> None:
    global chosen
    chosen = Chosen(pool)


def client() -> Client:
    """A client of the pool. It works from any folder and any machine."""
    return Client(endpoint.find(chosen.pool))


def pool_here() -> Config | None:
    """The configuration of the pool that runs from this home; None where a command means a pool elsewhere. Raises `PoolUnavailable`."""
    if chosen.pool or os.environ.get(configuration.POOL_URL):
        return None
    config = configuration.load()
    local.require(config)
    return local.remembered(config)


def load(preset: str | None = None, file: Path | None = None, sets: list[str] | None = None) -> Config:
    """The configuration of this home, for commands that start and stop local processes. Raises `BadRequest` if ``--pool`` was given."""
    if chosen.pool:
        raise BadRequest("This command works only on this machine.", "Omit --pool.", param="pool")
    if file is not None and not file.is_file():
        raise BadRequest(f"There is no file {file}.", "Check the path given with --config.", param="config")
    return configuration.load(preset, file, configuration.from_pairs(pairs(sets)))


def pairs(sets: list[str] | None) -> list[tuple[str, str]]:
    """``["max_replicas=2"]`` → ``[("max_replicas", "2")]``. Raises `BadRequest`."""
    found: list[tuple[str, str]] = []
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"--set {text} has no value.", "Write it as --set KEY=VALUE.", param=key)
        found.append((key, value))
    return found
