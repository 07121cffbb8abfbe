"""Commands that start jobs on the pool, and follow, show and end them."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cluster import jobspec, machine
from cluster.cli import render
from cluster.cli.app import Wait, app, client, console
from cluster.cli.patience import Patient
from cluster.client import Client, Job
from cluster.errors import BadRequest, JobFailed
from cluster.machine import expanded
from cluster.store.jobs import JobStatus
from cluster.types import VersionId

LOOK_AGAIN_S = 0.5


@app.command()
@jobspec.options("finetune")
def train(wait: Wait = True, **given: Any) -> None:
    """Fine-tune on the pool. The command sends local files to the pool first. There the job is `python -m jobs.finetune`."""
    if made := trained("finetune", "Fine-tuning", given, wait):
        registered(made, fell(made))


@app.command()
@jobspec.options("pretrain")
def pretrain(wait: Wait = True, **given: Any) -> None:
    """Train a new model from scratch on your own text. The command sends local files to the pool first."""
    made = trained("pretrain", "Pretraining", given, wait)
    if made is None:
        return
    if made.get("bits_per_byte") is None:
        return registered(made, f"answers {made['exact_match']:.0%} of its questions")
    before, after = made["bits_per_byte_before"], made["bits_per_byte"]
    words = f"{before:.3f} → {after:.3f} bits per byte of held-out text, perplexity {made['perplexity']:.1f}"
    name = made["version"].partition("@")[0]
    registered(made, words, f"next: springtide fleets add {name}" if made.get("stage") else "")


@app.command()
@jobspec.options("distill")
def distill(wait: Wait = True, **given: Any) -> None:
    """Train a small student on the pool, on what a teacher says of the data. There the job is `python -m jobs.distill`."""
    if made := trained("distill", "Distilling", given, wait):
        teachers = f", the teacher's {made['teacher_loss']:.3f}" if "teacher_loss" in made else ""
        registered(made, fell(made) + teachers)


@app.command()
@jobspec.options("dpo")
def dpo(wait: Wait = True, **given: Any) -> None:
    """Teach a version which of two answers is preferred. There the job is `python -m jobs.dpo`."""
    if made := trained("dpo", "Learning preferences", given, wait):
        agrees = f"{made['preference_accuracy_before']:.0%} → {made['preference_accuracy']:.0%}"
        registered(made, f"prefers as held-out pairs do: {agrees}, by a margin of {made['reward_margin']:.2f}")


@app.command()
@jobspec.options("rl")
def rl(wait: Wait = True, **given: Any) -> None:
    """Train an adapter on rewards of its own answers, which the pool's replicas give. There the job is `python -m jobs.rl`."""
    if made := trained("rl", "Reinforcing", given, wait):
        registered(made, f"held-out reward {made['reward_before']:.3f} → {made['reward']:.3f}")


@app.command()
@jobspec.options("evaluate")
def evaluate(wait: Wait = True, **given: Any) -> None:
    """Measure a version against the live one and store the gate's verdict."""
    pool, id = client(), VersionId.parse(given["version"])
    job = start(pool, "evaluate", given)
    if not wait or followed(pool, job, f"Evaluating {id}") is None:
        return console.print(going_on(job), highlight=False)
    render.verdict(console, pool.version(id).verdicts[-1])


@app.command()
def jobs(limit: Annotated[int, typer.Option(help="How many of the newest.", min=1, max=1000)] = 20) -> None:
    """List the newest jobs with their progress: step, loss, tokens per second, time left."""
    render.jobs(console, client().jobs(limit))


@app.command()
def cancel(job: str) -> None:
    """Cancel a job. Versions that it has registered stay. Checkpoints of an unfinished run are removed."""
    console.print(f"{job}: {client().cancel(job).status}.", highlight=False)


@app.command()
def logs(
    job: str,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep printing until the job ends. Ctrl-C stops only the printing.")
    ] = False,
) -> None:
    """Print a job's log."""
    pool, offset = client(), 0
    while True:
        ended = pool.job(job).status.ended  # asked before the log, so the log has the last lines
        try:
            offset, some = printed(pool, job, offset)
            if not some and (ended or not follow):
                return
            time.sleep(0 if some else LOOK_AGAIN_S)
        except KeyboardInterrupt:
            return


@app.command()
def events(
    job: str,
    limit: Annotated[int, typer.Option(help="How many of the newest.", min=1, max=1000)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as one JSON list.")] = False,
) -> None:
    """What happened to a job: what it waited for, how far it was, which checkpoints it can go on from."""
    happened = client().events(job, limit)
    if as_json:
        print(json.dumps([event.model_dump(mode="json", exclude={"schema_version"}) for event in happened]))
    else:
        render.events(console, happened)


def printed(pool: Client, job: str, offset: int) -> tuple[int, bool]:
    """Print the next part of a log. Returns the next offset, and whether there was anything to print."""
    part = pool.log(job, offset)
    print(part.text, end="", flush=True)
    return part.next, bool(part.text)


def measure(pool: Client, id: VersionId, alias: str) -> None:
    """Run the gate's evaluation and wait for it."""
    follow(pool, start(pool, "evaluate", {"version": str(id), "alias": alias}), f"Evaluating {id}")


def going_on(job: str) -> str:
    return f"The job continues. See: springtide logs {job} --follow · springtide cancel {job} · springtide jobs"


# training


def trained(verb: str, label: str, given: dict[str, Any], wait: bool) -> dict[str, Any] | None:
    """Start a job that trains, and follow it to its end. Returns what it made; None where it goes on, and then the words are said."""
    pool = client()
    job = start(pool, verb, given)
    console.print(f"Job [bold]{job}[/] is submitted.")
    made = followed(pool, job, label) if wait else None
    if made is None:
        console.print(going_on(job), highlight=False)
    return made


def fell(made: dict[str, Any]) -> str:
    return f"held-out loss {made['eval_loss_before']:.3f} → {made['eval_loss']:.3f}"


def registered(made: dict[str, Any], words: str, following: str = "") -> None:
    """Say what was registered, how good it is, and what comes next."""
    stage = f"its rollout is {made['stage']}" if made.get("stage") else f"next: springtide publish {made['version']}"
    console.print(f"Registered [bold]{made['version']}[/] ({made['kind']}): {words}; {following or stage}")


# starting


def start(pool: Client, verb: str, given: dict[str, Any]) -> str:
    """Check the options, send the files that they name, and submit the job. Returns the job's id."""
    chosen = jobspec.chosen(given)
    asked = jobspec.parse(verb, chosen)  # so that a mistake shows before a large file is sent
    several = {option.name for option in jobspec.options_of(type(asked)) if option.many}
    found = {name: [*_here(name, sources, name in several)] for name, sources in asked.files().items()}
    sent = {
        name: [one if isinstance(one, str) else f"{upload(pool, one)}#{one.name}" for one in ones] for name, ones in found.items()
    }
    return pool.submit(jobspec.parse(verb, asked.with_files(sent)))


def _here(name: str, sources: list[str], folders: bool) -> Iterator[Path | str]:
    """The local files that an option names, and as they are the sources that are elsewhere. Raises `BadRequest`.

    ``folders``: whether a folder means all files in it.
    """
    for source in sources:
        path = local_file(name, source)
        if path is not None and folders and path.is_dir():
            yield from machine.files_in(path)
        else:
            yield source if path is None else _existing(path, name)


def _existing(path: Path, name: str) -> Path:
    if not path.is_file():
        raise BadRequest(f"There is no file {path}.", "Give the path of a file here, or a URL.", param=name)
    return path


def local_file(name: str, source: str) -> Path | None:
    """The local file that an option names; None for a URL, an upload, and a name that the pool knows.

    >>> local_file("data", "/lines.jsonl"), local_file("data", "s3://bucket/lines.jsonl"), local_file("recipe", "lora")
    (PosixPath('/lines.jsonl'), None, None)
    """
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    if "://" in source or source.startswith(("upload:", "sample:")):
        return None
    path = expanded(source)
    return None if name == "recipe" and path.suffix not in (".yaml", ".yml") else path


def upload(pool: Client, file: Path) -> str:
    """Send a file. A terminal shows a bar meanwhile."""
    columns = (TextColumn("Sending {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(file.name, total=file.stat().st_size)
        return pool.upload(file, lambda done_bytes: bar.update(task, completed=done_bytes))


# following


def followed(pool: Client, job: str, label: str) -> dict[str, Any] | None:
    """What `follow` returns; None if Ctrl-C stopped it."""
    try:
        return follow(pool, job, label)
    except KeyboardInterrupt:
        return None


def follow(pool: Client, job: str, label: str) -> dict[str, Any]:
    """Draw a job's progress until it ends. Returns what it made. Raises `JobFailed`."""
    return drawn(Patient(lambda: pool.job(job), pool.job(job)), label)


def drawn(look: Callable[[], Job], label: str, looked_every_s: float = LOOK_AGAIN_S) -> dict[str, Any]:
    """Draw what ``look`` returns until the job has ended. Returns what it made. Raises `JobFailed`."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None, words="")
        while not (now := look()).status.ended:
            draw(bar, task, label, now)
            time.sleep(looked_every_s)
        draw(bar, task, label, now)
    if now.status is JobStatus.SUCCEEDED:
        return now.made
    raise JobFailed(f"Job {now.id} is {now.status}: {now.message}", f"See `springtide logs {now.id}`.")


def draw(bar: Progress, task: TaskID, label: str, now: Job) -> None:
    done, total = (now.progress.step, now.progress.steps or None) if now.progress else (0, None)
    starting = ": starting" if now.status is JobStatus.QUEUED else ""
    bar.update(task, description=f"{label}{starting}", completed=done, total=total, words=render.doing(now))
