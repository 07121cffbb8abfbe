"""Commands that add, list and remove fleets."""

import contextlib
import time
from typing import Annotated, Any

import typer

from cluster import config as configuration
from cluster import engine_options
from cluster.cli import models, render
from cluster.cli.app import Wait, app, client, console, pairs, pool_here
from cluster.cli.patience import Patient
from cluster.client import Client
from cluster.errors import EngineFailed
from cluster.store.imports import Source
from cluster.types import FleetPhase

fleets_app = typer.Typer(invoke_without_command=True, help="Fleets: the replicas that host one base model each.")
app.add_typer(fleets_app, name="fleets")


@fleets_app.callback()
def fleets(context: typer.Context) -> None:
    """List every fleet with its model, its replicas and its state."""
    if context.invoked_subcommand is None:
        render.fleets(console, client().fleets())


@fleets_app.command()
def add(
    name: str,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name, or a version as NAME@N; on the pool's machine also a folder, a GGUF file, a hub id, or smollm2. "
            "By default the name of the fleet."
        ),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set one key of this fleet: --set max_replicas=2. Repeatable."),
    ] = None,
    wait: Wait = True,
) -> None:
    """Host one more base model. Keys without --set are those under `fleet:` in the pool's configuration."""
    pool, overrides = client(), engine_options.with_template(configuration.from_pairs(pairs(set)))
    named = {"model": _version_for(model, name, overrides)} if model else {}
    listed = pool.add_fleet(name, {**overrides, **named})
    render.fleets(console, started(pool, name, listed) if wait else listed)


def _version_for(model: str, fleet: str, overrides: dict[str, Any]) -> str:
    config = pool_here()

    def check(source: Source) -> None:
        if config is not None:
            with contextlib.suppress(ValueError):  # keys that the pool refuses in its own words
                models.check_fits(source, config.spec_of(fleet, config.fleet_with(fleet, overrides)))

    return models.version_for(model, config, console, check)


def started(pool: Client, name: str, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fleet, once the first replica of ``name`` has started. Raises `EngineFailed` in vLLM's words where it does not."""
    look, row = Patient(pool.fleets, listed), _row(listed, name)
    with console.status("") as line:
        while row["phase"] == FleetPhase.STARTING:
            line.update(f"Starting the fleet {name}: {row['words']}")
            time.sleep(0.5)
            row = _row(look(), name)
    if row["phase"] == FleetPhase.FAILED:
        raise EngineFailed(
            row["words"], f"The fleet stays. Remove it with `springtide fleets remove {name}`, then add it with other keys."
        )
    return look.known


def _row(listed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The fleet's row; one that somebody has removed meanwhile is no more awaited."""
    return next((row for row in listed if row["name"] == name), {"phase": FleetPhase.DRAINING, "words": ""})


@fleets_app.command()
def remove(
    name: str,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if an alias means one of its versions.")] = False,
) -> None:
    """Remove a fleet. It finishes its streams first, and then gives its slots back."""
    render.fleets(console, client().remove_fleet(name, force))
