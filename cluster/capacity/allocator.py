"""The allocator: what each job may have of the pool's slots now, and what serving keeps.

Control owns one and passes the time in. Every job's driver sends heartbeats (what it asks for, what its workers hold) and gets a grant
back. Every turn the arbiter (`cluster.capacity.arbiter`) decides what each owner *shall* have. The allocator turns that into what each job
*may* have now: less at once, because a job has to yield; more only as far as slots are free, because no slot may have two owners.

Example: 4 slots, serving holds 1, job ``a`` holds 3. Serving's load rises to 3, so ``a`` shall have 1. Its grant is 1 in the same turn, and
its driver takes two workers away. When the load has fallen again, ``a`` shall have 3. As long as two replicas are still ending, its grant
stays 1; when Ray counts their slots as free, its grant is 3.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.capacity.arbiter import (
    SERVING,
    Assignment,
    Budget,
    Decision,
    Demand,
    FleetDemand,
    Job,
    Past,
    arbitrate,
    counted,
    order,
)
from cluster.capacity.handover import Allocation, SlotSnapshot

SILENT_S = 10
"""A job without a heartbeat for so long has ended. Its slots are free when Ray says so."""
LISTEN_S = 3
"""A control that has just started only listens for so long. Within this time every running job has said what it holds."""
CHANGES = 200
"""How many changes of grants are kept."""
SNAPSHOTS = 5_000
"""How many snapshots are kept."""


class Heartbeat(NamedTuple):
    """A driver's words: what its job asks for, and the slots that its workers hold now. It holds 0 while it waits."""

    job: Job
    held: int = 0
    active: int = 0
    """Of the held ones, those whose workers train now."""
    driver: str = ""
    """The driver's process. If two processes run one job, the first one has the slots until it is silent."""
    requested: int = 0
    """Of the held ones, those that somebody else asks Ray's autoscaler for: Ray Train does for its workers."""


class Grant(NamedTuple):
    """What a job may have, and why."""

    slots: int
    reason: str


class GrantChange(NamedTuple):
    """One change of what an owner shall have, for logs, metrics and people."""

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
        """Job → its last heartbeat and when that came."""
        self.lease = 0
        self.decision = Decision((), (), Past())
        self.grants: dict[str, Grant] = {}
        """Job → what it may have now."""
        self.changes: deque[GrantChange] = deque(maxlen=CHANGES)
        self.snapshots: deque[SlotSnapshot] = deque(maxlen=SNAPSHOTS)

    # what drivers say

    def heartbeat(self, beat: Heartbeat, now_s: float) -> Grant:
        """Note that the job lives and what it holds. Returns what it may have."""
        last, heard_s = self.heartbeats.get(beat.job.id, (beat, now_s))
        if last.driver != beat.driver and now_s - heard_s < SILENT_S:
            return Grant(0, "another process runs this job, or did some seconds ago")
        self.heartbeats[beat.job.id] = (beat, now_s)
        return self.grant(beat.job.id, beat.held)

    def end(self, job: str, driver: str = "") -> None:
        """The job is over. Nobody has to wait until it has been silent for long enough."""
        if job in self.heartbeats and self.heartbeats[job][0].driver != driver:
            return
        self.heartbeats.pop(job, None)
        self.grants.pop(job, None)

    def grant(self, job: str, held: int) -> Grant:
        """What the job may have. As long as nothing was decided about it, it keeps what it holds."""
        return self.grants.get(job) or Grant(held, "control has not decided yet")

    @property
    def beats(self) -> list[Heartbeat]:
        """The last heartbeat of each job."""
        return [beat for beat, _ in self.heartbeats.values()]

    @property
    def held_by_jobs(self) -> int:
        return sum(beat.held for beat in self.beats)

    # what control asks

    def turn(
        self,
        slots: int,
        held: int,
        fleets: Sequence[FleetDemand],
        now_s: float,
        free: int | None = None,
        pool_ceiling: int | None = None,
    ) -> int:
        """Decide anew. Returns the lease: the slots that serving should hold.

        ``slots``: all of the pool. ``held``: by replicas, including those that are ending. ``free``: the slots that nobody holds, as Ray
        counts them; there may be owners on the pool that send no heartbeats. ``pool_ceiling``: as in `Demand`.
        """
        wanted = sum(fleet.wanted_slots for fleet in fleets)
        if 0 <= now_s - self.began_s < LISTEN_S:  # not `<` alone: a clock that is set back must not make this last for hours
            self.lease = wanted
        else:
            self._forget_silent(now_s)
            jobs = tuple(beat.job for beat in self.beats)
            self._adopt(
                arbitrate(self.budget, Demand(slots, tuple(fleets), jobs, pool_ceiling), self.decision.past, now_s), now_s
            )
            unheld = max(0, slots - held - self.held_by_jobs)
            self.grants = self._promise(unheld, unheld if free is None else max(0, min(unheld, free)))
        self._record(slots, held, wanted, now_s)
        return self.lease

    def requested(self, lease: int, pool_ceiling: int | None) -> int:
        """The slots to ask Ray's autoscaler for on top of the ``lease``: what jobs hold, what they need in order to run at all, and what
        fleets lack.

        What jobs hold always counts, unless Ray Train asks for it itself. The rest is added one need after the other, the most important
        first, as long as all of it stays within ``pool_ceiling``. A need that does not fit is skipped: the autoscaler refuses a request as a
        whole, so those after it would get no machine either. Example: the lease is 1, the ceiling 4, jobs wait for 9, 2 and 1 slots: 3 are
        requested.
        """
        slots = self.held_by_jobs - sum(beat.requested for beat in self.beats)
        for lack in [*self._fleets_lack(lease), *self._jobs_lack()]:
            if pool_ceiling is None or lease + slots + lack <= pool_ceiling:
                slots += lack
        return slots

    def _fleets_lack(self, lease: int) -> list[int]:
        """What more machines would give to fleets that have a ceiling. A fleet without one starts its replicas, and Ray asks the autoscaler
        for their places by itself."""
        most = self.budget.serving_ceiling_slots
        lacks = [fleet.lacks for fleet in self.decision.fleets if fleet.ceiling is not None]
        return lacks if most is None or lease + sum(lacks) <= most else []

    def _jobs_lack(self) -> list[int]:
        lacks = {beat.job.id: max(0, beat.job.least - beat.held) for beat in self.beats}
        return [lacks[job.id] for job in order([beat.job for beat in self.beats])]

    # deciding

    def _forget_silent(self, now_s: float) -> None:
        self.heartbeats = {id: (beat, at_s) for id, (beat, at_s) in self.heartbeats.items() if now_s - at_s < SILENT_S}

    def _adopt(self, decision: Decision, now_s: float) -> None:
        before = dict(self.decision.past.grants)
        for one in decision.assignments:
            if one.act != "hold":
                self.changes.append(GrantChange(now_s, one.owner, before.get(one.owner, 0), one.slots, one.reason))
        self.decision, self.lease = decision, decision.grants[SERVING]

    def _promise(self, unheld: int, free: int) -> dict[str, Grant]:
        """Job → what it may have now. ``unheld``: slots that nobody says it holds. ``free``: those of them that Ray counts as free.

        The two differ for a moment after a job took what it was promised: Ray counts the slots as used, but the next heartbeat has not
        come yet. Example: ``a`` holds 0 and was promised 3. Its workers start: ``free`` falls from 3 to 0, ``unheld`` is still 3. Going by
        ``free`` alone would take the promise back while ``a`` uses it.
        """
        promised: dict[str, Grant] = {}
        for one in self.decision.assignments[1:]:  # the first is serving's
            beat, _ = self.heartbeats[one.owner]
            grant = self._promise_one(one, beat, unheld, free)
            promised[one.owner] = grant
            given = max(0, grant.slots - beat.held)
            free, unheld = max(0, free - given), max(0, unheld - given)
        return promised

    def _promise_one(self, one: Assignment, beat: Heartbeat, unheld: int, free: int) -> Grant:
        before = self.grants.get(one.owner)
        pending = max(0, before.slots - beat.held) if before else 0  # promised, and not yet in a heartbeat
        room = max(free, min(unheld, pending))  # what is pending may be in use already, so Ray need not count it as free
        more = min(room, max(0, one.slots - beat.held))
        more -= more % beat.job.step  # whole workers only
        slots = min(one.slots, beat.held + more)  # less than it holds takes effect at once: the job is asked to yield
        if slots < beat.job.least:
            slots = 0  # too few to run with: others can use them meanwhile
        if slots == one.slots:
            return Grant(slots, one.reason)
        return Grant(slots, f"it will have {counted(one.slots)}, {slots} of them now")

    # recording

    def _record(self, slots: int, held: int, wanted: int, now_s: float) -> None:
        """Keep a snapshot where anything has changed."""
        last = {one.job: one for one in self.snapshots[-1].jobs} if self.snapshots else {}
        jobs: list[Allocation] = []
        for beat in self.beats:
            now = Allocation(beat.job.id, self.grant(beat.job.id, beat.held).slots, beat.held, beat.active)
            same = last.get(now.job) == now
            jobs.append(last[now.job] if same else now)  # most jobs stay as they are: one object serves many snapshots
        snapshot = SlotSnapshot(now_s, slots, self.lease, held, wanted, tuple(jobs))
        if not self.snapshots or self.snapshots[-1]._replace(at_s=now_s) != snapshot:
            self.snapshots.append(snapshot)

    def describe(self) -> dict[str, Any]:
        """For `springtide status`: ``{"grants": {owner: slots}, "fleets": […], "jobs": […], "changes": […]}``."""
        return {
            "grants": dict(self.decision.past.grants),
            "fleets": [fleet._asdict() for fleet in self.decision.fleets],
            "jobs": [
                {
                    **beat.job._asdict(),
                    "held": beat.held,
                    "active": beat.active,
                    "reason": self.grant(beat.job.id, beat.held).reason,
                }
                for beat in self.beats
            ],
            "changes": [change._asdict() for change in self.changes],
        }

    def since(self, at_s: float) -> list[SlotSnapshot]:
        """The snapshots after ``at_s``, oldest first."""
        return [snapshot for snapshot in self.snapshots if snapshot.at_s > at_s]
