"""``python -m tests.reverting VERSION``: let a replica take weights over that turn out not to be what another replica has.

Prints the replica's state afterwards.
"""

import json
import sys
from typing import Any, cast

import ray

from cluster import config as configuration
from cluster.control.broadcast import broadcast
from cluster.control.client import ACTOR, NAMESPACE
from cluster.control.describe import public
from cluster.pool import graph, local
from cluster.types import HoldOrder


def run(id: str) -> None:
    config = local.remembered(configuration.load())
    ray.init(address=local.require(config).address, log_to_driver=False)
    app = graph.fleet_app(config.default_fleet)
    control: Any = ray.get_actor(ACTOR, namespace=NAMESPACE)
    (replica,) = [one["id"] for one in cast(Any, ray.get(control.status.remote()))["replicas"] if one["app"] == app]
    (before,) = (one for one in broadcast(app, "hold", {replica: HoldOrder((id,))}, {}, timeout_s=60) if one)
    (after,) = broadcast(app, "swap_weights", before.id, id, "0" * 64, timeout_s=60)
    print(json.dumps(public(after)))


if __name__ == "__main__":
    run(*sys.argv[1:])
