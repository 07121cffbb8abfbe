"""Builds the view that gateways route by, from what every fleet's replicas hold, and announces it.

A gateway hears of a version only when a replica holds it, or when requests for it may wait.
"""

import time
from collections.abc import Callable

from cluster.control.applications import surge_app
from cluster.control.gateways import Gateways
from cluster.control.hosting import Fleet, Hosting
from cluster.control.replicas import SILENT_S
from cluster.publishing import placement
from cluster.publishing.placement import Holders
from cluster.types import FleetState, Generation, ReplicaState, VersionId


class Announcer:
    """Used by the loop's thread only."""

    def __init__(self, hosting: Hosting, gateways: Gateways, failed: Callable[[str], str] = lambda _: "") -> None:
        """``failed``: Serve application → why none of its replicas can start now; empty where one can."""
        self.hosting = hosting
        self.gateways = gateways
        self.failed = failed
        self.began_s = time.monotonic()

    def announce(self) -> bool:
        """Tell the gateways what all fleets can answer now. False where a gateway did not answer."""
        open_ = {name: self._open(fleet) for name, fleet in self.hosting.fleets.items()}
        alias_fleets = {alias: name or "" for alias, name in self.hosting.assigned().items()}
        holders = {name: placement.count_holders(some) for name, some in {"": (), **open_}.items()}  # "": aliases without a fleet
        aliases = {alias: self._routable(alias, name, holders[name]) for alias, name in alias_fleets.items()}
        replicas = tuple(replica for some in open_.values() for replica in some)
        return self.gateways.announce(aliases, replicas, self._fleets(), alias_fleets, self._asleep())

    def _asleep(self) -> bool:
        """Whether no replica of any fleet runs: none has reported for long enough, and Serve knows of none. A control that has just started
        would else wait for a report that nobody sends, and a gateway that starts then would know of no fleet to wake."""
        if time.monotonic() - self.began_s < SILENT_S:
            return False
        known = (self.hosting.applications.known.get(app) for fleet in self.hosting.fleets.values() for app in fleet.apps)
        return not any(app.running or app.starting for app in known if app)

    def _routable(self, alias: str, fleet: str, holders: Holders) -> Generation:
        copies = self.hosting.fleets[fleet].placement.copies if fleet in self.hosting.fleets else {}
        announced = self.gateways.current.aliases.get(alias)
        return placement.routable(self.hosting.desired.moves[alias], holders, announced, copies)

    def _open(self, fleet: Fleet) -> tuple[ReplicaState, ...]:
        """The fleet's replicas as gateways should see them: one that swaps its weights answers for nothing until it has."""
        surge = self.hosting.replicas.of(app) if (app := answering_surge(fleet)) else ()
        swap = fleet.swap
        own = self.hosting.own(fleet)
        swapping = {one.id for one in own if swap and one.id == swap.replica and one.base != str(swap.weights)}
        return tuple(one._replace(held={}) if one.id in swapping else one for one in (*own, *surge))

    def _fleets(self) -> dict[str, FleetState]:
        """Each fleet with what it answers for once it runs."""
        moves = self.hosting.readable_moves(self.hosting.desired.moves)
        return {fleet.name: self._state(fleet, moves) for fleet in self.hosting.there}

    def _state(self, fleet: Fleet, moves: dict[str, Generation]) -> FleetState:
        """While it sleeps, what its replicas held last is what they will hold again: adapters that were live before are kept on them."""
        state = placement.fleet_state(fleet.name, fleet.model, fleet.app, moves, self.hosting.desired.weights)
        own = self.hosting.own(fleet)
        fleet.last_held = frozenset(id for one in own for id in one.held) if own else fleet.last_held
        kept = () if own else (id for id in fleet.last_held if str(self.hosting.weights(VersionId.parse(id))) in state.versions)
        interims = map(str, self.hosting.interims_of(fleet))  # a request for one may wait until a replica holds it
        versions, task = tuple(sorted({*state.versions, *kept, *interims})), fleet.spec.fleet.task
        failed = "" if own else self.failed(fleet.app)
        return state._replace(versions=versions, surge=answering_surge(fleet), task=task, failed=failed)


def answering_surge(fleet: Fleet) -> str:
    """The Serve application of the surge that answers for the fleet; empty where none should. One that is not wanted any more drains."""
    return surge_app(fleet.name, fleet.surge_wanted) if fleet.surge_wanted else ""
