"""The `springtide` command. Commands stay thin: each says what it does, calls one function, and prints the answer."""

import json
import os
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

from cluster import client
from cluster import config as configuration
from cluster.cli import render
from cluster.config import Config
from cluster.errors import BadRequest, SpringtideError
from cluster.pool import local
from cluster.publishing.gate import latest
from cluster.publishing.rollout import UNDER_WAY
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import VersionId

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One pool of accelerators that serves models and trains them.",
)
k8s_app = typer.Typer(no_args_is_help=True, help="Manifests for KubeRay, rendered from the same configuration.")
app.add_typer(k8s_app, name="k8s")
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)

Preset = Annotated[str | None, typer.Option(help="Start from cluster/presets/NAME.yaml: laptop or gpu.")]
File = Annotated[Path | None, typer.Option("--config", help="A YAML file; springtide.yaml here by default.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override one key: --set fleet.max_replicas=2. Repeatable.")]
PATHS = ("--data", "--eval-data", "--recipe", "--held-out", "--tasks", "--golden")
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
    from cluster.cli import demo

    demo.run(_load(preset, config, set), console, keep_serving=not once)


@app.command()
def up(model: Model = None, preset: Preset = None, config: File = None, set: Sets = None) -> None:
    """Start the pool and serve. Returns when it answers; `springtide down` stops it."""
    from cluster.cli import demo

    loaded = demo.up(_load(preset, config, set), console, model)
    render.serving(console, loaded)


@app.command()
def down() -> None:
    """Stop the pool and every process it started. The store stays."""
    stopped = local.down(_running())
    console.print("Stopped." if stopped else "Nothing was running.")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Draw who holds the slots, once a second; Ctrl-C ends it.")] = False,
    minutes: Annotated[float, typer.Option(help="How far back --watch draws.", min=0.1, max=1440)] = 5,
) -> None:
    """What is running: replicas with the versions they hold, aliases, slots."""
    config = _running()
    running = local.require(config)
    if watch and as_json:
        raise BadRequest("--watch prints no JSON.", "Use `springtide status --json` alone.")
    if watch:
        from cluster.cli import top as watching

        return watching.watch(config, console, minutes)
    document = client.status(config)
    if as_json:
        print(json.dumps(document))
    else:
        render.status(console, running, document)


@app.command()
def models(name: Annotated[str | None, typer.Argument(help="A model, or one version as NAME@N.")] = None) -> None:
    """Every version in the store, with its kind, lineage and measurements; the live one marked."""
    registry = _registry()
    if name and "@" in name:
        render.manifest(console, registry.manifest(VersionId.parse(name)), registry.verdicts(VersionId.parse(name)))
    else:
        render.models(console, registry, [name] if name else registry.names())


@app.command()
def history(alias: str) -> None:
    """Every move of an alias and every step of its rollouts: when, to what, by whom and why."""
    registry = _registry()
    render.history(console, registry.history(alias), registry.rollouts(alias))


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

    config = _running()
    if "://" not in data and not Path(data).expanduser().is_file():
        raise BadRequest(f"There is no file {data}.", "Give the path or URL of JSON lines.", param="data")
    base = base or config.default_model
    _registry().meant(base)  # what can be known now need not fail in the job
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

    config = _running()
    listed = submit.jobs(config)[:20]
    render.jobs(console, listed, [submit.log(config, job.submission_id or "") for job in listed])


@app.command()
def cancel(job: str) -> None:
    """Stop a job, by its name or its run's. What it has registered stays; an unfinished run leaves nothing."""
    from cluster.pool import submit

    config = _running()
    submit.cancel(config, submit.named(config, job))
    console.print(f"{job} is stopped.")


@app.command()
def logs(job: str) -> None:
    """A job's whole log, by the job's name or its run's."""
    from cluster.pool import submit

    config = _running()
    print(submit.log(config, submit.named(config, job)))


@app.command()
def publish(
    version: Annotated[str, typer.Argument(help="NAME@N")],
    alias: Annotated[str | None, typer.Option(help="The alias to move; the version's own name by default.")] = None,
    reason: str = "published by hand",
    canary: Annotated[bool, typer.Option("--canary", help="Go by the policy's steps, compared with the live version.")] = False,
    steps: Annotated[str | None, typer.Option(help="Shares for --canary, for example 5,25,100.")] = None,
    gate: Annotated[bool | None, typer.Option(help="Whether a verdict is needed; the policy's own choice by default.")] = None,
    wait: Annotated[bool, typer.Option(help="Watch until it is live or rolled back.")] = True,
) -> None:
    """Bring a version to the live model name. No request fails, and what was live stays live until the new one has shown itself."""
    from cluster.cli import demo
    from cluster.pool import submit

    id, config = VersionId.parse(version), _running()
    policy = demo.policy(config.publishing.policy, canary, steps, gate)
    rollout = client.publish(config, id, alias or id.name, reason, policy)
    if rollout.stage == "registered" and latest(_registry().verdicts(id), rollout.incumbent) is None:
        console.print("It needs a verdict first; measuring it now.")
        render.follow(console, config, submit.submit(config, "evaluate", str(id), "--alias", rollout.alias), f"Evaluating {id}")
    if wait and rollout.stage in UNDER_WAY:
        rollout = demo.watch(config, console, rollout)
    render.rollout(console, rollout)
    if rollout.stage == "rolled_back":
        sys.exit(2)  # as where it is refused at once


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context, version: Annotated[str, typer.Argument(help="NAME@N")]) -> None:
    """Measure a version against the live one and store the gate's verdict. Options go to the job: --held-out, --tasks, --golden, --against."""
    from cluster.pool import submit

    config, id = _running(), VersionId.parse(version)
    job = submit.submit(config, "evaluate", str(id), *absolute(list(context.args)))
    render.follow(console, config, job, f"Evaluating {id}")
    render.verdict(console, _registry().verdicts(id)[-1])


@app.command()
def promote(alias: str, reason: str = "promoted by hand") -> None:
    """Make the alias's canary live now, for everybody."""
    render.rollout(console, client.step(_running(), "promote", alias, reason))


@app.command()
def abort(alias: str, reason: str = "aborted by hand") -> None:
    """End the alias's rollout; every session gets the stable version again."""
    render.rollout(console, client.step(_running(), "abort", alias, reason))


@app.command()
def rollback(alias: str, to: Annotated[str | None, typer.Option(help="A version; the previous one by default.")] = None) -> None:
    """End the rollout under way, or else move the alias back to what it served before. Nothing is deleted."""
    render.rollout(console, client.rollback(_running(), alias, VersionId.parse(to) if to else None, "rolled back by hand"))


@app.command()
def ask(
    question: str,
    model: Annotated[str | None, typer.Option(help="The alias; by default what the pool serves.")] = None,
    version: Annotated[int | None, typer.Option(help="Pin NAME@N.")] = None,
) -> None:
    """Ask the live model one question over HTTP and show which version answered."""
    from cluster.cli import demo

    config = _running()
    model = model or config.default_model
    answer = demo.ask(config, f"{model}@{version}" if version else model, question)
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

    for key, value in local.client_environment(_running()).items():
        print(f"export {key}={shlex.quote(value)}")


@app.command()
def doctor() -> None:
    """Check what usually goes wrong: the store, the ports, the versions, the memory."""
    from cluster.cli import doctor

    findings = doctor.examine(_load(None, None, None))
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[red]no[/]", finding.subject, finding.words)
    console.print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, what: str) -> None:
    """Measure, as `python -m benchmarks` does: springtide bench serving."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", what, *context.args]))


@k8s_app.command("render")
def k8s_render(
    into: Annotated[Path | None, typer.Option(help="Write the files here instead of printing them.")] = None,
    preset: Preset = "gpu",
    config: File = None,
    set: Sets = None,
) -> None:
    """The RayService for serving and the RayJob for fine-tuning."""
    from cluster.pool import k8s

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
    return local.remembered(config) if local.find(config) else config


def _registry() -> Registry:
    return Registry(Store(_running().store))


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
