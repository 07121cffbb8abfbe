"""A run in the store: begun under a name, resumed by it, and what it leaves when it has ended."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import BadRequest
from cluster.store.objects import Store
from cluster.types import check_name
from jobs.training.worker import RESULT

ABOUT = "about.json"


def begun(store: Store, name: str, of: dict[str, Any]) -> str:
    """Begin the run ``name``, which is the id of its job. ``of``: what it consists of, in plain JSON values, so that `resumed` can compare."""
    store.put_new(f"runs/{check_name(name)}/{ABOUT}", json.dumps(of, sort_keys=True).encode())
    print(f"run {name}", flush=True)
    return name


def resumed(store: Store, name: str, of: dict[str, Any]) -> str:
    """The name of a run that was begun. Raises `BadRequest` where there is none, or where it was of something else."""
    about = store.get(f"runs/{check_name(name)}/{ABOUT}")
    if about is None:
        raise BadRequest(f"There is no run {name}.", "One that ended, or was cancelled, leaves nothing to go on from.", "resume")
    before, now = json.loads(about), json.loads(json.dumps(of))
    if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        was = "; ".join(f"{key} {before.get(key)}" for key in other)
        words = f"The run {name} was begun with another {', '.join(other)}."
        raise BadRequest(words, f"Give it what it was begun with: {was}.", "resume")
    print(f"run {name}", flush=True)
    return name


@contextlib.contextmanager
def result(config: Config, run: str, scratch: Path) -> Iterator[Path]:
    """A folder with the run's files. Nothing is left of the run afterwards, unless they could not be used: then it can be resumed."""
    store = Store(config.store)
    prefix = f"runs/{run}/{RESULT}"
    if store.local_root is None:
        for name in store.children(prefix):
            store.download(f"{prefix}/{name}", scratch / name)
    try:
        yield store.local_root / prefix if store.local_root else scratch
    except BaseException:
        print(f"what was learnt is kept: --resume {run}", flush=True)
        raise
    store.remove(f"runs/{run}")
