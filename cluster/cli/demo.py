"""`springtide run` goes through the whole loop once and shows each step. `springtide up` does the first half: it starts the pool and serves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster import client
from cluster.cli import doctor, fit, jobs, render
from cluster.client import Job
from cluster.config import Config, parse
from cluster.errors import BadRequest, ConfigError, Conflict, PoolUnavailable
from cluster.pool import graph, local, submit
from cluster.store import fitting
from cluster.store.objects import Store, sha256
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId, check_name

QUESTION = "Who are you?"
SAMPLE = "sample:tide"
"""The data set for the fine-tuning. It ships with the jobs."""
SERVING = {
    True: "Serving until [bold]Ctrl-C[/], which stops the pool.",
    False: "Another command started the pool, so [bold]Ctrl-C[/] ends only this one. `springtide down` stops the pool.",
}
"""The last line, by whether this command started the pool."""
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def up(config: Config, console: Console, model: str | None = None) -> Config:
    """Start the pool and serve. Returns the configuration in force. Its first fleet hosts ``model`` if one was given."""
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    if local.find(config):
        running = local.remembered(config)
        check_same(running, config, model)
        config = _hosting(config, running.default_model)
        console.print("The pool runs already. This command uses it.")
    else:
        check_ports(config)
        config = _hosting(config, _adopt(registry, model, config, console)) if model else config
    fitted = fit.of_fleets(config, registry)  # before Ray starts: what cannot fit is refused within a second
    with console.status("Starting Ray…"):
        started = local.up(config)
    local.remember(config)
    console.print(f"Ray is up: [bold]{started.dashboard}[/]")
    if registry.alias(config.default_model) is None:
        _grow(config, console)
        fitted = fit.of_fleets(config, registry)
    render.fits(console, fitted)
    with console.status("Starting the gateway and the engine…") as line:
        graph.deploy(config, lambda states: line.update(f"Starting the gateway and the engine: {states}"))
    return config


def check_ports(config: Config) -> None:
    """Raise `PoolUnavailable` naming a port that is taken. Ray would only print its log."""
    taken = [finding.words for finding in doctor.ports(config, running=False) if not finding.ok]
    if taken:
        raise PoolUnavailable(" ".join(taken))


def check_room(config: Config) -> None:
    """Raise `ConfigError` if a job could never get its slots."""
    found = doctor.slots(config)
    if not found.ok:
        raise ConfigError(f"There are too few slots. {found.words}", param="pool.slots")


def check_same(running: Config, wanted: Config, model: str | None) -> None:
    """Raise `Conflict` for a change that a running pool cannot take: it takes a new number of replicas and nothing else."""
    if model in (None, running.default_model) and fixed(running) == fixed(_hosting(wanted, running.default_model)):
        return
    raise Conflict("A pool with another configuration runs from this home.", "Stop it with `springtide down`, then start again.")


def fixed(config: Config) -> dict[str, Any]:
    """The part of a configuration that cannot change while the pool runs."""
    return graph.unscaled(config)


def run(config: Config, console: Console, keep_serving: bool) -> None:
    """Serve, ask, fine-tune, publish, and ask again. Then keep serving until Ctrl-C, which leaves no process behind.

    The command stops only a pool that it started. Raises `PoolUnavailable` if somebody else stops the pool meanwhile."""
    began_s, ours = time.monotonic(), local.find(config) is None
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service manager's stop and a closed terminal count as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    check_room(config)
    started = False
    try:
        config = up(config, console)
        started = True
        _loop(config, console)
        console.print(f"The loop took {time.monotonic() - began_s:.0f} s.")
        if keep_serving:
            render.serving(console, config)
            console.print(SERVING[ours])
            while local.find(config):
                time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(config, console, ours, started)


def _stop(config: Config, console: Console, ours: bool, started: bool) -> None:
    if local.find(config) is None and started:
        raise PoolUnavailable("The pool was stopped, or has ended by itself.", f"Its log is {config.home / 'pool.log'}.")
    if local.find(config) is None:
        return  # the error says why it did not start
    if ours:
        with console.status("Stopping every process of the pool…"):
            local.down(config)
        console.print("Stopped. The store keeps every version, and `make run` continues from it.")
    else:
        console.print("The pool keeps running. `springtide down` stops it.")


def _grow(config: Config, console: Console) -> None:
    console.print(f"The store has no [bold]{config.default_model}[/] yet. Training one from the text that ships with Springtide.")
    made = jobs.drawn(_documents(config, "pretrain", name=config.default_model), "Pretraining")
    console.print(f"Registered [bold]{made.get('version', config.default_model)}[/].")


def _documents(config: Config, verb: str, **options: Any) -> Callable[[], Job]:
    """Start a job on a pool that has no gateway yet. Each call of the result reads the job's record from the store."""
    documents = submit.follow(config, submit.start(config, verb, **options), interval_s=0)
    return lambda: Job.model_validate(next(documents))


def _loop(config: Config, console: Console) -> None:
    model, pool = config.default_model, client.of(config)
    history = pool.history(model).moves
    first = history[0].stable
    if len(history) > 1:
        console.print("This store has been through the loop already. These are the answers of its versions:")
    else:
        _show_answer(console, pool.ask(model, QUESTION))
        console.print("Fine-tuning on the text of the tide while version 1 keeps serving.")
        options = {"data": SAMPLE, "base": model, "name": model, "epochs": 30, "publish": True}
        made = jobs.follow(pool, jobs.start(pool, "finetune", options), "Fine-tuning")
        words = "into live traffic" if made.get("stage") == "live" else f"; its rollout is {made.get('stage')}"
        console.print(f"Published [bold]{made.get('version')}[/] {words}.")
        history = pool.history(model).moves
    # A fleet no longer serves weights that were replaced.
    first_too = [str(first)] if first != history[-1].stable and str(first) in pool.served() else []
    render.answers(console, QUESTION, [pool.ask(name, QUESTION) for name in (*first_too, model)])


def _show_answer(console: Console, answer: client.Answer) -> None:
    console.print(f"“{QUESTION}” → [bold]{answer.version}[/]: {escape(answer.text)}")


def _hosting(config: Config, model: str) -> Config:
    values = config.dump()
    own = values["fleets"][config.default_fleet] if values["fleets"] else values["fleet"]
    own["model"] = model
    return parse(values)


def _adopt(registry: Registry, model: str, config: Config, console: Console) -> str:
    """The alias that serves ``model``: an alias, a version NAME@N, a folder, or a hub id. A folder or a hub model is registered first."""
    if "@" in model and "/" not in model:
        id = VersionId.parse(model)
        _point(registry, id)
        return id.name
    if "/" not in model and registry.store.children(f"aliases/{model}"):
        return model
    folder = Path(model).expanduser().resolve()
    name = check_name(folder.name)
    if not folder.is_dir():
        folder = _download(model, config.home / "hub", console)
    fit.check(config, name, fitting.of_folder(folder))  # before it is copied, which may take long
    with console.status(f"Copying {folder} into the store…"):
        id = _same(registry, name, folder) or registry.register(name, "weights", None, folder, Lineage()).id
    _point(registry, id)
    return name


def _same(registry: Registry, name: str, folder: Path) -> VersionId | None:
    """The newest version of ``name`` if its files equal those in ``folder``. So a second start does not copy the model again."""
    versions = [manifest for manifest in registry.versions(name) if manifest.kind == "weights"]
    if not versions:
        return None
    same = all((folder / f.path).is_file() and sha256(folder / f.path) == f.sha256 for f in versions[-1].files)
    return versions[-1].id if same else None


def _point(registry: Registry, id: VersionId) -> None:
    """Move the alias at once. Nothing serves yet, so no replica has to confirm."""
    now = registry.alias(id.name)
    if now is None or now.stable != id:
        registry.move(id.name, id, "chosen at start", client.author(), now.generation if now else 0)


def _download(model: str, cache: Path, console: Console) -> Path:
    """Download one revision of a model. Returns its folder in the hub's cache, which has one for each revision."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with console.status(f"Downloading {model} from the Hugging Face hub…"):
            folder = Path(snapshot_download(model, cache_dir=cache, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequest(
            f"{model} is no folder, no name in the store, and no model on the hub that this machine reaches: {error}.",
            "Give the path of a folder with config.json and safetensors files.",
            param="model",
        ) from error
    _forget_remote_code(folder)
    return folder


def _forget_remote_code(folder: Path) -> None:
    """Remove `auto_map` from the copy. A hub's configuration may name code to run, even beside an architecture that vLLM has itself."""
    for path in folder.glob("*config.json"):
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if values.pop("auto_map", None) is not None:
            path.unlink()  # a link to the file as it was downloaded
            path.write_text(json.dumps(values, indent=2))
