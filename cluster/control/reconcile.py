"""What control reconciles: each alias, each fleet, the store's list of both, and what is left of fleets that are no more. Sends a key of the
work queue to its reconciler.

::

    store ── discover ──▶ ("alias", name) ── moved ──▶ ("fleet", name) ──▶ gateways, replicas, Serve
                                ▲                            ▲
                                └──── replicas report ───────┘
"""

from collections.abc import Callable

from cluster.control.aliases import AliasReconciler
from cluster.control.fleets import FleetReconciler
from cluster.control.hosting import Hosting
from cluster.control.leftovers import LeftoverReconciler
from cluster.control.loop import Loop
from cluster.control.runtime_fleets import RuntimeFleets
from cluster.control.work_queue import Key

DISCOVER: Key = ("discover", "")
LEFTOVERS: Key = ("leftovers", "")
DISCOVER_S = 2.0
"""How often the store is listed for aliases and fleets that other hands have made."""


class Reconcilers:
    def __init__(
        self, hosting: Hosting, aliases: AliasReconciler, fleets: FleetReconciler, room: Callable[[], int | None]
    ) -> None:
        self.hosting = hosting
        self.aliases = aliases
        self.fleets = fleets
        self.loop = Loop(self.reconcile)
        self.runtime_fleets = RuntimeFleets(hosting, self.loop, room)
        self.leftovers = LeftoverReconciler(hosting, self.runtime_fleets)

    def start(self) -> None:
        self.loop.add(DISCOVER, LEFTOVERS)
        self.loop.start()

    def reconcile(self, key: Key) -> float | None:
        kind, name = key
        if kind == "alias":
            return self.aliases.reconcile(name)
        if kind == "fleet":
            return self.fleets.reconcile(name)
        if kind == "leftovers":
            return self.leftovers.reconcile()
        return self._discover()

    def _discover(self) -> float:
        """Nothing else is reconciled before the first time: gateways must not hear of some aliases only, since they would drop the others."""
        desired = self.hosting.desired
        self.runtime_fleets.sync()
        names = desired.names() if desired.loaded else desired.load()
        for key in [*(("fleet", name) for name in self.hosting.fleets), *(("alias", name) for name in names)]:
            if key not in self.loop.queue:
                self.loop.add(key)
        return DISCOVER_S

    def changed(self, kind: str, name: str) -> None:
        """Something happened to an alias or a fleet. From any thread."""
        self.loop.post(lambda: self._changed(kind, name))

    def application_changed(self, app: str) -> None:
        """Replicas of a Serve application came, went, or hold something else. From any thread."""
        self.loop.post(lambda: [self._changed("fleet", one.name) for one in self.hosting.fleets.values() if app in one.apps])

    def _changed(self, kind: str, name: str) -> None:
        if not self.hosting.desired.loaded:
            return
        self.loop.add((kind, name))
        if kind == "fleet":  # a rollout on it may wait for just this
            assigned = self.hosting.assigned()
            for alias in self.hosting.desired.under_way():
                if assigned.get(alias, name) == name:
                    self.loop.add(("alias", alias))
