"""Reconciles one alias: its rollout goes as far as the facts take it, and the alias moves in the store as the rollout's record says.

The order of the acts makes any turn repeatable. A rollout's record is written before anything follows from it; then the alias moves in the
store; then the fleet's reconciler tells the gateways, and only of versions that a replica holds, or that requests may wait for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster import logs
from cluster.control import adapters, clock, weight_distribution
from cluster.control.applications import Applications
from cluster.control.desired import Desired
from cluster.control.gateways import Gateways
from cluster.control.hosting import Fleet, Hosting
from cluster.control.slots import slots
from cluster.errors import Conflict
from cluster.publishing import placement, rollout
from cluster.publishing.canary import Comparison, Tally, looks
from cluster.publishing.rollout import Facts, Order, Rollout, Warmth
from cluster.store.aliases import MoveOptions
from cluster.types import HoldOrder, Manifest, ReplicaState

ACTIVE_S = 0.5
"""How often an alias with a rollout under way is looked at; events come between."""
REST_S = 2.0
"""How often any other alias is: other hands may have moved it in the store."""
READS_PER_S = 50
"""With very many aliases at rest, the store is asked no oftener than this."""

log = logs.logger(__name__)


class Progress(NamedTuple):
    """Where an alias's newest rollout is, for those who wait for it in other threads."""

    rollout: Rollout
    facts: Facts | None
    """What was last known of it; None before it was looked at."""
    surges: bool
    """Whether it needs a surge of its fleet: engines take as long to start as they take."""


class AliasReconciler:
    """Used by the loop's thread; ``progress`` may be read by any."""

    def __init__(self, hosting: Hosting, gateways: Gateways, room: Callable[[], int | None]) -> None:
        """``room``: the slots that the pool has or may come to have; None where no limit is known."""
        self.hosting = hosting
        self.gateways = gateways
        self.room = room
        self.orders: dict[str, Order] = {}
        """What operators asked for and no record carries out yet. The only state that dies with control; who asked is told."""
        self.progress: dict[str, Progress] = {}
        self._looked: dict[str, tuple[int, int]] = {}
        """Alias → (number of its rollout, looks that were taken at its canary)"""

    @property
    def desired(self) -> Desired:
        return self.hosting.desired

    @property
    def applications(self) -> Applications:
        return self.hosting.applications

    def reconcile(self, alias: str) -> float:
        """One turn for one alias; the seconds until the next. Each record is written before it is acted on."""
        self.desired.refresh(alias)
        before = self.desired.changes
        one = self.desired.rollouts.get(alias)
        while one is not None:
            self._move(one)
            if one.stage == "live":
                self.desired.close_forerunners(one, clock.now_s())
            fleet = self._fleet(one)
            facts = self._facts(one, fleet)
            self.progress[alias] = Progress(one, facts, bool(fleet and self.hosting.needs_surge(fleet, one)))
            after = rollout.decide(one, facts, clock.now_s())
            if after is None:
                break
            one = self._record(after)
        if self.desired.changes != before:
            self._tell_fleet(alias)
        under_way = one is not None and one.stage in rollout.UNDER_WAY
        return ACTIVE_S if under_way else max(REST_S, len(self.desired.moves) / READS_PER_S)

    def begin(self, begun: Rollout) -> None:
        """Write a new rollout's first record."""
        if fleet := self._fleet(begun):
            fleet.orders.forget(str(begun.version))
        self.gateways.forget(begun.alias)
        self.orders.pop(begun.alias, None)
        self.desired.record(begun)
        self.progress[begun.alias] = Progress(begun, None, False)

    def _tell_fleet(self, alias: str) -> None:
        """The fleet's reconciler has something to announce, to load or to swap."""
        name = self.hosting.assigned().get(alias)
        for fleet in [name] if name else self.hosting.fleets:
            self.hosting.changed("fleet", fleet)

    def _fleet(self, one: Rollout) -> Fleet | None:
        return self.hosting.fleet_of(one.alias, self.desired.weights(one.version))

    def _record(self, after: Rollout) -> Rollout:
        try:
            self.desired.record(after)
        except Conflict:  # another control, older or younger than this one, was faster: follow its record
            return self.desired.rollout(after.alias) or after
        self.orders.pop(after.alias, None)
        log.info("%s of %s: %s %d %%: %s", after.version, after.alias, after.stage, after.percent, after.reason)
        return after

    def _move(self, one: Rollout) -> None:
        """Write the alias's move that the rollout's record asks for, unless it was written, or somebody moved on by hand since."""
        wanted, history = rollout.wanted(one), self.desired.moves.get(one.alias, [])
        own = [move.record for move in history if move.rollout == one.number]
        untouched = one.stage in ("registered", "warming") or (one.stage == "rolled_back" and not own)
        # A live rollout has moved the alias already, at 100 %; whatever moved it since was somebody's will.
        if wanted is None or untouched or one.stage in ("live", "retired") or max(own, default=0) >= one.n:
            return
        newest = history[-1] if history else None
        if newest is not None and (newest.stable, newest.canary, newest.percent) == wanted:
            return
        options: MoveOptions = {
            "canary": wanted.canary,
            "percent": wanted.percent,
            "shadow_percent": one.policy.shadow_percent if wanted.canary else 0,
            "rollout": one.number,
            "record": one.n,
        }
        self.desired.append_move(one, wanted.stable, newest.generation if newest else 0, options)

    # what `rollout.decide` goes by

    def _facts(self, one: Rollout, fleet: Fleet | None) -> Facts:
        if one.stage not in rollout.UNDER_WAY:
            return Facts()
        order = self.orders.get(one.alias)
        if one.stage == "registered":
            verdict = self.desired.verdict(one)
            return Facts(passed=verdict.passed if verdict else None, verdict=verdict.words if verdict else "", order=order)
        manifest = self.desired.manifest(one.version)
        if fleet is None:
            return Facts(warmth=self._homeless(manifest), order=order)
        needs_surge = self.hosting.needs_surge(fleet, one)
        if needs_surge is None:
            return Facts(order=order)  # nothing is known yet; control goes on when the weights have been compared
        own = self.hosting.own(fleet)
        alike = one.incumbent is None or self.desired.weights(one.incumbent) == manifest.weights
        can_split = len(own) > 1 or alike or bool(needs_surge)
        if one.stage == "warming":
            return Facts(warmth=self._warmth(one, manifest, fleet, bool(needs_surge)), order=order, can_split=can_split)
        asked = self._asked(own, manifest, fleet)
        warmth = placement.held_by_targets(asked, manifest, self.hosting.targets(fleet, fleet.model))
        comparison = self._comparison(one)
        return Facts(warmth=warmth, comparison=comparison, look=self._look(one, comparison), order=order, can_split=can_split)

    def _comparison(self, one: Rollout) -> Comparison | None:
        if one.percent == 100 or one.incumbent is None:
            return None
        seen = self.gateways.latest(one.alias, one.number)
        if seen is None:
            return None
        return Comparison(seen.get(str(one.version), Tally()), seen.get(str(one.incumbent), Tally()))

    def _look(self, one: Rollout, comparison: Comparison | None) -> bool:
        """Whether enough was answered since the last look. A control that was restarted looks once more."""
        if comparison is None:
            return False
        due = looks(comparison.evidence)
        number, looked = self._looked.get(one.alias, (0, 0))
        self._looked[one.alias] = one.number, due
        return due > (looked if number == one.number else 0)

    def _homeless(self, manifest: Manifest) -> Warmth:
        """A refusal: the fleet has left these weights for others since the rollout began, or is no more. Nobody will host them."""
        names = [fleet.model for fleet in self.hosting.there]
        moves = self.hosting.readable_moves(names).values()
        there = ", ".join(str(self.desired.weights(move.stable)) for move in moves)
        return Warmth(1, 0, f"no fleet hosts {manifest.weights} any more; train it on {there or 'what a fleet hosts'}")

    def _warmth(self, one: Rollout, manifest: Manifest, fleet: Fleet, surges: bool) -> Warmth | None:
        """How many replicas are ready; None while what they refused is from an earlier time."""
        weights = self.desired.manifest(manifest.weights)
        resident = one.incumbent is not None and self.desired.weights(one.incumbent) == weights.id
        new = [manifest] if manifest.id == weights.id or resident else [weights, manifest]
        asked, placed = self._asked(self.hosting.own(fleet), manifest, fleet), adapters.place(self.hosting, fleet)
        if not placed.copies.get(str(manifest.id), 1):
            return self._no_place(fleet, manifest)
        seen = placement.warmth(asked, manifest)
        registry, cache = self.desired.registry, self.hosting.config.home / "cache"
        missing = bool(seen.refused) or not seen.complete
        orders = {r.id: HoldOrder((str(manifest.id),), placed.assigned.get(r.id, ())) for r in (*asked, *self._surge(fleet))}
        answered = fleet.orders.hold(orders, lambda: weight_distribution.load(registry, new, cache), missing)
        ready = placement.warmth(self._asked(self.hosting.own(fleet), manifest, fleet), manifest) if answered else seen
        if ready.refused:
            return ready if answered else None
        return self._surge_warmth(manifest, fleet) if ready.complete and surges else ready

    def _asked(self, own: Sequence[ReplicaState], manifest: Manifest, fleet: Fleet) -> tuple[ReplicaState, ...]:
        """Those of the fleet's own replicas that must hold the version."""
        placed = adapters.place(self.hosting, fleet)
        return tuple(one for one in own if placed.asked(one, str(manifest.id)))

    def _no_place(self, fleet: Fleet, manifest: Manifest) -> Warmth:
        """A refusal, or patience where the fleet may have the replicas that it needs: Serve starts them (`FleetReconciler`)."""
        places, most = fleet.spec.fleet.max_cpu_loras, self._most_replicas(fleet)
        needed = adapters.wanted(self.hosting, fleet)[str(manifest.weights)].replicas_for(str(manifest.id), places)
        if needed <= most:
            running = len(self.hosting.own(fleet))
            return Warmth(1, 0, waits=f"a replica with a free place: the adapters need {needed} replicas, and {running} run")
        more = "raise fleet.max_replicas" if most >= fleet.spec.fleet.max_replicas else "add slots to the pool"
        return Warmth(
            1,
            0,
            f"all {places * most} places for adapters of the fleet {fleet.name} are taken ({places} on each of {most} replicas); raise "
            f"fleet.max_cpu_loras, or {more}",
        )

    def _most_replicas(self, fleet: Fleet) -> int:
        """The replicas that the fleet may have by its settings and by the slots that there can be. The arbiter may allow fewer just now."""
        settings, room = fleet.spec.fleet, self.room()
        most = settings.max_replicas if room is None else min(settings.max_replicas, room // settings.tensor_parallel_size)
        return max(len(self.hosting.own(fleet)), most)

    def _surge(self, fleet: Fleet) -> tuple[ReplicaState, ...]:
        return self.hosting.replicas.of(fleet.surge_app) if fleet.surge else ()

    def _surge_warmth(self, manifest: Manifest, fleet: Fleet) -> Warmth:
        """The same of the fleet's surge."""
        if there := self._surge(fleet):
            seen = placement.held_by_targets(there, manifest, {replica.id: manifest.weights for replica in there})
            return seen._replace(replicas=max(fleet.surge_size, len(there)))
        app = self.applications.known.get(fleet.surge_app) if fleet.surge else None
        trouble = f"Its own replicas did not start: {app.failed}" if app and app.status == "DEPLOY_FAILED" else ""
        free = slots(self.hosting.config.pool.accelerator)["free"] >= fleet.spec.fleet.tensor_parallel_size
        waits = "a second fleet to start" if free else "a slot for a second fleet: none is free"
        return Warmth(1, 0, trouble, waits)
