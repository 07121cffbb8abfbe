"""The control actor: observe → decide → act, twice a second, until what is live is what the store says.

One named, detached, restartable Ray actor. It holds nothing that it could not read again: desired state comes from the store, actual
state from the replicas. Killed at any point, Ray starts it again and the next tick goes on from there.

The order of its acts makes that true. A rollout's record is written before anything follows from it; an alias moves in the store before
any gateway hears of it; a gateway hears of a version only when a replica holds it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster import artefact, carry, graph, logs, placement, rollout
from cluster.canary import Comparison, Tally
from cluster.config import Config, parse
from cluster.errors import Conflict, NoReplica, PoolUnavailable, SpringtideError, VersionRefused
from cluster.gate import Verdict, latest
from cluster.gateways import Gateways
from cluster.registry import Registry, adapter_rank, check_layout
from cluster.replicas import LOAD_TIMEOUT_S, Replicas
from cluster.rollout import DIRECT, Facts, Order, Policy, Rollout
from cluster.store import Store
from cluster.types import Generation, Manifest, ReplicaState, VersionId, View, check_name

ACTOR, NAMESPACE = "springtide-control", "springtide"
TICK_S = 0.5
RETRY_REFUSED_S = 30
ORDER_TIMEOUT_S = 30
START_TIMEOUT_S = 60
OPTIONS: dict[str, Any] = {
    "name": ACTOR,
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "max_restarts": -1,
    "max_concurrency": 64,  # a publish waits in its thread for minutes where loading takes that long, and gateways must be heard beside it
    "num_cpus": 0,
    "runtime_env": {"env_vars": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}},  # this actor has no event loop to route in
}

log = logs.logger(__name__)


class Client(Protocol):
    """What callers outside the actor may ask. `SpringtideError`s arrive as themselves."""

    def publish(self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None) -> Rollout: ...


class Control:
    """The actor's body. Threaded rather than async: everything it calls blocks. One loop acts; whoever asks waits for it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: Config = parse(config)
        self.registry = Registry(Store(self.config.store))
        self.wake = threading.Event()
        self.replicas = Replicas(graph.fleet_app(self.config.fleet.model), self.wake.set)
        self.gateways = Gateways()
        self.acting = threading.RLock()
        """Held for each tick, and by whoever starts a rollout."""
        self.ticked = threading.Condition()
        self.rollouts: dict[str, Rollout] = {}
        """The newest rollout of each alias at its newest record, as far as this process has read or written."""
        self.histories: dict[str, list[Generation]] = {}
        """Every alias's moves as this tick read them: the store is listed once a tick, however many ask."""
        self.facts: dict[str, Facts] = {}
        self.orders: dict[str, Order] = {}
        self.steered = ""
        """The replica that gateways are steered around while it takes other weights over."""
        self.retry_refused_s = 0.0
        threading.Thread(target=self._run, daemon=True, name="control-loop").start()

    # asked from outside

    def view(self) -> View:
        """The newest view. A gateway that starts during a move waits for the move's end, so that it cannot adopt half of one."""
        with self.acting:
            return self.gateways.current

    def configure(self, config: dict[str, Any]) -> None:
        """Take over a newer configuration: on Kubernetes the graph may be redeployed while this actor lives on."""
        self.config = parse(config)
        if self.registry.store.url != Store(self.config.store).url:
            self.registry = Registry(Store(self.config.store))

    def status(self) -> dict[str, Any]:
        """What `springtide status` prints: ``{"slots", "aliases", "replicas", "rollouts"}``, without the replicas' secrets."""
        return {
            "slots": slots(),
            "aliases": {name: move.model_dump(mode="json") for name, move in self.gateways.current.aliases.items()},
            "replicas": [public(replica) for replica in self.replicas.observe()],
            "rollouts": [self._describe(one) for one in self.rollouts.values()],
        }

    def _describe(self, one: Rollout) -> dict[str, Any]:
        facts = self.facts.get(one.alias, Facts())
        waiting = rollout.waiting_for(one, facts, time.time())
        compared = {side: summary(tally) for side, tally in (facts.comparison or Comparison(Tally(), Tally()))._asdict().items()}
        return {**one.model_dump(mode="json"), "waiting_for": waiting, **(compared if facts.comparison else {})}

    def publish(self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None) -> Rollout:
        """Begin a rollout of ``version`` on ``alias``, and return it once it waits for something: its verdict, the canary's requests,
        or nothing any more, because it is live.

        Raises `VersionRefused` with the reason where it did not get that far, and then the alias means what it meant before; `Conflict`
        where another rollout of the alias is under way.
        """
        manifest = self.registry.manifest(VersionId.parse(version))
        self._check_fits(manifest, check_name(alias))
        with self.acting:
            begun = self._begin(manifest, alias, policy or self.config.publishing.policy, reason, author)
        return self._until(begun, lambda one: self._waits(one), LOAD_TIMEOUT_S)

    def order(self, alias: str, what: str, reason: str, author: str) -> Rollout:
        """``promote`` the alias's rollout to 100 %, or ``abort`` it. Returns it when that is done."""
        with self.acting:
            now = self._newest(alias)
            if now is None or now.stage not in rollout.UNDER_WAY or what not in ("promote", "abort"):
                raise Conflict(f"No rollout of {alias} is under way.", "See `springtide history`.")
            if what == "promote" and now.stage != "canary":
                raise Conflict(f"The rollout of {now.version} is still {now.stage}.", "Promote it when it is a canary.")
            self.orders[alias] = Order(what, author, reason)
        goal = "live" if what == "promote" else "rolled_back"
        return self._until(now, lambda one: one.stage == goal and self._carried_out(one), ORDER_TIMEOUT_S)

    def rollback(self, alias: str, to: str | None, reason: str, author: str) -> Rollout:
        """Make ``alias`` mean ``to`` at once; by default abort the rollout under way, or else go back to the version before."""
        now = self._newest(alias)
        if to is None and now is not None and now.stage in rollout.UNDER_WAY:
            return self.order(alias, "abort", reason, author)
        target = VersionId.parse(to) if to else self.registry.previous(alias)
        return self.publish(str(target), alias, reason, author, DIRECT)

    # publishing

    def _begin(self, manifest: Manifest, alias: str, policy: Policy, reason: str, author: str) -> Rollout:
        now, live = self._newest(alias), self.registry.alias(alias)
        if now is not None and now.stage in rollout.UNDER_WAY:
            raise Conflict(
                f"A rollout of {now.version} on {alias} is under way ({now.stage} {now.percent} %).",
                f"Wait for it, or end it: springtide promote {alias}, springtide abort {alias}.",
            )
        number, incumbent = (now.number + 1 if now else 1), live.stable if live else None
        begun = rollout.begin(alias, number, manifest.id, incumbent, policy, reason, author, time.time())
        if incumbent == manifest.id:
            return begun.next("live", "it is live already", time.time())
        self.rollouts[alias] = self.registry.record(begun)
        self.facts[alias] = Facts()
        self.orders.pop(alias, None)
        self.wake.set()
        return begun

    def _until(self, begun: Rollout, done: Callable[[Rollout], bool], timeout_s: float) -> Rollout:
        """Wait for the loop to bring the rollout there. A rollback that nobody ordered is raised with its reason."""
        deadline_s = time.monotonic() + timeout_s
        self.wake.set()
        with self.ticked:
            while not done(now := self._current(begun)) and (now.stage != "rolled_back" or not self._over(now)):
                if not self.ticked.wait(deadline_s - time.monotonic()):
                    raise PoolUnavailable(f"{now.version} is still {now.stage} after {timeout_s} s.", "See `springtide status`.")
        if now.stage == "rolled_back" and not done(now):
            raise VersionRefused(now.reason, "The live version is untouched.")
        return now

    def _current(self, begun: Rollout) -> Rollout:
        """The rollout as it is now. Where another has followed already: as it went live, if it did, or else how it ended."""
        now = self.rollouts.get(begun.alias)
        if now is None or now.number < begun.number:
            return begun  # never recorded: it was live already
        if now.number == begun.number:
            return now
        records = self.registry.records(begun.alias, begun.number)
        return next((record for record in records if record.stage == "live"), records[-1])

    def _waits(self, one: Rollout) -> bool:
        newest = self.rollouts.get(one.alias)
        if newest is not None and newest.number > one.number:
            return one.stage == "live"
        if one.stage == "registered":
            return one.policy.gate and self._verdict(one) is None
        return self._carried_out(one) and (one.stage == "live" or (one.stage == "canary" and one.percent < 100))

    def _over(self, one: Rollout) -> bool:
        """Whether a rollback has reached the gateways, or is history."""
        return self._carried_out(one) or self.rollouts[one.alias].number > one.number

    def _carried_out(self, one: Rollout) -> bool:
        """Whether every gateway routes by what the rollout's record says."""
        move, meant = self.gateways.current.aliases.get(one.alias), rollout.wanted(one)
        return meant is None or (move is not None and (move.stable, move.canary, move.percent) == meant)

    def _newest(self, alias: str) -> Rollout | None:
        if alias not in self.rollouts and (known := self.registry.rollout(alias)):
            self.rollouts[alias] = known
        return self.rollouts.get(alias)

    def _check_fits(self, manifest: Manifest, alias: str) -> None:
        """Refuse what the engine would choke on, before any replica sees it."""
        cache = self.config.home / "cache"
        folder = self.registry.fetch(manifest, cache)
        check_layout(folder, manifest.kind)
        hosted = self._hosted()
        if manifest.weights != hosted:
            self._check_replaces(manifest, hosted, alias, cache)
        base = self.registry.fetch(self.registry.manifest(manifest.base), cache) if manifest.base else None
        artefact.inspect(folder, base)
        rank, limit = adapter_rank(folder) if manifest.kind == "adapter" else 0, self.config.fleet.max_lora_rank
        if rank > limit:
            raise VersionRefused(
                f"{manifest.id} has rank {rank}, but the engine takes at most {limit}.",
                f"Train with a smaller r, or start the pool with fleet.max_lora_rank={rank} or more.",
                param="fleet.max_lora_rank",
            )

    def _check_replaces(self, manifest: Manifest, hosted: VersionId, alias: str, cache: Path) -> None:
        """Other weights than the fleet's take their place; they must be of the same shape, and nobody else may need the old ones."""
        others = [
            name for name, move in self.registry.aliases().items() if name != alias and self._weights(move.stable) == hosted
        ]
        if alias != self.config.fleet.model or others or manifest.weights.name != hosted.name:
            raise VersionRefused(
                f"{manifest.id} needs {manifest.weights}, but the fleet hosts {hosted} for {', '.join(others) or self.config.fleet.model}.",
                f"Train it on {hosted}, or serve its base: springtide up --model {manifest.weights}.",
                param="base",
            )
        new, old = (self.registry.fetch(self.registry.manifest(id), cache) for id in (manifest.weights, hosted))
        if other := artefact.difference(new, old):
            raise VersionRefused(
                f"{manifest.weights} cannot take the place of {hosted} in a running engine: another {other}.",
                f"Serve it by itself: springtide up --model {manifest.weights}.",
                param="base",
            )

    def _hosted(self) -> VersionId:
        replicas = self.replicas.states or self.replicas.observe()
        if not replicas:
            raise NoReplica("No replica is running yet.", "Wait until `springtide status` shows one, then publish again.")
        live = self.registry.alias(self.config.fleet.model)
        return self._weights(live.stable) if live else VersionId.parse(replicas[0].base)

    def _weights(self, id: VersionId) -> VersionId:
        return self.registry.manifest(id).weights

    # the loop

    def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception:
                # Whatever stopped this tick (store away, application still starting, a damaged object), the loop must go on: a thread
                # that ended would leave an actor that looks alive and converges nothing.
                log.exception("tick")
            with self.ticked:
                self.ticked.notify_all()
            self.wake.wait(TICK_S)
            self.wake.clear()

    def tick(self) -> None:
        """One round: read both sides, take each rollout's next steps, tell the gateways, load what is missing, swap one set of weights."""
        with self.acting:
            replicas = self.replicas.observe()
            self.histories = self.registry.histories()
            for alias in self.registry.store.children("rollouts"):
                self._advance(alias, replicas)
            target = self._choose_swap(replicas)
            told = self._announce(replicas)
        self._load(replicas)
        if target and told:  # not before the gateways know, or requests would arrive at a replica that is neither
            known = {replica.base: replica.fingerprint for replica in replicas}
            self.replicas.become(self.steered, str(target), known.get(str(target), ""))

    def _advance(self, alias: str, replicas: tuple[ReplicaState, ...]) -> None:
        """Let the rollout go as far as the facts take it, each record written before it is acted on."""
        now = self._newest(alias)
        while now is not None:
            self._move(now)
            self.facts[alias] = self._facts(now, replicas)
            after = rollout.decide(now, self.facts[alias], time.time())
            if after is None:
                return
            now = self._write(after)

    def _write(self, after: Rollout) -> Rollout:
        try:
            self.registry.record(after)
        except Conflict:  # another control, older or younger than this one, was faster: follow its record
            del self.rollouts[after.alias]
            return self._newest(after.alias) or after
        self.rollouts[after.alias] = after
        self.orders.pop(after.alias, None)
        log.info("%s of %s: %s %d %%: %s", after.version, after.alias, after.stage, after.percent, after.reason)
        if after.stage == "live":
            self._retire(after)
        return after

    def _retire(self, live: Rollout) -> None:
        """Close the rollouts that this one has replaced."""
        for records in self.registry.rollouts(live.alias):
            ended = records[-1].number < live.number and rollout.decide(records[-1], Facts(replaced_by=live.version), time.time())
            if ended and records[-1].stage == "live":
                self.registry.record(ended)

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
        manifest, order = self.registry.manifest(one.version), self.orders.get(one.alias)
        if one.stage == "registered":
            verdict = self._verdict(one)
            return Facts(passed=verdict.passed if verdict else None, verdict=verdict.words if verdict else "", order=order)
        divisible = len(replicas) > 1 or one.incumbent is None or self._weights(one.incumbent) == manifest.weights
        if one.stage == "warming":
            weights = self.registry.manifest(manifest.weights)
            new = [manifest] if manifest.id == weights.id or weights.id == self._hosted() else [weights, manifest]
            asked = self.replicas.hold([str(manifest.id)], lambda: carry.load(self.registry, new))
            ready = placement.warmth(replicas if not asked else self.replicas.states, manifest)
            return Facts(warmth=ready if asked or not ready.refused else None, order=order, divisible=divisible)
        move = self._means(one.alias)
        hosts = placement.bases(replicas, move, self._weights) if move else {}
        comparison = None
        if one.percent < 100 and one.incumbent:
            seen = self.gateways.measured(one.alias, one.number)
            comparison = Comparison(seen.get(str(one.version), Tally()), seen.get(str(one.incumbent), Tally()))
        warmth = placement.settled(replicas, manifest, hosts)
        return Facts(warmth=warmth, comparison=comparison, order=order, divisible=divisible)

    def _means(self, alias: str) -> Generation | None:
        """The alias's newest move, as this tick has read the store."""
        return next(reversed(self.histories.get(alias, [])), None)

    def _verdict(self, one: Rollout) -> Verdict | None:
        return latest(self.registry.verdicts(one.version), one.incumbent)

    def _announce(self, replicas: tuple[ReplicaState, ...]) -> bool:
        open_ = tuple(replica._replace(held={}) if replica.id == self.steered else replica for replica in replicas)
        announced = self.gateways.current.aliases
        moved = {name: history for name, history in self.histories.items() if history}
        aliases = {name: placement.answerable(history, open_, announced.get(name)) for name, history in moved.items()}
        return self.gateways.announce(aliases, open_)

    def _load(self, replicas: tuple[ReplicaState, ...]) -> None:
        """Ask for what clients may get and is not held. What a replica has refused it is asked again only every `RETRY_REFUSED_S`.

        What was live before stays where it is held, and is not asked for again where it had to make room.
        """
        live = [id for history in self.histories.values() if history for id in history[-1].versions]
        coming = [one.version for one in self.rollouts.values() if one.stage in ("warming", "canary")]
        wanted = [self.registry.manifest(id) for id in dict.fromkeys([*live, *coming])]
        again = time.monotonic() >= self.retry_refused_s
        if again:
            self.retry_refused_s = time.monotonic() + RETRY_REFUSED_S
        missing = [m for m in wanted if any(placement.lacks(r, m) and (again or str(m.id) not in r.refused) for r in replicas)]
        if missing:
            self.replicas.hold([str(manifest.id) for manifest in missing])

    def _choose_swap(self, replicas: tuple[ReplicaState, ...]) -> VersionId | None:
        """The weights that one replica should take over now, None where every replica hosts what it should. One at a time."""
        move = self._means(self.config.fleet.model)
        hosts = placement.bases(replicas, move, self._weights) if move else {}
        wrong = [r for r in replicas if r.id in hosts and r.base != str(hosts[r.id]) and str(hosts[r.id]) not in r.refused]
        chosen = next((replica for replica in wrong if replica.id == self.steered), wrong[0] if wrong else None)
        self.steered = chosen.id if chosen else ""
        return hosts[chosen.id] if chosen else None


def public(replica: ReplicaState) -> dict[str, Any]:
    return {key: value for key, value in replica._asdict().items() if key != "secret"}


def summary(tally: Tally) -> dict[str, Any]:
    """A tally in few words, for `springtide status`."""
    from statistics import median

    return {
        "requests": tally.requests,
        "errors": tally.errors,
        "ttft_p50_ms": round(median(tally.ttft_s) * 1000, 1) if tally.ttft_s else None,
        "itl_p50_ms": round(median(tally.itl_s) * 1000, 2) if tally.itl_s else None,
        "finish": tally.finish,
        "shadowed": tally.shadowed,
        "disagreed": tally.disagreed,
    }


# outside the actor


class _Remote:
    """`Client` over the actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def publish(self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None) -> Rollout:
        return self._call("publish", LOAD_TIMEOUT_S + START_TIMEOUT_S, version, alias, reason, author, policy)

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SpringtideError) else error) from None
        except (RayActorError, GetTimeoutError) as error:
            raise PoolUnavailable(
                "The control actor does not answer.", "It restarts by itself; try again in some seconds."
            ) from error


def ensure(config: Config) -> Any:
    """The control actor's handle, started if there is none. Anyone on the pool may call this: the first one wins."""
    return ray.remote(Control).options(**OPTIONS, get_if_exists=True).remote(config.dump())


def connect() -> Client:
    """The control of the pool that this process runs on, for jobs. Others speak HTTP: `cluster.admin`. Raises `PoolUnavailable`."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    try:
        return _Remote(ray.get_actor(ACTOR, namespace=NAMESPACE))
    except ValueError as error:
        raise PoolUnavailable(
            "The pool has no control actor: nothing is being served.", "Start serving with `springtide up`."
        ) from error


def slots() -> dict[str, float]:
    """Slots of this pool: ``{"total", "free"}``. GPUs where there are any, else the logical resource."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kind = "GPU" if total.get("GPU") else "slot"
    return {"total": total.get(kind, 0.0), "free": free.get(kind, 0.0)}
