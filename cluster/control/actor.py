"""The control actor: asks what is live to become what the store says, twice a second and whenever something happened.

One named, detached, restartable Ray actor. Desired state comes from the store, actual state from the replicas; killed at any point, Ray
starts it again and the next round (`cluster.control.reconcile`) goes on from there. Only an order to promote or abort that was not carried out
yet dies with it, and whoever gave it is told.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import ray

from cluster import logs, metrics, niceness
from cluster.capacity.allocator import Allocator, Grant, Heartbeat
from cluster.capacity.arbiter import SERVING, FleetDemand
from cluster.config import Config, parse
from cluster.control import admission
from cluster.control.client import ACTOR, ENGINES, NAMESPACE
from cluster.control.gateways import Gateways
from cluster.control.lease import Lease
from cluster.control.reconcile import Reconciler
from cluster.control.replicas import LOAD_TIMEOUT_S, Replicas
from cluster.control.slots import Served, resource, served, slots
from cluster.errors import Conflict, ModelNotFound, PoolUnavailable, VersionRefused
from cluster.pool import graph
from cluster.publishing import rollout
from cluster.publishing.canary import Comparison, Tally
from cluster.publishing.rollout import DIRECT, Facts, Order, Policy, Rollout
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import ColdStage, ColdStart, Manifest, ReplicaState, VersionId, View, check_name

TICK_S = 0.5
TURN_S = 0.3
ABORT_TIMEOUT_S = 30
STAGE_S = 600
"""How long what a starting replica said about itself is repeated."""
SOON_S = 2
"""And how long where Serve does not list it: it lists one that has just begun, and one that failed no more."""
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


class Control:
    """The actor's body. Threaded rather than async: everything it calls blocks. One loop acts; whoever asks waits for it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: Config = parse(config)
        self.registry = Registry(Store(self.config.store))
        self.wake = threading.Event()
        self.replicas = Replicas(graph.fleet_app(self.config.default_fleet), self.wake.set)
        self.gateways = Gateways()
        self.acting = threading.RLock()
        """Held for each round, and by whoever starts a rollout."""
        self.ticked = threading.Condition()
        self.state = Reconciler(self.config, self.registry, self.replicas, self.gateways)
        self.lease = Lease(resource(self.config.pool.accelerator))
        self.turning = threading.Lock()
        self.serving = Served(0, 0, 0)
        self.stages: dict[str, tuple[str, float]] = {}
        self.allocator = Allocator(self.config.training.budget, time.time())
        self.board = metrics.Board()
        niceness.freeze_gc()
        threading.Thread(target=self._run, daemon=True, name="control-loop").start()
        threading.Thread(target=self._turn, daemon=True, name="slots-loop").start()

    # asked from outside

    def view(self, known: int = 0) -> View | None:
        """The newest view, None where it is the ``known`` one or before it. A gateway that starts during a move waits for the move's end, so
        that it cannot adopt half of one."""
        with self.acting:
            return self.gateways.current if self.gateways.current.revision > known else None

    def configure(self, config: dict[str, Any]) -> None:
        """Take over a newer configuration: on Kubernetes the graph may be redeployed while this actor lives on."""
        self.config = parse(config)
        if self.registry.store.url != Store(self.config.store).url:
            self.registry = Registry(Store(self.config.store))
        self.state.config, self.state.registry = self.config, self.registry
        self.allocator.budget = self.config.training.budget

    def status(self) -> dict[str, Any]:
        """What `springtide status` prints: ``{"slots", "aliases", "replicas", …}``, without the replicas' secrets."""
        with self.turning:
            allocation = self.allocator.describe()
        return {
            "slots": slots(self.config.pool.accelerator),
            "aliases": {name: move.model_dump(mode="json") for name, move in self.gateways.current.aliases.items()},
            "replicas": [public(replica) for replica in self.replicas.observe(fresh=True)],
            "starting": [{"id": id, "stage": stage, "since_s": since_s} for id, (stage, since_s) in self._starting().items()],
            "asleep": max(0, engines() - len(self.replicas.states) - len(self._starting())),
            "rollouts": [self._describe(one) for one in self.state.rollouts.values()],
            "allocation": allocation,
        }

    def history(self, alias: str) -> dict[str, Any]:
        """``{"moves": […], "rollouts": [[record, …], …]}`` of an alias, oldest first. Raises `ModelNotFound`."""
        moves = self.registry.history(alias)
        if not moves:
            raise ModelNotFound(f"There is no alias {alias}.", "See `springtide models` for the ones that exist.", param="model")
        rollouts = [[record.model_dump(mode="json") for record in records] for records in self.registry.rollouts(alias)]
        return {"moves": [move.model_dump(mode="json") for move in moves], "rollouts": rollouts}

    def _describe(self, one: Rollout) -> dict[str, Any]:
        facts = self.state.facts.get(one.alias, Facts())
        waiting = rollout.waiting_for(one, facts, time.time())
        compared = {side: summary(tally) for side, tally in (facts.comparison or Comparison(Tally(), Tally()))._asdict().items()}
        return {**one.model_dump(mode="json"), "waiting_for": waiting, **(compared if facts.comparison else {})}

    def publish(
        self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None, after: int | None = None
    ) -> Rollout:
        """Begin a rollout of ``version`` on ``alias``, and return it once it waits for something: its verdict, a second fleet for another
        shape, the canary's requests, or nothing any more, because it is live.

        Raises `VersionRefused` with the reason where it did not get that far, and then the alias means what it meant before; `Conflict`
        where another rollout of the alias is under way, or where the alias is not at generation ``after`` any more.
        """
        manifest, hosted = self.registry.manifest(VersionId.parse(version)), self.state.hosted()
        back = manifest.id in [move.stable for move in self.registry.history(check_name(alias))]
        admission.check(self.config, self.registry, manifest, alias, hosted, examined=back)
        self.state.shapes.difference(
            self.registry, self.config.home / "cache", manifest.weights, hosted
        )  # it reads files: not in a round
        with self.acting:
            admission.check_replaces(self.config, self.registry, manifest, alias, self.state.hosted(), self.state.coming())
            moved = self.registry.alias(alias)
            if after is not None and (moved is None or moved.generation != after):
                raise Conflict(f"{alias} was moved meanwhile.", "See `springtide history`, then decide again.")
            begun = self._begin(manifest, alias, policy or self.config.publishing.policy, reason, author, back)
        return self._until(begun, self._waits, LOAD_TIMEOUT_S)

    def order(self, alias: str, what: str, reason: str, author: str) -> Rollout:
        """``promote`` the alias's rollout to 100 %, or ``abort`` it. Returns it when that is done."""
        with self.acting:
            now = self.state.newest(alias)
            if now is None or now.stage not in rollout.UNDER_WAY or what not in ("promote", "abort"):
                raise Conflict(f"No rollout of {alias} is under way.", "See `springtide history`.")
            if what == "promote" and now.stage != "canary":
                raise Conflict(f"The rollout of {now.version} is still {now.stage}.", "Promote it when it is a canary.")
            self.state.orders[alias] = Order(what, author, reason)
        goal, timeout_s = ("live", LOAD_TIMEOUT_S) if what == "promote" else ("rolled_back", ABORT_TIMEOUT_S)
        return self._until(now, lambda one: one.stage == goal and self._carried_out(one), timeout_s)

    def rollback(self, alias: str, to: str | None, reason: str, author: str) -> Rollout:
        """Make ``alias`` mean ``to`` at once; by default abort the rollout under way, or else go back to the version before."""
        now = self.state.newest(alias)
        if now is not None and now.stage in rollout.UNDER_WAY and now.back and to in (None, str(now.version)):
            return self._until(now, self._waits, LOAD_TIMEOUT_S)  # somebody else was faster, or this is asked once more
        if to is None and now is not None and now.stage in rollout.UNDER_WAY:
            return self.order(alias, "abort", reason, author)
        live = self.registry.alias(alias)  # read first: what was before it is decided for this generation and no other
        target = VersionId.parse(to) if to else self.registry.previous(alias)
        return self.publish(str(target), alias, reason, author, DIRECT, None if to or live is None else live.generation)

    # replicas that are not there yet

    def starting(self, replica: str, stage: str) -> None:
        """Told by a replica on its way."""
        with self.turning:
            self.stages = {**self.stages, replica: (stage, time.time())}

    def leaving(self, replica: str) -> None:
        """Told by a replica that ends, so that gateways know at once."""
        self.replicas.leave(replica)
        with self.turning:
            self.stages = {id: told for id, told in self.stages.items() if id != replica}

    def _starting(self) -> dict[str, tuple[str, float]]:
        """Replica → (stage, since when), of those that have told anything and are not there yet. Where Serve has none at all, they failed."""
        there = {replica.id for replica in self.replicas.states}
        known_s = STAGE_S if self.serving.wanted else SOON_S
        with self.turning:
            self.stages = {
                id: (stage, at_s) for id, (stage, at_s) in self.stages.items() if id not in there and time.time() - at_s < known_s
            }
            return self.stages

    def stage(self) -> ColdStart:
        """How far the fleet's first replica is. The words reach clients: they name no job, no machine and no version."""
        told = self._starting()
        if told:
            stage, since_s = max(told.values(), key=lambda one: one[1])
            return ColdStart(ColdStage.STARTING, f"A replica {stage}, since {time.time() - since_s:.0f} s.")
        if self.replicas.states:
            return ColdStart(ColdStage.RUNNING, "A replica has just come.")
        if not self.serving.starting:
            return ColdStart(ColdStage.ASLEEP, "No replica runs, and none is being started.")
        trains = any(slots for job, slots in self.allocator.decision.past.grants if job != SERVING)
        return ColdStart(ColdStage.QUEUED, f"A replica waits for {'a slot: jobs hold them' if trains else 'its process'}.")

    # slots

    def heartbeat(self, beat: Heartbeat) -> Grant:
        """A job's driver says that it lives and what it holds; returns what it has."""
        with self.turning:
            return self.allocator.heartbeat(beat, time.time())

    def leave(self, job: str, driver: str) -> None:
        with self.turning:
            self.allocator.end(job, driver)

    def snapshots(self, since_s: float) -> list[list[Any]]:
        """Who held what after ``since_s``, as `cluster.capacity.handover.parse` reads it."""
        with self.turning:
            return [[*one[:-1], [list(job) for job in one.jobs]] for one in self.allocator.since(since_s)]

    def allocation(self, since_s: float) -> dict[str, Any]:
        """What `springtide status --watch` draws: ``{"allocation", "snapshots", "slots"}``, snapshots after ``since_s`` (seconds since the epoch)."""
        with self.turning:
            allocation = self.allocator.describe()
        return {"allocation": allocation, "snapshots": self.snapshots(since_s), "slots": slots(self.config.pool.accelerator)}

    # publishing

    def _begin(self, manifest: Manifest, alias: str, policy: Policy, reason: str, author: str, back: bool) -> Rollout:
        now, live = self.state.newest(alias), self.registry.alias(alias)
        if now is not None and now.stage in rollout.UNDER_WAY:
            raise Conflict(
                f"A rollout of {now.version} on {alias} is under way ({now.stage} {now.percent} %).",
                f"Wait for it, or end it: springtide promote {alias}, springtide abort {alias}.",
            )
        number, incumbent = (now.number + 1 if now else 1), live.stable if live else None
        back = back and policy == DIRECT
        begun = rollout.begin(alias, number, manifest.id, incumbent, policy, reason, author, time.time(), back)
        if incumbent == manifest.id:
            return begun.next("live", "it is live already", time.time())
        self.state.rollouts[alias] = self.registry.record(begun)
        self.state.facts[alias] = Facts()
        self.replicas.forget(str(manifest.id))
        self.state.orders.pop(alias, None)
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
        now = self.state.rollouts.get(begun.alias)
        if now is None or now.number < begun.number:
            return begun  # never recorded: it was live already
        if now.number == begun.number:
            return now
        records = self.registry.records(begun.alias, begun.number)
        return next((record for record in records if record.stage == "live"), records[-1])

    def _waits(self, one: Rollout) -> bool:
        newest = self.state.rollouts.get(one.alias)
        if newest is not None and newest.number > one.number:
            return one.stage == "live"
        if one.stage == "registered":
            return one.policy.gate and self.state.verdict(one) is None
        if self.state.surges(one) and one.stage in rollout.UNDER_WAY:
            return True  # engines take as long to start as they take; `springtide publish` shows it
        return self._carried_out(one) and (one.stage == "live" or (one.stage == "canary" and one.percent < 100))

    def _over(self, one: Rollout) -> bool:
        """Whether a rollback has reached the gateways, or is history."""
        return self._carried_out(one) or self.state.rollouts[one.alias].number > one.number

    def _carried_out(self, one: Rollout) -> bool:
        """Whether every gateway routes by what the rollout's record says."""
        move, meant = self.gateways.current.aliases.get(one.alias), rollout.wanted(one)
        return meant is None or (move is not None and (move.stable, move.canary, move.percent) == meant)

    # the loop

    def _run(self) -> None:
        while True:
            try:
                with self.acting:
                    self.state.tick()
            except Exception:
                # Whatever stopped this round (store away, application still starting, a damaged object), the loop must go on: a thread
                # that ended would leave an actor that looks alive and converges nothing.
                log.exception("a round")
            with self.ticked:
                self.ticked.notify_all()
            self.wake.wait(TICK_S)
            self.wake.clear()

    def _turn(self) -> None:
        while True:
            try:
                there = slots(self.config.pool.accelerator)
                self.serving = now = served(self.replicas.apps, self.config.fleet.tensor_parallel_size)
                self._starting()
                most = self.lease.ceiling(int(there["total"]))
                with self.turning:
                    total, free = int(there["total"]), int(there["free"])
                    held = now.held(total - free, self.allocator.held_by_jobs)
                    fleets = [FleetDemand(self.config.fleet.model, 0, now.wanted, 0, self.config.fleet.tensor_parallel_size)]
                    lease = self.allocator.turn(total, held, fleets, time.time(), free, most)
                    requested = self.allocator.requested(lease, most)
                metrics.publish(self.board, self.allocator.snapshots, self.allocator.changes)
                self.lease.hold(lease + requested, most)
            except Exception:
                # Serve or the coordinator is away for a moment; grants stay as they are, and the loop must go on.
                log.exception("a turn of the allocator")
            time.sleep(TURN_S)


def engines() -> int:
    """Those of the pool, awake or asleep."""
    return sum(one["namespace"] == ENGINES for one in cast(list[Any], ray.util.list_named_actors(all_namespaces=True)))


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
        "shadows_failed": tally.shadows_failed,
    }


# outside the actor


def start(config: Config) -> Any:
    """Start the control actor where there is none, and return its handle. Callers outside this package use `cluster.control.client.ensure`."""
    return ray.remote(Control).options(**OPTIONS, get_if_exists=True).remote(config.dump())
