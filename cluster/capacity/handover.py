"""Who had how many slots, when, and how long it took to hand them over: pure, from what control recorded."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

SAME_S = 1e-3
"""Times closer than this are one: a duration added to its beginning is not quite its end, and control's snapshots are much further apart."""


class Allocation(NamedTuple):
    """One job's part, in slots."""

    job: str
    grant: int
    """What it may have."""
    held: int
    """What its workers hold."""
    active: int
    """What trains: less than it holds while new workers load, or while the next formation begins."""


class SlotSnapshot(NamedTuple):
    """The pool from ``at_s`` on, in slots. Control records one whenever something changed."""

    at_s: float
    slots: int
    lease: int
    """What serving may have."""
    serving: int
    """What replicas hold that run, or that end."""
    wanted: int
    """What Serve holds and asks for."""
    jobs: tuple[Allocation, ...] = ()

    @property
    def idle(self) -> int:
        return self.slots - self.serving - sum(one.held for one in self.jobs)


class Handover(NamedTuple):
    """A change of one job's grant that it carried out. Seconds count from when the job's grant changed: a smaller one is decided and told at
    once, a larger one when the slots are free."""

    at_s: float
    job: str
    kind: Literal["yield", "grow"]
    before: int
    after: int
    slots_free_s: float | None
    """Until the slots were given back; None for a growth."""
    training_s: float | None
    """Until the job trained on all that it has; None where that is nothing."""

    @property
    def ended_s(self) -> float:
        """When it was over, give or take a rounding."""
        return self.at_s + (self.slots_free_s or 0.0 if self.training_s is None else self.training_s)


def handovers(snapshots: Sequence[SlotSnapshot]) -> list[Handover]:
    """Those that were carried out; one that was overtaken by another decision counts as part of that."""
    ways: dict[str, list[tuple[float, Allocation]]] = {}
    for snapshot in snapshots:
        for one in snapshot.jobs:
            way = ways.setdefault(one.job, [])
            if not way or way[-1][1] != one:
                way.append((snapshot.at_s, one))
    return sorted((done for job, way in ways.items() for done in _of(job, way)), key=lambda done: done.at_s)


def ended_since(snapshots: Sequence[SlotSnapshot], since_s: float) -> list[Handover]:
    """Those that ended after ``since_s``, the time of an earlier snapshot."""
    return [done for done in handovers(snapshots) if done.ended_s > since_s + SAME_S]


def _of(job: str, way: Iterable[tuple[float, Allocation]]) -> Iterable[Handover]:
    """``way``: when the job's part changed, and to what."""
    began: tuple[float, int] | None = None
    freed_s: float | None = None
    for at_s, one in way:
        if began is None and one.grant != one.held:
            began, freed_s = (at_s, one.held), None
        if began is None:
            continue
        if one.held > one.grant:
            freed_s = None
        elif freed_s is None:
            freed_s = at_s - began[0]
        if one.held == one.grant == one.active:
            kind = "yield" if one.grant < began[1] else "grow"
            took_s = at_s - began[0] if one.grant else None
            if one.grant != began[1]:
                yield Handover(began[0], job, kind, began[1], one.grant, freed_s if kind == "yield" else None, took_s)
            began = None


def crowded(snapshots: Sequence[SlotSnapshot]) -> list[SlotSnapshot]:
    """Snapshots at which more slots were held than there are: two owners of one."""
    return [snapshot for snapshot in snapshots if snapshot.idle < 0]


def parse(rows: Iterable[Sequence[object]]) -> list[SlotSnapshot]:
    """Snapshots as `springtide status --json` has them."""
    return [SlotSnapshot(*row[:-1], tuple(Allocation(*one) for one in row[-1])) for row in rows]  # type: ignore[arg-type,union-attr]
