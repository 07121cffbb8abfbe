"""What a run asks for whose interim versions replicas shall hold. See `cluster.control.interims`."""

import time
from collections.abc import Sequence

from cluster.control import adapters
from cluster.control.gateways import Gateways
from cluster.control.hosting import Fleet, Hosting
from cluster.control.loop import Loop
from cluster.errors import BadRequest, NoReplica, VersionRefused
from cluster.publishing.adapter_placement import WantedAdapters
from cluster.types import Manifest, ReplicaState, VersionId, interim_name

HOLD_S = 30.0
"""How long replicas may take to load an adapter."""


class InterimHolds:
    """Called from many threads at once."""

    def __init__(self, hosting: Hosting, gateways: Gateways, loop: Loop) -> None:
        self.hosting = hosting
        self.gateways = gateways
        self.loop = loop

    def hold(self, run: str, versions: Sequence[str], places: int) -> None:
        """Let the fleet that hosts their base hold these interim versions of a run, and of all that the run has named the newest ``places``.

        Returns when every replica of the fleet holds the newest one and every gateway knows that. At once where the fleet sleeps: a request
        for the version wakes it. Asked again within `cluster.control.interims.EXPIRES_S`, they stay.

        Raises `VersionRefused` where no fleet hosts the base, where its places for adapters are taken, or where a replica refuses the version;
        `NoReplica` where none holds it after `HOLD_S`.
        """
        ids = sorted(map(VersionId.parse, versions))
        if not ids or any(id.name != interim_name(run) for id in ids):
            raise BadRequest(f"{', '.join(versions) or 'nothing'} is no interim version of {run}.", param="model")
        newest = self.hosting.desired.registry.manifest(ids[-1])
        fleet = self.loop.call(lambda: self._need(run, ids, places, newest))
        listed = self.loop.wait(lambda: self._done(fleet, newest), HOLD_S) or self._listed(fleet, newest)
        there = self._replicas(fleet, newest)
        if listed and (not there or any(str(newest.id) in one.held for one in there)):
            return
        if refusal := next((one.refused[str(newest.id)] for one in there if str(newest.id) in one.refused), ""):
            raise VersionRefused(f"The replicas of {fleet.name} refuse {newest.id}: {refusal}")
        raise NoReplica(f"No replica of {fleet.name} holds {newest.id} after {HOLD_S:.0f} s.", "See `springtide status`.")

    def end(self, run: str) -> None:
        """The run needs none of its versions any more."""
        self.loop.call(lambda: self._end(run))

    # in the loop's thread

    def _need(self, run: str, ids: Sequence[VersionId], places: int, newest: Manifest) -> Fleet:
        fleet, interims = self.hosting.fleet_of(newest.id.name, newest.weights), self.hosting.interims
        if fleet is None:
            raise VersionRefused(f"No fleet hosts {newest.weights}.", "Add one: springtide fleets add NAME --model VERSION.")
        before = interims.of(run)
        interims.need(run, ids, min(places, self._room(fleet, newest.weights, run)), time.monotonic())
        for id in set(before) - set(interims.of(run)):
            self.hosting.desired.registry.catalog.forget(id)
        self.loop.add(("fleet", fleet.name))
        return fleet

    def _room(self, fleet: Fleet, weights: VersionId, run: str) -> int:
        """The places for adapters that are neither taken by live ones nor by other runs."""
        live = adapters.wanted(self.hosting, fleet).get(str(weights), WantedAdapters()).live
        others = [id for id in self.hosting.interims_of(fleet) if id.name != interim_name(run)]
        room = fleet.spec.fleet.max_cpu_loras - len(live) - len(others)
        if room < 1:
            raise VersionRefused(
                f"All {fleet.spec.fleet.max_cpu_loras} places for adapters of the fleet {fleet.name} are taken.",
                f"Raise max_cpu_loras of fleets.{fleet.name}.",
                param="fleet.max_cpu_loras",
            )
        return room

    def _end(self, run: str) -> None:
        for id in self.hosting.interims.of(run):
            self.hosting.desired.registry.catalog.forget(id)
        self.hosting.interims.end(run)
        self.loop.add(*(("fleet", name) for name in self.hosting.fleets))

    # asked after each turn of the loop

    def _done(self, fleet: Fleet, newest: Manifest) -> bool:
        """Whether each replica of the fleet has done what it could, and every gateway knows."""
        return self._listed(fleet, newest) and all(_heard(one, newest) for one in self._replicas(fleet, newest))

    def _listed(self, fleet: Fleet, newest: Manifest) -> bool:
        """Whether gateways know that the fleet answers for the version. A control that has just started knows of no replica yet."""
        known = self.gateways.current.fleets.get(fleet.name)
        return known is not None and str(newest.id) in known.versions

    def _replicas(self, fleet: Fleet, newest: Manifest) -> list[ReplicaState]:
        """The fleet's replicas over the version's base, as the gateways know them."""
        current = self.gateways.current.replicas
        return [one for one in current if one.app in fleet.apps and one.base == str(newest.weights)]


def _heard(replica: ReplicaState, newest: Manifest) -> bool:
    """Whether the replica has done what it could."""
    return str(newest.id) in replica.held or str(newest.id) in replica.refused
