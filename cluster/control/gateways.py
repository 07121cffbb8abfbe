"""Control's side of the gateways: one view, announced so that no client sees an alias go back."""

import time
from threading import Lock
from typing import Any, cast

from cluster import logs
from cluster.control.background import Background
from cluster.control.broadcast import broadcast
from cluster.pool import graph
from cluster.publishing.canary import Tally, merge
from cluster.types import EMPTY_VIEW, FleetState, Generation, ReplicaState, View
from cluster.view import ViewDelta, delta

PREPARE_TIMEOUT_S = 2
"""Far less than a gateway holds requests (`deployments.routing.router.HOLD_TIMEOUT_S`), so that none gives up waiting before the move."""
ADOPT_TIMEOUT_S = 5
MEASURE_TIMEOUT_S = 2

log = logs.logger(__name__)


class Gateways:
    """Every gateway of the pool, and the view that they were last told."""

    def __init__(self) -> None:
        self.current = EMPTY_VIEW
        self.announcing = Lock()
        """Held while a view is announced. Nothing but the gateways is asked meanwhile."""
        self.background = Background(lambda: None, threads=4)

    def newer(self, known: int) -> View | None:
        """The newest view, None where it is the ``known`` one or before it. A gateway that starts during a move waits for the move's end, so
        that it cannot adopt half of one."""
        with self.announcing:
            return self.current if self.current.revision > known else None

    def announce(
        self,
        aliases: dict[str, Generation],
        replicas: tuple[ReplicaState, ...],
        fleets: dict[str, FleetState],
        alias_fleets: dict[str, str],
        asleep: bool = False,
    ) -> bool:
        """Make every gateway route by this. False where a gateway did not answer, and then nothing has changed; try again. ``asleep``: whether
        it is certain that no replica runs, so that none was merely not heard yet.

        Two phases: a gateway that has not heard of a move holds new requests for the alias until every gateway has, so a client that
        has seen the new generation at one gateway cannot get the old one from another. Should this process die between the phases,
        the gateways go on after a time of their own with what they know.
        """
        view = View(self._next(), aliases, replicas, fleets, alias_fleets)
        change = delta(self.current, view)
        if change.empty:
            return True
        if not replicas and not asleep and self.current is EMPTY_VIEW:
            return False  # just started and nothing heard yet: the gateways know better
        with self.announcing:
            return self._announce(view, change)

    def _announce(self, view: View, change: ViewDelta) -> bool:
        moved = list(change.moves)
        silent = failures(self._tell("prepare", moved, view.revision, timeout_s=PREPARE_TIMEOUT_S)) if moved else []
        if silent:
            log.warning("a gateway does not answer: %s", silent[0])
        if silent and self.current is EMPTY_VIEW:
            return False  # the gateways know more than this process does yet; they go on by themselves
        if silent:
            view = self.current._replace(revision=view.revision)
            change = delta(self.current, view)  # which releases those that did prepare
        self._adopt(view, change)
        return not silent

    def _next(self) -> int:
        """A revision above every one before, although clocks may go back."""
        return max(time.time_ns(), self.current.revision + 1)

    def _adopt(self, view: View, change: ViewDelta) -> None:
        """Tell what changed; a gateway that does not know what it changed from answers with what it does know, and hears all of it."""
        self.current = view
        answers = self._tell("adopt", change, timeout_s=ADOPT_TIMEOUT_S)
        known = [answer for answer in answers if isinstance(answer, int)]
        if max(known, default=0) > view.revision:  # from the control before this one, whose clock was ahead
            self.current = view._replace(revision=max(known) + 1)
        if any(revision != self.current.revision for revision in known):
            answers = self._tell("adopt", self.current, timeout_s=ADOPT_TIMEOUT_S)
        for error in failures(answers):
            log.warning("a gateway did not adopt the view: %s", error)  # it fetches it by itself

    def latest(self, alias: str, rollout: int) -> dict[str, Tally] | None:
        """Version id → what all gateways together saw of it since ``rollout`` of ``alias`` sends sessions to a canary, as they said a moment
        ago: they are asked in the background, again and again. None before the first answer."""
        return self.background.latest((alias, rollout), lambda: self._measured(alias, rollout))

    def forget(self, alias: str) -> None:
        """What was measured for rollouts of the alias is not needed any more."""
        self.background.forget(lambda key: key[0] == alias)

    def _measured(self, alias: str, rollout: int) -> dict[str, Tally]:
        answers = self._tell("measured", alias, rollout, timeout_s=MEASURE_TIMEOUT_S)
        tallies = [cast(dict[str, Tally], answer) for answer in answers if isinstance(answer, dict)]
        ids = {id for tally in tallies for id in tally}
        return {id: merge(tally[id] for tally in tallies if id in tally) for id in ids}

    def _tell(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        return broadcast(graph.GATEWAY_APP, method, *arguments, timeout_s=timeout_s)


def failures(answers: list[Any]) -> list[Exception]:
    return [answer for answer in answers if isinstance(answer, Exception)]
