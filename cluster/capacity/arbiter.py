"""Who has the slots: serving and training share one budget, and this decides how it is divided. Pure.

Serving comes first. What its load asks for it gets in the same decision, up to its ceiling, and training is asked to yield the rest. What
the load no longer asks for is kept until it has not been asked for during the whole cool-down: the lease is the largest demand of a
sliding window, so it rises at once, falls late and cannot flap faster than the window. Where it rose and fell again and again, the
window doubles for each rise but the first within `Budget.memory_s`. On top comes a headroom: the largest rise that recent traffic made
within the time that a hand-over takes, so that the next one finds its slots free (Lyra, EuroSys '23, lends all but such a buffer).

Jobs share what is left: by priority, then by age; first the least that each can run with, then up to its most. A job for which there is
no room holds nothing and waits.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from cluster.types import Durable

SERVING = "serving"
"""The owner of the lease, beside the jobs' ids."""
MOST_PATIENCE = 3
"""How often the cool-down is doubled at most."""


class Budget(Durable):
    """How slots may be divided."""

    serving_floor_slots: int = Field(default=0, ge=0)
    """Kept for serving whatever it asks for; `fleet.min_replicas` is a floor too."""
    serving_ceiling_slots: int | None = Field(default=None, ge=0)
    training_floor_slots: int = Field(default=0, ge=0)
    """Kept from serving while there are jobs. Like the ceilings it says what jobs may have; how many replicas Serve starts is bounded by
    `fleet.max_replicas`."""
    training_ceiling_slots: int | None = Field(default=None, ge=0)
    cool_down_s: float = Field(default=60, ge=0)
    """How long serving keeps slots that its load no longer asks for."""
    hand_over_s: float = Field(default=10, gt=0)
    """How long a slot takes from training to serving; rises within this time are what the headroom is for."""
    memory_s: float = Field(default=600, gt=0)
    """How far back recent traffic goes."""
    headroom_slots: int = Field(default=0, ge=0)
    """The most that is kept free for the next rise."""

    @model_validator(mode="after")
    def check(self) -> "Budget":
        ceiling = self.serving_ceiling_slots
        if ceiling is not None and ceiling < self.serving_floor_slots:
            raise ValueError(f"serving_ceiling_slots {ceiling} is below serving_floor_slots {self.serving_floor_slots}; raise it")
        most = self.training_ceiling_slots
        if most is not None and most < self.training_floor_slots:
            raise ValueError(f"training_ceiling_slots {most} is below training_floor_slots {self.training_floor_slots}; raise it")
        return self


class Job(NamedTuple):
    """One training job's claim. ``least`` and ``most`` in slots; it grows and shrinks by ``step`` slots, one worker's."""

    id: str
    priority: int
    since_s: float
    least: int
    most: int
    step: int = 1


class Demand(NamedTuple):
    """What there is, and what is asked for."""

    slots: int
    wanted: int
    """Slots that serving's load asks for."""
    jobs: tuple[Job, ...] = ()
    most: int | None = None
    """Slots that may be asked for, as far as is known from what the autoscaler refused; None where it refused nothing."""


class Past(NamedTuple):
    """What earlier decisions leave to later ones."""

    asked: tuple[tuple[float, int], ...] = ()
    """(time, slots wanted by serving), oldest first, as far back as `Budget.memory_s` or the cool-down; only changes are kept."""
    raised_s: tuple[float, ...] = ()
    """When the lease rose after it had fallen."""
    fell: bool = True
    """Whether the lease's last change was no rise."""
    grants: tuple[tuple[str, int], ...] = ()
    """Owner → slots, as last decided."""


class Verdict(NamedTuple):
    """What one owner shall do, and why, in words for logs, metrics and whoever watches."""

    owner: str
    act: Literal["grow", "hold", "shrink"]
    slots: int
    """What it shall have."""
    reason: str


class Decision(NamedTuple):
    verdicts: tuple[Verdict, ...]
    """Serving's first, then the jobs' in their order."""
    past: Past

    @property
    def grants(self) -> dict[str, int]:
        return {verdict.owner: verdict.slots for verdict in self.verdicts}


def decide(budget: Budget, demand: Demand, past: Past, now_s: float) -> Decision:
    """Divide the slots. Never more than there are, and never two owners for one."""
    raised = tuple(at_s for at_s in past.raised_s if at_s > now_s - budget.memory_s)
    cool_down_s = budget.cool_down_s * 2 ** min(MOST_PATIENCE, max(0, len(raised) - 1))
    asked = remember(past.asked, demand.wanted, now_s - max(budget.memory_s, cool_down_s), now_s)
    lease, why = lease_of(budget, demand, asked, cool_down_s, now_s)
    before = dict(past.grants)
    left = max(0, demand.slots - lease)
    if budget.training_ceiling_slots is not None:
        left = min(left, budget.training_ceiling_slots)
    grants = divide(demand.jobs, left)
    verdicts = [verdict(SERVING, lease, before.get(SERVING, 0), why)]
    for job in order(demand.jobs):
        verdicts.append(verdict(job.id, grants[job.id], before.get(job.id, 0), _why(job, grants[job.id], lease, demand)))
    change = lease - before.get(SERVING, lease)
    raised = (*raised, now_s) if change > 0 and past.fell else raised
    fell = change < 0 or (past.fell and change == 0)
    return Decision(tuple(verdicts), Past(asked, raised, fell, tuple((v.owner, v.slots) for v in verdicts)))


def lease_of(
    budget: Budget, demand: Demand, asked: Sequence[tuple[float, int]], cool_down_s: float, now_s: float
) -> tuple[int, str]:
    """Slots for serving, and what decided it."""
    peak = largest_since(asked, now_s - cool_down_s)
    spare = min(budget.headroom_slots, largest_rise(asked, budget.hand_over_s))
    ceiling = demand.slots if budget.serving_ceiling_slots is None else budget.serving_ceiling_slots
    most = min(ceiling, demand.slots - (budget.training_floor_slots if demand.jobs else 0))
    lease = max(0, min(max(peak + spare, budget.serving_floor_slots), most))
    if lease < demand.wanted:
        return lease, f"the load asks for {counted(demand.wanted)}, more than serving may have"
    if peak > demand.wanted:
        return lease, f"the load asks for {counted(demand.wanted)}, and asked for {peak} within the last {cool_down_s:.0f} s"
    if lease > demand.wanted and spare:
        return lease, f"the load asks for {counted(demand.wanted)}, and rose by {spare} within {budget.hand_over_s:.0f} s before"
    return lease, f"the load asks for {counted(demand.wanted)}"


def remember(asked: Sequence[tuple[float, int]], wanted: int, since_s: float, now_s: float) -> tuple[tuple[float, int], ...]:
    """Append where the demand changed; forget what ended before ``since_s``."""
    longer = (*asked, (now_s, wanted)) if not asked or asked[-1][1] != wanted else tuple(asked)
    ended = sum(1 for later_s, _ in longer[1:] if later_s <= since_s)
    return longer[ended:]


def largest_since(asked: Sequence[tuple[float, int]], since_s: float) -> int:
    """The largest demand that held at or after ``since_s``."""
    ends_s = [at_s for at_s, _ in asked[1:]] + [float("inf")]
    return max((wanted for (_, wanted), end_s in zip(asked, ends_s, strict=True) if end_s > since_s), default=0)


def largest_rise(asked: Sequence[tuple[float, int]], within_s: float) -> int:
    """The largest rise of the demand from any time to one at most ``within_s`` later. One pass: the demand is looked at where it changed,
    and of what it was before only those levels are kept that may still be the lowest."""
    largest, lows = 0, deque[tuple[float, int]]()  # (until when, level), both rising
    ends_s = [*(at_s for at_s, _ in asked[1:]), float("inf")]
    for (at_s, wanted), end_s in zip(asked, ends_s, strict=False):
        while lows and lows[0][0] <= at_s - within_s:
            lows.popleft()
        while lows and lows[-1][1] >= wanted:
            lows.pop()
        lows.append((end_s, wanted))
        largest = max(largest, wanted - lows[0][1])
    return largest


def divide(jobs: Sequence[Job], slots: int) -> dict[str, int]:
    """Job → slots, at most ``slots`` together; 0 for who has to wait."""
    grants: dict[str, int] = {}
    for job in order(jobs):
        grants[job.id] = job.least if job.least <= slots else 0
        slots -= grants[job.id]
    for job in order(jobs):
        room = min(slots, job.most - grants[job.id]) if grants[job.id] or job.least == 0 else 0
        more = room - room % job.step
        grants[job.id] += more
        slots -= more
    return grants


def order(jobs: Sequence[Job]) -> list[Job]:
    """Who comes first: the higher priority, then the older."""
    return sorted(jobs, key=lambda job: (-job.priority, job.since_s, job.id))


def verdict(owner: str, slots: int, before: int, reason: str) -> Verdict:
    return Verdict(owner, "grow" if slots > before else "shrink" if slots < before else "hold", slots, reason)


def counted(slots: int) -> str:
    """``1 slot``, ``2 slots``"""
    return f"{slots} slot{'' if slots == 1 else 's'}"


def _why(job: Job, slots: int, lease: int, demand: Demand) -> str:
    if job.least > demand.slots:
        there, fewer = (
            f"it needs {counted(job.least)}, and the pool has {demand.slots}",
            "give it fewer with training.min_workers",
        )
        if demand.most is not None and lease + job.least > demand.most:
            return f"{there}, and the autoscaler adds no more for it: {fewer}, or allow more machines"
        return f"{there}: it waits for machines; or {fewer}"
    if slots == 0 and job.least:
        return f"it needs {counted(job.least)}; serving has {lease} and jobs before it the rest"
    if slots == job.most:
        return "it has the most that it can use"
    return f"serving has {counted(lease)} and jobs before it theirs"
