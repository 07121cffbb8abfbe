"""The arbiter divides the pool's slots among fleets and jobs. It is a pure function: the caller passes the time in.

It divides in this order:

1. **Serving's lease.** A fleet needs its floor or the largest demand of its cool-down window, whichever is more. The lease is the sum of
   these needs plus a headroom, within the budget's bounds.
2. **Fleets** share the lease. First every fleet gets its floor, then what it asks for now, then what it asked for within its window. In
   each of these passes the higher priority comes first, and fleets of one priority get equally much. Slots go in whole replicas.
3. **Jobs** share what the lease leaves: the higher priority first, then the older job. Each gets the least that it can run with before
   any gets more. A job for which there is no room gets nothing and waits.

Example, without headroom: the pool has 8 slots. ``chat`` (priority 1) asks for 4, ``code`` (priority 0, floor 1) asks for 2, and a job can
use 1 to 6. The lease is 6 and the job gets 2. Now ``chat`` asks for 8. The lease is 8: ``code`` keeps its floor of 1, ``chat`` gets 7, and
the job waits.

**Windows.** A fleet's need is the largest demand of a sliding window, so the lease rises at once, falls late, and changes no faster than
the window. If the lease rises and falls again and again, the window doubles for each rise after the first within `Budget.memory_s`. The
window is one fleet's and not all serving's, because a slot that comes back from another fleet takes longer than one that comes back from
a job: a replica must drain and an engine must start. Example: ``chat`` asks for 3 and ``code`` for 1, then they change places. A window
over the sum would see 4 all the time and take two slots from ``chat`` at once. With a window each, ``code`` gets two more slots from jobs,
and ``chat`` keeps its three for the cool-down, in case its load returns. Only where ``code`` could not get them from jobs does it get
them from ``chat``, since what a fleet asks for now comes before what it asked for lately.

**Headroom.** The headroom is the largest rise that one fleet made within the time that a hand-over takes. So the next rise finds its slots
free (Lyra, EuroSys '23, lends all but such a buffer).

**Ceilings.** While a fleet lacks slots, every fleet has a ceiling in replicas: what it would get if it asked for everything. Example:
4 slots, ``chat`` asks for 4, ``code`` holds 3 and has a floor of 1. The ceiling of ``code`` is 1, so two of its replicas end and ``chat``
gets 3. Where no fleet lacks anything there is no ceiling, so that a fleet may ask for more than the pool has and the autoscaler adds a
machine. A single fleet never has a ceiling: it can take slots from jobs only.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from cluster.types import Durable

SERVING = "serving"
"""The owner of the lease, beside the jobs' ids."""
MOST_DOUBLINGS = 3
"""How often the cool-down is doubled at most."""


class Budget(Durable):
    """How slots may be divided."""

    serving_floor_slots: int = Field(default=0, ge=0)
    """Serving keeps these slots, whatever it asks for. A fleet's ``min_replicas`` is a floor too."""
    serving_ceiling_slots: int | None = Field(default=None, ge=0)
    training_floor_slots: int = Field(default=0, ge=0)
    """Serving does not get these slots while there are jobs. Like the other bounds it limits the lease, and so what jobs may have; how many
    replicas Serve starts is limited by a fleet's ``max_replicas``."""
    training_ceiling_slots: int | None = Field(default=None, ge=0)
    cool_down_s: float = Field(default=60, ge=0)
    """How long a fleet keeps slots that its load no longer asks for."""
    hand_over_s: float = Field(default=10, gt=0)
    """How long a slot takes from training to serving. The headroom covers a rise within this time."""
    memory_s: float = Field(default=600, gt=0)
    """How long the arbiter remembers demand."""
    headroom_slots: int = Field(default=0, ge=0)
    """The headroom is at most so large."""

    @model_validator(mode="after")
    def check(self) -> "Budget":
        ceiling = self.serving_ceiling_slots
        if ceiling is not None and ceiling < self.serving_floor_slots:
            raise ValueError(f"serving_ceiling_slots {ceiling} is below serving_floor_slots {self.serving_floor_slots}; raise it")
        most = self.training_ceiling_slots
        if most is not None and most < self.training_floor_slots:
            raise ValueError(f"training_ceiling_slots {most} is below training_floor_slots {self.training_floor_slots}; raise it")
        return self


class FleetDemand(NamedTuple):
    """One fleet's demand."""

    name: str
    priority: int
    wanted_slots: int
    """For all replicas that its load asks for, those that run included. Before its ceiling where that is known, see `_hidden`."""
    floor_slots: int = 0
    """For its ``min_replicas``, or for the replicas that its adapters need."""
    slots_per_replica: int = 1


class Job(NamedTuple):
    """One training job's demand. ``least`` and ``most`` in slots; it grows and shrinks by ``step`` slots, one worker's."""

    id: str
    priority: int
    since_s: float
    least: int
    most: int
    step: int = 1


class Demand(NamedTuple):
    """What there is, and who asks for it."""

    slots: int
    fleets: tuple[FleetDemand, ...] = ()
    jobs: tuple[Job, ...] = ()
    pool_ceiling: int | None = None
    """The most slots that the autoscaler will give the pool, as far as its refusals tell. None if it refused nothing."""

    @property
    def wanted(self) -> int:
        """Slots that serving's load asks for."""
        return sum(fleet.wanted_slots for fleet in self.fleets)


Asked = tuple[tuple[float, int], ...]
"""A fleet's demand over time: (since when, slots), oldest first. Only changes are kept."""


class Past(NamedTuple):
    """What one decision leaves to the next."""

    asked: tuple[tuple[str, Asked], ...] = ()
    """Fleet → its demand, as far back as `Budget.memory_s` or the cool-down."""
    raised_s: tuple[float, ...] = ()
    """When the lease rose after it had fallen."""
    fell: bool = True
    """Whether the lease's last change was no rise."""
    grants: tuple[tuple[str, int], ...] = ()
    """Owner → slots, as last decided."""
    ceilings: tuple[tuple[str, int], ...] = ()
    """Fleet → the slots of its ceiling, for those that had one."""


class Assignment(NamedTuple):
    """What one owner shall have, and why, in words for logs and people."""

    owner: str
    act: Literal["grow", "hold", "shrink"]
    slots: int
    reason: str


class FleetGrant(NamedTuple):
    """What one fleet has of the lease."""

    name: str
    slots: int
    lacks: int
    """Slots that its load asks for and that it does not get."""
    ceiling: int | None
    """The most replicas that it may have now. None if nothing but its own ``max_replicas`` limits it."""
    reason: str


class Decision(NamedTuple):
    assignments: tuple[Assignment, ...]
    """Serving's first, then the jobs' in their order."""
    fleets: tuple[FleetGrant, ...]
    """How the lease is divided, in the order of the demand. What they leave of it is the headroom."""
    past: Past

    @property
    def grants(self) -> dict[str, int]:
        return {one.owner: one.slots for one in self.assignments}


def arbitrate(budget: Budget, demand: Demand, past: Past, now_s: float) -> Decision:
    """Divide the slots. Never more than there are, and never two owners for one."""
    raised = tuple(at_s for at_s in past.raised_s if at_s > now_s - budget.memory_s)
    cool_down_s = budget.cool_down_s * 2 ** min(MOST_DOUBLINGS, max(0, len(raised) - 1))
    asked = _remembered(budget, demand, past, cool_down_s, now_s)
    needs = [_need(fleet, asked[fleet.name], dict(past.ceilings), now_s - cool_down_s) for fleet in demand.fleets]
    lease, why = _lease(budget, demand, needs, list(asked.values()), cool_down_s)
    fleets = _fleets(needs, lease, _most(budget, demand))
    grants = {SERVING: lease, **divide(demand.jobs, _left(budget, demand, lease))}
    reasons = {SERVING: why, **{job.id: _why(job, grants[job.id], lease, demand) for job in demand.jobs}}
    before = dict(past.grants)
    owners = [SERVING, *(job.id for job in order(demand.jobs))]
    assignments = tuple(_assignment(owner, grants[owner], before.get(owner, 0), reasons[owner]) for owner in owners)
    change = lease - before.get(SERVING, lease)
    raised = (*raised, now_s) if change > 0 and past.fell else raised
    fell = change < 0 or (past.fell and change == 0)
    ceilings = _ceilings_in_slots(demand, fleets)
    kept = Past(tuple(asked.items()), raised, fell, tuple((one.owner, one.slots) for one in assignments), ceilings)
    return Decision(assignments, fleets, kept)


# serving's lease


class Need(NamedTuple):
    """A fleet's need, in slots: ``floor`` ≤ ``now`` ≤ ``lately``."""

    fleet: FleetDemand
    floor: int
    now: int
    lately: int
    """The largest of its window."""

    def everything(self, slots: int) -> "Need":
        """The need of a fleet that asks for all there is."""
        return self._replace(now=max(slots, self.now), lately=max(slots, self.lately))


def _remembered(budget: Budget, demand: Demand, past: Past, cool_down_s: float, now_s: float) -> dict[str, Asked]:
    """Each fleet's demand with that of now. A fleet that is gone is forgotten, and its slots are free at once."""
    known, since_s = dict(past.asked), now_s - max(budget.memory_s, cool_down_s)
    return {fleet.name: remember(known.get(fleet.name, ()), fleet.wanted_slots, since_s, now_s) for fleet in demand.fleets}


def _need(fleet: FleetDemand, asked: Asked, ceilings: dict[str, int], since_s: float) -> Need:
    lately = max(fleet.floor_slots, largest_since(asked, since_s))
    now = lately if _hidden(fleet, ceilings) else max(fleet.floor_slots, fleet.wanted_slots)
    return Need(fleet, fleet.floor_slots, now, lately)


def _hidden(fleet: FleetDemand, ceilings: dict[str, int]) -> bool:
    """Whether the fleet's ceiling hides what its load asks for: it asks for just as much as it may have.

    Then the window tells what it really asks for. Otherwise the fleet would seem content as soon as it has a ceiling, would lose the
    ceiling for that, ask for more, and get the ceiling again, twice a second.
    """
    return fleet.name in ceilings and fleet.wanted_slots >= ceilings[fleet.name]


def _most(budget: Budget, demand: Demand) -> int:
    """The most that serving may have."""
    ceiling = demand.slots if budget.serving_ceiling_slots is None else budget.serving_ceiling_slots
    return max(0, min(ceiling, demand.slots - (budget.training_floor_slots if demand.jobs else 0)))


def _left(budget: Budget, demand: Demand, lease: int) -> int:
    """What the lease leaves to jobs."""
    left = max(0, demand.slots - lease)
    return left if budget.training_ceiling_slots is None else min(left, budget.training_ceiling_slots)


def _lease(budget: Budget, demand: Demand, needs: Sequence[Need], asked: Sequence[Asked], cool_down_s: float) -> tuple[int, str]:
    """Slots for serving, and what decided it."""
    peak = sum(need.lately for need in needs)
    spare = min(budget.headroom_slots, max((largest_rise(one, budget.hand_over_s) for one in asked), default=0))
    lease = min(max(peak + spare, budget.serving_floor_slots), _most(budget, demand))
    asks = f"the load asks for {counted(demand.wanted)}"
    if lease < demand.wanted:
        return lease, f"{asks}, more than serving may have"
    if peak > demand.wanted:
        return lease, f"{asks}, and asked for {peak} within the last {cool_down_s:.0f} s"
    if lease > demand.wanted and spare:
        return lease, f"{asks}, and rose by {spare} within {budget.hand_over_s:.0f} s before"
    return lease, asks


def remember(asked: Asked, wanted: int, since_s: float, now_s: float) -> Asked:
    """Append where the demand changed; forget what ended before ``since_s``.

    >>> remember(((0, 1), (10, 3)), wanted=2, since_s=11, now_s=20)
    ((10, 3), (20, 2))
    """
    longer = (*asked, (now_s, wanted)) if not asked or asked[-1][1] != wanted else asked
    ended = sum(1 for later_s, _ in longer[1:] if later_s <= since_s)
    return longer[ended:]


def largest_since(asked: Asked, since_s: float) -> int:
    """The largest demand that held at or after ``since_s``.

    >>> largest_since(((0, 5), (10, 3), (20, 1)), since_s=15)
    3
    """
    ends_s = [at_s for at_s, _ in asked[1:]] + [float("inf")]
    return max((wanted for (_, wanted), end_s in zip(asked, ends_s, strict=True) if end_s > since_s), default=0)


def largest_rise(asked: Asked, within_s: float) -> int:
    """The largest rise of the demand from any time to one at most ``within_s`` later.

    One pass over the changes. ``lows`` holds the earlier levels that can still be the lowest within reach: an earlier level that is not
    lower than a later one can never be, and one that ended too long ago cannot any more.

    >>> largest_rise(((0, 1), (3, 2), (4, 4), (60, 9)), within_s=5)
    5
    """
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


# fleets


def _fleets(needs: Sequence[Need], lease: int, most: int) -> tuple[FleetGrant, ...]:
    grants = divide_fleets(needs, lease)
    lacks = {need.fleet.name: max(0, need.now - grants[need.fleet.name]) for need in needs}
    short = len(needs) > 1 and any(lacks.values())
    return tuple(
        FleetGrant(
            need.fleet.name,
            grants[need.fleet.name],
            lacks[need.fleet.name],
            _ceiling(need, needs, most) if short else None,
            _why_fleet(need, grants[need.fleet.name]),
        )
        for need in needs
    )


def _ceiling(need: Need, needs: Sequence[Need], most: int) -> int:
    """The replicas that a fleet would get if it asked for everything."""
    others = [need.everything(most) if one is need else one for one in needs]
    return divide_fleets(others, most)[need.fleet.name] // need.fleet.slots_per_replica


def _ceilings_in_slots(demand: Demand, grants: Sequence[FleetGrant]) -> tuple[tuple[str, int], ...]:
    pairs = zip(demand.fleets, grants, strict=True)
    return tuple((one.name, one.ceiling * fleet.slots_per_replica) for fleet, one in pairs if one.ceiling is not None)


def divide_fleets(needs: Sequence[Need], slots: int) -> dict[str, int]:
    """Fleet → slots, in whole replicas, at most ``slots`` together.

    >>> chat, code = FleetDemand("chat", 1, 8), FleetDemand("code", 0, 2, floor_slots=1)
    >>> divide_fleets([Need(chat, 0, 8, 8), Need(code, 1, 2, 2)], 8)
    {'chat': 7, 'code': 1}
    """
    grants = {need.fleet.name: 0 for need in needs}
    ranks = sorted({need.fleet.priority for need in needs}, reverse=True)
    for level in ("floor", "now", "lately"):
        for rank in ranks:
            equals = [need for need in needs if need.fleet.priority == rank]
            _fill(grants, {need.fleet: getattr(need, level) for need in equals}, slots - sum(grants.values()))
    return grants


def _fill(grants: dict[str, int], targets: dict[FleetDemand, int], slots: int) -> None:
    """Raise fleets of one priority to their targets, or as far as ``slots`` go: equally, a replica at a time for what cannot be split."""

    def lacking() -> list[FleetDemand]:
        """Those below their target for whom one more replica fits; the one with the fewest slots first."""
        below = [fleet for fleet, target in targets.items() if grants[fleet.name] < target and fleet.slots_per_replica <= slots]
        return sorted(below, key=lambda fleet: (grants[fleet.name], fleet.name))

    while fleets := lacking():
        equal = slots // len(fleets)
        for fleet in fleets:
            size = fleet.slots_per_replica
            replicas = -(-(targets[fleet] - grants[fleet.name]) // size)  # rounded up: half a replica serves nobody
            given = min(replicas, max(1, equal // size)) * size
            if given <= slots:
                grants[fleet.name] += given
                slots -= given


def _why_fleet(need: Need, slots: int) -> str:
    asks = f"its load asks for {counted(need.now)}"
    if slots < need.now:
        return f"{asks}, and other fleets leave it {slots}"
    return f"{asks}, and asked for {need.lately} lately" if slots > need.now else asks


# jobs


def divide(jobs: Sequence[Job], slots: int) -> dict[str, int]:
    """Job → slots, at most ``slots`` together; 0 for a job that has to wait.

    >>> divide([Job("low", 0, 0, least=2, most=4), Job("high", 1, 0, least=1, most=2)], 5)
    {'high': 2, 'low': 3}
    """
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
    """The higher priority first, then the older."""
    return sorted(jobs, key=lambda job: (-job.priority, job.since_s, job.id))


def counted(slots: int) -> str:
    """``1 slot``, ``2 slots``"""
    return f"{slots} slot{'' if slots == 1 else 's'}"


def _assignment(owner: str, slots: int, before: int, reason: str) -> Assignment:
    return Assignment(owner, "grow" if slots > before else "shrink" if slots < before else "hold", slots, reason)


def _why(job: Job, slots: int, lease: int, demand: Demand) -> str:
    if job.least > demand.slots:
        return _why_too_large(job, lease, demand)
    if slots == 0 and job.least:
        return f"it needs {counted(job.least)}; serving has {lease} and jobs before it the rest"
    if slots == job.most:
        return "it has the most that it can use"
    return f"serving has {counted(lease)} and jobs before it theirs"


def _why_too_large(job: Job, lease: int, demand: Demand) -> str:
    there = f"it needs {counted(job.least)}, and the pool has {demand.slots}"
    fewer = "give it fewer with training.min_workers"
    if demand.pool_ceiling is not None and lease + job.least > demand.pool_ceiling:
        return f"{there}, and the autoscaler adds no more for it: {fewer}, or allow more machines"
    return f"{there}: it waits for machines; or {fewer}"
