"""How far the replicas are that are not there yet, as they say themselves: for clients who wait for the first one."""

from threading import Lock
from typing import NamedTuple

from cluster.control.applications import Application
from cluster.types import ColdStage, ColdStart

TOLD_S = 600
"""How long what a starting replica said about itself is repeated."""
GONE_S = 2
"""And how long where Serve does not list it: it lists one that has just begun, and one that failed no more."""


class Starting(NamedTuple):
    app: str
    """The Serve application; empty where it did not say."""
    words: str
    since_s: float


class ColdStarts:
    """Any thread may tell and ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._told: dict[str, Starting] = {}

    def starting(self, replica: str, words: str, app: str, now_s: float) -> None:
        with self._lock:
            self._told[replica] = Starting(app, words, now_s)

    def gone(self, replica: str) -> None:
        with self._lock:
            self._told.pop(replica, None)

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


def stage(told: list[Starting], running: bool, starting: int, jobs_hold_slots: bool, now_s: float) -> ColdStart:
    """How far a fleet's first replica is. The words reach clients: they name no job, no machine and no version.

    >>> stage([], running=False, starting=1, jobs_hold_slots=True, now_s=0.0).words
    'A replica waits for a slot: jobs hold them.'
    """
    if told:
        newest = max(told, key=lambda one: one.since_s)
        return ColdStart(ColdStage.STARTING, f"A replica {newest.words}, since {now_s - newest.since_s:.0f} s.")
    if running:
        return ColdStart(ColdStage.RUNNING, "A replica has just come.")
    if not starting:
        return ColdStart(ColdStage.ASLEEP, "No replica runs, and none is being started.")
    return ColdStart(ColdStage.QUEUED, f"A replica waits for {'a slot: jobs hold them' if jobs_hold_slots else 'its process'}.")
