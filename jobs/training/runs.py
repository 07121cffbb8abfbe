"""A run in the store. A job begins it under its own id, another job may resume it by that name, and at its end it leaves its files."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster.config import Config
from cluster.errors import BadRequest
from cluster.store.objects import Store
from cluster.types import check_name
from jobs.training.drivers.worker import RESULT
from jobs.training.recipe import Recipe

ABOUT = "about.json"


def begin(store: Store, name: str, inputs: dict[str, Any]) -> str:
    """Begin the run ``name``, and return the name. It is the job's id.

    ``inputs``: what the run depends on, in plain JSON values, for example its base, its recipe and the digest of its data. `resume` compares them.
    """
    store.put_new(f"runs/{check_name(name)}/{ABOUT}", json.dumps(inputs, sort_keys=True).encode())
    print(f"run {name}", flush=True)
    return name


def resume(store: Store, name: str, inputs: dict[str, Any]) -> str:
    """Resume the run ``name``, and return the name. Raises `BadRequest` if there is no such run, or if it began with other ``inputs``."""
    about = store.get(f"runs/{check_name(name)}/{ABOUT}")
    if about is None:
        raise BadRequest(f"There is no run {name}.", "A run that ended or was cancelled cannot be resumed.", "resume")
    before, now = _known(json.loads(about)), _known(json.loads(json.dumps(inputs)))
    if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        began_with = "; ".join(f"{key} {before.get(key)}" for key in other)
        raise BadRequest(f"The run {name} began with another {', '.join(other)}.", f"It began with: {began_with}.", "resume")
    print(f"run {name}", flush=True)
    return name


def _known(value: Any, defaults: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Plain JSON without what is null, and without what the recipe has by default: a release that adds a key to recipes does not make another run
    of the same inputs.

    >>> _known({"data": "0fe1", "recipe": {"epochs": 2.5, "compile": False, "distillation": None}})
    {'data': '0fe1', 'recipe': {'epochs': 2.5}}
    """
    if not isinstance(value, dict):
        return value
    inner = {"recipe": Recipe.model_validate({}).model_dump(mode="json")}
    given = {key: each for key, each in value.items() if each is not None and each != defaults.get(key)}
    return {key: _known(each, inner.get(key, {})) for key, each in given.items()}


@contextlib.contextmanager
def result(config: Config, run: str, scratch: Path) -> Iterator[Path]:
    """A folder with the files of a run that has ended. If the block raises, the run stays and can be resumed. Otherwise it is removed."""
    store = Store(config.store)
    prefix = f"runs/{run}/{RESULT}"
    if store.local_root is None:
        for name in store.children(prefix):
            store.download(f"{prefix}/{name}", scratch / name)
    try:
        yield store.local_root / prefix if store.local_root else scratch
    except BaseException:
        print(f"the run is kept: --resume {run}", flush=True)
        raise
    store.remove(f"runs/{run}")
