"""The lease: the slots that Ray Train must leave to serving.

With `deployments/ray_patches.py` the only file that touches Ray's private API; contract tests name Ray 2.60.

An elastic run of Ray Train is as large as Ray's AutoscalingCoordinator reserves for it. The coordinator divides the nodes' *totals* among
those who ask it, and Serve does not: so a run takes slots into account on which replicas run already, and waits for ever to start there. So
control asks in serving's name, above every run's priority (``ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py`` in
2.60). Our own jobs take what `cluster.capacity.allocator` gives them, and what they hold or wait for is asked for with it: the lease keeps
runs off that others start on the pool, and since the coordinator passes on what it is asked for, Ray's autoscaler adds a machine for a job
that has no room.

What is asked for says where it is not: on nodes without a slot in use. Ray's autoscaler keeps every machine on which it has put a part of a
request, and puts it where it leaves the least over, in use or not (``_compute_score`` in ``ray/autoscaler/v2/scheduler.py``): it would keep
an idle machine in the place of one that works and stays anyway. The coordinator passes that on, and does not read it.

All of what is asked for is one request to Ray's autoscaler: where not all of it fits, it adds nothing for anybody
(``_enforce_resource_constraints`` there). How large the pool can become it keeps to itself (Ray has a place for that,
``get_cluster_config`` in ``ray/_private/state.py``, and no autoscaler of the open Ray fills it). But it says which request it refuses, so
what the pool can have is learnt from that (`cluster.capacity.ceiling`).

The coordinator merges the requests of all who ask it into one (``_merge_and_send_requests``). One that is refused may be too large because
of somebody else's part, and nothing is learnt from that: asking for less of our own would not help.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import math
import time
from types import SimpleNamespace
from typing import Any

import ray
import ray._private.state as cluster_state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue, reportMissingTypeStubs]
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator  # pyright: ignore[reportPrivateImportUsage]
from ray.exceptions import RpcError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from cluster.capacity.ceiling import Ceiling

REQUESTER = "springtide-serving"
PRIORITY = SimpleNamespace(value=100)
"""Ray Train asks with 10; the coordinator reads nothing but ``value``."""
EXPIRES_S = 60
"""When the lease ends by itself, should nobody be left to renew it."""
RENEW_S = 15
ANSWER_S = 5
STATUS_S = 1
"""How long is waited for the autoscaler's words: the turn in which they are asked for waits too."""
LISTEN_S = 5
"""How often is looked whether the request was refused; the autoscaler decides as often, unless told otherwise."""
REFUSED_S = 300
"""How long a refusal counts. Somebody may have allowed more machines since, so it is tried again, and nobody gets one until that is refused."""
NODE = "ray.io/node-id"
"""A label that Ray gives every node."""
IDLE_NODES = 64
"""How many are named at once; the next ones when these are gone. The autoscaler compares every slot of a request with every node."""


class Lease:
    """Whoever holds it renews it."""

    def __init__(self, resource: str) -> None:
        """``resource``: what a slot is to Ray, ``slot`` or ``GPU``."""
        self.resource = resource
        self.places: list[dict[str, str]] | None = None
        self.renewed_s = self.heard_s = self.refused_s = float("-inf")
        self.known = Ceiling()
        self.allowed: int | None = None
        """The most that might be asked for when ``places`` were."""
        self.since: int | None = None
        """The first version of the cluster's state, as Ray counts them, that was seen when as many slots as now were asked for."""

    def ceiling(self, total: int) -> int | None:
        """The most slots that may be asked for, of a pool that has ``total`` now. None where nothing was refused."""
        now_s = time.monotonic()
        self.known = self.known.has(total)
        if self.places and now_s - self.heard_s >= LISTEN_S:
            self.heard_s = now_s
            self._listen(len(self.places), total, now_s)
        return self.known.slots(retry=now_s - self.refused_s >= REFUSED_S)

    def _listen(self, asked: int, total: int, now_s: float) -> None:
        try:
            told = status()
        except RpcError:
            return  # Ray is away or slow; what is known still holds, and serving's turn must not be missed for want of news
        version: int = told.cluster_resource_state.cluster_resource_state_version
        self.since = version if self.since is None else min(self.since, version)  # Ray counts from 0 again when it is restarted
        refused = answer(told, self.resource, asked, self.since)
        if refused:
            self.known, self.refused_s = self.known.refused(asked, total), now_s
        elif refused is not None:
            self.known = self.known.granted(asked, self.allowed)

    def hold(self, slots: int, most: int | None) -> None:
        """Reserve this many slots, of ``most`` that might be asked for. Cheap where nothing changed; raises what Ray raises where the
        coordinator does not answer."""
        now_s, places = time.monotonic(), placed(slots, in_use(self.resource))
        if places == self.places and now_s - self.renewed_s < RENEW_S:
            self.allowed = most
            return
        actor: Any = coordinator.get_or_create_autoscaling_coordinator()
        bundles = [{self.resource: 1.0} for _ in places]
        asked = actor.request_resources.remote(
            requester_id=REQUESTER, resources=bundles, expire_after_s=EXPIRES_S, priority=PRIORITY, label_selectors=places
        )
        ray.get(asked, timeout=ANSWER_S)
        if len(places) != len(self.places or []):
            self.since = None
        self.places, self.allowed, self.renewed_s = places, most, now_s


def status() -> Any:
    """What Ray's autoscaler is asked for, and what it says of it."""
    client: Any = internal_kv_get_gcs_client()
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=STATUS_S))


def answer(status: Any, resource: str, slots: int, since: int) -> bool | None:
    """Whether Ray's autoscaler refuses our ``slots``: no machines that it may add are enough for what it is asked for at this moment. None
    where it does not tell: it refused an earlier request or one in which others ask too, has not seen any state of the cluster ``since``
    we asked, or there is no autoscaler."""
    asked = status.cluster_resource_state.cluster_resource_constraints
    refused = list(status.autoscaling_state.infeasible_cluster_resource_constraints)
    if refused:
        return True if any(request in asked and ours(request, resource, slots) for request in refused) else None
    return False if status.autoscaling_state.last_seen_cluster_resource_state_version >= since else None


def ours(request: Any, resource: str, slots: int) -> bool:
    """Whether a request asks for our ``slots`` and nothing else. Others may ask for other things than slots, and be refused for them."""
    parts = request.resource_requests
    return sum(part.count for part in parts) == slots and all(
        dict(part.request.resources_bundle) == {resource: 1.0} for part in parts
    )


def placed(slots: int, used: dict[str, int]) -> list[dict[str, str]]:
    """A label selector for each slot: not on an idle node for those that are in use, and anywhere for those that are not yet.

    >>> placed(3, {"a": 0, "b": 2})
    [{'ray.io/node-id': '!in(a)'}, {'ray.io/node-id': '!in(a)'}, {}]
    """
    idle = sorted(node for node, slots_in_use in used.items() if not slots_in_use)[:IDLE_NODES]
    elsewhere = {NODE: f"!in({','.join(idle)})"} if idle else {}
    settled = min(slots, sum(used.values()))
    return [*(elsewhere for _ in range(settled)), *({} for _ in range(slots - settled))]


def in_use(resource: str) -> dict[str, int]:
    """Node that has any → slots on which something runs, whoever's it is."""
    free: dict[str, dict[str, float]] = cluster_state.available_resources_per_node()
    total = cluster_state.total_resources_per_node()
    there = {node: has[resource] for node, has in total.items() if has.get(resource) and node in free}
    return {node: math.ceil(round(slots - free[node].get(resource, 0), 3)) for node, slots in there.items()}
