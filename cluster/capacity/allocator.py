"""The tide: what each job may have of the pool's slots now, and what serving keeps. Owned by control, which passes the time in.

Jobs claim, serving's replicas are counted, `cluster.capacity.arbiter` divides, and who has more than its share is asked to yield. A job never
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
MOMENTS = 5_000


class Heartbeat(NamedTuple):
    """What a job asks for, and the slots that its workers hold now: 0 while it waits."""

    job: Job
    held: int = 0
    learning: int = 0
    """Of them, those that train at this moment."""
    driver: str = ""
    """The process that claims: of two that run one job, the first has the slots, until it is silent."""


class Grant(NamedTuple):
    """What a job has to live with."""

    slots: int
    reason: str


class GrantChange(NamedTuple):
    """One change of somebody's share, for whoever watches."""

    at_s: float
    owner: str
    before: int
    after: int
    reason: str


class Allocator:
    def __init__(self, budget: Budget, now_s: float) -> None:
        self.budget = budget
        self.began_s = now_s
        self.claims: dict[str, tuple[Heartbeat, float]] = {}
        self.past = Past()
        self.shares: dict[str, Grant] = {}
        self.turns: deque[GrantChange] = deque(maxlen=REMEMBERED)
        self.moments: deque[SlotSnapshot] = deque(maxlen=MOMENTS)

    def claim(self, claim: Heartbeat, now_s: float) -> Grant:
        """What the job has now. Its driver claims again and again, as long as the job lives."""
        known, heard_s = self.claims.get(claim.job.id, (claim, now_s))
        if known.driver != claim.driver and now_s - heard_s < SILENT_S:
            return Grant(0, "another process runs this job, or did some seconds ago")
        self.claims[claim.job.id] = (claim, now_s)
        return self.share(claim.job.id, claim.held)

    def share(self, job: str, held: int) -> Grant:
        """The job's share, or what it holds while nothing was decided about it yet."""
        return self.shares.get(job) or Grant(held, "control has not decided yet")

    def end(self, job: str, driver: str = "") -> None:
        """The job is over, and nobody need wait until it has been silent for long enough."""
        if job in self.claims and self.claims[job][0].driver != driver:
            return
        self.claims.pop(job, None)
        self.shares.pop(job, None)

    @property
    def claimed(self) -> int:
        """The slots that jobs hold."""
        return sum(claim.held for claim, _ in self.claims.values())

    def floor(self, lease: int, most: int | None) -> int:
        """The slots that jobs hold, or need in order to run at all, as far as serving's ``lease`` and they are at most ``most`` together.

        What jobs hold always counts. One that waits and does not fit is passed over for those after it, in the order in which they would
        get slots: it could not run, and asked for beside it they would get no machine either.
        """
        slots = self.claimed
        lacks = {claim.job.id: max(0, claim.job.least - claim.held) for claim, _ in self.claims.values()}
        for job in order([claim.job for claim, _ in self.claims.values()]):
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
        self.claims = {id: (claim, at_s) for id, (claim, at_s) in self.claims.items() if now_s - at_s < SILENT_S}
        jobs = tuple(claim.job for claim, _ in self.claims.values())
        decision = decide(self.budget, Demand(slots, wanted, jobs, most), self.past, now_s)
        self._note(decision, now_s)
        self.past = decision.past
        unheld = slots - held - self.claimed
        self.shares = self._promise(decision, max(0, unheld), max(0, unheld if free is None else min(unheld, free)))
        self._record(slots, held, wanted, now_s)
        return decision.shares[SERVING]

    def _promise(self, decision: Decision, unheld: int, free: int) -> dict[str, Grant]:
        """Shares, each growing only by what is ``free`` now: a slot is given when it has been given back. What a job was promised and does not
        say yet that it holds is its own if nobody else says so (``unheld``): it may just have taken it."""
        promised: dict[str, Grant] = {}
        for verdict in decision.verdicts:
            if verdict.owner == SERVING:
                continue
            claim, _ = self.claims[verdict.owner]
            before = self.shares.get(verdict.owner)
            own = min(unheld, max(0, before.slots - claim.held)) if before else 0
            more = min(max(free, own), max(0, verdict.slots - claim.held))
            more -= more % claim.job.step
            has = min(verdict.slots, claim.held + more)
            if has < claim.job.least:
                has = 0
            given = max(0, has - claim.held)
            free, unheld = max(0, free - given), max(0, unheld - given)
            few = f"{counted(verdict.slots)} meant for it, {has} there so far"
            promised[verdict.owner] = Grant(has, verdict.reason if has == verdict.slots else few)
        return promised

    def _note(self, decision: Decision, now_s: float) -> None:
        before = dict(self.past.shares)
        for verdict in decision.verdicts:
            if verdict.act != "hold":
                self.turns.append(GrantChange(now_s, verdict.owner, before.get(verdict.owner, 0), verdict.slots, verdict.reason))

    def _record(self, slots: int, held: int, wanted: int, now_s: float) -> None:
        lease = dict(self.past.shares).get(SERVING, wanted)
        known = {stake.job: stake for stake in self.moments[-1].jobs} if self.moments else {}
        stakes: list[Allocation] = []
        for id, (claim, _) in self.claims.items():
            stake = Allocation(id, self.share(id, claim.held).slots, claim.held, claim.learning)
            before = known.get(id, stake)
            stakes.append(before if before == stake else stake)  # most stay as they were, and are kept once
        moment = SlotSnapshot(now_s, slots, lease, held, wanted, tuple(stakes))
        if not self.moments or self.moments[-1]._replace(at_s=now_s) != moment:
            self.moments.append(moment)

    def describe(self) -> dict[str, Any]:
        """``{"shares": {owner: slots}, "jobs": […], "turns": […]}`` for `springtide status`."""
        return {
            "shares": dict(self.past.shares),
            "jobs": [
                {
                    **claim.job._asdict(),
                    "held": claim.held,
                    "learning": claim.learning,
                    "why": self.share(claim.job.id, claim.held).reason,
                }
                for claim, _ in self.claims.values()
            ],
            "turns": [turn._asdict() for turn in self.turns],
        }

    def since(self, at_s: float) -> list[SlotSnapshot]:
        """What was recorded after ``at_s``, oldest first."""
        return [moment for moment in self.moments if moment.at_s > at_s]
