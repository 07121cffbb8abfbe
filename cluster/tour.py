"""`springtide run`: the whole loop once, in front of the reader's eyes. `up` is its first half."""

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from cluster import admin, graph, pool, show, submit
from cluster.config import Config, parse
from cluster.errors import BadRequest, PoolUnavailable
from cluster.registry import Registry
from cluster.store import Store
from cluster.types import Lineage, VersionId, check_name

QUESTION = "Who are you?"
TIDE = Path(__file__).parent.parent / "jobs" / "seedling" / "tide.jsonl"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Answer:
    text: str
    version: str
    seconds: float


def up(config: Config, console: Console, model: str | None = None) -> Config:
    """Start the pool and serve; returns the configuration in force, whose fleet hosts ``model`` where one was given."""
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    if model:
        config = _hosting(config, _adopt(registry, model, console))
    with console.status("Starting Ray…"):
        started = pool.up(config)
    console.print(f"Ray is up: [bold]{started.dashboard}[/]")
    if registry.alias(config.fleet.model) is None:
        _grow(config, console)
    with console.status("Starting the gateway and the engine…") as line:
        graph.deploy(config, lambda states: line.update(f"Starting the gateway and the engine: {states}"))
    return config


def run(config: Config, console: Console, keep_serving: bool) -> None:
    """Serve, ask, fine-tune, publish, ask again; then keep serving until Ctrl-C, which leaves no process behind."""
    began_s = time.monotonic()
    try:
        config = up(config, console)
        _loop(config, console)
        console.print(f"The loop took {time.monotonic() - began_s:.0f} s.")
        show.serving(console, config)
        if keep_serving:
            console.print("Serving until [bold]Ctrl-C[/].")
            signal.sigwait({signal.SIGINT, signal.SIGTERM}) if _blocked() else None
    except KeyboardInterrupt:
        pass
    finally:
        with console.status("Stopping every process of the pool…"):
            pool.down(config)
        console.print("Stopped. The store keeps every version; `make run` goes on from it.")


def _blocked() -> bool:
    """Let both signals wait for `sigwait`, so that none is lost between printing and waiting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    return True


def _grow(config: Config, console: Console) -> None:
    console.print(f"The store has no [bold]{config.fleet.model}[/] yet: growing one from the text that ships with Springtide.")
    job = submit.submit(config, "pretrain", "--name", config.fleet.model)
    result = show.follow(console, config, job, "Pretraining")
    console.print(f"Registered [bold]{result.get('version', config.fleet.model)}[/].")


def _loop(config: Config, console: Console) -> None:
    model, registry = config.fleet.model, Registry(Store(config.store))
    first = registry.versions(model)[0].id
    if len(registry.history(model)) > 1:
        console.print("This store has been through the loop already; here is what each of its versions answers.")
    else:
        _show_answer(console, ask(config, model, QUESTION))
        console.print(f"Fine-tuning on [bold]{TIDE.name}[/] while version 1 keeps serving.")
        arguments = ("--data", str(TIDE), "--base", model, "--name", model, "--epochs", "30", "--publish")
        job = submit.submit(config, "finetune", *arguments)
        result = show.follow(console, config, job, "Fine-tuning")
        console.print(f"Published [bold]{result.get('version')}[/] into live traffic.")
    show.answers(console, QUESTION, [ask(config, str(first), QUESTION), ask(config, model, QUESTION)])


def _show_answer(console: Console, answer: Answer) -> None:
    console.print(f"“{QUESTION}” → [bold]{answer.version}[/]: {answer.text}")


def ask(config: Config, model: str, question: str) -> Answer:
    """One greedy answer over HTTP, with the version from the ``x-model-version`` header."""
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
    began_s = time.monotonic()
    try:
        response = httpx.post(url, json=body, timeout=120)
    except httpx.HTTPError as error:
        raise PoolUnavailable(f"The gateway at {url} does not answer: {error}.", "Start serving with `springtide up`.") from error
    if response.status_code != 200:
        raise BadRequest(
            response.json()["error"]["message"] if response.headers.get("content-type") == "application/json" else response.text
        )
    text = response.json()["choices"][0]["message"]["content"]
    return Answer(text.strip(), response.headers["x-model-version"], time.monotonic() - began_s)


def _hosting(config: Config, model: str) -> Config:
    values = config.dump()
    values["fleet"]["model"] = model
    return parse(values)


def _adopt(registry: Registry, model: str, console: Console) -> str:
    """The alias that serves ``model``: a name in the store, a version in it, or a folder or hub id that is registered now."""
    if "@" in model and "/" not in model:
        id = VersionId.parse(model)
        _point(registry, id)
        return id.name
    if registry.store.children(f"aliases/{model}") if "/" not in model else False:
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, console)
    name = check_name(Path(model).name)
    with console.status(f"Copying {folder} into the store…"):
        manifest = registry.register(name, "weights", None, folder, Lineage())
    _point(registry, manifest.id)
    return name


def _point(registry: Registry, id: VersionId) -> None:
    """Before anything serves there is nobody to acknowledge, so the alias moves at once."""
    now = registry.alias(id.name)
    if now is None or now.stable != id:
        registry.move(id.name, id, "chosen at start", admin.author(), now.generation if now else 0)


def _download(model: str, console: Console) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with console.status(f"Downloading {model} from the Hugging Face hub…"):
            cached = Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadRequest(
            f"{model} is neither a folder here, nor a name in the store, nor a model on the hub that can be reached: {error}.",
            "Give the path of a folder with config.json and safetensors files.",
            param="model",
        ) from error
    plain = cached.parent / f"{cached.name}-files"  # the hub's cache is made of links, which the registry refuses
    if not plain.exists():
        shutil.copytree(cached, plain, symlinks=False)
    return plain
