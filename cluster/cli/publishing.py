"""Commands that make a version live under a model name, and take it back."""

import sys
import time
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from cluster.cli import render
from cluster.cli.app import Wait, app, client, console
from cluster.cli.patience import Patient
from cluster.client import Client, Watched
from cluster.errors import BadRequest
from cluster.publishing.gate import latest
from cluster.publishing.rollout import UNDER_WAY, Policy, Rollout
from cluster.types import VersionId

LOOK_AGAIN_S = 0.5


@app.command()
def history(alias: str) -> None:
    """List the moves of an alias and the steps of its rollouts: when, to which version, by whom and why."""
    told = client().history(alias)
    render.history(console, told.moves, told.rollouts)


@app.command()
def publish(
    version: Annotated[str, typer.Argument(help="NAME@N")],
    alias: Annotated[str | None, typer.Option(help="The alias to move. By default the version's own name.")] = None,
    reason: str = "published by hand",
    canary: Annotated[
        bool, typer.Option("--canary", help="Give it traffic step by step, compared with the live version.")
    ] = False,
    steps: Annotated[
        str | None, typer.Option(help="Percent of the traffic for each step of --canary, for example 5,25,100.")
    ] = None,
    gate: Annotated[
        bool | None, typer.Option(help="Whether the gate must pass the version first. By default as the policy says.")
    ] = None,
    wait: Wait = True,
) -> None:
    """Make a version live under a model name. No request fails, and the live version serves on until the new one has passed its steps."""
    id, pool = VersionId.parse(version), client()
    own = canary or steps is not None or gate is not None
    chosen = policy(Policy.model_validate(pool.status()["policy"]), canary, steps, gate) if own else None
    rollout = pool.publish(id, alias or id.name, reason, chosen)
    if rollout.stage == "registered" and latest(pool.version(id).verdicts, rollout.incumbent) is None:
        from cluster.cli.jobs import measure

        console.print("The gate must pass it first. Measuring it now.")
        measure(pool, id, rollout.alias)
    if wait and rollout.stage in UNDER_WAY:
        rollout = watch(pool, console, rollout)
    render.rollout(console, rollout)
    if rollout.stage == "rolled_back":
        sys.exit(2)  # the same status as for a version that is refused at once


@app.command()
def promote(alias: str, reason: str = "promoted by hand") -> None:
    """Make the canary of an alias live now, for all traffic."""
    step("promote", alias, reason)


@app.command()
def abort(alias: str, reason: str = "aborted by hand") -> None:
    """End the rollout of an alias. Every session gets the stable version again."""
    step("abort", alias, reason)


def step(what: Literal["promote", "abort"], alias: str, reason: str) -> None:
    """The order names the version that is under way now: it may wait to be heard, and is not for what is published meanwhile."""
    pool = client()
    render.rollout(console, pool.step(what, alias, reason, pool.rollout(alias).record.version))


@app.command()
def rollback(alias: str, to: Annotated[str | None, typer.Option(help="A version. By default the previous one.")] = None) -> None:
    """End the rollout under way. If there is none, move the alias back to the version before. Nothing is deleted."""
    render.rollout(console, client().rollback(alias, VersionId.parse(to) if to else None, "rolled back by hand"))


def policy(pools: Policy, canary: bool, steps: str | None, gate: bool | None) -> Policy:
    """The pool's policy, with the changes that the command's options make."""
    values = {**(Policy() if canary and len(pools.steps) == 1 else pools).model_dump(), "gate": pools.gate}
    shares = {"steps": [int(share) for share in steps.split(",") if share.isdigit()]} if steps else {}
    try:
        return Policy.model_validate(values | shares | ({} if gate is None else {"gate": gate}))
    except ValidationError as error:
        raise BadRequest(str(error.errors()[0]["msg"]), "Write --steps as 5,25,100.", param="steps") from error


def watch(pool: Client, console: Console, rollout: Rollout) -> Rollout:
    """Draw the rollout until it is live or has ended. Ctrl-C stops only the drawing."""
    look = Patient(lambda: pool.rollout(rollout.alias), Watched(rollout, {}))
    console.print(f"From another terminal: springtide promote {rollout.alias} · abort {rollout.alias}.")
    try:
        with Live(render.progress(rollout, {}), console=console, refresh_per_second=4) as live:
            while rollout.stage in UNDER_WAY:
                time.sleep(LOOK_AGAIN_S)
                now = look()
                if now.record.number != rollout.number:  # it has ended, and another one has begun
                    known = (records[-1] for records in pool.history(rollout.alias).rollouts)  # the newest ones only
                    return next((last for last in known if last.number == rollout.number), rollout)
                rollout = now.record
                live.update(render.progress(rollout, now.seen))
        console.print()
    except KeyboardInterrupt:
        console.print(
            f"The rollout continues. See: springtide history {rollout.alias} · promote {rollout.alias} · abort {rollout.alias}."
        )
    return rollout
