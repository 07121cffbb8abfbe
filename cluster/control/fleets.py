"""Reconciles one fleet: its Serve application exists, its replicas host the right weights and hold the right adapters, a surge stands in
where they cannot host two versions at once, and gateways route by what is there.

Twice a second, and whenever a replica or an alias has changed, the fleet's desired state (the store) is compared with its actual state (what
its replicas report), and the smallest step towards it is taken. A step that takes long is an order, heard of later.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from cluster.control import adapters
from cluster.control.announcing import Announcer
from cluster.control.applications import Applications, surge_app
from cluster.control.desired import Desired
from cluster.control.hosting import Fleet, Hosting
from cluster.control.slots import slots
from cluster.errors import SpringtideError
from cluster.publishing import placement, rollout
from cluster.publishing.placement import SurgeFacts
from cluster.types import HoldOrder, ReplicaBounds, ReplicaState, VersionId, is_interim

TURN_S = 0.5
RETRY_REFUSED_S = 30
"""How often a replica is asked again for what it has refused."""


class FleetReconciler:
    """Used by the loop's thread only."""

    def __init__(self, hosting: Hosting, announcer: Announcer, ceilings: Callable[[], dict[str, int | None]] = dict) -> None:
        """``ceilings``: fleet → the most replicas that the arbiter lets it have now."""
        self.hosting = hosting
        self.announcer = announcer
        self.ceilings = ceilings

    @property
    def desired(self) -> Desired:
        return self.hosting.desired

    @property
    def applications(self) -> Applications:
        return self.hosting.applications

    def reconcile(self, name: str) -> float | None:
        """One turn for one fleet; the seconds until the next, None where the fleet is no more."""
        fleet = self.hosting.fleets.get(name)
        if fleet is None:
            return None
        self.hosting.count()
        if not self.applications.read:
            return TURN_S  # nothing is known of Serve yet: what seems to be missing may be there
        if fleet.removed:
            return self._remove(fleet)
        if not fleet.declared and fleet.app not in self.applications.known:
            self.applications.start_fleet(fleet.spec)
        self._host(fleet)
        return TURN_S

    def _remove(self, fleet: Fleet) -> float | None:
        """Its replicas finish their streams and give their slots back; then the fleet is forgotten."""
        for app in fleet.apps:
            if self.applications.there(app):
                self.applications.end(app)
        self.announcer.announce()
        if any(app in self.applications.known for app in fleet.apps):
            return TURN_S
        self.hosting.remove(fleet.name)
        return None

    def _host(self, fleet: Fleet) -> None:
        self.hosting.interims.expire(time.monotonic())
        fleet.retrying = time.monotonic() >= fleet.retry_refused_s
        fleet.retry_refused_s = time.monotonic() + RETRY_REFUSED_S if fleet.retrying else fleet.retry_refused_s
        chosen = self._choose(fleet)
        adapters.place(self.hosting, fleet)
        told = self.announcer.announce()
        self._load(fleet)
        self._bound(fleet)
        # Not before the gateways know, or requests would arrive at a replica that swaps its weights, or is gone.
        if told and chosen:
            self._surge(fleet)
            self._swap(fleet)

    def _choose(self, fleet: Fleet) -> bool:
        """Choose the fleet's surge and its next swap. False where the rollout of its alias cannot be read: both stay as they were, the
        gateways still hear of every replica that comes and goes, and the alias's own reconciler says why."""
        try:
            self._find_surge(fleet)
            fleet.surge_wanted = self._choose_surge(fleet)
            targets = self.hosting.targets(fleet, fleet.model)
            own = self.hosting.own(fleet)
            fleet.swap = placement.next_swap(own, targets, lambda r, id: self._may_take(fleet, r, id), fleet.swap)
        except (SpringtideError, ValueError):
            return False
        return True

    # the surge

    def _find_surge(self, fleet: Fleet) -> None:
        """One that a control before this one has started; one that is not needed any more is ended like any other."""
        if fleet.surge is None and (weights := self.applications.surge_of(fleet.name)):
            fleet.surge, fleet.surge_size = weights, 1

    def _choose_surge(self, fleet: Fleet) -> VersionId | None:
        own, now = self.hosting.own(fleet), self.desired.rollout(fleet.model)
        held = frozenset(id for replica in own for id in replica.held)
        under_way = now is not None and now.stage in rollout.UNDER_WAY
        needed = self.hosting.needs_surge(fleet, now) if now and under_way else ""
        ready = bool(now and under_way and placement.warmth(own, self.desired.manifest(now.version)).complete)
        facts = SurgeFacts(fleet.surge, held, self.desired.move(fleet.model), now, needed, ready)
        return placement.surge_weights(facts, self.desired.weights)

    def _surge(self, fleet: Fleet) -> None:
        """Let the surge be what was chosen."""
        if fleet.surge_wanted == fleet.surge:
            return
        if fleet.surge:
            self.applications.end(fleet.surge_app)
            fleet.surge, fleet.surge_size = None, 0
        if fleet.surge_wanted and self.applications.known.get(surge_app(fleet.name, fleet.surge_wanted)) is None:
            room = int(slots(self.hosting.config.pool.accelerator)["free"] // fleet.spec.fleet.tensor_parallel_size)
            size = max(1, min(len(self.hosting.own(fleet)), room))
            self.applications.start_surge(fleet.spec, fleet.surge_wanted, size)
            fleet.surge, fleet.surge_size = fleet.surge_wanted, size
        self.hosting.count()

    # how many there may be

    def _bound(self, fleet: Fleet) -> None:
        """Tell the fleet's bounds to those of its replicas that say others. They repeat them to Serve's autoscaler with their load
        (`deployments.autoscaling`), which asks for no fewer replicas and no more."""
        needed = min(adapters.place(self.hosting, fleet).replicas_needed, fleet.spec.fleet.max_replicas)
        fleet.bounds = ReplicaBounds(needed if needed > 1 else 0, self.ceilings().get(fleet.name))
        if stale := tuple(one.id for one in self.hosting.own(fleet) if one.bounds != fleet.bounds):
            fleet.orders.bound(fleet.bounds, stale)

    # what replicas hold

    def _load(self, fleet: Fleet) -> None:
        """Order what clients may get and a replica must hold and does not. What a replica has refused it is asked for again every
        `RETRY_REFUSED_S`. Order it to let go of interim versions that no run needs any more.

        What was live before stays where it is held, and is not ordered again where it had to make room.
        """
        digests = {str(id): self.desired.manifest(id).digest for id in self.hosting.wanted_of(fleet)}
        assigned = adapters.place(self.hosting, fleet).assigned
        orders: dict[str, HoldOrder] = {}
        for one in self.hosting.all_of(fleet):
            if one.id in assigned:
                lacking, over = self._lacking(fleet, one, assigned[one.id], digests), self._over(one, assigned[one.id])
                stays = () if self.hosting.interims.complete(time.monotonic()) else over
                if lacking or over != stays:
                    orders[one.id] = HoldOrder(lacking, (*assigned[one.id], *stays))
        if orders:
            fleet.orders.hold(orders)

    def _over(self, replica: ReplicaState, assigned: Iterable[str]) -> tuple[str, ...]:
        """The interim versions that the replica holds and no run needs, as far as control knows."""
        return tuple(id for id in replica.held if is_interim(id) and id not in assigned)

    def _lacking(self, fleet: Fleet, replica: ReplicaState, ids: Iterable[str], digests: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(
            id for id in ids if placement.lacks(replica, id, digests.get(id)) and (fleet.retrying or id not in replica.refused)
        )

    def _may_take(self, fleet: Fleet, replica: ReplicaState, weights: str) -> bool:
        """What a replica has refused it is asked for again when no rollout is waiting to hear of it."""
        now = self.desired.rollout(fleet.model)
        again = fleet.retrying and (now is None or now.stage not in rollout.UNDER_WAY)
        return again or weights not in replica.refused or fleet.orders.swapping(replica.id, weights)

    def _swap(self, fleet: Fleet) -> None:
        if fleet.swap is None:
            return
        known = {replica.base: replica.fingerprint for replica in self.hosting.all_of(fleet)}
        now, weights = self.desired.rollout(fleet.model), str(fleet.swap.weights)
        # What is live now is bad, where the rollout goes back: streams by it must not hold up the way back.
        cut_streams = now is not None and (now.stage == "rolled_back" or now.is_rollback)
        fleet.orders.swap(fleet.swap.replica, weights, known.get(weights, ""), cut_streams)
