"""One more node of a pool, on this machine, until it is ended: ``python -m tests.joined GCS_ADDRESS SLOTS``.

As `ray.cluster_utils.Cluster.add_node` starts one, but with the agents' ports chosen here: a raylet that is not told them waits 15 s for the
files in which its agents say them, which take longer to start on a busy machine, and then ends ("Timed out waiting for file").
``ray start --address`` will not, since a pool on loopback is for this machine alone.
"""

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.pool import LOOPBACK
from tests.conftest import free_ports


def join(gcs_address: str, slots: int) -> Node:
    agents = ("dashboard_agent_listen_port", "metrics_agent_port", "runtime_env_agent_port", "metrics_export_port")
    ports = {"min_worker_port": 0, "max_worker_port": 0, **dict(zip(agents, free_ports(len(agents)), strict=True))}
    resources = {"num_cpus": 2, "num_gpus": 0, "resources": {"slot": slots}, "object_store_memory": 80 << 20}
    params = RayParams(gcs_address=gcs_address, node_ip_address=LOOPBACK, **ports, **resources)
    return Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)


if __name__ == "__main__":
    node = join(sys.argv[1], int(sys.argv[2]))
    signal.pause()
