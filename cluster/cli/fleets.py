"""Commands that add, list and remove fleets."""

from typing import Annotated

import typer

from cluster import config as configuration
from cluster.cli import render
from cluster.cli.app import app, client, console, pairs

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
        str | None, typer.Option(help="An alias, or a version as NAME@N. By default the alias with the fleet's name.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set one key of this fleet: --set max_replicas=2. Repeatable."),
    ] = None,
) -> None:
    """Host one more base model. Keys without --set are those under `fleet:` in the pool's configuration."""
    named = {"model": model} if model else {}
    render.fleets(console, client().add_fleet(name, {**configuration.from_pairs(pairs(set)), **named}))


@fleets_app.command()
def remove(
    name: str,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if an alias means one of its versions.")] = False,
) -> None:
    """Remove a fleet. It finishes its streams first, and then gives its slots back."""
    render.fleets(console, client().remove_fleet(name, force))
