"""``python -m tests.carrying STORE VERSION FOLDER``: carry a version to three processes of the pool as control carries it to replicas.

Each has a cache of its own, as machines have. Prints what each found.
"""

# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
import json
import os
import sys
from pathlib import Path
from typing import Any

import ray

from cluster import config as configuration
from cluster.control import weight_distribution
from cluster.pool import local
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import VersionId


def arrive(url: str, id: str, carried: Any, cache: str) -> str:
    """What a replica does with the order: take the files, and check every digest."""
    weight_distribution.unpack(carried, Path(cache))
    registry = Registry(Store(url))
    return str(registry.fetch(registry.manifest(VersionId.parse(id)), Path(cache)))


def run(url: str, id: str, folder: str) -> None:
    running = local.require(local.remembered(configuration.load()))
    bucket = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    ray.init(address=running.address, log_to_driver=False, runtime_env={"env_vars": {**bucket, "PYTHONPATH": os.getcwd()}})
    registry = Registry(Store(url))
    carried = weight_distribution.load(registry, [registry.manifest(VersionId.parse(id))], Path(folder) / "control")
    remote = ray.remote(num_cpus=0)(arrive)
    print(json.dumps(ray.get([remote.remote(url, id, carried, f"{folder}/machine-{n}") for n in range(3)])))


if __name__ == "__main__":
    run(*sys.argv[1:])
