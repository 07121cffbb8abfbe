"""One more node of a pool, on this machine, until it is ended: ``python -m tests.joined GCS_ADDRESS SLOTS``.

As `ray.cluster_utils.Cluster.add_node` starts one. ``ray start --address`` will not, since a pool on loopback is for this machine alone.
"""

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.address import LOOPBACK


def join(gcs_address: str, slots: int) -> Node:
    ports = {"min_worker_port": 0, "max_worker_port": 0, "dashboard_agent_listen_port": 0, "metrics_export_port": 0}
    resources = {"num_cpus": 2, "num_gpus": 0, "resources": {"slot": slots}, "object_store_memory": 80 << 20}
    params = RayParams(gcs_address=gcs_address, node_ip_address=LOOPBACK, **ports, **resources)
    return Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)


if __name__ == "__main__":
    node = join(sys.argv[1], int(sys.argv[2]))
    signal.pause()
