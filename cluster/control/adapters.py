"""Which of a fleet's replicas must hold which adapters, as things are now. `cluster.publishing.adapter_placement` decides it."""

from collections.abc import Iterable

from cluster.control.hosting import Fleet, Hosting
from cluster.publishing import adapter_placement
from cluster.publishing.adapter_placement import AdapterPlacement, WantedAdapters
from cluster.types import ReplicaState, VersionId


def place(hosting: Hosting, fleet: Fleet) -> AdapterPlacement:
    """Which of the fleet's replicas, its surge's included, must hold which adapters. Worked out again where a move, a rollout, a run's
    interim version, a replica or the fleet's settings have changed."""
    places, fleets = fleet.spec.fleet.max_cpu_loras, tuple(one.name for one in hosting.there)
    changes = hosting.desired.changes, hosting.interims.changes, hosting.replicas.changes
    known = changes, fleets, fleet.apps, places, hosting.unreadable()
    if fleet.placed_for != known:
        fleet.placement, fleet.placed_for = _place(hosting, fleet, places), known
    return fleet.placement


def _place(hosting: Hosting, fleet: Fleet, places: int) -> AdapterPlacement:
    adapters, alike = wanted(hosting, fleet), dict[tuple[str, str], list[ReplicaState]]()
    for replica in hosting.all_of(fleet):
        alike.setdefault((replica.app, replica.base), []).append(replica)
    groups = ((adapters.get(base, WantedAdapters()), some) for (_, base), some in alike.items())
    return adapter_placement.combine([adapter_placement.assign(own, some, places) for own, some in groups])


def wanted(hosting: Hosting, fleet: Fleet) -> dict[str, WantedAdapters]:
    """Weights → the adapters on them that clients may get, and those of rollouts and runs that the fleet's replicas should hold."""
    live = dict.fromkeys(hosting.live_of(fleet))
    found, coming = _by_weights(hosting, live), _by_weights(hosting, (id for id in hosting.coming_to(fleet) if id not in live))
    return {
        base: WantedAdapters(tuple(found.get(base, ())), tuple(coming.get(base, ()))) for base in found.keys() | coming.keys()
    }


def _by_weights(hosting: Hosting, ids: Iterable[VersionId]) -> dict[str, list[str]]:
    """Weights → those of the versions that are adapters on them."""
    found: dict[str, list[str]] = {}
    for id in ids:
        if (weights := hosting.desired.weights(id)) != id:
            found.setdefault(str(weights), []).append(str(id))
    return found
