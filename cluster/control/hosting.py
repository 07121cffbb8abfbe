"""Which fleet hosts what: the fleets that there should be, their replicas, their surges, and the aliases that belong to each.

Both reconcilers ask here (`cluster.control.aliases`, `cluster.control.fleets`), and publishing does.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.config import Config, FleetSpec
from cluster.control.admission import Shapes
from cluster.control.applications import Applications, surge_app
from cluster.control.background import Background
from cluster.control.desired import Desired
from cluster.control.interims import Interims
from cluster.control.replicas import Orders, Replicas
from cluster.control.slots import ServingFleet
from cluster.errors import NoReplica, SpringtideError, VersionRefused
from cluster.pool import graph
from cluster.publishing import placement
from cluster.publishing.adapter_placement import NOTHING, AdapterPlacement
from cluster.publishing.placement import Hosted, Swap
from cluster.publishing.rollout import Rollout
from cluster.store.registry import Registry
from cluster.types import UNBOUNDED, Generation, Manifest, ReplicaBounds, ReplicaState, VersionId, is_interim

UNREADABLE_S = 5.0
"""How long a manifest that could not be read is not asked for again."""


@dataclass
class Fleet:
    """One fleet as control knows it between two turns. All of it can be found out again: from the store, the replicas and Serve."""

    spec: FleetSpec
    declared: bool
    """Whether the configuration names it: Serve's declarative graph has its application then, and control never starts or ends it."""
    orders: Orders = field(init=False)
    removed: bool = False
    """Whether it drains and goes."""
    swap: Swap | None = None
    """The replica that swaps its weights; gateways send it nothing."""
    surge: VersionId | None = None
    """What its surge hosts, or is about to; None while there is none."""
    surge_size: int = 0
    """Replicas of the surge."""
    surge_wanted: VersionId | None = None
    """What its surge should host by now."""
    retry_refused_s: float = 0.0
    retrying: bool = False
    """Whether this turn asks again for what a replica has refused."""
    last_held: frozenset[str] = frozenset()
    """What its replicas held when any were there."""
    placement: AdapterPlacement = NOTHING
    """Which of its replicas must hold which adapters."""
    placed_for: tuple[object, ...] = ()
    """What `placement` was worked out from."""
    bounds: ReplicaBounds = UNBOUNDED
    """How few and how many replicas it may have now."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def model(self) -> str:
        return self.spec.fleet.model

    @property
    def app(self) -> str:
        return graph.fleet_app(self.spec.name)

    @property
    def surge_app(self) -> str:
        return surge_app(self.name, self.surge) if self.surge else ""

    @property
    def apps(self) -> tuple[str, ...]:
        """The Serve applications that it consists of."""
        return tuple(app for app in (self.app, self.surge_app) if app)


class Hosting:
    """Used by the loop's thread only."""

    def __init__(
        self,
        config: Config,
        desired: Desired,
        replicas: Replicas,
        applications: Applications,
        changed: Callable[[str, str], None],
    ) -> None:
        self.config = config
        self.desired = desired
        self.replicas = replicas
        self.applications = applications
        self.shapes = Shapes()
        self.interims = Interims(time.monotonic())
        self.changed = changed
        """Called with the key of what work in the background was about, when it has ended."""
        self.background = Background(lambda: None)
        self.fleets: dict[str, Fleet] = {}
        self.ended_s: dict[str, float] = {}
        """Fleet that was removed → when, in seconds since the epoch."""
        self._assigned: tuple[tuple[object, ...], dict[str, str | None]] = ((), {})
        self._unreadable_s: dict[VersionId, float] = {}
        """Version whose manifest cannot be read → when to try again."""
        self.watched: Callable[[tuple[ServingFleet, ...]], None] = lambda _: None
        """Hears which fleets there are."""
        self.device_bytes: Callable[[], int | None] = lambda: None
        """The memory of one device of a slot; None where it is not known. It may block for some seconds."""
        for name in config.fleets:
            self.add(config.spec(name), declared=True)

    def configure(self, config: Config, registry: Registry) -> None:
        """Take over another configuration: its fleets come and go, and those that stay have its settings."""
        self.config = config
        if registry is not self.desired.registry:
            self.desired.reset(registry)
        for name, fleet in list(self.fleets.items()):
            if fleet.declared and name not in config.fleets:
                self.remove(name)
        for name in config.fleets:
            if name in self.fleets:
                fleet = self.fleets[name]
                fleet.spec, fleet.declared, fleet.removed = config.spec(name), True, False
            else:
                self.add(config.spec(name), declared=True)

    def add(self, spec: FleetSpec, declared: bool) -> Fleet:
        fleet = Fleet(spec, declared)
        fleet.orders = Orders(self.replicas, lambda: fleet.apps, lambda: self.changed("fleet", fleet.name))
        self.fleets[spec.name] = fleet
        return fleet

    def remove(self, name: str) -> None:
        self.fleets.pop(name).orders.close()

    @property
    def there(self) -> list[Fleet]:
        """The fleets that are to stay."""
        return [fleet for fleet in self.fleets.values() if not fleet.removed]

    def count(self) -> None:
        """Tell who counts slots which applications there are."""
        self.watched(tuple(ServingFleet(fleet.spec, fleet.apps, fleet.bounds.floor) for fleet in self.fleets.values()))

    # replicas

    def own(self, fleet: Fleet) -> tuple[ReplicaState, ...]:
        """The fleet's replicas, without those of its surge."""
        return self.replicas.of(fleet.app)

    def all_of(self, fleet: Fleet) -> tuple[ReplicaState, ...]:
        return self.replicas.of(*fleet.apps)

    def targets(self, fleet: Fleet, alias: str) -> dict[str, VersionId]:
        """Replica id → the weights that it should host for ``alias``."""
        move = self.desired.move(alias)
        return placement.target_weights(self.own(fleet), move, self.desired.weights, fleet.surge_wanted) if move else {}

    def wanted_of(self, fleet: Fleet) -> list[VersionId]:
        """The versions that the fleet's clients may get, then those of rollouts that its replicas should hold already."""
        return list(dict.fromkeys([*self.live_of(fleet), *self.coming_to(fleet)]))

    def live_of(self, fleet: Fleet) -> list[VersionId]:
        """The versions that the fleet's clients may get."""
        moves = self.readable_moves(self.aliases_of(fleet)).values()
        return list(dict.fromkeys(id for move in moves for id in move.versions))

    # aliases

    def hosted(self) -> tuple[list[Hosted], SpringtideError | ValueError | None]:
        """What each fleet hosts, and the error of a fleet whose model cannot be read: it costs that fleet, and no other."""
        found: list[Hosted] = []
        unreadable: SpringtideError | ValueError | None = None
        for fleet in self.there:
            try:
                move = self.desired.move(fleet.model)
                weights = frozenset(self.desired.weights(id) for id in move.versions) if move else frozenset[VersionId]()
                found.append(Hosted(fleet.name, fleet.model, weights))
            except (SpringtideError, ValueError) as error:
                found.append(Hosted(fleet.name, fleet.model, frozenset()))
                unreadable = error
        return found, unreadable

    def fleet_of(self, alias: str, weights: VersionId | None) -> Fleet | None:
        """The fleet that ``alias`` belongs to, whose version sits on ``weights``. None where no fleet hosts them. Raises where that cannot
        be known, because what another fleet hosts cannot be read."""
        hosted, unreadable = self.hosted()
        name = placement.fleet_of(alias, weights, hosted)
        if name is None and unreadable is not None:
            raise unreadable
        return self.fleets[name] if name else None

    def aliases_of(self, fleet: Fleet) -> list[str]:
        """Every alias with a move that belongs to the fleet."""
        return [alias for alias, name in self.assigned().items() if name == fleet.name]

    def assigned(self) -> dict[str, str | None]:
        """Alias → its fleet, of every alias with a move. Worked out again where a move, the set of fleets, or what can be read has changed."""
        fleets = frozenset(fleet.name for fleet in self.there)
        before, known = self._assigned
        if before == (self.desired.changes, fleets, self.unreadable()):
            return known
        hosted, _ = self.hosted()
        known = {alias: placement.fleet_of(alias, self.weights(id), hosted) for alias, id in self.desired.live().items()}
        # after: reading what fleets host may have been the first reading of an alias
        self._assigned = (self.desired.changes, fleets, self.unreadable()), known
        return known

    def unreadable(self) -> tuple[VersionId, ...]:
        """The versions whose manifests are not asked for again yet."""
        now_s = time.monotonic()
        return tuple(id for id, until_s in self._unreadable_s.items() if until_s > now_s)

    def weights(self, id: VersionId) -> VersionId | None:
        """The weights that a version is, or sits on. None where its manifest cannot be read: that costs its alias, and no other."""
        if self._unreadable_s.get(id, 0.0) > time.monotonic():
            return None
        try:
            return self.desired.weights(id)
        except (SpringtideError, ValueError):
            self._unreadable_s[id] = time.monotonic() + UNREADABLE_S
            return None

    def readable_moves(self, aliases: Iterable[str]) -> dict[str, Generation]:
        """Alias → its newest move, of those whose versions can be read."""
        newest = {alias: self.desired.moves[alias][-1] for alias in aliases if self.desired.moves.get(alias)}
        return {alias: move for alias, move in newest.items() if all(self.weights(id) for id in move.versions)}

    def coming_to(self, fleet: Fleet) -> list[VersionId]:
        """Versions of rollouts under way that the fleet's replicas should hold already, and interim versions of runs. One that cannot be read
        costs its alias, and no fleet: the alias's reconciler says why."""
        hosted, _ = self.hosted()
        under_way = [
            (alias, one.version) for alias, one in self.desired.under_way().items() if one.stage in ("warming", "canary")
        ]
        wanted = [*under_way, *((id.name, id) for id in self.interims.all)]
        readable = [(alias, id, weights) for alias, id in wanted if (weights := self.weights(id)) is not None]
        return [id for alias, id, weights in readable if placement.fleet_of(alias, weights, hosted) == fleet.name]

    def interims_of(self, fleet: Fleet) -> list[VersionId]:
        """The interim versions that the fleet's replicas should hold."""
        return [id for id in self.coming_to(fleet) if is_interim(id.name)]

    def hosted_without(self, fleet: Fleet, alias: str) -> bool:
        """Whether another fleet would answer for the alias if this one were no more."""
        hosted, _ = self.hosted()
        move = self.desired.move(alias)
        weights = self.weights(move.stable) if move else None
        return placement.fleet_of(alias, weights, [one for one in hosted if one.fleet != fleet.name]) is not None

    def holds_back(self, alias: str) -> bool:
        """Whether the weights under what the alias means must stay where they are. The alias of a removed fleet is answered for as long as they
        do by chance, unless somebody moved it since.

        Example: the fleet guest is added for seedling@1, and removed. Other weights may then take the place of seedling@1 in the fleet
        seedling, and guest is a 404.
        """
        fleet, move = self.fleets.get(alias), self.desired.move(alias)
        if fleet is not None and not fleet.removed:
            return True
        return alias not in self.ended_s or move is None or move.time_s > self.ended_s[alias]

    def for_publish(self, alias: str, manifest: Manifest) -> tuple[Fleet, VersionId]:
        """The fleet that a version would go live on, and the weights that it hosts now. Raises `VersionRefused` where no fleet hosts what the
        version needs, `NoReplica` while none of the fleet's replicas runs."""
        fleet = self.fleet_of(alias, manifest.weights)
        if fleet is None:
            there = ", ".join(sorted(f"the fleet {one.name} hosts {self._hosts_in_words(one)}" for one in self.there))
            raise VersionRefused(
                f"{manifest.id} needs {manifest.weights}, and no fleet hosts it: {there}.",
                f"Train it on those, or add a fleet: springtide fleets add NAME --model {manifest.weights.name}.",
                param="base",
            )
        replicas = self.own(fleet)
        if not replicas:
            raise NoReplica(
                f"No replica of the fleet {fleet.name} is running yet.",
                "Wait until `springtide status` shows one, then publish again; a request wakes a fleet that sleeps.",
            )
        live = self.desired.move(fleet.model)
        return fleet, self.desired.weights(live.stable) if live else VersionId.parse(replicas[0].base)

    def _hosts_in_words(self, fleet: Fleet) -> str:
        move = self.desired.moves.get(fleet.model)
        return str(self.weights(move[-1].stable) or "nothing that can be read") if move else "nothing yet"

    # surges

    def needs_surge(self, fleet: Fleet, one: Rollout) -> str | None:
        """Why the rollout needs a surge of the fleet; empty where it does not, None while that is being found out."""
        if one.incumbent is None or one.alias != fleet.model:
            return ""
        new, old = self.desired.weights(one.version), self.desired.weights(one.incumbent)
        if new == old:
            return ""
        if (new, old) not in self.shapes.known:
            # It reads both from end to end: not in the loop. A control that was restarted in the middle of a rollout comes here too.
            self.background.result(("shape", new, old), lambda: self._compare(fleet, new, old))
            return None
        if shape := self.shapes.known[new, old]:
            return f"another {shape}"
        lonely = one.policy.steps[0] != 100 and len(self.own(fleet)) == 1
        return "one replica cannot host a canary's weights beside its own" if lonely else ""

    def _compare(self, fleet: Fleet, new: VersionId, old: VersionId) -> bool:
        self.shapes.swap_obstacle(self.desired.registry, self.config.home / "cache", new, old)
        self.changed("alias", fleet.model)
        return True
