"""Which replicas hold which adapters. Pure.

An engine has `max_cpu_loras` places for adapters. While one engine has places for all live adapters of its fleet, every replica holds all of
them, so any replica answers any request. Beyond that the fleet's places are divided: each adapter gets as many replicas as the places allow.

An assignment is sticky. A replica keeps what it holds, and a replica that comes or goes moves few adapters. An assignment is also a floor:
an engine keeps other adapters in the places that are left, and unloads them when it needs the places.
"""

import heapq
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from cluster.types import ReplicaState


class AdapterPlacement(NamedTuple):
    """Who must hold what."""

    assigned: dict[str, tuple[str, ...]]
    """Replica id → ids of the adapters that it must hold."""
    copies: dict[str, int]
    """Adapter's id → how many replicas must hold it; only of adapters that not every replica holds. 0: there is no place for it."""
    replicas_needed: int = 0
    """The fewest replicas that have a place for every adapter."""
    unplaced: tuple[str, ...] = ()
    """The live adapters without a place, sorted."""

    def asked(self, replica: ReplicaState, id: str) -> bool:
        """Whether the replica must hold the adapter."""
        return id not in self.copies or id in self.assigned.get(replica.id, ())


NOTHING = AdapterPlacement({}, {})


class WantedAdapters(NamedTuple):
    """Ids of the adapters of one fleet on the same weights."""

    live: tuple[str, ...] = ()
    """What clients may get."""
    coming: tuple[str, ...] = ()
    """Of rollouts under way. Those that are live already are not in here."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.live, *self.coming)

    def replicas_for(self, id: str, places: int) -> int:
        """The fewest replicas that have a place for this adapter beside those that go before it."""
        before = self.all.index(id) if id in self.all else len(self.all)
        return ceil((before + 1) / places)


def assign(adapters: WantedAdapters, replicas: Sequence[ReplicaState], places: int) -> AdapterPlacement:
    """Divide the places of ``replicas``, which host the same weights, among ``adapters``; ``places``: adapters per replica.

    Where there are too few places, live adapters go before those of rollouts, and of the live ones those go first that a replica holds.

    Example: two replicas with 2 places each, three adapters. Four places are enough for one copy of each adapter. Replica r holds a and b,
    replica s holds nothing: r keeps a and b, and s loads c. A fifth adapter finds no place, and its ``copies`` are 0; it needs a third
    replica. Now r is lost: s keeps c and loads one of the others, and two have no place until r is back.
    """
    every, needed = adapters.all, ceil(len(adapters.all) / places)
    if not replicas or needed <= 1:
        return AdapterPlacement({one.id: every for one in replicas}, {}, needed)
    copies = max(1, len(replicas) * places // len(every))
    holders, used = _kept(_first(adapters, replicas, len(replicas) * places), replicas, copies, places)
    _fill([some for some in holders.values() if len(some) < copies], used, copies, places)
    assigned: dict[str, list[str]] = {one.id: [] for one in replicas}
    for id, some in holders.items():
        for replica in some:
            assigned[replica].append(id)
    counted = {id: len(holders.get(id, ())) for id in every}
    unplaced = tuple(sorted(id for id in adapters.live if not counted[id]))
    return AdapterPlacement({id: tuple(ids) for id, ids in assigned.items()}, counted, needed, unplaced)


def _first(adapters: WantedAdapters, replicas: Sequence[ReplicaState], count: int) -> Sequence[str]:
    """The ``count`` adapters that get a place."""
    if len(adapters.all) <= count:
        return adapters.all
    held = {id for replica in replicas for id in replica.held}
    return [*sorted(adapters.live, key=lambda id: id not in held), *adapters.coming][:count]


def combine(groups: Sequence[AdapterPlacement]) -> AdapterPlacement:
    """The placements of several groups of replicas as one.

    Example: the fleet has two replicas and one copy of a. Its surge has one replica, which holds all: a has 2 copies.
    """
    if len(groups) == 1:
        return groups[0]
    counted = [one.copies or dict.fromkeys(next(iter(one.assigned.values()), ()), len(one.assigned)) for one in groups]
    copies = {id: sum(some.get(id, 0) for some in counted) for one in groups for id in one.copies}
    return AdapterPlacement(
        {id: ids for one in groups for id, ids in one.assigned.items()},
        copies,
        max((one.replicas_needed for one in groups), default=0),
        tuple(sorted({id for one in groups for id in one.unplaced if not copies[id]})),
    )


def _kept(
    adapters: Sequence[str], replicas: Sequence[ReplicaState], copies: int, places: int
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Adapter → the replicas that hold it already and keep it, of several the ones that keep the fewest; and how many each keeps."""
    holders: dict[str, list[str]] = {id: [] for id in adapters}
    for replica in replicas:
        for id in replica.held:
            if id in holders:
                holders[id].append(replica.id)
    used = dict.fromkeys((one.id for one in replicas), 0)
    for id, some in holders.items():
        chosen = some if len(some) <= copies else sorted(some, key=lambda one: (used[one], one))[:copies]
        holders[id] = [one for one in chosen if used[one] < places]
        for one in holders[id]:
            used[one] += 1
    return holders, used


def _fill(lacking: Sequence[list[str]], used: dict[str, int], copies: int, places: int) -> None:
    """Give adapters the copies that they lack, those with the fewest first, on the replicas with the most room."""
    room = [(count, id) for id, count in used.items() if count < places]
    heapq.heapify(room)
    for some in sorted(lacking, key=len):
        passed: list[tuple[int, str]] = []
        while len(some) < copies and room:
            count, replica = heapq.heappop(room)
            if replica in some:
                passed.append((count, replica))
                continue
            some.append(replica)
            if count + 1 < places:
                passed.append((count + 1, replica))
        for entry in passed:
            heapq.heappush(room, entry)
