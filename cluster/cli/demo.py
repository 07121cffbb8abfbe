"""`springtide run` goes through the whole loop once and shows each step. `springtide up` is its first half: the pool starts and serves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster import client
from cluster.cli import doctor, jobs, render
from cluster.client import Job
from cluster.config import Config, parse
from cluster.errors import BadRequest, ConfigError, Conflict, PoolUnavailable
from cluster.pool import graph, local, submit
from cluster.store.objects import Store, sha256
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId, check_name

QUESTION = "Who are you?"
SAMPLE = "sample:tide"
"""The data set that it fine-tunes on; it ships with the jobs."""
SERVING = {
    True: "Serving until [bold]Ctrl-C[/], which stops the pool.",
    False: "It was not started here, so [bold]Ctrl-C[/] ends only this command; `springtide down` stops the pool.",
}
"""What the last line says, by whether this command started the pool."""
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def up(config: Config, console: Console, model: str | None = None) -> Config:
    """Start the pool and serve. Returns the configuration in force; its first fleet hosts ``model`` where one was given."""
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    if local.find(config):
        running = local.remembered(config)
        check_same(running, config, model)
        config = _hosting(config, running.default_model)
        console.print("The pool runs already; this uses it.")
    else:
        check_ports(config)
        config = _hosting(config, _adopt(registry, model, config.home, console)) if model else config
    with console.status("Starting Ray…"):
        started = local.up(config)
    local.remember(config)
    console.print(f"Ray is up: [bold]{started.dashboard}[/]")
    if registry.alias(config.default_model) is None:
        _grow(config, console)
    with console.status("Starting the gateway and the engine…") as line:
        graph.deploy(config, lambda states: line.update(f"Starting the gateway and the engine: {states}"))
    return config


def check_ports(config: Config) -> None:
    """Raise `PoolUnavailable` with the port's number. Ray would end with its log instead."""
    taken = [finding.words for finding in doctor.ports(config, running=False) if not finding.ok]
    if taken:
        raise PoolUnavailable(" ".join(taken))


def check_room(config: Config) -> None:
    """Raise `ConfigError` where a training run could never get its slots."""
    found = doctor.slots(config)
    if not found.ok:
        raise ConfigError(f"There are too few slots. {found.words}", param="pool.slots")


def check_same(running: Config, wanted: Config, model: str | None) -> None:
    """A running pool takes a new number of replicas, and nothing else."""
    if model in (None, running.default_model) and fixed(running) == fixed(_hosting(wanted, running.default_model)):
        return
    raise Conflict("A pool with another configuration runs from this home.", "Stop it with `springtide down`, then start again.")


def fixed(config: Config) -> dict[str, Any]:
    """The part of a configuration that cannot change while the pool runs."""
    return graph.unscaled(config)


def run(config: Config, console: Console, keep_serving: bool) -> None:
    """Serve, ask, fine-tune, publish, ask again; then keep serving until Ctrl-C, which leaves no process behind.

    The command stops only a pool that it started. Raises `PoolUnavailable` where somebody else ends the pool meanwhile."""
    began_s, ours = time.monotonic(), local.find(config) is None
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service manager's stop and a closed terminal are a Ctrl-C
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
        raise PoolUnavailable("The pool has been stopped, or ended by itself.", f"Its log is {config.home / 'pool.log'}.")
    if local.find(config) is None:
        return  # what kept it from starting is said by the error
    if ours:
        with console.status("Stopping every process of the pool…"):
            local.down(config)
        console.print("Stopped. The store keeps every version; `make run` goes on from it.")
    else:
        console.print("The pool goes on without this command; `springtide down` stops it.")


def _grow(config: Config, console: Console) -> None:
    console.print(f"The store has no [bold]{config.default_model}[/] yet: growing one from the text that ships with Springtide.")
    made = jobs.drawn(_documents(config, "pretrain", name=config.default_model), "Pretraining")
    console.print(f"Registered [bold]{made.get('version', config.default_model)}[/].")


def _documents(config: Config, verb: str, **options: Any) -> Callable[[], Job]:
    """Start a job on a pool that does not serve yet: there is no gateway to ask, so its record is read from the store."""
    documents = submit.follow(config, submit.start(config, verb, **options), interval_s=0)
    return lambda: Job.model_validate(next(documents))


def _loop(config: Config, console: Console) -> None:
    model, pool = config.default_model, client.of(config)
    history = pool.history(model).moves
    first = history[0].stable
    if len(history) > 1:
        console.print("This store has been through the loop already; here is what each of its versions answers.")
    else:
        _show_answer(console, pool.ask(model, QUESTION))
        console.print("Fine-tuning on the text of the tide while version 1 keeps serving.")
        options = {"data": SAMPLE, "base": model, "name": model, "epochs": 30, "publish": True}
        made = jobs.follow(pool, jobs.start(pool, "finetune", options), "Fine-tuning")
        words = "into live traffic" if made.get("stage") == "live" else f"; its rollout is {made.get('stage')}"
        console.print(f"Published [bold]{made.get('version')}[/] {words}.")
        history = pool.history(model).moves
    # Weights that were replaced are not served any more.
    first_too = [str(first)] if first != history[-1].stable and str(first) in pool.served() else []
    render.answers(console, QUESTION, [pool.ask(name, QUESTION) for name in (*first_too, model)])


def _show_answer(console: Console, answer: client.Answer) -> None:
    console.print(f"“{QUESTION}” → [bold]{answer.version}[/]: {escape(answer.text)}")


def _hosting(config: Config, model: str) -> Config:
    values = config.dump()
    own = values["fleets"][config.default_fleet] if values["fleets"] else values["fleet"]
    own["model"] = model
    return parse(values)


def _adopt(registry: Registry, model: str, home: Path, console: Console) -> str:
    """The alias that serves ``model``, which is an alias, a version NAME@N, a folder, or a hub id. The last two are registered first."""
    if "@" in model and "/" not in model:
        id = VersionId.parse(model)
        _point(registry, id)
        return id.name
    if "/" not in model and registry.store.children(f"aliases/{model}"):
        return model
    folder = Path(model).expanduser().resolve()
    name = check_name(folder.name)
    if not folder.is_dir():
        folder = _download(model, home / "hub", console)
    with console.status(f"Copying {folder} into the store…"):
        id = _same(registry, name, folder) or registry.register(name, "weights", None, folder, Lineage()).id
    _point(registry, id)
    return name


def _same(registry: Registry, name: str, folder: Path) -> VersionId | None:
    """The newest version of ``name`` where its files are those of ``folder``, so that a second start does not copy the model again."""
    versions = [manifest for manifest in registry.versions(name) if manifest.kind == "weights"]
    if not versions:
        return None
    same = all((folder / f.path).is_file() and sha256(folder / f.path) == f.sha256 for f in versions[-1].files)
    return versions[-1].id if same else None


def _point(registry: Registry, id: VersionId) -> None:
    """Move the alias at once: nothing serves yet, so no replica has to acknowledge."""
    now = registry.alias(id.name)
    if now is None or now.stable != id:
        registry.move(id.name, id, "chosen at start", client.author(), now.generation if now else 0)


def _download(model: str, cache: Path, console: Console) -> Path:
    """The folder of one revision, in the hub's own cache layout: each model and each revision has its own."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with console.status(f"Downloading {model} from the Hugging Face hub…"):
            folder = Path(snapshot_download(model, cache_dir=cache, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequest(
            f"{model} is neither a folder here, nor a name in the store, nor a model on the hub that can be reached: {error}.",
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
