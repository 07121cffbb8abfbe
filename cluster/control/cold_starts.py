"""How far the replicas are that are not there yet, as they say themselves, and why the last one did not come: for clients who wait for the
first one, and for whoever wants to know."""

from threading import Lock
from typing import NamedTuple

from cluster.control.applications import Application
from cluster.types import ColdStage, ColdStart

TOLD_S = 600
"""How long what a starting replica said about itself is repeated."""
GONE_S = 2
"""And how long where Serve does not list it: it lists one that has just begun, and one that failed no more."""
AGAIN_S = 60
"""How long no engine is started over weights on which one has just failed for good. Whoever has changed something need not wait longer."""


class Starting(NamedTuple):
    app: str
    """The Serve application; empty where it did not say."""
    words: str
    since_s: float


class FailedStart(NamedTuple):
    """The last start of an application's replica that came to nothing."""

    weights: str
    words: str
    final: bool
    """Whether the next start would fail as well: it does not fit, or vLLM refuses it."""
    at_s: float

    def holds(self, now_s: float) -> bool:
        """Whether nobody should start another yet."""
        return self.final and now_s - self.at_s < AGAIN_S


class ColdStarts:
    """Any thread may tell and ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._told: dict[str, Starting] = {}
        self._failures: dict[str, FailedStart] = {}
        """Application → its last failure, until a replica of it has started."""

    def starting(self, replica: str, words: str, app: str, now_s: float) -> None:
        with self._lock:
            self._told[replica] = Starting(app, words, now_s)

    def gone(self, replica: str) -> None:
        with self._lock:
            self._told.pop(replica, None)

    def arrived(self, replica: str) -> None:
        """It runs: what kept the one before it from starting is over."""
        if replica in self._told:  # not under the lock, which every replica would take every second
            with self._lock:
                told = self._told.pop(replica, None)
                self._failures.pop(told.app if told else "", None)

    def failed(self, replica: str, app: str, failure: FailedStart) -> None:
        with self._lock:
            self._told.pop(replica, None)
            self._failures[app] = failure

    def forget(self, app: str) -> None:
        """Another application takes the name."""
        with self._lock:
            self._failures.pop(app, None)

    def failure(self, app: str) -> FailedStart | None:
        """Why the application's last start came to nothing; None where it did not."""
        return self._failures.get(app)

    def holding(self, app: str, now_s: float, weights: str = "") -> str:
        """The words of a failure after which no other start is due yet, of these weights or any. Empty where one may start."""
        failure = self._failures.get(app)
        alike = failure is not None and weights in ("", failure.weights)
        return failure.words if failure and alike and failure.holds(now_s) else ""

    def those(self, running: set[str], known: dict[str, Application], now_s: float) -> dict[str, Starting]:
        """Replica → what it said last, of those that have said anything and are not ``running`` yet. Where Serve has none of the
        application's at all, they failed."""
        with self._lock:
            self._told = {
                id: told
                for id, told in self._told.items()
                if id not in running and now_s - told.since_s < (TOLD_S if wanted(known, told.app) else GONE_S)
            }
            return dict(self._told)


def wanted(known: dict[str, Application], app: str) -> int:
    """Replicas that Serve has or starts: of an application, or of all where it is not named."""
    return sum(one.running + one.starting for name, one in known.items() if app in ("", name))


def stage(told: list[Starting], running: bool, starting: int, jobs_hold_slots: bool, now_s: float, failed: str = "") -> ColdStart:
    """How far a fleet's first replica is. The words reach clients: they name no job and no machine. ``failed``: why the one before it did not
    start.

    >>> stage([], running=False, starting=1, jobs_hold_slots=True, now_s=0.0).words
    'A replica waits for a slot: jobs hold them.'
    """
    if failed and not running:
        return ColdStart(ColdStage.STARTING if told else ColdStage.QUEUED, failed)
    if told:
        newest = max(told, key=lambda one: one.since_s)
        return ColdStart(ColdStage.STARTING, f"A replica {newest.words}, since {now_s - newest.since_s:.0f} s.")
    if running:
        return ColdStart(ColdStage.RUNNING, "A replica has just come.")
    if not starting:
        return ColdStart(ColdStage.ASLEEP, "No replica runs, and none is being started.")
    return ColdStart(ColdStage.QUEUED, f"A replica waits for {'a slot: jobs hold them' if jobs_hold_slots else 'its process'}.")
