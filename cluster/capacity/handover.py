"""Hand-overs: how long jobs took to give slots back and to train again, found in the snapshots that control recorded. Pure.

Example: job ``a`` trains on 3 slots. At 10 s its grant falls to 1, at 11 s it holds 1, at 11.5 s it trains on that 1. This is one
hand-over, a yield from 3 to 1: its slots were free after 1 s, and it trained again after 1.5 s.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

SAME_S = 1e-3
"""Times closer than this count as the same. A beginning plus a duration is not exactly the end, in floating point; two snapshots are much
further apart."""


class Allocation(NamedTuple):
    """One job's slots."""

    job: str
    grant: int
    """What it may have."""
    held: int
    """What its workers hold."""
    active: int
    """What it trains on. Less than it holds while new workers load, and while a new process group begins."""


class SlotSnapshot(NamedTuple):
    """The pool's slots from ``at_s`` until the next snapshot. Control records one whenever something changed."""

    at_s: float
    slots: int
    lease: int
    """What serving may have."""
    serving: int
    """What replicas hold, including those that are ending."""
    wanted: int
    """What the load asks for."""
    jobs: tuple[Allocation, ...] = ()

    @property
    def idle(self) -> int:
        return self.slots - self.serving - sum(one.held for one in self.jobs)


class Handover(NamedTuple):
    """A change of one job's grant, carried out. Seconds count from the change of the grant. A grant falls as soon as that is decided; it
    rises when the slots are free."""

    at_s: float
    job: str
    kind: Literal["yield", "grow"]
    before: int
    after: int
    slots_free_s: float | None
    """Until the job had given its slots back. None for a growth."""
    training_s: float | None
    """Until the job trained on all that it has. None if it has nothing."""

    @property
    def ended_s(self) -> float:
        """When it was over, within `SAME_S`."""
        return self.at_s + (self.slots_free_s or 0.0 if self.training_s is None else self.training_s)


def handovers(snapshots: Sequence[SlotSnapshot]) -> list[Handover]:
    """All that were carried out, by the time they began. If the grant changes again on the way, both changes are one hand-over."""
    histories: dict[str, list[tuple[float, Allocation]]] = {}
    for snapshot in snapshots:
        for one in snapshot.jobs:
            history = histories.setdefault(one.job, [])
            if not history or history[-1][1] != one:
                history.append((snapshot.at_s, one))
    return sorted((done for history in histories.values() for done in _of_job(history)), key=lambda done: done.at_s)


def ended_since(snapshots: Sequence[SlotSnapshot], since_s: float) -> list[Handover]:
    """Those that ended after ``since_s``, the time of an earlier snapshot."""
    return [done for done in handovers(snapshots) if done.ended_s > since_s + SAME_S]


def _of_job(history: Iterable[tuple[float, Allocation]]) -> Iterable[Handover]:
    """``history``: when one job's allocation changed, and to what.

    A hand-over begins when the job may have something else than it holds, and ends when it trains on exactly what it may have.
    """
    began: tuple[float, int] | None = None  # (when, slots held)
    freed_s: float | None = None
    for at_s, one in history:
        if began is None and one.grant != one.held:
            began, freed_s = (at_s, one.held), None
        if began is None:
            continue
        if one.held > one.grant:
            freed_s = None  # the grant fell once more: there are slots to give back again
        elif freed_s is None:
            freed_s = at_s - began[0]
        if one.held == one.grant == one.active:
            if one.grant != began[1]:  # else the grant came back before anything was handed over
                yield _handover(one, began, freed_s, at_s)
            began = None


def _handover(end: Allocation, began: tuple[float, int], freed_s: float | None, at_s: float) -> Handover:
    began_s, before = began
    yielded = end.grant < before
    took_s = at_s - began_s if end.grant else None
    return Handover(began_s, end.job, "yield" if yielded else "grow", before, end.grant, freed_s if yielded else None, took_s)


def doubly_owned(snapshots: Sequence[SlotSnapshot]) -> list[SlotSnapshot]:
    """The snapshots in which more slots were held than there are: some slot had two owners. There should be none."""
    return [snapshot for snapshot in snapshots if snapshot.idle < 0]


def parse(rows: Iterable[Sequence[object]]) -> list[SlotSnapshot]:
    """Snapshots as ``GET /admin/slots`` sends them."""
    return [SlotSnapshot(*row[:-1], tuple(Allocation(*one) for one in row[-1])) for row in rows]  # type: ignore[arg-type,union-attr]
