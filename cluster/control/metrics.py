"""The metrics that control exports: how the slots are divided, what was decided, how long hand-overs took. See `cluster.metrics`."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cluster import logs
from cluster.capacity.allocator import GrantChange
from cluster.capacity.arbiter import SERVING, FleetGrant
from cluster.capacity.handover import Allocation, Handover, SlotSnapshot, ended_since
from cluster.metrics import (
    DECISIONS,
    FLEET_SLOTS,
    JOB_SLOTS,
    LEASE,
    SLOTS,
    SLOTS_FREE,
    TRAINING_AGAIN,
    WAITING,
    WANTED,
    Metric,
)

TRAINING, IDLE = "training", "idle"
MOST_JOBS = 64
"""Jobs with series of their own at a time, those that hold most slots first. All count in the sums."""
RECENT = 500
"""How many of the last snapshots are searched for a hand-over that ended. One that takes more changes than that is timed too short."""
PARTS = ("grant", "held", "active")
METHODS = {"gauge": "set", "counter": "inc", "histogram": "observe"}

log = logs.logger(__name__)


class Sample(NamedTuple):
    """One value: a gauge's level, what a counter grows by, or one observation. ``tags`` in the metric's order."""

    metric: Metric
    value: float
    tags: tuple[str, ...] = ()


# the values: pure


def levels(snapshot: SlotSnapshot, before: Iterable[str] = ()) -> list[Sample]:
    """The gauges at ``snapshot``. ``before``: the jobs that had series of their own. Those that have ended are set to 0 once, and then their
    series end."""
    training = sum(one.held for one in snapshot.jobs)
    slots = [
        Sample(SLOTS, n, (owner,)) for owner, n in ((SERVING, snapshot.serving), (TRAINING, training), (IDLE, snapshot.idle))
    ]
    waiting = sum(1 for one in snapshot.jobs if one.held == one.grant == 0)
    totals = [Sample(LEASE, snapshot.lease), Sample(WANTED, snapshot.wanted), Sample(WAITING, waiting)]
    ended = [Allocation(job, 0, 0, 0) for job in before if job not in {one.job for one in snapshot.jobs}]
    jobs = [(one.job, part, getattr(one, part)) for one in (*largest(snapshot), *ended) for part in PARTS]
    return [*slots, *totals, *(Sample(JOB_SLOTS, slots, (job, part)) for job, part, slots in jobs)]


def largest(snapshot: SlotSnapshot) -> list[Allocation]:
    """The jobs with series of their own."""
    return sorted(snapshot.jobs, key=lambda one: -max(one.held, one.grant))[:MOST_JOBS]


def fleet_levels(fleets: Iterable[FleetGrant], before: Iterable[str] = ()) -> list[Sample]:
    """The gauges of each fleet. ``before``: as in `levels`."""
    now = {fleet.name: (fleet.slots, fleet.lacks) for fleet in fleets}
    gone = {name: (0, 0) for name in before if name not in now}
    return [
        Sample(FLEET_SLOTS, slots, (name, part))
        for name, both in {**now, **gone}.items()
        for part, slots in zip(("grant", "lacking"), both, strict=True)
    ]


def decided(changes: Iterable[GrantChange]) -> list[Sample]:
    """One for each change of a grant."""
    return [
        Sample(DECISIONS, 1, (SERVING if one.owner == SERVING else TRAINING, "grow" if one.after > one.before else "shrink"))
        for one in changes
    ]


def took(done: Iterable[Handover]) -> list[Sample]:
    """The seconds of hand-overs that ended."""
    both = (
        (one.kind, metric, s) for one in done for metric, s in ((SLOTS_FREE, one.slots_free_s), (TRAINING_AGAIN, one.training_s))
    )
    return [Sample(metric, max(0.0, seconds), (kind,)) for kind, metric, seconds in both if seconds is not None]


# telling Ray


class Board:
    """The instruments, and what they were told already: every decision and every hand-over counts once."""

    def __init__(self) -> None:
        self.instruments: dict[str, Any] = {}
        self.jobs: tuple[str, ...] = ()
        self.fleets: tuple[str, ...] = ()
        self.change: GrantChange | None = None
        self.snapshot: SlotSnapshot | None = None
        self.failing = False

    def news(
        self, snapshots: Sequence[SlotSnapshot], changes: Sequence[GrantChange], fleets: Sequence[FleetGrant] = ()
    ) -> list[Sample]:
        """What has to be said now."""
        if not snapshots:
            return []
        said = [*levels(snapshots[-1], self.jobs), *fleet_levels(fleets, self.fleets)]
        said += [*decided(self._since(changes)), *took(self._ended(snapshots))]
        self.jobs = tuple(one.job for one in largest(snapshots[-1]))
        self.fleets = tuple(fleet.name for fleet in fleets)
        self.change, self.snapshot = (changes[-1] if changes else None), snapshots[-1]
        return said

    def _since(self, changes: Sequence[GrantChange]) -> list[GrantChange]:
        """Those after the last that was counted. That one is found by identity, not by time: clocks may go back."""
        new: list[GrantChange] = []
        for change in reversed(changes):
            if change is self.change:
                break
            new.append(change)
        return new

    def _ended(self, snapshots: Sequence[SlotSnapshot]) -> list[Handover]:
        """The hand-overs that ended since the last call. If nothing was recorded since, none did."""
        if snapshots[-1] is self.snapshot:
            return []
        since_s = self.snapshot.at_s if self.snapshot else float("-inf")
        return ended_since(list(snapshots)[-RECENT:], since_s)

    def tell(self, sample: Sample) -> None:
        name, kind, _, keys = sample.metric
        if name not in self.instruments:
            self.instruments[name] = sample.metric.make()
        instrument, tags = self.instruments[name], dict(zip(keys, sample.tags, strict=True))
        getattr(instrument, METHODS[kind])(float(sample.value), tags)


def publish(
    board: Board, snapshots: Sequence[SlotSnapshot], changes: Sequence[GrantChange], fleets: Sequence[FleetGrant] = ()
) -> None:
    """Tell Ray's agent how the slots are divided and what has happened since the last call. Call it often: a gauge that nobody sets ends.

    Never raises, because dividing the slots matters more than being watched.
    """
    try:
        for sample in board.news(snapshots, changes, fleets):
            board.tell(sample)
        board.failing = False
    except Exception:  # whatever Ray's client raises; logged once until it works again
        if not board.failing:
            log.exception("the metrics of slots")
        board.failing = True
