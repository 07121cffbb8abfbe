"""The `springtide` command. Commands stay thin: each says what it does, calls one function, and prints the answer."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import admin, pool, show
from cluster import config as configuration
from cluster.config import Config
from cluster.errors import BadRequest, SpringtideError
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Generation, VersionId

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One pool of accelerators that serves models and trains them.",
)
k8s_app = typer.Typer(no_args_is_help=True, help="Manifests for KubeRay, rendered from the same configuration.")
app.add_typer(k8s_app, name="k8s")
console = Console()

Preset = Annotated[str | None, typer.Option(help="Start from cluster/presets/NAME.yaml: laptop or gpu.")]
File = Annotated[Path | None, typer.Option("--config", help="A YAML file; springtide.yaml here by default.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one key: --set fleet.max_replicas=2. Repeatable.")]
PATHS = ("--data", "--eval-data", "--recipe")
PATHS_JOINED = tuple(f"{option}=" for option in PATHS)
Model = Annotated[str | None, typer.Option(help="A folder in Hugging Face layout, a hub id, or a name in the store.")]


@app.command()
def run(
    preset: Preset = None,
    config: File = None,
    set: Sets = None,
    once: Annotated[bool, typer.Option(help="Stop when the loop is done.")] = False,
) -> None:
    """The whole loop: start the pool, serve a model, fine-tune it, publish the result into live traffic, keep serving."""
    from cluster import tour

    tour.run(_load(preset, config, set), console, keep_serving=not once)


@app.command()
def up(model: Model = None, preset: Preset = None, config: File = None, set: Sets = None) -> None:
    """Start the pool and serve. Returns when it answers; `springtide down` stops it."""
    from cluster import tour

    loaded = tour.up(_load(preset, config, set), console, model)
    show.serving(console, loaded)


@app.command()
def down() -> None:
    """Stop the pool and every process it started. The store stays."""
    stopped = pool.down(_running())
    console.print("Stopped." if stopped else "Nothing was running.")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What is running: replicas with the versions they hold, aliases, slots."""
    config = _running()
    running = pool.require(config)
    document = admin.status(config)
    if as_json:
        print(json.dumps(document))
    else:
        show.status(console, running, document)


@app.command()
def models(name: Annotated[str | None, typer.Argument(help="A model, or one version as NAME@N.")] = None) -> None:
    """Every version in the store, with its kind, lineage and measurements; the live one marked."""
    registry = _registry()
    if name and "@" in name:
        show.manifest(console, registry.manifest(VersionId.parse(name)))
    else:
        show.models(console, registry, [name] if name else registry.names())


@app.command()
def history(alias: str) -> None:
    """Every move of an alias: when, to what, by whom and why."""
    show.history(console, _registry().history(alias))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="JSONL in OpenAI's chat format or prompt/completion: a path or URL.")],
    wait: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
) -> None:
    """Fine-tune on the pool, as `ray job submit -- python -m jobs.finetune` does. Further options go to the job: --name, --full, --publish."""
    from cluster import submit

    config = _running()
    job = submit.submit(config, "finetune", *absolute(["--data", data, *context.args]))
    console.print(f"Job [bold]{job}[/] submitted; `springtide logs {job}` shows its log.")
    if wait:
        console.print_json(json.dumps(show.follow(console, config, job, "Fine-tuning")))


@app.command()
def jobs() -> None:
    """Every job on the pool with its progress: step, loss, tokens per second, time left."""
    from cluster import submit

    config = _running()
    listed = submit.jobs(config)[:20]
    show.jobs(console, listed, [submit.log(config, job.submission_id or "") for job in listed])


@app.command()
def logs(job: str) -> None:
    """A job's whole log."""
    from cluster import submit

    print(submit.log(_running(), job))


@app.command()
def publish(
    version: Annotated[str, typer.Argument(help="NAME@N")],
    alias: Annotated[str | None, typer.Option(help="The alias to move; the version's own name by default.")] = None,
    reason: str = "published by hand",
) -> None:
    """Load a version on every replica, then move the live model name to it. No request fails."""
    id = VersionId.parse(version)
    _moved(admin.publish(_running(), id, alias or id.name, reason))


@app.command()
def rollback(alias: str, to: Annotated[str | None, typer.Option(help="A version; the previous one by default.")] = None) -> None:
    """Move an alias back to what it served before. A rollback is a new generation; nothing is deleted."""
    target = VersionId.parse(to) if to else _registry().previous(alias)
    _moved(admin.publish(_running(), target, alias, "rolled back by hand"))


@app.command()
def ask(question: str, model: str = "seedling", version: Annotated[int | None, typer.Option(help="Pin NAME@N.")] = None) -> None:
    """Ask the live model one question over HTTP and show which version answered."""
    from cluster import tour

    answer = tour.ask(_running(), f"{model}@{version}" if version else model, question)
    console.print(f"[bold]{answer.version}[/]: {escape(answer.text)}")


@app.command("config")
def show_config(preset: Preset = None, config: File = None, set: Sets = None) -> None:
    """The resolved configuration: every key with the value in force."""
    import yaml

    print(yaml.safe_dump(_load(preset, config, set).dump(), sort_keys=False), end="")


@app.command()
def env() -> None:
    """Shell lines for Ray's own commands on this pool: eval "$(springtide env)"."""
    import shlex

    for key, value in pool.client_environment(_running()).items():
        print(f"export {key}={shlex.quote(value)}")


@app.command()
def doctor() -> None:
    """Check what usually goes wrong: the store, the ports, the versions, the memory."""
    from cluster import checkup

    findings = checkup.examine(_load(None, None, None))
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[red]no[/]", finding.subject, finding.words)
    console.print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, what: str) -> None:
    """Measure, as `python -m jobs.bench` does: springtide bench serving."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jobs.bench", what, *context.args]))


@k8s_app.command("render")
def k8s_render(
    into: Annotated[Path | None, typer.Option(help="Write the files here instead of printing them.")] = None,
    preset: Preset = "gpu",
    config: File = None,
    set: Sets = None,
) -> None:
    """The RayService for serving and the RayJob for fine-tuning."""
    from cluster import k8s

    files = k8s.render(_load(preset, config, set))
    for name, text in files.items():
        if into is None:
            print(f"# {name}\n{text}")
        else:
            into.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(text)
    if into is not None:
        console.print(f"Wrote {', '.join(files)} to {into}.")


def _load(preset: str | None, file: Path | None, sets: list[str] | None) -> Config:
    pairs: list[tuple[str, str]] = []
    for text in sets or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"--set {text} has no value.", "Write it as --set KEY=VALUE.", param=key)
        pairs.append((key, value))
    if file is not None and not file.is_file():
        raise BadRequest(f"There is no file {file}.", "Check the path given with --config.", param="config")
    return configuration.load(preset, file, configuration.from_pairs(pairs))


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


def _running() -> Config:
    """The configuration of the pool that runs from this home; what would be started, where none runs."""
    config = _load(None, None, None)
    return pool.remembered(config) if pool.find(config) else config


def _registry() -> Registry:
    return Registry(Store(_running().store))


def _moved(move: Generation) -> None:
    console.print(f"[bold]{move.alias}[/] is [bold green]{move.stable}[/] now (generation {move.generation}).")


def main() -> None:
    """The console script. Errors of our family become one message and exit status 2; anything else is a bug and shows its traceback."""
    try:
        app()
    except SpringtideError as error:
        width = shutil.get_terminal_size().columns
        Console(stderr=True, width=max(width, 60)).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
