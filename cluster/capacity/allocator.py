"""The tide: what each job may have of the pool's slots now, and what serving keeps. Owned by control, which passes the time in.

Jobs claim, serving's replicas are counted, `cluster.capacity.arbiter` divides, and who has more than its grant is asked to yield. A job never
gets more than is free: what it is promised beyond that comes when who holds it has given it back, so no slot has two owners.
"""

from collections import deque
from typing import Any, NamedTuple

from cluster.capacity.arbiter import SERVING, Budget, Decision, Demand, Job, Past, counted, decide, order
from cluster.capacity.handover import Allocation, SlotSnapshot

SILENT_S = 10
"""A job that claims nothing for this long has ended; its slots are free when Ray says so."""
LEARN_S = 3
"""How long a control that was just started only listens: jobs that run claim what they hold within this time."""
REMEMBERED = 200
"""Turns."""
SNAPSHOTS = 5_000


class Heartbeat(NamedTuple):
    """What a job asks for, and the slots that its workers hold now: 0 while it waits."""

    job: Job
    held: int = 0
    active: int = 0
    """Of them, those that train now."""
    driver: str = ""
    """The process that claims: of two that run one job, the first has the slots, until it is silent."""


class Grant(NamedTuple):
    """What a job has to live with."""

    slots: int
    reason: str


class GrantChange(NamedTuple):
    """One change of somebody's grant, for whoever watches."""

    at_s: float
    owner: str
    before: int
    after: int
    reason: str


class Allocator:
    def __init__(self, budget: Budget, now_s: float) -> None:
        self.budget = budget
        self.began_s = now_s
        self.heartbeats: dict[str, tuple[Heartbeat, float]] = {}
        self.past = Past()
        self.grants: dict[str, Grant] = {}
        self.changes: deque[GrantChange] = deque(maxlen=REMEMBERED)
        self.snapshots: deque[SlotSnapshot] = deque(maxlen=SNAPSHOTS)

    def heartbeat(self, beat: Heartbeat, now_s: float) -> Grant:
        """What the job has now. Its driver claims again and again, as long as the job lives."""
        known, heard_s = self.heartbeats.get(beat.job.id, (beat, now_s))
        if known.driver != beat.driver and now_s - heard_s < SILENT_S:
            return Grant(0, "another process runs this job, or did some seconds ago")
        self.heartbeats[beat.job.id] = (beat, now_s)
        return self.grant(beat.job.id, beat.held)

    def grant(self, job: str, held: int) -> Grant:
        """The job's grant, or what it holds while nothing was decided about it yet."""
        return self.grants.get(job) or Grant(held, "control has not decided yet")

    def end(self, job: str, driver: str = "") -> None:
        """The job is over, and nobody need wait until it has been silent for long enough."""
        if job in self.heartbeats and self.heartbeats[job][0].driver != driver:
            return
        self.heartbeats.pop(job, None)
        self.grants.pop(job, None)

    @property
    def held_by_jobs(self) -> int:
        """The slots that jobs hold."""
        return sum(beat.held for beat, _ in self.heartbeats.values())

    def floor(self, lease: int, most: int | None) -> int:
        """The slots that jobs hold, or need in order to run at all, as far as serving's ``lease`` and they are at most ``most`` together.

        What jobs hold always counts. One that waits and does not fit is passed over for those after it, in the order in which they would
        get slots: it could not run, and asked for beside it they would get no machine either.
        """
        slots = self.held_by_jobs
        lacks = {beat.job.id: max(0, beat.job.least - beat.held) for beat, _ in self.heartbeats.values()}
        for job in order([beat.job for beat, _ in self.heartbeats.values()]):
            if most is None or lease + slots + lacks[job.id] <= most:
                slots += lacks[job.id]
        return slots

    def turn(self, slots: int, held: int, wanted: int, now_s: float, free: int | None = None, most: int | None = None) -> int:
        """Decide anew; the slots that serving should hold. ``held``: by replicas, those that end still included. ``wanted``: for all that
        Serve has and wants. ``free``: what nobody holds, as Ray counts: others may be on the pool that claim nothing. ``most``: as in
        `Demand`."""
        if 0 <= now_s - self.began_s < LEARN_S:  # a clock may be set back
            self._record(slots, held, wanted, now_s)
            return wanted
        self.heartbeats = {id: (beat, at_s) for id, (beat, at_s) in self.heartbeats.items() if now_s - at_s < SILENT_S}
        jobs = tuple(beat.job for beat, _ in self.heartbeats.values())
        decision = decide(self.budget, Demand(slots, wanted, jobs, most), self.past, now_s)
        self._note(decision, now_s)
        self.past = decision.past
        unheld = slots - held - self.held_by_jobs
        self.grants = self._promise(decision, max(0, unheld), max(0, unheld if free is None else min(unheld, free)))
        self._record(slots, held, wanted, now_s)
        return decision.grants[SERVING]

    def _promise(self, decision: Decision, unheld: int, free: int) -> dict[str, Grant]:
        """Grants, each growing only by what is ``free`` now: a slot is given when it has been given back. What a job was promised and does not
        say yet that it holds is its own if nobody else says so (``unheld``): it may just have taken it."""
        promised: dict[str, Grant] = {}
        for verdict in decision.verdicts:
            if verdict.owner == SERVING:
                continue
            beat, _ = self.heartbeats[verdict.owner]
            before = self.grants.get(verdict.owner)
            own = min(unheld, max(0, before.slots - beat.held)) if before else 0
            more = min(max(free, own), max(0, verdict.slots - beat.held))
            more -= more % beat.job.step
            has = min(verdict.slots, beat.held + more)
            if has < beat.job.least:
                has = 0
            given = max(0, has - beat.held)
            free, unheld = max(0, free - given), max(0, unheld - given)
            few = f"{counted(verdict.slots)} meant for it, {has} there so far"
            promised[verdict.owner] = Grant(has, verdict.reason if has == verdict.slots else few)
        return promised

    def _note(self, decision: Decision, now_s: float) -> None:
        before = dict(self.past.grants)
        for verdict in decision.verdicts:
            if verdict.act != "hold":
                self.changes.append(
                    GrantChange(now_s, verdict.owner, before.get(verdict.owner, 0), verdict.slots, verdict.reason)
                )

    def _record(self, slots: int, held: int, wanted: int, now_s: float) -> None:
        lease = dict(self.past.grants).get(SERVING, wanted)
        known = {allocation.job: allocation for allocation in self.snapshots[-1].jobs} if self.snapshots else {}
        allocations: list[Allocation] = []
        for id, (beat, _) in self.heartbeats.items():
            allocation = Allocation(id, self.grant(id, beat.held).slots, beat.held, beat.active)
            before = known.get(id, allocation)
            allocations.append(before if before == allocation else allocation)  # most stay as they were, and are kept once
        snapshot = SlotSnapshot(now_s, slots, lease, held, wanted, tuple(allocations))
        if not self.snapshots or self.snapshots[-1]._replace(at_s=now_s) != snapshot:
            self.snapshots.append(snapshot)

    def describe(self) -> dict[str, Any]:
        """``{"grants": {owner: slots}, "jobs": […], "changes": […]}`` for `springtide status`."""
        return {
            "grants": dict(self.past.grants),
            "jobs": [
                {
                    **beat.job._asdict(),
                    "held": beat.held,
                    "active": beat.active,
                    "reason": self.grant(beat.job.id, beat.held).reason,
                }
                for beat, _ in self.heartbeats.values()
            ],
            "changes": [change._asdict() for change in self.changes],
        }

    def since(self, at_s: float) -> list[SlotSnapshot]:
        """What was recorded after ``at_s``, oldest first."""
        return [snapshot for snapshot in self.snapshots if snapshot.at_s > at_s]
