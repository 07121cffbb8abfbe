"""What still runs on the pool for a fleet that is no more: its Serve application, its surge, its sleeping engines.

Control starts and ends these itself. It may be killed after it has recorded that a fleet was removed and before Serve has deleted the
application; the control that comes after it hosts no such fleet, and nobody would name the application again. So what runs is compared with
what should, again and again, whoever began to end it.

Example: the newest record of ``extra`` says that it was removed, control does not host it, and Serve has ``fleet-extra``. Control hosts it
again as a fleet that drains, and so it is listed and counted until it has gone, as if nobody had been killed.
"""

import threading
from collections.abc import Mapping
from typing import NamedTuple

from cluster import logs
from cluster.control import engines
from cluster.control.applications import surged
from cluster.control.engines import EngineName
from cluster.control.hosting import Hosting
from cluster.control.runtime_fleets import RuntimeFleets
from cluster.pool import graph
from cluster.pool.serve_api import IMPERATIVE

LOOK_S = 2.0
"""How often Ray is asked what runs."""
SOON_S = 0.3
"""How long after a question its answer is looked for."""

log = logs.logger(__name__)


class Found(NamedTuple):
    """What runs, in Ray's words."""

    imperative: frozenset[str] = frozenset()
    """Of the applications of removed fleets those that `serve.run` started, as control does. Others are declared by a configuration that
    control need not have heard of yet."""
    engines: tuple[str, ...] = ()
    """The names of all engines, awake or asleep."""


class Facts(NamedTuple):
    """What runs, and which fleets there should be."""

    applications: frozenset[str]
    found: Found
    hosted: frozenset[str]
    """The fleets that control hosts, declared or not."""
    draining: frozenset[str]
    """Those of them that were removed."""
    ended: Mapping[str, bool]
    """Every fleet that was ever added at run time → whether its newest record says that it was removed."""


class Leftovers(NamedTuple):
    fleets: tuple[str, ...] = ()
    """Fleets whose application must drain and go."""
    surges: tuple[str, ...] = ()
    """Applications of surges that must go."""
    engines: tuple[str, ...] = ()
    """Names of engines that must go, unless a replica owns them still."""


def leftovers(facts: Facts) -> Leftovers:
    """What nobody needs any more.

    A fleet stays where control hosts it and it was not removed, where its newest record says so, and where Serve has its application although
    nothing says that it was removed: control may not have heard of the configuration that declares it.
    """
    removed = removed_fleets(facts.applications, facts.ended) - facts.hosted
    removed = {name for name in removed if graph.fleet_app(name) in facts.found.imperative}
    recorded = {name for name, ended in facts.ended.items() if not ended}
    served = {name for app in facts.applications if (name := graph.fleet_of(app))} - removed - facts.draining
    stay = (facts.hosted - facts.draining) | recorded | served
    surges = (app for app in facts.applications if (name := surged(app)) and name not in stay | facts.hosted)
    sleepers = (name for name in facts.found.engines if (one := EngineName.parse(name)) and one.fleet not in stay)
    return Leftovers(tuple(sorted(removed)), tuple(sorted(surges)), tuple(sorted(sleepers)))


def removed_fleets(applications: frozenset[str], ended: Mapping[str, bool]) -> set[str]:
    """The fleets that were removed, as their newest records say, and that Serve has."""
    return {name for name, over in ended.items() if over and graph.fleet_app(name) in applications}


class LeftoverReconciler:
    """Used by the loop's thread only. Ray and its dashboard may be away for long, so they are asked in other threads."""

    def __init__(self, hosting: Hosting, fleets: RuntimeFleets) -> None:
        self.hosting = hosting
        self.fleets = fleets

    def reconcile(self) -> float:
        """One turn; the seconds until the next. Raises where Ray does not say what runs."""
        if not (self.hosting.desired.loaded and self.hosting.applications.read):
            return SOON_S  # a fleet that was not read yet looks as if it were no more
        known, ended = frozenset(self.hosting.applications.known), self.fleets.ended
        doubtful = bool(removed_fleets(known, ended) - self.hosting.fleets.keys())
        found = self.hosting.background.result("leftovers", lambda: self.look(doubtful))
        if found is None:
            return SOON_S
        self._end(leftovers(self._facts(known, found)))
        return LOOK_S

    def look(self, doubtful: bool) -> Found:
        """In a thread of its own. ``doubtful``: whether it matters who started the applications."""
        sources = self.hosting.applications.sources() if doubtful else {}
        return Found(frozenset(app for app, source in sources.items() if source == IMPERATIVE), tuple(engines.names()))

    def _facts(self, applications: frozenset[str], found: Found) -> Facts:
        fleets = self.hosting.fleets.values()
        draining = frozenset(fleet.name for fleet in fleets if fleet.removed)
        return Facts(applications, found, frozenset(self.hosting.fleets), draining, self.fleets.ended)

    def _end(self, those: Leftovers) -> None:
        for name in those.fleets:
            self.fleets.drain(name)
        for app in those.surges:
            if self.hosting.applications.there(app):
                self.hosting.applications.end(app)
        if those.engines:
            threading.Thread(target=self.end_engines, args=(those.engines,), name="end-engines", daemon=True).start()

    def end_engines(self, names: tuple[str, ...]) -> None:
        """In a thread of its own."""
        log.info("no fleet owns these engines: %s", ", ".join(names))
        engines.end(names)
