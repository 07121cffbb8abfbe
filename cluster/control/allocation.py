"""The slot loop: count what serving and jobs hold and want, divide the slots, take the lease, and say so to whoever measures.

A loop of its own, because a slot's way from training to serving must not wait for a store or a gateway. It turns three times a second while
slots may change hands, and once a second while nothing is trained and no replica comes or goes: each turn asks Serve's controller and Ray's
head, which share their processors with engines.
"""

import threading
import time
from typing import Any

from cluster import logs
from cluster.capacity.allocator import Allocator, Grant, Heartbeat
from cluster.capacity.arbiter import SERVING, Budget, FleetDemand
from cluster.capacity.ceiling import room
from cluster.config import FleetSpec
from cluster.control import clock, metrics, ray_autoscaling
from cluster.control.applications import Applications
from cluster.control.lease import Lease
from cluster.control.slots import Served, ServingFleet, resource, served, slots, together

TURN_S, REST_S = 0.3, 1.0
"""The pause between two turns while slots may change hands, and otherwise."""

log = logs.logger(__name__)


class Allocation:
    """Which job may have how many slots, and how many serving keeps."""

    def __init__(self, accelerator: str, budget: Budget, applications: Applications) -> None:
        self.accelerator = accelerator
        self.applications = applications
        self.allocator = Allocator(budget, clock.now_s())
        self.lease = Lease(resource(accelerator))
        self.board = metrics.Board()
        self.serving: tuple[ServingFleet, ...] = ()
        self.ceiling: int | None = None
        """The most slots that Ray's autoscaler gives, as far as the last turn knew; see `Lease.ceiling`."""
        self._lock = threading.Lock()
        """Around the allocator. Nobody is asked for anything while it is held."""
        self._wake = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="slots-loop").start()

    def configure(self, accelerator: str, budget: Budget) -> None:
        with self._lock:
            if accelerator != self.accelerator:
                self.accelerator, self.lease = accelerator, Lease(resource(accelerator))
            self.allocator.budget = budget

    def watch(self, serving: tuple[ServingFleet, ...]) -> None:
        """Count these fleets from now on."""
        if serving != self.serving:
            self.serving = serving
            self._wake.set()

    def ceilings(self) -> dict[str, int | None]:
        """Fleet → the most replicas that it may have now; None where nothing but its own ``max_replicas`` limits it."""
        return {grant.name: grant.ceiling for grant in self.allocator.decision.fleets}

    # from jobs and for whoever looks

    def heartbeat(self, beat: Heartbeat) -> Grant:
        with self._lock:
            first = not self.allocator.heartbeats
            grant = self.allocator.heartbeat(beat, clock.now_s())
        if first:
            self._wake.set()
        return grant

    def leave(self, job: str, driver: str) -> None:
        with self._lock:
            self.allocator.end(job, driver)

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return self.allocator.describe()

    def since(self, since_s: float) -> dict[str, Any]:
        """``{"allocation", "snapshots", "slots"}``: how the slots are divided, and each change after ``since_s`` (seconds since the epoch), as
        `cluster.capacity.handover.parse` reads it."""
        with self._lock:
            allocation = self.allocator.describe()
            snapshots = [[*one[:-1], [list(job) for job in one.jobs]] for one in self.allocator.since(since_s)]
        return {"allocation": allocation, "snapshots": snapshots, "slots": self.slots()}

    def slots(self) -> dict[str, float]:
        return slots(self.accelerator)

    def room(self) -> int | None:
        """The slots that the pool has or may come to have; None where no limit is known."""
        return room(int(self.slots()["total"]), self.ceiling, self.lease.grows)

    @property
    def jobs_hold_slots(self) -> bool:
        return any(granted for owner, granted in self.allocator.decision.past.grants if owner != SERVING)

    # the loop

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except Exception:
                # Serve or the coordinator is away for a moment; grants stay as they are, and the loop must go on.
                log.exception("a turn of the allocator")
            time.sleep(TURN_S)
            self._wake.wait(0 if self._slots_may_change_hands else REST_S - TURN_S)
            self._wake.clear()

    @property
    def _slots_may_change_hands(self) -> bool:
        return bool(self.allocator.heartbeats) or not all(app.steady for app in self.applications.known.values())

    def _turn(self) -> None:
        self.applications.refresh()
        lease, nodes = self.lease, ray_autoscaling.slots_of_nodes(resource(self.accelerator))
        total, free = int(sum(node.total for node in nodes.values())), int(sum(node.free for node in nodes.values()))
        of_fleets = {one.spec.name: self._served(one) for one in self.serving}
        demands = [demand(one.spec, of_fleets[one.spec.name], one.floor) for one in self.serving]
        self.ceiling = ceiling = lease.ceiling(total)
        with self._lock:
            held = together(of_fleets.values()).held(total - free, self.allocator.held_by_jobs)
            kept = self.allocator.turn(total, held, demands, clock.now_s(), free, ceiling)
            requested = self.allocator.requested(kept, ceiling)
        metrics.publish(self.board, self.allocator.snapshots, self.allocator.changes, self.allocator.decision.fleets)
        lease.hold(kept + requested, ceiling, {node: slots.in_use for node, slots in nodes.items()})

    def _served(self, one: ServingFleet) -> Served:
        return together(served(self.applications.known.get(app), one.spec.fleet.tensor_parallel_size) for app in one.apps)


def demand(spec: FleetSpec, now: Served, adapters_floor: int = 0) -> FleetDemand:
    """What a fleet asks for. Its load policy runs in Serve, so what Serve has and starts is what the load asks for.

    Its floor is ``min_replicas``, or the replicas that its adapters need where these are more (``adapters_floor``): no other fleet's load may
    leave an adapter without a replica. Serve keeps ``min_replicas`` by itself, so where it wants fewer they are not in force yet, or any
    more. The adapters' floor it hears of together with the ceiling, which may hold it down: that floor counts while the fleet is awake.
    """
    slots = spec.fleet.tensor_parallel_size
    floor = max(min(now.wanted, spec.fleet.min_replicas * slots), adapters_floor * slots if now.wanted else 0)
    return FleetDemand(spec.name, spec.fleet.priority, now.wanted, floor, slots)
