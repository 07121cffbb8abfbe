"""The control actor: it composes control's services, and passes on what others ask.

One named, detached, restartable Ray actor. Desired state comes from the store, actual state from the replicas; killed at any point, Ray
starts it again, and reconciling goes on from there (`cluster.control.reconcile`). Only an order to promote or abort that was not carried
out yet dies with it, and whoever gave it is told.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import functools
import time
from typing import Any

import ray

from cluster import niceness
from cluster.capacity.allocator import Grant, Heartbeat
from cluster.config import Config, parse
from cluster.control import catalogue, clock, cold_starts, describe, engines
from cluster.control.aliases import AliasReconciler, Progress
from cluster.control.allocation import Allocation
from cluster.control.announcing import Announcer
from cluster.control.applications import Applications
from cluster.control.client import ACTOR, NAMESPACE
from cluster.control.cold_starts import ColdStarts, FailedStart
from cluster.control.desired import Desired
from cluster.control.fleets import FleetReconciler
from cluster.control.gateways import Gateways
from cluster.control.hosting import Hosting
from cluster.control.interim_holds import InterimHolds
from cluster.control.jobs import JobService
from cluster.control.publishing import Publishing
from cluster.control.reconcile import Reconcilers
from cluster.control.replicas import Replicas
from cluster.control.slots import device_bytes
from cluster.pool import graph, local
from cluster.pool.lean import WHOLE
from cluster.pool.serve_api import ServeApi
from cluster.pool.submit import JobServer
from cluster.publishing.rollout import Policy, Rollout
from cluster.store.objects import Store
from cluster.store.registry import Registry, registry_of
from cluster.types import ColdStart, ReplicaState, View

WAITING, ORDERS, BEATS = "waiting", "orders", "beats"
GROUPS = {WAITING: 64, ORDERS: 32, BEATS: 16}
"""Threads by what must not wait for what. Everything else has ``max_concurrency``.

- ``waiting``: calls that wait for minutes and can be asked again, such as a publish, which waits for its replicas.
- ``orders``: what an operator does to end or undo something. It must get through while publishes hold all of ``waiting``. An abort waits for
  half a minute at most. A rollback may wait as long as a publish, for replicas that swap weights: 32 rollbacks at once make an abort wait.
- ``beats``: heartbeats of jobs, reports of replicas, and what gateways ask. They read memory only, and must be heard while a store that does
  not answer holds everything else."""
OPTIONS: dict[str, Any] = {
    "name": ACTOR,
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "max_restarts": -1,
    "max_concurrency": 32,
    "num_cpus": 0,
    "runtime_env": {
        "env_vars": {
            **WHOLE,
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # this actor has no event loop to route in
        }
    },
}


class Control:
    """The actor's body. Threaded rather than async: everything it calls blocks. Two loops act (`Reconcilers`, `Allocation`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: Config = parse(config)
        self.registry = registry_of(self.config)
        self.replicas = Replicas(lambda app: self.reconcilers.application_changed(app))
        self.gateways = Gateways()
        jobs = functools.cache(lambda: JobServer(ray.get_runtime_context().gcs_address))
        self.applications = Applications(lambda: ServeApi(jobs().dashboard, local.bearer()))
        self.cold_starts = ColdStarts()
        self.hosting = Hosting(
            self.config,
            Desired(self.registry),
            self.replicas,
            self.applications,
            lambda kind, name: self.reconcilers.changed(kind, name),
        )
        self.slots = Allocation(self.config.pool.accelerator, self.config.training.budget, self.applications)
        self.aliases = AliasReconciler(self.hosting, self.gateways, self.slots.room)
        announcer = Announcer(self.hosting, self.gateways, lambda app: self.cold_starts.holding(app, clock.now_s()))
        fleets = FleetReconciler(self.hosting, announcer, self.slots.ceilings)
        self.reconcilers = Reconcilers(self.hosting, self.aliases, fleets, self.slots.room)
        self.publishing = Publishing(self.hosting, self.aliases, self.gateways, self.reconcilers.loop)
        self.interims = InterimHolds(self.hosting, self.gateways, self.reconcilers.loop)
        self.hosting.watched = self.slots.watch
        self.hosting.device_bytes = lambda: device_bytes(self.config.pool.accelerator)
        self.job_service = JobService(self.registry, jobs, lambda: self.config.publishing.model_dump().values())
        niceness.freeze_gc()
        self.reconcilers.start()
        self.slots.start()
        self.job_service.start()

    def configure(self, config: dict[str, Any]) -> None:
        """Take over a newer configuration: on Kubernetes the graph may be redeployed while this actor lives on. One that is not valid changes
        nothing; one that is changes all at once, between two turns, or nothing where a part cannot take it."""
        new = parse(config)
        registry = self.registry if self.registry.store.url == Store(new.store).url else registry_of(new)
        self.reconcilers.loop.call(lambda: self._configure(new, registry))

    def _configure(self, new: Config, registry: Registry) -> None:
        config, own, fleets = self.config, self.registry, [(one.spec, one.declared) for one in self.hosting.fleets.values()]
        try:
            self._take_over(new, registry)
        except Exception:
            self._take_over(config, own)
            for spec, declared in fleets:  # one of the store that the new configuration declares went with it
                if spec.name not in self.hosting.fleets:
                    self.hosting.add(spec, declared)
            raise

    def _take_over(self, new: Config, registry: Registry) -> None:
        self.config, self.registry = new, registry
        self.hosting.configure(new, registry)
        self.slots.configure(new.pool.accelerator, new.training.budget)
        self.job_service.configure(registry)

    # for gateways

    @ray.method(concurrency_group=BEATS)
    def view(self, known: int = 0) -> View | None:
        """The newest view, None where it is the ``known`` one or before it."""
        return self.gateways.newer(known)

    @ray.method(concurrency_group=BEATS)
    def stage(self, fleet: str = "") -> ColdStart:
        """How far the first replica of a fleet is; of any where none is named."""
        now_s, known = clock.now_s(), self.applications.known
        apps = [one.app for one in list(self.hosting.fleets.values()) if fleet in ("", one.name)]
        replicas = self.replicas.states
        told = self.cold_starts.those({one.id for one in replicas}, known, now_s)
        of_it = [one for one in told.values() if not one.app or one.app in apps]
        starting = sum(known[app].starting for app in apps if app in known)
        failed = next((one.words for app in apps if (one := self.cold_starts.failure(app)) and one.final), "")
        runs = any(r.app in apps for r in replicas)
        return cold_starts.stage(of_it, runs, starting, self.slots.jobs_hold_slots, now_s, failed)

    # for replicas

    @ray.method(concurrency_group=BEATS)
    def report(self, state: ReplicaState) -> None:
        """A replica says how it is: at once when it holds something else, and every second."""
        self.cold_starts.arrived(state.id)
        self.replicas.report(state)

    @ray.method(concurrency_group=BEATS)
    def starting(self, replica: str, stage: str, app: str = "") -> None:
        """Told by a replica on its way."""
        self.cold_starts.starting(replica, stage, app, clock.now_s())

    @ray.method(concurrency_group=BEATS)
    def failed(self, replica: str, app: str, weights: str, words: str, final: bool) -> None:
        """Told by a replica whose engine did not start."""
        self.cold_starts.failed(replica, app, FailedStart(weights, words, final, clock.now_s()))
        self.reconcilers.application_changed(app)

    @ray.method(concurrency_group=BEATS)
    def failure(self, app: str, weights: str) -> str:
        """Why an engine over these weights need not be started now; empty where one may be."""
        return self.cold_starts.holding(app, clock.now_s(), weights)

    @ray.method(concurrency_group=BEATS)
    def leaving(self, replica: str) -> None:
        """Told by a replica that ends, so that gateways know at once."""
        self.cold_starts.gone(replica)
        self.replicas.leave(replica)

    # for jobs

    @ray.method(concurrency_group=BEATS)
    def heartbeat(self, beat: Heartbeat) -> Grant:
        """A job's driver says that it lives and what it holds; returns what it has."""
        return self.slots.heartbeat(beat)

    @ray.method(concurrency_group=BEATS)
    def leave(self, job: str, driver: str) -> None:
        self.slots.leave(job, driver)

    @ray.method(concurrency_group=BEATS)
    def progress(self, job: str, snapshot: dict[str, Any]) -> bool:
        """A job's driver says where the job is; returns whether somebody asked for its end."""
        return self.job_service.progress(job, snapshot)

    @ray.method(concurrency_group=WAITING)
    def hold_interims(self, run: str, versions: list[str], places: int) -> None:
        """See `InterimHolds.hold`."""
        self.interims.hold(run, versions, places)

    @ray.method(concurrency_group=ORDERS)
    def end_interims(self, run: str) -> None:
        """See `InterimHolds.end`."""
        self.interims.end(run)

    # for operators

    def status(self) -> dict[str, Any]:
        """What `springtide status` prints: ``{"slots", "fleets", "aliases", "replicas", …}``, without the replicas' secrets."""
        replicas = self.replicas.states
        told = self.cold_starts.those({one.id for one in replicas}, self.applications.known, clock.now_s())
        return {
            "slots": self.slots.slots(),
            "fleets": self.fleets(),
            "aliases": {name: move.model_dump(mode="json") for name, move in self.gateways.current.aliases.items()},
            "replicas": [describe.public(replica) for replica in replicas],
            "starting": [{"id": id, "stage": one.words, "since_s": one.since_s} for id, one in told.items()],
            "asleep": max(0, len(engines.names()) - len(replicas) - len(told)),
            "rollouts": [describe.rollout_of(one, clock.now_s()) for one in list(self.aliases.progress.values())],
            "damaged": [damaged._asdict() for damaged in self.registry.damaged()],
            "troubles": describe.troubles(self.reconcilers.loop.queue.failures, time.monotonic()),
            "allocation": self.slots.describe(),
            "policy": self.config.publishing.policy.model_dump(mode="json"),
        }

    def fleets(self) -> list[dict[str, Any]]:
        """Every fleet with its bounds, its replicas and its state. The surge of a rollout is one more fleet."""
        fleets, replicas, known = list(self.hosting.fleets.values()), self.replicas.states, self.applications.known
        failures = dict(self.reconcilers.runtime_fleets.failures)
        surges = [found for one in fleets if (found := describe.surge(one, replicas, known))]
        return [
            *(describe.fleet(one, replicas, known, self.cold_starts.failure(one.app)) for one in fleets),
            *surges,
            *map(describe.failed_fleet, failures.items()),
        ]

    @ray.method(concurrency_group=WAITING)
    def add_fleet(self, name: str, overrides: dict[str, Any], author: str) -> list[dict[str, Any]]:
        """See `RuntimeFleets.add`. Returns what `fleets` does."""
        self.cold_starts.forget(graph.fleet_app(name))
        self.reconcilers.runtime_fleets.add(name, overrides, author)
        return self.fleets()

    @ray.method(concurrency_group=ORDERS)
    def remove_fleet(self, name: str, force: bool, author: str) -> list[dict[str, Any]]:
        """See `RuntimeFleets.remove`. Returns what `fleets` does; the fleet is listed as draining until it has gone."""
        self.reconcilers.runtime_fleets.remove(name, force, author)
        return self.fleets()

    def models(self, name: str | None = None) -> dict[str, Any]:
        return catalogue.models(self.registry, name)

    def version(self, id: str) -> dict[str, Any]:
        return catalogue.version(self.registry, id)

    def jobs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The newest jobs, the newest first; see `cluster.store.jobs.document`."""
        return self.job_service.listed(limit)

    def job(self, id: str) -> dict[str, Any]:
        """One job, by its id. Raises `JobNotFound`."""
        return self.job_service.get(id)

    def job_events(self, id: str, limit: int = 100) -> list[dict[str, Any]]:
        """See `JobService.events`."""
        return self.job_service.events(id, limit)

    @ray.method(concurrency_group=WAITING)
    def submit(self, verb: str, options: dict[str, Any], author: str) -> str:
        """See `JobService.submit`."""
        return self.job_service.submit(verb, options, author)

    @ray.method(concurrency_group=ORDERS)
    def cancel(self, id: str, author: str) -> dict[str, Any]:
        """See `JobService.cancel`."""
        return self.job_service.cancel(id, author)

    def logs(self, id: str, offset: int = 0) -> dict[str, Any]:
        """See `JobService.log`."""
        return self.job_service.log(id, offset)

    def history(self, alias: str) -> dict[str, Any]:
        return catalogue.history(self.registry, alias)

    def rollout(self, alias: str) -> dict[str, Any]:
        """``{"record", "seen"}``: the newest rollout of an alias, and what is known of it. Raises `ModelNotFound`."""
        progress = self.aliases.progress.get(alias) or Progress(catalogue.rollout(self.registry, alias), None, False)
        return {"record": progress.rollout.model_dump(mode="json"), "seen": describe.seen(progress, clock.now_s())}

    def allocation(self, since_s: float) -> dict[str, Any]:
        """What `springtide top` draws: ``{"allocation", "snapshots", "slots"}``, snapshots after ``since_s`` (seconds since the epoch)."""
        return self.slots.since(since_s)

    @ray.method(concurrency_group=WAITING)
    def publish(
        self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None, after: int | None = None
    ) -> Rollout:
        """See `Publishing.publish`."""
        return self.publishing.publish(version, alias, reason, author, policy, after)

    @ray.method(concurrency_group=WAITING)
    def promote(self, alias: str, reason: str, author: str, version: str | None = None) -> Rollout:
        """See `Publishing.order`."""
        return self.publishing.order(alias, "promote", reason, author, version)

    @ray.method(concurrency_group=ORDERS)
    def abort(self, alias: str, reason: str, author: str, version: str | None = None) -> Rollout:
        """See `Publishing.order`."""
        return self.publishing.order(alias, "abort", reason, author, version)

    @ray.method(concurrency_group=ORDERS)
    def rollback(self, alias: str, to: str | None, reason: str, author: str) -> Rollout:
        """See `Publishing.rollback`."""
        return self.publishing.rollback(alias, to, reason, author)


def remote(body: type[Control], **options: Any) -> Any:
    """The Ray actor class of a body. Groups of threads can be named where the class is made only."""
    decorate: Any = ray.remote
    return decorate(concurrency_groups=GROUPS)(body).options(**OPTIONS, **options)


def start(config: Config) -> Any:
    """Start the control actor where there is none, and return its handle. Callers outside this package use `cluster.control.client.ensure`."""
    return remote(Control, get_if_exists=True).remote(config.dump())
