"""Fleets that come and go while the pool runs: `springtide fleets add` and `remove`.

The request writes a record to the store; the control loop makes it true. So a fleet survives a restart of control and of the whole pool, and
whoever writes the same record by other means gets the same fleet.
"""

import time
from collections.abc import Callable
from typing import Any, cast

from cluster.config import Fleet, check_one_fleet_per_model
from cluster.control.hosting import Hosting
from cluster.control.loop import Loop
from cluster.errors import BadRequest, Conflict, FleetNotFound, ModelNotFound, PoolUnavailable, SpringtideError
from cluster.pool import graph
from cluster.publishing.rollout import UNDER_WAY
from cluster.store import fitting
from cluster.store.fleets import FleetRecord, FleetRecords
from cluster.types import Generation, VersionId, check_name


class RuntimeFleets:
    def __init__(self, hosting: Hosting, loop: Loop, room: Callable[[], int | None]) -> None:
        """``room``: the slots that the pool has or may come to have; None where no limit is known."""
        self.hosting = hosting
        self.loop = loop
        self.room = room
        self.failures: dict[str, str] = {}
        """Fleet → why its record cannot be made true. It costs that fleet, and no other."""
        self.ended: dict[str, bool] = {}
        """Every fleet that was ever added → whether its newest record says that it was removed, as far as the last `sync` could tell."""
        self._records = FleetRecords(hosting.desired.registry.store)

    @property
    def records(self) -> FleetRecords:
        store = self.hosting.desired.registry.store
        if self._records.store is not store:
            self._records = FleetRecords(store)
        return self._records

    # for operators, in their own threads

    def add(self, name: str, overrides: dict[str, Any], author: str) -> None:
        """Host one more model. ``overrides``: keys of a fleet; ``model`` is an alias, by default the fleet's name, or a version NAME@N, which
        the alias of the fleet's name then means. Returns when it is recorded; its replicas start then. Raises with the reason where it cannot
        be."""
        check_name(name)
        values = {**overrides, "model": str(overrides.get("model", name))}
        first: VersionId | None = None
        if "@" in values["model"]:
            first, values["model"] = self._first_version(name, values["model"]), name
        live = self.hosting.desired.registry.alias(values["model"])
        if first is None and live is None:
            raise ModelNotFound(
                f"The store has no model {values['model']}.",
                "Register one: springtide up --model PATH, or jobs.pretrain.",
                param="model",
            )
        fleet = self.loop.call(lambda: self._fleet(name, values))
        self._check_fit(name, fleet, first or cast(Generation, live).stable)
        self.loop.call(lambda: self._add(name, values, author, first))

    def remove(self, name: str, force: bool, author: str) -> None:
        """Let a fleet drain and go. Refused while others need it, unless ``force``."""
        self.loop.call(lambda: self._remove(check_name(name), force, author))

    def _first_version(self, fleet: str, version: str) -> VersionId | None:
        """The version that the alias of the fleet's name must mean first; None where it means that already."""
        registry = self.hosting.desired.registry
        id = registry.manifest(VersionId.parse(version)).id
        live = registry.alias(fleet)
        if live is not None and live.stable != id:
            raise Conflict(
                f"{fleet} means {live.stable} already.", f"Add the fleet for it (--model {fleet}), or under another name."
            )
        return id if live is None else None

    def _check_fit(self, name: str, fleet: Fleet, version: VersionId) -> None:
        """Raise `DoesNotFit` where no engine of the fleet could start. It reads files: not in the loop."""
        config, registry = self.hosting.config, self.hosting.desired.registry
        weights = registry.manifest(version).weights
        model = fitting.of_version(registry, weights, config.home / "cache")
        fitting.fit(config.spec_of(name, fleet), model, str(weights), self.hosting.device_bytes())

    # in the loop's thread

    def _add(self, name: str, values: dict[str, Any], author: str, first: VersionId | None) -> None:
        newest = self.records.newest(name)
        self._check_free(name, newest)
        fleet = self._fleet(name, values)
        self._check_room(fleet)
        if first is not None:  # not before the checks: nothing ends an alias
            self.hosting.desired.registry.move(name, first, "first version of the fleet", author, after=0)
        self._append(name, newest, author, overrides=values)

    def _check_free(self, name: str, newest: FleetRecord | None) -> None:
        """Serve's application counts too: it drains where a control before this one has removed the fleet."""
        applications, fleet = self.hosting.applications, self.hosting.fleets.get(name)
        if not applications.read:
            raise PoolUnavailable("Control has just started and does not know yet what is served.", "Try again in some seconds.")
        recorded, served = newest is not None and not newest.ended, graph.fleet_app(name) in applications.known
        if fleet is None and not recorded and not served:
            return
        draining = fleet.removed if fleet else newest is not None and newest.ended
        raise Conflict(
            f"There is a fleet {name} already{', and it drains' if draining else ''}.",
            "Wait until it is gone." if draining else "Choose another name, or remove it first.",
            param="name",
        )

    def _fleet(self, name: str, overrides: dict[str, Any]) -> Fleet:
        """The fleet with these overrides. Raises `BadRequest` naming the key at fault."""
        config = self.hosting.config
        try:
            fleet = config.fleet_with(name, overrides)
            others = {other.name: other.spec.fleet for other in self.hosting.there if other.name != name}
            check_one_fleet_per_model({**others, name: fleet})
        except ValueError as error:
            raise BadRequest(
                f"The fleet {name} is not valid: {error}.", "See `springtide config` for the keys of a fleet."
            ) from None
        if config.gateway.hold_timeout_s <= fleet.swap_drain_s:
            raise BadRequest(
                f"swap_drain_s {fleet.swap_drain_s} must be shorter than gateway.hold_timeout_s {config.gateway.hold_timeout_s}.",
                "Requests wait for a swap.",
                param="swap_drain_s",
            )
        return fleet

    def _check_room(self, fleet: Fleet) -> None:
        """Every fleet's least number of replicas must fit at once, or one of them would wait for ever."""
        others = sum(one.spec.fleet.min_replicas * one.spec.fleet.tensor_parallel_size for one in self.hosting.there)
        needs, room = max(1, fleet.min_replicas) * fleet.tensor_parallel_size, self.room()
        if room is not None and others + needs > room:
            raise BadRequest(
                f"It needs {needs} of the pool's {room} slots, and {others} are the least that other fleets keep.",
                "Lower min_replicas of some fleet (0 lets it sleep), or add machines first.",
                param="min_replicas",
            )

    def _remove(self, name: str, force: bool, author: str) -> None:
        fleet, newest = self.hosting.fleets.get(name), self.records.newest(name)
        if fleet is not None and fleet.declared:
            raise BadRequest(
                f"The fleet {name} is part of the configuration.",
                "Take it out of `fleets:` there, then deploy again.",
                param="name",
            )
        if newest is None or newest.ended:
            raise FleetNotFound(f"There is no fleet {name}.", "See `springtide fleets` for the ones that exist.", param="name")
        if fleet is not None and not force:
            self._check_unused(name)
        self._append(name, newest, author, overrides=newest.overrides, ended=True)

    def _check_unused(self, name: str) -> None:
        """An alias that no other fleet hosts, the fleet's own as well, would be answered with 404; a rollout would have nobody."""
        fleet = self.hosting.fleets[name]
        homeless = [alias for alias in self.hosting.aliases_of(fleet) if not self.hosting.hosted_without(fleet, alias)]
        if homeless:
            raise Conflict(
                f"{', '.join(sorted(homeless))} would have no fleet: only {name} hosts the weights of what is live there.",
                "Say --force if clients may get 404 for that, or add a fleet that hosts it first.",
            )
        now = self.hosting.desired.rollout(fleet.model)
        if now is not None and now.stage in UNDER_WAY:
            raise Conflict(f"A rollout of {now.version} is under way on {name}.", "Wait for it, end it, or say --force.")

    def _append(self, name: str, newest: FleetRecord | None, author: str, **what: Any) -> None:
        record = FleetRecord(name=name, n=newest.n + 1 if newest else 1, author=author, time_s=time.time(), **what)
        self._apply(self.records.append(record))
        self.loop.retry(("fleet", name))

    def sync(self) -> None:
        """Make true what the records say. One that is not valid any more costs its own fleet."""
        ended: dict[str, bool] = {}
        for name in self.records.names():
            ended[name] = False  # where its record cannot be read
            try:
                if (newest := self.records.newest(name)) is not None:
                    ended[name] = newest.ended
                    self._apply(newest)
                self.failures.pop(name, None)
            except (SpringtideError, ValueError) as error:
                self.failures[name] = str(error)
        self.ended = ended

    def _apply(self, record: FleetRecord) -> None:
        fleet = self.hosting.fleets.get(record.name)
        self.hosting.ended_s.pop(record.name, None)
        if record.ended:
            self.hosting.ended_s[record.name] = record.time_s
        if fleet is not None and fleet.declared:
            return  # the configuration has it now, and says what it is
        if record.ended and fleet is not None:
            fleet.removed = True
        if not record.ended and fleet is None:
            spec = self.hosting.config.spec_of(record.name, self._fleet(record.name, record.overrides))
            self.hosting.add(spec, declared=False)

    def drain(self, name: str) -> None:
        """Host a fleet that was removed until it has gone: the control that removed it was killed before that."""
        spec = self.hosting.config.spec_of(name, self._removed(name))
        fleet = self.hosting.add(spec, declared=False)
        fleet.removed, fleet.surge = True, self.hosting.applications.surge_of(name)
        self.loop.add(("fleet", name))

    def _removed(self, name: str) -> Fleet:
        """What it was. Where its record says too little, or what the configuration no longer allows, its name is enough to end it."""
        newest = self.records.newest(name)
        try:
            return self.hosting.config.fleet_with(name, newest.overrides if newest else {})
        except ValueError:
            return self.hosting.config.fleet_with(name, {})
