"""Commands that start jobs on the pool, and follow, show and end them."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import render
from cluster.cli.app import app, client, console
from cluster.cli.machine import running
from cluster.client import Client
from cluster.errors import BadRequest
from cluster.types import VersionId

PATHS = ("--data", "--eval-data", "--recipe", "--held-out", "--tasks", "--golden")
PATHS_JOINED = tuple(f"{option}=" for option in PATHS)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="JSONL in OpenAI's chat format or prompt/completion: a path or URL.")],
    base: Annotated[str | None, typer.Option(help="A model, or a version as NAME@N; by default what the pool serves.")] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
) -> None:
    """Fine-tune on the pool, as `ray job submit -- python -m jobs.finetune` does.

    Further options go to the job: --name NAME, --epochs N, --full (all weights instead of an adapter), --recipe FILE, --set KEY=VALUE (of
    the recipe), --eval-data FILE, --priority N, --resume RUN, --publish. `python -m jobs.finetune --help` explains them. How many workers
    it may have: SPRINGTIDE_TRAINING__WORKERS=4 SPRINGTIDE_TRAINING__MIN_WORKERS=2 springtide train …
    """
    from cluster.pool import submit

    config = running()
    if "://" not in data and not Path(data).expanduser().is_file():
        raise BadRequest(f"There is no file {data}.", "Give the path or URL of JSON lines.", param="data")
    base = base or config.default_model
    client().models(base) if "@" not in base else client().version(VersionId.parse(base))  # else the job would fail
    job = submit.submit(config, "finetune", *absolute(["--data", data, "--base", base, *context.args]))
    console.print(f"Job [bold]{job}[/] submitted; `springtide logs {job}` shows its log.")
    if not wait:
        return
    try:
        made = render.follow(console, config, job, "Fine-tuning")
    except KeyboardInterrupt:
        console.print(f"The job goes on: springtide logs {job} · springtide cancel {job}")
        return
    loss = f"held-out loss {made['eval_loss_before']:.3f} → {made['eval_loss']:.3f}"
    following = f"its rollout is {made['stage']}" if made.get("stage") else f"next: springtide publish {made['version']}"
    console.print(f"Registered [bold]{made['version']}[/] ({made['kind']}): {loss}; {following}")


@app.command()
def jobs() -> None:
    """Every job on the pool with its progress: step, loss, tokens per second, time left."""
    from cluster.pool import submit

    config = running()
    listed = submit.jobs(config)[:20]
    render.jobs(console, listed, [submit.log(config, job.submission_id or "") for job in listed])


@app.command()
def cancel(job: str) -> None:
    """Stop a job, by its name or its run's. What it has registered stays; an unfinished run leaves nothing."""
    from cluster.pool import submit

    config = running()
    submit.cancel(config, submit.named(config, job))
    console.print(f"{job} is stopped.")


@app.command()
def logs(job: str) -> None:
    """A job's whole log, by the job's name or its run's."""
    from cluster.pool import submit

    config = running()
    print(submit.log(config, submit.named(config, job)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context, version: Annotated[str, typer.Argument(help="NAME@N")]) -> None:
    """Measure a version against the live one and store the gate's verdict. Options go to the job: --held-out, --tasks, --golden, --against."""
    pool, id = client(), VersionId.parse(version)
    measure(pool, id, absolute(list(context.args)))
    render.verdict(console, pool.version(id).verdicts[-1])


def measure(pool: Client, id: VersionId, options: list[str]) -> None:
    """Run the gate's evaluation and wait for it."""
    from cluster.pool import submit

    config = running()
    render.follow(console, config, submit.submit(config, "evaluate", str(id), *options), f"Evaluating {id}")


def absolute(arguments: list[str]) -> list[str]:
    """A job's arguments with the paths among them made absolute, because a job runs in a folder of its own.

    >>> absolute(["--data", "/x.jsonl", "--eval-data=https://host/y.jsonl", "--recipe", "lora.v2"])
    ['--data', '/x.jsonl', '--eval-data', 'https://host/y.jsonl', '--recipe', 'lora.v2']
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith(PATHS_JOINED) else [word])]
    return [_absolute(before, word) if before in PATHS else word for before, word in pairwise(["", *words])]


def _absolute(option: str, text: str) -> str:
    path = Path(text).expanduser()
    named = option == "--recipe" and path.suffix not in (".yaml", ".yml")  # one of those that ship with Springtide
    return text if "://" in text or named else str(path.resolve())
