"""Commands that look at what the pool serves, and ask it."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli import render
from cluster.cli.app import app, client, console
from cluster.errors import BadRequest, ModelNotFound
from cluster.types import VersionId

Minutes = Annotated[float, typer.Option(help="How many minutes back the chart goes.", min=0.1, max=1440)]


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="The same as `springtide top`.")] = False,
    minutes: Minutes = 5,
) -> None:
    """Show what is running: aliases, fleets, replicas with the versions that they hold, slots."""
    if watch and as_json:
        raise BadRequest("--watch and --json exclude each other.", "Use one of them.")
    if watch:
        return top(minutes)
    pool = client()
    document = pool.status()
    if as_json:
        print(json.dumps(document))
    else:
        render.status(console, pool.url, document)


@app.command()
def top(minutes: Minutes = 5) -> None:
    """Draw who holds the slots, and why that changed, once a second until Ctrl-C. Into a file it prints each change."""
    from cluster.cli import top as drawing

    drawing.watch(client(), console, minutes)


@app.command()
def models(name: Annotated[str | None, typer.Argument(help="A model, or one version as NAME@N.")] = None) -> None:
    """List every version with its kind, lineage and measurements, and mark the live ones."""
    if name and "@" in name:
        told = client().version(VersionId.parse(name))
        render.manifest(console, told.manifest, told.verdicts)
    else:
        render.models(console, client().models(name))


@app.command()
def ask(
    question: str,
    model: Annotated[str | None, typer.Option(help="The alias. By default the first that the pool lists.")] = None,
    version: Annotated[int | None, typer.Option(help="Pin NAME@N.")] = None,
) -> None:
    """Ask the live model one question and show which version answered."""
    pool = client()
    model = model or next(iter(pool.served()), None)
    if model is None:
        raise ModelNotFound("The pool serves no model yet.", "`springtide status` says what it waits for.")
    answer = pool.ask(f"{model}@{version}" if version else model, question)
    console.print(f"[bold]{answer.version}[/]: {escape(answer.text)}")
