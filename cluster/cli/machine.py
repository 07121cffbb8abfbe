"""Commands that start, stop and examine the pool on this machine."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster import endpoint
from cluster.cli import render
from cluster.cli.app import File, Preset, Sets, app, console, load
from cluster.config import Config
from cluster.pool import local

k8s_app = typer.Typer(no_args_is_help=True, help="Manifests for KubeRay, rendered from the same configuration.")
app.add_typer(k8s_app, name="k8s")

Model = Annotated[
    str | None,
    typer.Option(
        help="A folder in Hugging Face layout, a GGUF file, a hub id, a name or version in the store, or smollm2: a small chat model "
        "that `make setup` installs."
    ),
]


@app.command()
def run(
    model: Model = None,
    preset: Preset = None,
    config: File = None,
    set: Sets = None,
    once: Annotated[bool, typer.Option(help="Stop when the loop is done.")] = False,
) -> None:
    """Go through the whole loop: start the pool, serve a model, fine-tune it, publish the result into live traffic, keep serving."""
    loaded = load(preset, config, set)
    _prepare(loaded, model)
    from cluster.cli import demo

    demo.run(loaded, console, keep_serving=not once, model=model)


@app.command()
def up(model: Model = None, preset: Preset = None, config: File = None, set: Sets = None) -> None:
    """Start the pool and serve. Returns when the pool answers. `springtide down` stops it."""
    loaded = load(preset, config, set)
    _prepare(loaded, model)
    from cluster.cli import demo

    render.serving(console, demo.up(loaded, console, model))


def _prepare(config: Config, model: str | None) -> None:
    """What must come before Ray is imported."""
    from cluster.cli import fit

    fit.before_start(config, model)
    local.use(config)


@app.command()
def down() -> None:
    """Stop the pool and every process it started. The store stays."""
    stopped = local.down(running())
    console.print("Stopped." if stopped else "Nothing was running.")


@app.command("config")
def show_config(preset: Preset = None, config: File = None, set: Sets = None) -> None:
    """Print the resolved configuration: every key with its value."""
    import yaml

    print(yaml.safe_dump(load(preset, config, set).dump(), sort_keys=False), end="")


@app.command()
def env(
    client: Annotated[
        bool,
        typer.Option(
            "--client", help="Print the address and key instead, for `springtide` in other folders and on other machines."
        ),
    ] = False,
) -> None:
    """Print shell lines that point Ray's own commands at this pool: eval "$(springtide env)"."""
    config = running()
    variables = endpoint.variables(endpoint.of(config)) if client else local.client_environment(config)
    for key, value in variables.items():
        print(f"export {key}={shlex.quote(value)}")


@app.command()
def doctor() -> None:
    """Check what usually goes wrong: the store, the ports, the versions, the memory."""
    from cluster.cli import doctor

    findings = doctor.examine(load())
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[red]no[/]", finding.subject, finding.words)
    console.print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="What `springtide up --model` takes, if it is on this machine.")],
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory of one GPU, or of the machine without GPUs. By default what is here.", min=0.1)
    ] = None,
    preset: Preset = None,
    config: File = None,
    set: Sets = None,
) -> None:
    """Say whether a model fits on one slot: what its weights, its KV cache and its context need. Nothing is started.

    The exit status is 1 where it does not fit. Try another setting with --set, for example --set fleet.max_model_len=4096.
    """
    from cluster.capacity import fit as capacity
    from cluster.cli import fit
    from cluster.memory import device_bytes
    from cluster.store import fitting

    loaded = load(preset, config, set)
    name, read = fit.read(model, loaded)
    memory = int(memory_gib * 2**30) if memory_gib else device_bytes(loaded.pool.accelerator)
    slot = fitting.slot(fit.spec_for(loaded, model), memory)
    found = capacity.fit(read, slot)
    render.fit(console, name, slot, found)
    console.print(fit.verdict(found), highlight=False)
    raise typer.Exit(1 if found.fits is False else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, what: str) -> None:
    """Run a benchmark, as `python -m benchmarks` does: springtide bench serving."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", what, *context.args]))


@k8s_app.command("render")
def k8s_render(
    into: Annotated[Path | None, typer.Option(help="Write the files here instead of printing them.")] = None,
    preset: Preset = "gpu",
    config: File = None,
    set: Sets = None,
) -> None:
    """Print the RayService for serving and the RayJob for fine-tuning."""
    from cluster.pool import k8s

    files = k8s.render(load(preset, config, set))
    for name, text in files.items():
        if into is None:
            print(f"# {name}\n{text}")
        else:
            into.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(text)
    if into is not None:
        console.print(f"Wrote {', '.join(files)} to {into}.")


def running() -> Config:
    """The configuration of the pool that runs from this home. If none runs, the configuration that would start."""
    config = load()
    return local.remembered(config) if local.find(config) else config
