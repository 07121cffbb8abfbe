"""A pool to which Ray's own autoscaler adds machines, and from which it takes them: ``python -m tests.autoscaled RESOLVED``.

Ray's fake provider starts each machine as another raylet on this one (``ray/autoscaler/_private/fake_multi_node/node_provider.py``), so
everything but the cloud is real. In the place of ``python -m cluster.pool.local``, and ended in the same way.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cluster.config import Config, parse
from cluster.pool import local

IDLE_S = 6
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
NOTHING: dict[str, Any] = {
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{f"{node}_{what}_commands": [] for node in ("head", "worker") for what in ("setup", "start_ray")},
}
"""What a cluster's configuration must have, and this one has no use for."""


def cluster(config: Config) -> dict[str, Any]:
    """One slot at the head, and up to two more machines with one each."""
    head = {"resources": {"CPU": 2, "slot": config.pool.slots}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    more = {
        "resources": {"CPU": 2, "slot": 1, "object_store_memory": 80 << 20},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    return {
        **NOTHING,
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "provider": {
            "type": "external",  # the wheel lacks the defaults of ``fake_multinode``
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": local.address(config),
        },
        "available_node_types": {"ray.head.default": head, "one-slot": more},
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
    }


def supervise(resolved: Path) -> int:
    config = parse(json.loads(resolved.read_text()))
    plan = config.home / "cluster.json"
    plan.write_text(json.dumps(cluster(config)))
    command = local.ray_command
    local.ray_command = lambda config: [*command(config), f"--autoscaling-config={plan}"]
    os.environ.update(ENVIRONMENT)
    return local.supervise(config, resolved)


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
