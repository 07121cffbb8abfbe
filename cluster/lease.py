"""The lease: the slots that Ray Train must leave to serving. The only file that touches Ray's private API; a contract test names Ray 2.60.

An elastic run of Ray Train is as large as Ray's AutoscalingCoordinator reserves for it. The coordinator divides the nodes' *totals* among
those who ask it, and Serve does not: so a run takes slots into account on which replicas run already, and waits for ever to start there.
So control asks in serving's name, above every run's priority
(``ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py`` in 2.60). Our own jobs take what `cluster.tide` gives them, and
what they hold or wait for is asked for with it: the lease keeps runs off that others start on the pool, and since the coordinator passes
on what it is asked for, Ray's autoscaler adds a machine for a job that has no room.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import time
from types import SimpleNamespace
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator  # pyright: ignore[reportPrivateImportUsage]

REQUESTER = "springtide-serving"
PRIORITY = SimpleNamespace(value=100)
"""Ray Train asks with 10; the coordinator reads nothing but ``value``."""
EXPIRES_S = 60
"""When the lease ends by itself, should nobody be left to renew it."""
RENEW_S = 15
ANSWER_S = 5


class Lease:
    """Whoever holds it renews it."""

    def __init__(self, resource: str) -> None:
        """``resource``: what a slot is to Ray, ``slot`` or ``GPU``."""
        self.resource = resource
        self.slots = -1
        self.renewed_s = float("-inf")

    def hold(self, slots: int) -> None:
        """Reserve this many slots. Cheap where nothing changed; raises what Ray raises where the coordinator does not answer."""
        now_s = time.monotonic()
        if slots == self.slots and now_s - self.renewed_s < RENEW_S:
            return
        actor: Any = coordinator.get_or_create_autoscaling_coordinator()
        bundles = [{self.resource: 1.0} for _ in range(slots)]
        asked = actor.request_resources.remote(
            requester_id=REQUESTER, resources=bundles, expire_after_s=EXPIRES_S, priority=PRIORITY
        )
        ray.get(asked, timeout=ANSWER_S)
        self.slots, self.renewed_s = slots, now_s
