"""One round of control: observe → decide → act, on what the store says and what the replicas are.

The order of its acts makes any round repeatable. A rollout's record is written before anything follows from it; an alias moves in the
store before any gateway hears of it; a gateway hears of a version only when a replica holds it, or requests for it may wait.
"""

import time

from cluster import logs
from cluster.config import Config
from cluster.control import weight_distribution
from cluster.control.admission import Shapes
from cluster.control.gateways import Gateways
from cluster.control.replicas import Replicas
from cluster.control.slots import slots
from cluster.control.surge import Surge, app_name
from cluster.errors import Conflict, NoReplica
from cluster.pool import graph
from cluster.publishing import placement, rollout
from cluster.publishing.canary import Comparison, Tally
from cluster.publishing.gate import Verdict, latest
from cluster.publishing.rollout import Facts, Order, Rollout, Warmth
from cluster.store.registry import Registry
from cluster.types import FleetState, Generation, Manifest, ReplicaState, VersionId

RETRY_REFUSED_S = 30
FIND_S = 30
"""How often to look for a second fleet that nobody knows of."""

log = logs.logger(__name__)


class Reconciler:
    """What control knows between two rounds. All of it but ``orders`` can be read again: from the store, the replicas and Serve."""

    def __init__(self, config: Config, registry: Registry, replicas: Replicas, gateways: Gateways) -> None:
        self.config = config
        self.registry = registry
        self.replicas = replicas
        self.gateways = gateways
        self.surge = Surge()
        self.shapes = Shapes()
        self.rollouts: dict[str, Rollout] = {}
        """The newest rollout of each alias at its newest record, as far as this process has read or written."""
        self.retired: dict[str, int] = {}
        """Alias → the live rollout whose forerunners are closed."""
        self.histories: dict[str, list[Generation]] = {}
        """Every alias's moves as this round read them: the store is listed once a round, however many ask."""
        self.facts: dict[str, Facts] = {}
        self.orders: dict[str, Order] = {}
        self.steered = ("", "")
        """The replica that gateways are steered around, and the weights that it takes over meanwhile."""
        self.apart: VersionId | None = None
        """The weights that a second fleet should host by now."""
        self.retry_refused_s = 0.0
        self.retrying = False
        """Whether this round asks again for what a replica has refused."""
        self.find_s = 0.0

    def newest(self, alias: str) -> Rollout | None:
        if alias not in self.rollouts and (known := self.registry.rollout(alias)):
            self.rollouts[alias] = known
        return self.rollouts.get(alias)

    def tick(self) -> None:
        """One round: read both sides, take each rollout's next steps, tell the gateways, order what is missing."""
        self._find()
        self.retrying = time.monotonic() >= self.retry_refused_s
        self.retry_refused_s = time.monotonic() + RETRY_REFUSED_S if self.retrying else self.retry_refused_s
        replicas = self.replicas.observe()
        if self.histories:
            self._announce(replicas)  # what replicas have said since; what follows may change it, and takes longer
        self.histories = self.registry.histories()
        for alias in self.registry.store.children("rollouts"):
            self._advance(alias, replicas)
        self.apart = self._choose_apart(replicas)
        target = self._choose_swap(replicas)
        told = self._announce(replicas)
        self._load(replicas)
        if told:  # not before the gateways know, or requests would arrive at a replica that is neither, or gone
            self._surge(replicas)
            known = {replica.base: replica.fingerprint for replica in replicas}
            if target:
                self.replicas.become(self.steered[0], str(target), known.get(str(target), ""), self._hurries())

    def _advance(self, alias: str, replicas: tuple[ReplicaState, ...]) -> None:
        """Let the rollout go as far as the facts take it, each record written before it is acted on."""
        now = self.newest(alias)
        while now is not None:
            self._move(now)
            if now.stage == "live":
                self._retire(now)
            self.facts[alias] = self._facts(now, replicas)
            after = rollout.decide(now, self.facts[alias], time.time())
            if after is None:
                return
            now = self._write(after)

    def coming(self) -> dict[str, VersionId]:
        """Alias → version of the rollouts under way."""
        return {alias: one.version for alias, one in self.rollouts.items() if one.stage in rollout.UNDER_WAY}

    def _write(self, after: Rollout) -> Rollout:
        try:
            self.registry.record(after)
        except Conflict:  # another control, older or younger than this one, was faster: follow its record
            del self.rollouts[after.alias]
            return self.newest(after.alias) or after
        self.rollouts[after.alias] = after
        self.orders.pop(after.alias, None)
        log.info("%s of %s: %s %d %%: %s", after.version, after.alias, after.stage, after.percent, after.reason)
        return after

    def _retire(self, live: Rollout) -> None:
        """Close the rollouts that this one has replaced. Looked at once by every control: one may have been killed before it got there."""
        if self.retired.get(live.alias) == live.number:
            return
        for records in self.registry.rollouts(live.alias):
            ended = records[-1].number < live.number and rollout.decide(records[-1], Facts(replaced_by=live.version), time.time())
            if ended and records[-1].stage == "live":
                self.registry.record(ended)
        self.retired[live.alias] = live.number  # last: where the store was away meanwhile, the next round tries again

    def _move(self, one: Rollout) -> None:
        """Write the alias's move that the rollout's record asks for, unless it was written, or somebody moved on by hand since."""
        meant, history = rollout.wanted(one), self.histories.setdefault(one.alias, [])
        own = [move.record for move in history if move.rollout == one.number]
        untouched = one.stage in ("registered", "warming") or (one.stage == "rolled_back" and not own)
        # A live rollout has moved the alias already, at 100 %; whatever moved it since was somebody's will.
        if meant is None or untouched or one.stage in ("live", "retired") or max(own, default=0) >= one.n:
            return
        newest = history[-1] if history else None
        if newest is not None and (newest.stable, newest.canary, newest.percent) == meant:
            return
        shadow = one.policy.shadow_percent if meant.canary else 0
        move = self.registry.move(
            one.alias,
            meant.stable,
            one.reason,
            one.author,
            newest.generation if newest else 0,
            canary=meant.canary,
            percent=meant.percent,
            shadow_percent=shadow,
            rollout=one.number,
            record=one.n,
        )
        history.append(move)

    def _facts(self, one: Rollout, replicas: tuple[ReplicaState, ...]) -> Facts:
        if one.stage not in rollout.UNDER_WAY:
            return Facts()
        order = self.orders.get(one.alias)
        if one.stage == "registered":
            verdict = self.verdict(one)
            return Facts(passed=verdict.passed if verdict else None, verdict=verdict.words if verdict else "", order=order)
        manifest, own = self.registry.manifest(one.version), self._own(replicas)
        alike = one.incumbent is None or self.weights(one.incumbent) == manifest.weights
        divisible = len(own) > 1 or alike or bool(self.surges(one))
        if one.stage == "warming":
            return Facts(warmth=self._warm(one, manifest, replicas), order=order, divisible=divisible)
        comparison = None
        if one.percent < 100 and one.incumbent:
            seen = self.gateways.measured(one.alias, one.number)
            comparison = Comparison(seen.get(str(one.version), Tally()), seen.get(str(one.incumbent), Tally()))
        warmth = placement.settled(own, manifest, self._hosts(own, one.alias))
        return Facts(warmth=warmth, comparison=comparison, order=order, divisible=divisible)

    def _warm(self, one: Rollout, manifest: Manifest, replicas: tuple[ReplicaState, ...]) -> Warmth | None:
        """How many replicas are ready; None while what they refused is from an earlier time."""
        weights = self.registry.manifest(manifest.weights)
        if (gone := self._leaves(one, weights.id)) is not None:
            return gone
        there = one.incumbent is not None and self.weights(one.incumbent) == weights.id
        new = [manifest] if manifest.id == weights.id or there else [weights, manifest]
        seen = placement.warmth(self._own(replicas), manifest)
        missing = bool(seen.refused) or not seen.complete
        asked = self.replicas.hold(
            [str(manifest.id)], lambda: weight_distribution.load(self.registry, new, self.config.home / "cache"), missing
        )
        ready = placement.warmth(self._own(self.replicas.states if asked else replicas), manifest)
        if ready.refused:
            return ready if asked else None
        return self._warm_apart(manifest, replicas) if ready.complete and self.surges(one) else ready

    def _leaves(self, one: Rollout, weights: VersionId) -> Warmth | None:
        """A refusal, where the fleet has left these weights for others since the rollout began: nobody will host them."""
        move = self._means(self.config.default_model)
        if one.alias == self.config.default_model or move is None or weights in [self.weights(id) for id in move.versions]:
            return None
        return Warmth(1, 0, f"the fleet does not host {weights} any more; train it on {self.weights(move.stable)}")

    def _warm_apart(self, manifest: Manifest, replicas: tuple[ReplicaState, ...]) -> Warmth:
        """The same of the second fleet's."""
        there = [replica for replica in replicas if replica.app == self.surge.app]
        if there:
            seen = placement.settled(there, manifest, {replica.id: manifest.weights for replica in there})
            return seen._replace(replicas=max(self.surge.replicas, len(there)))
        free = slots(self.config.pool.accelerator)["free"] >= self.config.fleet.tensor_parallel_size
        waits = "a second fleet to start" if free else "a slot for a second fleet: none is free"
        return Warmth(1, 0, self.surge.trouble() if self.surge.weights else "", waits)

    def hosted(self) -> VersionId:
        """The weights that the fleet hosts. Raises `NoReplica` while nothing runs."""
        replicas = self.replicas.states or self.replicas.observe()
        if not replicas:
            raise NoReplica(
                "No replica is running yet.",
                "Wait until `springtide status` shows one, then publish again; a request wakes a fleet that sleeps.",
            )
        live = self.registry.alias(self.config.default_model)
        return self.weights(live.stable) if live else VersionId.parse(replicas[0].base)

    def weights(self, id: VersionId) -> VersionId:
        return self.registry.manifest(id).weights

    def reshapes(self, one: Rollout) -> str:
        """What keeps the rollout's weights from being read into an engine that hosts the incumbent's; empty where nothing does."""
        if one.incumbent is None or one.alias != self.config.default_model:
            return ""
        new, old = self.weights(one.version), self.weights(one.incumbent)
        return self.shapes.difference(self.registry, self.config.home / "cache", new, old)

    def surges(self, one: Rollout) -> str:
        """Why the rollout needs a second fleet; empty where it does not."""
        if shape := self.reshapes(one):
            return f"another {shape}"
        if one.incumbent is None or one.alias != self.config.default_model or one.policy.steps[0] == 100:
            return ""
        lonely = len(self._own(self.replicas.states)) == 1 and self.weights(one.version) != self.weights(one.incumbent)
        return "one replica cannot host a canary's weights beside its own" if lonely else ""

    def _own(self, replicas: tuple[ReplicaState, ...]) -> tuple[ReplicaState, ...]:
        """The fleet's, without those of a second one."""
        return tuple(replica for replica in replicas if replica.app == graph.fleet_app(self.config.default_fleet))

    def _hosts(self, own: tuple[ReplicaState, ...], alias: str) -> dict[str, VersionId]:
        move = self._means(alias)
        return placement.bases(own, move, self.weights, self.apart) if move else {}

    def _means(self, alias: str) -> Generation | None:
        """The alias's newest move, as this tick has read the store."""
        return next(reversed(self.histories.get(alias, [])), None)

    def verdict(self, one: Rollout) -> Verdict | None:
        return latest(self.registry.verdicts(one.version), one.incumbent)

    def _announce(self, replicas: tuple[ReplicaState, ...]) -> bool:
        steered, target = self.steered
        apart = [r for r in replicas if self.apart and r.app == app_name(self.apart)]
        here = (*self._own(replicas), *apart)
        open_ = tuple(r._replace(held={}) if r.id == steered and r.base != target else r for r in here)
        announced = self.gateways.current.aliases
        moved = {name: history for name, history in self.histories.items() if history}
        aliases = {name: placement.answerable(history, open_, announced.get(name)) for name, history in moved.items()}
        return self.gateways.announce(aliases, open_, self._fleets())

    def _fleets(self) -> dict[str, FleetState]:
        """Each fleet with what it answers for once it runs."""
        name = self.config.fleet.model
        moves = {alias: history[-1] for alias, history in self.histories.items() if history}
        return {name: placement.fleet_state(name, name, graph.fleet_app(name), moves, self.weights)}

    def _choose_apart(self, replicas: tuple[ReplicaState, ...]) -> VersionId | None:
        """The weights that a second fleet should host: those of a rollout to another shape, and afterwards until the fleet itself
        holds what clients may get."""
        own, move, now = self._own(replicas), self._means(self.config.default_model), self.newest(self.config.default_model)
        held = {id for replica in own for id in replica.held}
        if self.surge.weights and move and not all(str(id) in held for id in move.versions):
            return self.surge.weights
        if now is None or now.stage not in ("warming", "canary"):
            return None
        if (
            self.surge.weights == self.weights(now.version)
            and now.incumbent
            and self.weights(now.incumbent) != self.surge.weights
        ):
            return self.surge.weights
        if not self.surges(now):
            return None
        ready = now.stage == "canary" or placement.warmth(own, self.registry.manifest(now.version)).complete
        return self.weights(now.version) if ready else None

    def _surge(self, replicas: tuple[ReplicaState, ...]) -> None:
        """Let the second fleet be what was chosen."""
        if self.apart == self.surge.weights:
            return
        if self.surge.weights:
            self.surge.end()
        if self.apart:
            room = int(slots(self.config.pool.accelerator)["free"] // self.config.fleet.tensor_parallel_size)
            self.surge.start(self.config, self.apart, max(1, min(len(self._own(replicas)), room)))
        self._watch()

    def _find(self) -> None:
        """A second fleet that a control before this one has started; one that is not needed any more is ended like any other."""
        if self.surge.weights is None and time.monotonic() >= self.find_s:
            self.find_s = time.monotonic() + FIND_S
            self.surge.find()
            self.apart = self.surge.weights
            self._watch()

    def _watch(self) -> None:
        self.replicas.apps = tuple(app for app in (graph.fleet_app(self.config.default_fleet), self.surge.app) if app)

    def _load(self, replicas: tuple[ReplicaState, ...]) -> None:
        """Ask for what clients may get and is not held. What a replica has refused it is asked again only every `RETRY_REFUSED_S`.

        What was live before stays where it is held, and is not asked for again where it had to make room.
        """
        live = [id for history in self.histories.values() if history for id in history[-1].versions]
        coming = [one.version for one in self.rollouts.values() if one.stage in ("warming", "canary")]
        wanted = [self.registry.manifest(id) for id in dict.fromkeys([*live, *coming])]
        again = self.retrying
        missing = [m for m in wanted if any(placement.lacks(r, m) and (again or str(m.id) not in r.refused) for r in replicas)]
        if missing:
            self.replicas.hold([str(manifest.id) for manifest in missing])

    def _choose_swap(self, replicas: tuple[ReplicaState, ...]) -> VersionId | None:
        """The weights that one replica should take over now, None where every replica hosts what it should. One at a time.

        What it has refused it is asked again when no rollout is waiting to hear of it.
        """
        own, now = self._own(replicas), self.newest(self.config.default_model)
        hosts = self._hosts(own, self.config.default_model)
        again = self.retrying and (now is None or now.stage not in rollout.UNDER_WAY)
        wrong = [r for r in own if r.id in hosts and r.base != str(hosts[r.id]) and self._may_take(r, str(hosts[r.id]), again)]
        chosen = next((replica for replica in wrong if replica.id == self.steered[0]), wrong[0] if wrong else None)
        self.steered = (chosen.id, str(hosts[chosen.id])) if chosen else ("", "")
        return hosts[chosen.id] if chosen else None

    def _hurries(self) -> bool:
        """Whether what is live now is bad, and streams by it must not hold up the way back."""
        now = self.newest(self.config.default_model)
        return now is not None and (now.stage == "rolled_back" or now.back)

    def _may_take(self, replica: ReplicaState, weights: str, again: bool) -> bool:
        return again or weights not in replica.refused or self.replicas.becoming(replica.id, weights)
