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
    """Every fleet with its model, its replicas and what it is doing."""
    if context.invoked_subcommand is None:
        render.fleets(console, client().fleets())


@fleets_app.command()
def add(
    name: str,
    model: Annotated[
        str | None, typer.Option(help="An alias, or a version as NAME@N; the alias of the fleet's name by default.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="One key that it has of its own: --set max_replicas=2. Repeatable."),
    ] = None,
) -> None:
    """Host one more base model. Everything that is not set is as under `fleet:` in the pool's configuration."""
    named = {"model": model} if model else {}
    render.fleets(console, client().add_fleet(name, {**configuration.from_pairs(pairs(set)), **named}))


@fleets_app.command()
def remove(
    name: str,
    force: Annotated[bool, typer.Option("--force", help="Also while an alias means one of its versions.")] = False,
) -> None:
    """Let a fleet finish its streams and end, and give its slots back."""
    render.fleets(console, client().remove_fleet(name, force))
