"""Ray's private API for what its autoscaler is asked for. `cluster.control.lease` decides what that is. Contract tests name Ray 2.60.

What this file relies on, in Ray 2.60:

- **Ray Train and the AutoscalingCoordinator** (``ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py``). An elastic
  run of Ray Train is as large as the coordinator reserves for it. The coordinator divides the nodes' *totals* among those who ask it, and
  Serve does not ask. So a run would count slots on which replicas already run, and wait for ever to start there. A request in serving's
  name, with a higher priority than any run's, keeps runs off.
- **One request for all.** The coordinator merges everybody's requests into one and passes it on to Ray's autoscaler
  (``_merge_and_send_requests``). If not all of it fits, the autoscaler adds nothing for anybody (``_enforce_resource_constraints`` in
  ``ray/autoscaler/v2/scheduler.py``).
- **Which machines it keeps.** The autoscaler keeps every machine on which it has put a part of a request, and puts a part where it leaves
  the least over, whether the slot is in use or not (``_compute_score`` there). So a request has to say where it is not meant to be.
- **What it refused.** It does not say how large the pool can become. Ray has a place for that (``get_cluster_config`` in
  ``ray/_private/state.py``), but no autoscaler of the open Ray fills it. It does say which request it refused (``GetClusterStatusReply``).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import ray
import ray._private.state as cluster_state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue, reportMissingTypeStubs]
from ray.exceptions import RpcError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

REQUESTER = "springtide-serving"
PRIORITY = SimpleNamespace(value=100)
"""Ray Train asks with 10. The coordinator reads nothing but ``value``."""
EXPIRES_S = 60
"""A request that nobody renews ends after this."""
ANSWER_S = 5
STATUS_S = 1
"""The slot loop waits for the autoscaler's status, so not for long."""


def request(resource: str, selectors: list[dict[str, str]]) -> None:
    """Ask for one ``resource`` for each label selector, in place of what was asked for before. Raises what Ray raises if the coordinator
    does not answer."""
    # Imported here: whoever has a handle of control imports this module with it, and Ray Data needs pandas (`cluster.pool.lean`).
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator  # pyright: ignore[reportPrivateImportUsage]

    actor: Any = coordinator.get_or_create_autoscaling_coordinator()
    asked = actor.request_resources.remote(
        requester_id=REQUESTER,
        resources=[{resource: 1.0} for _ in selectors],
        expire_after_s=EXPIRES_S,
        priority=PRIORITY,
        label_selectors=selectors,
    )
    ray.get(asked, timeout=ANSWER_S)


def status() -> Any:
    """What Ray's autoscaler is asked for, and what it says of it. None while Ray is away or slow."""
    client: Any = internal_kv_get_gcs_client()
    try:
        return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=STATUS_S))
    except RpcError:
        return None


def version(status: Any) -> int:
    """The version of the cluster's state that a status is about. Ray counts on, and from 0 again after a restart."""
    return status.cluster_resource_state.cluster_resource_state_version


def refused(status: Any, resource: str, slots: int, since: int) -> bool | None:
    """Whether the autoscaler refuses our ``slots``: the machines that it may add are not enough for what it is asked for now.

    None means that the status does not tell, in one of these cases: the autoscaler refused an earlier request, or one with other people's
    parts in it, or it has not yet seen the cluster's state ``since`` we asked, or there is no autoscaler.
    """
    asked = status.cluster_resource_state.cluster_resource_constraints
    refusals = list(status.autoscaling_state.infeasible_cluster_resource_constraints)
    if refusals:
        return True if any(one in asked and _ours(one, resource, slots) for one in refusals) else None
    return False if status.autoscaling_state.last_seen_cluster_resource_state_version >= since else None


def _ours(request: Any, resource: str, slots: int) -> bool:
    """Whether a request asks for our ``slots`` and nothing else. One with other people's parts may be refused because of those, and asking
    for less of our own would not help."""
    parts = request.resource_requests
    return sum(part.count for part in parts) == slots and all(
        dict(part.request.resources_bundle) == {resource: 1.0} for part in parts
    )


class NodeSlots(NamedTuple):
    """One node's slots."""

    total: float
    free: float

    @property
    def in_use(self) -> int:
        """By anybody."""
        return math.ceil(round(self.total - self.free, 3))


def slots_of_nodes(resource: str) -> dict[str, NodeSlots]:
    """Each node that has slots."""
    free: dict[str, dict[str, float]] = cluster_state.available_resources_per_node()
    total = cluster_state.total_resources_per_node()
    return {
        node: NodeSlots(has[resource], free[node].get(resource, 0.0))
        for node, has in total.items()
        if has.get(resource) and node in free
    }
