"""Control without Ray: its reconcilers over a real store, with replicas and gateways that are plain objects. For unit tests.

Real are the store, the registry, the control loop, both reconcilers and publishing. A replica here does what an engine does with an order: it
loads or stages versions, or swaps its weights, and reports.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from cluster.config import Config, parse
from cluster.control.aliases import AliasReconciler
from cluster.control.announcing import Announcer
from cluster.control.applications import Application, Applications
from cluster.control.desired import Desired
from cluster.control.fleets import FleetReconciler
from cluster.control.gateways import Gateways
from cluster.control.hosting import Hosting
from cluster.control.interim_holds import InterimHolds
from cluster.control.leftovers import Found
from cluster.control.publishing import Publishing
from cluster.control.reconcile import Reconcilers
from cluster.control.replicas import Replicas
from cluster.pool.serve_api import ServeApi
from cluster.publishing.rollout import DIRECT, Rollout
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import HoldOrder, Lineage, Manifest, ReplicaBounds, ReplicaState, VersionId, View, is_interim
from cluster.view import ViewDelta, apply
from tests.adapters import make_adapter

SETTINGS = '{"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1}'


def make_base(folder: Path, seed: int = 0) -> Path:
    """A model that no engine could run and every check of an artefact passes."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(SETTINGS)
    names = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "v_proj")]
    save_file({name: random.normal(size=(4, 4)).astype(np.float32) for name in names}, folder / "model.safetensors")
    return folder


class Machines:
    """The replicas of all fleets."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.replicas: Replicas | None = None
        self.there: dict[str, ReplicaState] = {}
        self.hung: dict[str, threading.Event] = {}
        """Application → set when its replicas shall answer orders again."""
        self.places = 16
        """For adapters, on each replica."""
        self.deaf = 0
        """So many orders to come reach no replica, and nobody says so."""
        self.served: dict[str, Application] = {}
        """What control has started in Serve. It outlives a control."""
        self.declared: set[str] = set()
        """Of those the ones that a configuration declares by now."""
        self.engines: set[str] = set()
        self.draining = False
        """Whether an application that ends has streams to finish, until the test takes it from `served`."""

    def start(self, id: str, app: str, weights: VersionId) -> None:
        held = {str(weights): self.registry.manifest(weights).digest}
        self.there[id] = ReplicaState(id, f"http://{id}", "secret", str(weights), held, {}, 0, app=app)

    def report(self) -> None:
        if self.replicas is not None:
            self.replicas.report(*self.there.values())

    def tell(self, app: str, method: str, *arguments: Any) -> None:
        if app in self.hung:
            self.hung[app].wait(30)
        if self.deaf:
            self.deaf -= 1
            return
        does = {"hold": self._hold, "bound": self._bound}.get(method, self._swap)
        for id, state in list(self.there.items()):
            if state.app == app:
                self.there[id] = does(state, *arguments)
        self.report()

    def _bound(self, state: ReplicaState, bounds: ReplicaBounds) -> ReplicaState:
        return state._replace(bounds=bounds)

    def _hold(self, state: ReplicaState, orders: dict[str, HoldOrder], _carried: Any) -> ReplicaState:
        order = orders.get(state.id, HoldOrder(()))
        for id in order.load:
            manifest = self.registry.manifest(VersionId.parse(id))
            here = str(manifest.weights) == state.base
            part = {"held": {**state.held, id: manifest.digest}} if here else {"staged": {**state.staged, id: manifest.digest}}
            state = state._replace(revision=state.revision + 1, **part)
        over = [id for id in state.held if is_interim(id) and state.id in orders and id not in order.keep]
        held = {id: digest for id, digest in state.held.items() if id not in over}
        state = state._replace(held=held, revision=state.revision + bool(over))
        idle = [id for id in state.held if id not in (*order.keep, state.base)]
        over = idle[: max(0, len(state.held) - 1 - self.places)]
        return state._replace(held={id: digest for id, digest in state.held.items() if id not in over})

    def _swap(self, state: ReplicaState, replica: str, id: str, _fingerprint: str, _cut: bool) -> ReplicaState:
        digest = self.registry.manifest(VersionId.parse(id)).digest
        mine = state.id == replica
        return state._replace(base=id, held={id: digest}, staged={}, revision=state.revision + 1) if mine else state


class Controlled:
    """One control, from its start on a store until `stop_all`."""

    running: ClassVar[list["Controlled"]] = []

    def __init__(self, config: Config, machines: Machines) -> None:
        self.config, self.machines = config, machines
        self.registry = Registry(Store(config.store))
        self.gateways, self.view = Gateways(), View(0, {}, ())
        self.gateways._tell = self._hear  # type: ignore[method-assign]
        self.applications = Applications(no_serve)
        self.applications.read = True
        self.configured = {f"fleet-{name}": Application("RUNNING", running=1) for name in config.fleets}
        self.refresh()
        self.applications.start_fleet = self._start_fleet  # type: ignore[method-assign]
        self.applications.end = self._end  # type: ignore[method-assign]
        self.replicas = machines.replicas = Replicas(lambda app: self.reconcilers.application_changed(app))
        self.replicas.tell = machines.tell  # type: ignore[method-assign]
        self.hosting = Hosting(
            config,
            Desired(self.registry),
            self.replicas,
            self.applications,
            lambda kind, name: self.reconcilers.changed(kind, name),
        )
        self.ceilings: dict[str, int | None] = {}
        self.room: int | None = 4
        self.aliases = AliasReconciler(self.hosting, self.gateways, lambda: self.room)
        self.reconcilers = Reconcilers(
            self.hosting,
            self.aliases,
            FleetReconciler(self.hosting, Announcer(self.hosting, self.gateways), lambda: self.ceilings),
            lambda: self.room,
        )
        self.publishing = Publishing(self.hosting, self.aliases, self.gateways, self.reconcilers.loop)
        self.interims = InterimHolds(self.hosting, self.gateways, self.reconcilers.loop)
        self.fleets = self.reconcilers.runtime_fleets
        self.reconcilers.leftovers.look = self.look  # type: ignore[method-assign]
        self.reconcilers.leftovers.end_engines = self._end_engines  # type: ignore[method-assign]
        machines.report()
        self.reconcilers.start()
        threading.Thread(target=self._beat, daemon=True).start()
        self.running.append(self)

    def _beat(self) -> None:
        while self.machines.replicas is self.replicas:  # until the next control
            self.machines.report()
            time.sleep(0.2)

    def _hear(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        if method == "adopt":
            news: View | ViewDelta = arguments[0]
            self.view = news if isinstance(news, View) else apply(self.view, news)
        return [self.view.revision]

    def refresh(self) -> None:
        self.applications.known = {**self.configured, **self.machines.served}

    def _start_fleet(self, spec: Any) -> None:
        self.machines.served[f"fleet-{spec.name}"] = Application("DEPLOYING", starting=1)
        self.refresh()

    def _end(self, app: str) -> None:
        self.machines.served.pop(app, None)
        if self.machines.draining:
            self.machines.served[app] = Application("DELETING", ending=1)
        self.refresh()

    def look(self, doubtful: bool) -> Found:
        imperative = self.machines.served.keys() - self.machines.declared if doubtful else ()
        return Found(frozenset(imperative), tuple(self.machines.engines))

    def _end_engines(self, names: tuple[str, ...]) -> None:
        self.machines.engines.difference_update(names)

    def publish(self, version: VersionId, alias: str) -> Rollout:
        return self.publishing.publish(str(version), alias, "test", "test", DIRECT)


def no_serve() -> ServeApi:
    raise AssertionError("nothing is served here")


def stop_all() -> None:
    """End the threads of every control that a test has started."""
    while Controlled.running:
        control = Controlled.running.pop()
        control.machines.replicas = None
        control.reconcilers.loop.stop()


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def two_fleets(folder: Path, of_m: dict[str, Any] | None = None) -> tuple[Config, Registry, Machines]:
    """A store in which m@1 and n@1 are live, and a machine for each of the fleets m and n. ``of_m``: settings of the fleet m."""
    fleets = {"m": of_m or {}, "n": {}}
    config = parse({"home": str(folder / "home"), "store": (folder / "store").as_uri(), "fleets": fleets})
    registry = Registry(Store(config.store))
    machines = Machines(registry)
    for seed, name in enumerate(("m", "n")):
        made = registry.register(name, "weights", None, make_base(folder / name, seed), Lineage())
        registry.move(name, made.id, "first", "test", after=0)
        machines.start(f"replica-{name}", f"fleet-{name}", made.id)
    return config, registry, machines


def adapter(registry: Registry, folder: Path, base: VersionId, seed: int, name: str = "") -> Manifest:
    root = registry.store.local_root
    assert root is not None
    made = make_adapter(folder / f"adapter-{seed}", root / f"versions/{base.name}/{base.n}/files", rank=2, seed=seed)
    return registry.register(name or base.name, "adapter", base, made, Lineage())
