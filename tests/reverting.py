"""``python -m tests.reverting VERSION``: let a replica take weights over that turn out not to be what another replica has.

Prints the replica's state afterwards.
"""

import json
import sys

import ray

from cluster import config as configuration
from cluster.control.broadcast import broadcast
from cluster.control.describe import public
from cluster.pool import graph, local


def run(id: str) -> None:
    config = local.remembered(configuration.load())
    ray.init(address=local.require(config).address, log_to_driver=False)
    app = graph.fleet_app(config.default_fleet)
    (before,) = broadcast(app, "hold", [id], {}, timeout_s=60)
    (after,) = broadcast(app, "become", before.id, id, "0" * 64, timeout_s=60)
    print(json.dumps(public(after)))


if __name__ == "__main__":
    run(*sys.argv[1:])
